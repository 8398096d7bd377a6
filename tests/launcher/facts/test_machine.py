"""What is found on a machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from onecurve.launcher.errors import Unsuitable
from onecurve.launcher.facts.machine import (
    count_cores,
    detect_machine,
    find_job_node,
    find_slurm_step,
    first_host,
)
from tests.messages import naming


def test_gpus_come_from_nvidia_smi(fake_gpus: Callable[..., dict[str, str]]) -> None:
    machine = detect_machine(fake_gpus(2))
    assert machine.kind == "cuda"
    assert [round(device.memory_bytes / 1024**3) for device in machine.devices] == [80, 80]
    assert machine.describe().startswith("2 GPUs (NVIDIA H100 80GB HBM3, 80 GiB)")


def test_no_gpu_is_a_cpu() -> None:
    machine = detect_machine({"PATH": "/nonexistent"})
    assert machine.kind == "cpu"
    assert machine.num_cores >= 1
    assert machine.memory_bytes > 0
    assert machine.driver_problem is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("node1", "node1"),
        ("a1,b2", "a1"),
        ("login,gpu[1-2]", "login"),
        ("n[3,5]-ib", "n3-ib"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("n[1-2],m[1-2]", "n1"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_host_list_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(Unsuitable, match="can't be read"):
        first_host("gpu[")


def test_slurm_step() -> None:
    assert find_slurm_step({}) is None
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    batch = find_slurm_step(job)
    assert batch is not None
    assert batch.is_batch_shell
    step = find_slurm_step({**job, "SLURM_STEP_ID": "0", "SLURM_NODEID": "1"})
    assert step is not None
    assert not step.is_batch_shell
    assert (step.num_nodes, step.node_rank, step.head_address) == (2, 1, "n1")
    assert find_slurm_step({**job, "SLURM_GPUS_ON_NODE": "4"}).num_gpus == 4  # type: ignore[union-attr]


def test_several_tasks_a_node_are_refused() -> None:
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "n[1-2]",
    }
    with pytest.raises(Unsuitable, match=naming("8 tasks", "2 nodes", "--ntasks-per-node=1")):
        find_slurm_step(step)


def test_granted_cores_are_a_bound_where_nothing_binds_to_them() -> None:
    assert count_cores({"SLURM_CPUS_ON_NODE": "1"}) == 1
    assert count_cores({"SLURM_CPUS_ON_NODE": "100000"}) == count_cores({})


PLACE = {"ONECURVE_NUM_NODES": "2", "ONECURVE_NODE_RANK": "1", "ONECURVE_HEAD_ADDRESS": "10.0.0.1"}


def test_any_scheduler_can_say_the_place() -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4"}
    node = find_job_node({**slurm, **PLACE, "ONECURVE_GPUS_PER_NODE": "4"})
    assert node is not None
    assert (node.num_nodes, node.node_rank, node.head_address, node.port) == (2, 1, "10.0.0.1", 29500)
    assert (node.num_gpus, node.is_batch_shell) == (4, False)
    assert find_job_node({**PLACE, "ONECURVE_PORT": "1234"}).port == 1234  # type: ignore[union-attr]
    assert find_job_node(slurm).num_nodes == 4  # type: ignore[union-attr]
    alone = find_job_node({"ONECURVE_NUM_NODES": "1"})
    assert alone is not None
    assert (alone.node_rank, alone.head_address) == (0, "localhost")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ONECURVE_NUM_NODES", "two"),
        ("ONECURVE_NUM_NODES", "0"),
        ("ONECURVE_NODE_RANK", "2"),
        ("ONECURVE_NODE_RANK", ""),
        ("ONECURVE_HEAD_ADDRESS", ""),
        ("ONECURVE_PORT", "x"),
        ("ONECURVE_GPUS_PER_NODE", "-1"),
    ],
)
def test_a_place_that_cannot_be_read_is_refused(name: str, value: str) -> None:
    with pytest.raises(Unsuitable, match=naming(name)):
        find_job_node({**PLACE, name: value})
