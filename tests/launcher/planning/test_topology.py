"""The choice of a topology, and the command that comes of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from onecurve.launcher.errors import UnknownTopology, Unsuitable
from onecurve.launcher.facts.gpus import Device
from onecurve.launcher.facts.machine import JobNode, Machine
from onecurve.launcher.facts.shape import ModelShape, build_shape
from onecurve.launcher.launching.command import build_command, choose_port, count_threads, to_arguments
from onecurve.launcher.planning.choice import choose_topology, list_candidates
from onecurve.launcher.planning.configs import read_strategy
from onecurve.launcher.planning.data_estimate import estimate_data
from onecurve.launcher.planning.memory import GPU_OVERHEAD_BYTES
from onecurve.launcher.planning.plan import build_plan
from onecurve.launcher.planning.topology import build_topology
from onecurve.launcher.planning.work import Work
from onecurve.launcher.preflight.devices import check_affinity, check_memory
from onecurve.launcher.units import GIB
from onecurve.training.config import Recipe
from tests.launcher.conftest import ROOT, Onecurve, cluster
from tests.messages import names, naming

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
    "hsdp": "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\nparallelism_config: "
    "{parallelism_config_dp_replicate_size: 2, parallelism_config_dp_shard_size: 8}",
    "deepspeed_zero3_offload": "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3, offload_param_device: cpu}",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "accelerate_configs").mkdir()
    for name, text in YAMLS.items():
        (tmp_path / "accelerate_configs" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def machine(num_gpus: int, gib: int = 80, node: JobNode | None = None, host: int = 256) -> Machine:
    devices = tuple(Device(index, "GPU", gib * GIB, 0, 9.0) for index in range(num_gpus))
    return Machine("cuda" if devices else "cpu", devices, 16, host * GIB, node)


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
    topology = choose_topology(root, machine(num_gpus, gib), build_shape(config), Work(8, 512))
    assert (topology.name, topology.num_processes) == (expected, num_processes)
    assert len(topology.reasons) == 3
    assert [line.split()[0] for line in topology.reasons] == ["found", "chosen", "because"]


def test_run_chooses_what_plan_recommends(
    recipe_file: Path, tmp_path: Path, onecurve: Onecurve, fake_gpus: Callable[..., dict[str, str]]
) -> None:
    model = tmp_path / "bert-large"
    model.mkdir()
    config = {
        **BERT,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = [recipe_file, "--json", "--model_name_or_path", model]
    words += ["--train_batch_size", 64, "--per_device_batch_size", 64, "--max_length", 512]
    gpus = fake_gpus(8, "NVIDIA L4", 24 * 1024)
    chosen = json.loads(onecurve("run", *words, "--dry-run", environment=gpus).stdout)
    planned = json.loads(onecurve("plan", *words, environment=gpus).stdout)
    checked = onecurve("check", *words, environment=gpus).stdout
    assert chosen["strategy"] == planned["recommended"] == "DDP"
    peak = next(row["memory"]["peak"] for row in planned["strategies"] if row["memory"]["strategy"] == "DDP")
    assert f"DDP needs {(peak + GPU_OVERHEAD_BYTES) / GIB:.1f} GiB of 24" in chosen["reasons"][2]
    assert "memory:" not in checked


def test_plan_recommends_only_what_a_yaml_does() -> None:
    recipe = Recipe.model_validate(
        {"model_name_or_path": "x", "dataset_name": "x", "train_batch_size": 1, "max_length": 128}
    )
    shape = build_shape(LLAMA)
    names = dict(list_candidates("cuda", 1, 1))
    for host, expected in ((1024, "ZeRO-3 offload"), (64, None)):
        plan = build_plan(recipe, shape, estimate_data(recipe), cluster("1xL4", host_gib=host))
        assert plan.recommended == expected
    assert (ROOT / "accelerate_configs" / f"{names['ZeRO-3 offload']}.yaml").is_file()
    for kind, count, nodes in (
        ("cpu", 1, 1),
        ("cpu", 2, 1),
        ("mps", 1, 1),
        ("cuda", 1, 1),
        ("cuda", 2, 1),
        ("cuda", 4, 2),
    ):
        for strategy, name in list_candidates(kind, count, nodes):  # type: ignore[arg-type]
            assert build_topology(ROOT, machine(0), name, None).strategy == strategy


def test_an_offload_that_the_host_has_no_room_for_is_told(root: Path) -> None:
    node = machine(1, 24, host=64)
    topology = choose_topology(root, node, build_shape(LLAMA), Work(1, 128))
    assert names(topology.reasons[2], "ZeRO-3", "offload", "139.8 GiB", "57.6")
    roomy = choose_topology(root, machine(1, 24, host=256), build_shape(LLAMA), Work(1, 128))
    assert "own memory" not in roomy.reasons[2]
    recipe = Recipe.model_validate({"model_name_or_path": "x", "dataset_name": "x"})
    told = [finding.message for finding in check_memory(recipe, topology, node, build_shape(LLAMA))]
    assert any(names(message, "139.8 GiB") for message in told)


@pytest.mark.slow
def test_a_gpu_that_the_user_has_chosen_stays_chosen(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text("import os; print('shown', os.environ['CUDA_VISIBLE_DEVICES'])", encoding="utf-8")
    words = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/single_gpu.yaml", str(script)]
    result = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "3"},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "shown 3" in result.stdout


def test_a_driver_that_fails_is_no_reason_to_train_on_the_cpu(
    recipe_file: Path, onecurve: Onecurve, broken_driver: dict[str, str]
) -> None:
    ran = onecurve("run", recipe_file, "--dry-run", environment=broken_driver)
    assert ran.returncode == 2
    assert names(ran.stderr, "nvidia-smi", "exit code 9", "couldn't communicate")
    doctor = onecurve("check", environment=broken_driver)
    assert doctor.returncode == 2
    assert "couldn't communicate" in doctor.stdout
    named = onecurve("run", recipe_file, "--dry-run", "--topology", "cpu", environment=broken_driver)
    assert named.returncode == 0, named.stderr
    hidden = onecurve("run", recipe_file, "--dry-run", environment={**broken_driver, "CUDA_VISIBLE_DEVICES": "-1"})
    assert hidden.returncode == 0, hidden.stderr


def test_few_cores_are_told_unless_slurm_granted_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    granted = JobNode("1", 1, 0, "n1", is_batch_shell=False, num_cpus=16)
    assert check_affinity(machine(0, node=granted)) == []
    much = JobNode("1", 1, 0, "n1", is_batch_shell=False, num_cpus=64)
    assert "16 of 64 cores" in check_affinity(machine(0, node=much))[0].message
    assert "16 of 128 cores" in check_affinity(machine(0))[0].message


def test_a_model_of_unknown_size_is_taken_to_fit(root: Path) -> None:
    topology = choose_topology(root, machine(2), None, Work(8, 512))
    assert topology.name == "multi_gpu"
    assert names(topology.reasons[2], "size")


def test_names_that_do_not_exist_are_answered_with_those_that_do(root: Path) -> None:
    with pytest.raises(UnknownTopology, match=naming("fsdp", "cpu", "multi_cpu")):
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
        node = machine(4, node=JobNode("12345", 2, rank, "n1", is_batch_shell=False))
        topology = choose_topology(root, node, None, Work(8, 128))
        assert (topology.name, topology.num_processes) == ("multi_node", 8)
        commands.append(
            build_command(node, topology, Path.cwd() / "training" / "run.py", ["--config", "r.yaml"]).to_shell()
        )
    assert "--machine_rank 1 --main_process_ip n1 --same_network --main_process_port 22345" in commands[1]
    assert commands[0] == commands[1].replace("--machine_rank 1", "--machine_rank 0")


@pytest.mark.parametrize(
    ("num_nodes", "gpus", "gib", "config", "expected"),
    [
        (2, 4, 80, BERT, "multi_node"),
        (2, 8, 80, LLAMA, "hsdp"),
        (4, 8, 80, LLAMA_70B, "fsdp"),
        (2, 1, 80, LLAMA, "fsdp"),
    ],
)
def test_several_machines_shard_inside_each_if_one_holds_the_model(
    root: Path, num_nodes: int, gpus: int, gib: int, config: dict[str, object], expected: str
) -> None:
    node = machine(gpus, gib, JobNode("1", num_nodes, 0, "n1", is_batch_shell=False))
    assert choose_topology(root, node, build_shape(config), Work(1, 512)).name == expected


@pytest.mark.parametrize(
    ("num_nodes", "gpus", "sizes"),
    [(4, 4, "4 --parallelism_config_dp_shard_size 4"), (3, 16, "6 --parallelism_config_dp_shard_size 8"),
     (1, 8, "1 --parallelism_config_dp_shard_size 8"), (1, 0, "2 --parallelism_config_dp_shard_size 2"),
     (3, 0, "3 --parallelism_config_dp_shard_size 1")],
)  # fmt: skip
def test_no_group_that_shards_spans_machines(root: Path, num_nodes: int, gpus: int, sizes: str) -> None:
    step = JobNode("1", num_nodes, 0, "n1", is_batch_shell=False) if num_nodes > 1 else None
    node = machine(gpus, node=step)
    line = build_command(node, build_topology(root, node, "hsdp", None), root / "training" / "run.py", []).to_shell()
    assert f"--parallelism_config_dp_replicate_size {sizes} " in line


def test_the_batch_shell_of_several_nodes_is_refused(root: Path) -> None:
    node = machine(4, node=JobNode("1", 2, 0, "n1", is_batch_shell=True))
    with pytest.raises(Unsuitable, match="srun --ntasks-per-node=1"):
        choose_topology(root, node, None, Work(8, 128))


@pytest.mark.parametrize("name", ["cpu", "single_gpu"])
def test_one_process_on_several_nodes_is_refused(root: Path, name: str) -> None:
    node = machine(1, node=JobNode("1", 2, 0, "n1", is_batch_shell=False))
    with pytest.raises(Unsuitable, match=naming("2 nodes")):
        build_topology(root, node, name, None)


def test_granted_gpus_that_are_not_seen_are_told(root: Path) -> None:
    node = machine(0, node=JobNode("1", 1, 0, "n1", is_batch_shell=False, num_gpus=2))
    with pytest.raises(Unsuitable, match=naming("2 GPUs", "nvidia-smi")):
        choose_topology(root, node, None, Work(8, 128))
    with pytest.raises(Unsuitable, match=naming("2 GPUs", "nvidia-smi")):
        build_topology(root, node, "fsdp", None)
    assert build_topology(root, node, "multi_cpu", None).uses_cpu, "who names a CPU topology means it"


def test_a_gpu_that_was_granted_and_is_lost_is_told(root: Path) -> None:
    node = machine(3, node=JobNode("1", 1, 0, "n1", is_batch_shell=False, num_gpus=4))
    with pytest.raises(Unsuitable, match=naming("4 GPUs", "nvidia-smi", "3")):
        choose_topology(root, node, None, Work(8, 128))
    with pytest.raises(Unsuitable, match=naming("4 GPUs", "nvidia-smi", "3")):
        build_topology(root, node, "fsdp", None)
    assert build_topology(root, node, "multi_gpu", 2).num_processes == 2, "who says how many means it"


def test_a_rehearsal_on_several_nodes_has_a_process_on_each(root: Path) -> None:
    node = machine(0, node=JobNode("1", 3, 0, "n1", is_batch_shell=False))
    assert build_topology(root, node, "multi_cpu", None).num_processes == 3


def test_two_jobs_on_one_node_meet_on_two_ports(root: Path) -> None:
    nodes = [machine(2, node=JobNode(job, 1, 0, "localhost", is_batch_shell=False)) for job in ("101", "102")]
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
    assert read_strategy({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": "3"}}) == "ZeRO-3"
    assert read_strategy({}) == "one process"


def test_deepspeeds_own_file_says_the_stage(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    content = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": str(file)}}
    file.write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}', encoding="utf-8")
    assert read_strategy(content) == "ZeRO-3 offload"
    file.write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    assert read_strategy(content) == "ZeRO-1"
    file.write_text("[1]", encoding="utf-8")
    with pytest.raises(UnknownTopology, match=naming("JSON")):
        read_strategy(content)


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("distributed_type: FSDP\nfsdp_config: [1]", ("own.yaml", "fsdp_config", "mapping")),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: 3", ("own.yaml", "deepspeed_config", "mapping")),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 4}", ("own.yaml", "zero_stage", "3", "4")),
        ("distributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: two", ("own.yaml", "num_processes", "'two'")),
    ],
)
def test_a_yaml_that_is_wrong_is_no_bug(root: Path, text: str, needed: tuple[str, ...]) -> None:
    (root / "accelerate_configs" / "own.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UnknownTopology, match=naming(*needed)):
        build_topology(root, machine(0), "own", None)


def test_shape_of_a_70b_model() -> None:
    shape: ModelShape = build_shape(LLAMA_70B)
    assert shape.num_parameters == pytest.approx(69.5e9, rel=0.01)


@pytest.mark.parametrize(("value", "is_there"), [("true", True), ("True", True), ("false", False)])
def test_eval_only_is_passed_on_where_it_is_true(root: Path, value: str, is_there: bool) -> None:
    topology = build_topology(root, machine(0), "cpu", None)
    arguments = to_arguments({"eval_only": value, "seed": "1"})
    words = build_command(machine(0), topology, root / "training" / "run.py", arguments).words
    assert words[-2:] == ("--seed", "1")
    assert ("--eval_only" in words) == is_there
