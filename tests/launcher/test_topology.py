"""The choice of a topology, and the command that comes of it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from launcher.command import build_command, choose_port, count_threads
from launcher.errors import UnknownTopology, Unsuitable
from launcher.machine import GIB, Device, Machine, SlurmStep
from launcher.memory import Work
from launcher.shape import ModelShape, build_shape
from launcher.topology import build_topology, choose_topology, read_strategy

LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
BERT = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA_70B = {
    **LLAMA,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
YAMLS = {
    "cpu": "distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1",
    "multi_cpu": "distributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2",
    "single_gpu": "distributed_type: 'NO'",
    "multi_gpu": "distributed_type: MULTI_GPU\nnum_processes: 8",
    "multi_node": "distributed_type: MULTI_GPU\nnum_machines: 2",
    "fsdp": "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}",
    "deepspeed_zero3_offload": "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3, offload_param_device: cpu}",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "accelerate_configs").mkdir()
    for name, text in YAMLS.items():
        (tmp_path / "accelerate_configs" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def machine(num_gpus: int, gib: int = 80, slurm: SlurmStep | None = None) -> Machine:
    devices = tuple(Device(index, "GPU", gib * GIB, 0, 9.0) for index in range(num_gpus))
    return Machine("cuda" if devices else "cpu", devices, 16, 256 * GIB, 200 * GIB, slurm)


@pytest.mark.parametrize(
    ("num_gpus", "gib", "config", "expected", "num_processes"),
    [
        (0, 0, BERT, "cpu", 1),
        (1, 24, BERT, "single_gpu", 1),
        (4, 24, BERT, "multi_gpu", 4),
        (8, 80, LLAMA, "fsdp", 8),
        (1, 24, LLAMA, "deepspeed_zero3_offload", 1),
        (2, 24, LLAMA_70B, "deepspeed_zero3_offload", 2),
    ],
)
def test_the_simplest_that_fits_is_chosen(
    root: Path, num_gpus: int, gib: int, config: dict[str, object], expected: str, num_processes: int
) -> None:
    topology = choose_topology(root, machine(num_gpus, gib), build_shape(config, 2), Work(8, 512))
    assert (topology.name, topology.num_processes) == (expected, num_processes)
    assert len(topology.reasons) == 3
    assert [line.split()[0] for line in topology.reasons] == ["found", "chosen", "because"]


def test_a_model_of_unknown_size_is_taken_to_fit(root: Path) -> None:
    topology = choose_topology(root, machine(2), None, Work(8, 512))
    assert topology.name == "multi_gpu"
    assert "size is not known" in topology.reasons[2]


def test_names_that_do_not_exist_are_answered_with_those_that_do(root: Path) -> None:
    with pytest.raises(UnknownTopology, match=r"did you mean fsdp\? There are: cpu, "):
        build_topology(root, machine(2), "fdsp", None)


def test_more_processes_than_devices_are_refused(root: Path) -> None:
    with pytest.raises(Unsuitable, match="only 2 GPUs"):
        build_topology(root, machine(2), "multi_gpu", 3)


def test_a_gpu_topology_is_rehearsed_where_there_is_no_gpu(root: Path) -> None:
    topology = build_topology(root, machine(0), "fsdp", None)
    assert (topology.num_processes, topology.uses_cpu, topology.strategy) == (2, True, "FSDP2")


def test_every_node_of_a_job_gets_its_rank_and_one_port(root: Path) -> None:
    commands = []
    for rank in (0, 1):
        node = machine(4, slurm=SlurmStep("12345", 2, rank, "n1", is_batch_shell=False))
        topology = choose_topology(root, node, None, Work(8, 128))
        assert (topology.name, topology.num_processes) == ("multi_node", 8)
        commands.append(build_command(Path.cwd(), "r.yaml", {}, topology, node).to_shell())
    assert "--machine_rank 1 --main_process_ip n1 --same_network --main_process_port 22345" in commands[1]
    assert commands[0] == commands[1].replace("--machine_rank 1", "--machine_rank 0")


def test_the_batch_shell_of_several_nodes_is_refused(root: Path) -> None:
    node = machine(4, slurm=SlurmStep("1", 2, 0, "n1", is_batch_shell=True))
    with pytest.raises(Unsuitable, match="srun --ntasks-per-node=1"):
        choose_topology(root, node, None, Work(8, 128))


@pytest.mark.parametrize("name", ["cpu", "single_gpu"])
def test_one_process_on_several_nodes_is_refused(root: Path, name: str) -> None:
    node = machine(1, slurm=SlurmStep("1", 2, 0, "n1", is_batch_shell=False))
    with pytest.raises(Unsuitable, match="each of which would train the same model alone"):
        build_topology(root, node, name, None)


def test_granted_gpus_that_are_not_seen_are_told(root: Path) -> None:
    node = machine(0, slurm=SlurmStep("1", 1, 0, "n1", is_batch_shell=False, num_gpus=2))
    with pytest.raises(Unsuitable, match="granted 2 GPUs on this node, but nvidia-smi shows none"):
        choose_topology(root, node, None, Work(8, 128))
    with pytest.raises(Unsuitable, match="granted 2 GPUs on this node, but nvidia-smi shows none"):
        build_topology(root, node, "fsdp", None)
    assert build_topology(root, node, "multi_cpu", None).uses_cpu, "who names a CPU topology means it"


def test_a_gpu_that_was_granted_and_is_lost_is_told(root: Path) -> None:
    node = machine(3, slurm=SlurmStep("1", 1, 0, "n1", is_batch_shell=False, num_gpus=4))
    with pytest.raises(Unsuitable, match="granted 4 GPUs on this node, but nvidia-smi shows 3"):
        choose_topology(root, node, None, Work(8, 128))
    with pytest.raises(Unsuitable, match="granted 4 GPUs on this node, but nvidia-smi shows 3"):
        build_topology(root, node, "fsdp", None)
    assert build_topology(root, node, "multi_gpu", 2).num_processes == 2, "who says how many means it"


def test_a_rehearsal_on_several_nodes_has_a_process_on_each(root: Path) -> None:
    node = machine(0, slurm=SlurmStep("1", 3, 0, "n1", is_batch_shell=False))
    assert build_topology(root, node, "multi_cpu", None).num_processes == 3


def test_two_jobs_on_one_node_meet_on_two_ports(root: Path) -> None:
    nodes = [machine(2, slurm=SlurmStep(job, 1, 0, "localhost", is_batch_shell=False)) for job in ("101", "102")]
    ports = [choose_port(node, build_topology(root, node, "multi_gpu", None)) for node in nodes]
    assert len({*ports, 29500}) == 3


def test_a_taken_port_is_avoided(root: Path) -> None:
    topology = build_topology(root, machine(0), "multi_cpu", None)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 29500))
            taken.listen()
        except OSError:
            pass  # Somebody else has it, which serves as well.
        assert choose_port(machine(0), topology) != 29500


def test_threads_share_the_cores(root: Path) -> None:
    assert count_threads(build_topology(root, machine(0), "multi_cpu", 4), machine(0)) == 4
    assert count_threads(build_topology(root, machine(0), "cpu", None), machine(0)) == 16


def test_strategies_are_read_from_the_yaml() -> None:
    assert read_strategy({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}}) == "ZeRO-1"
    assert read_strategy({"distributed_type": "FSDP", "fsdp_config": {"offload_params": True}}) == "FSDP2 offload"
    assert read_strategy({}) == "one process"


def test_shape_of_a_70b_model() -> None:
    shape: ModelShape = build_shape(LLAMA_70B, 2)
    assert shape.num_parameters == pytest.approx(69.5e9, rel=0.01)


@pytest.mark.parametrize(("value", "is_there"), [("true", True), ("True", True), ("false", False)])
def test_eval_only_is_passed_on_where_it_is_true(root: Path, value: str, is_there: bool) -> None:
    topology = build_topology(root, machine(0), "cpu", None)
    words = build_command(root, "r.yaml", {"eval_only": value, "seed": "1"}, topology, machine(0)).words
    assert words[-2:] == ("--seed", "1")
    assert ("--eval_only" in words) == is_there
