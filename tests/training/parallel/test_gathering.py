"""A divided tensor arrives whole at the process that keeps it, however it is divided, and no other process receives any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

from onecurve.training.parallel.gathering import Divided, Transfers, divide

SHAPES = [(7, 3), (6,), (1, 5), (2, 0), (40, 4)]
NUM_PROCESSES = 4


def build(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + 1


def cut_flat(whole: torch.Tensor, rank: int) -> Divided:
    """As ZeRO-3 does: equal runs of numbers, the last ones padded."""
    share = -(-whole.numel() // NUM_PROCESSES)
    own = torch.nn.functional.pad(whole.flatten(), (0, share * NUM_PROCESSES - whole.numel()), value=-1)
    group = distributed.group.WORLD
    assert group is not None
    return Divided(own[rank * share : (rank + 1) * share], whole.shape, share, group)


def gather_all(rank: int, folder: Path) -> None:
    """On each process: gather every tensor on one after the other, and write what is kept."""
    distributed.init_process_group("gloo", f"file://{folder}/meeting", world_size=NUM_PROCESSES, rank=rank)
    flat_mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    hybrid_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    kept, transfers = {}, Transfers()
    for keeper in range(NUM_PROCESSES):
        for shape in SHAPES:
            whole = build(shape)
            kinds = {
                "flat": cut_flat(whole, rank),
                "rows": divide(distribute_tensor(whole, flat_mesh, [Shard(0)])),
                "hybrid": divide(distribute_tensor(whole, hybrid_mesh, [Replicate(), Shard(0)])),
            }
            for kind, tensor in kinds.items():
                assert tensor is not None
                assert (tensor.shape, tensor.dtype, tensor.nbytes) == (whole.shape, whole.dtype, whole.nbytes)
                if rank == keeper:
                    kept[keeper, kind, shape] = torch.zeros(shape)
                    transfers.receive(tensor, kept[keeper, kind, shape])
                else:
                    transfers.send(tensor, keeper)
    transfers.finish()
    assert len(kept) == 3 * len(SHAPES)
    for (_, kind, shape), found in kept.items():
        assert torch.equal(found, build(shape)), (kind, shape)
    (folder / str(rank)).touch()
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_every_part_arrives_in_its_place(tmp_path: Path) -> None:
    spawn(gather_all, (tmp_path,), nprocs=NUM_PROCESSES)  # type: ignore[no-untyped-call]
    assert all((tmp_path / str(rank)).exists() for rank in range(NUM_PROCESSES))


@pytest.mark.parametrize("placements", [[Shard(1)], [Replicate()]])
def test_what_is_divided_in_another_way_is_left_to_torch(placements: list[Any], tmp_path: Path) -> None:
    distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", world_size=1, rank=0)
    try:
        tensor = distribute_tensor(build((4, 2)), init_device_mesh("cpu", (1,)), placements)
        assert isinstance(tensor, DTensor)
        assert divide(tensor) is None
    finally:
        distributed.destroy_process_group()
