"""The sizes in accelerate's `parallelism_config`: which of them keep one loss curve, and what they must come to.

Hybrid sharding (HSDP) divides all weights among `dp_shard_size` processes, usually those of a machine, and has
`dp_replicate_size` such groups. docs/topologies.md says why the others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping

SIZES = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
"""Names, as accelerate has them in its YAML behind `parallelism_config_`, and in capitals in its environment variables."""

_REFUSED = {"tp_size": "tensor parallelism", "cp_size": "context parallelism", "sp_size": "sequence parallelism"}


def find_problem(sizes: Mapping[str, int], num_processes: int) -> str | None:
    """Why a training with these sizes is refused; None where it is not.

    Args:
        sizes: by name; those that are missing are 1.
        num_processes: over all machines.
    """
    for name, meaning in _REFUSED.items():
        if sizes.get(name, 1) > 1:
            return (
                f"parallelism_config: {name} {sizes[name]}: {meaning} would give another loss curve here (docs/topologies.md "
                "says why); set it to 1 and take dp_shard_size, as in accelerate_configs/hsdp.yaml"
            )
    num_replicas, num_shards = sizes.get("dp_replicate_size", 1), sizes.get("dp_shard_size", 1)
    if num_shards == 1:
        return (
            "parallelism_config: dp_shard_size 1 divides no weights; use fsdp.yaml for one group that shards, or multi_gpu.yaml "
            "and multi_node.yaml for replicas only"
        )
    if num_replicas * num_shards == num_processes:
        return None
    fitting = num_shards if num_processes % num_shards == 0 else num_processes
    return (
        f"parallelism_config: {num_replicas} replicas (dp_replicate_size) of {num_shards} processes each (dp_shard_size) are "
        f"{num_replicas * num_shards} processes, but there are {num_processes}: add --parallelism_config_dp_replicate_size "
        f"{num_processes // fitting} --parallelism_config_dp_shard_size {fitting} to accelerate launch"
    )
