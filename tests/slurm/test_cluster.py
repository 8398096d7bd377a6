"""The test cluster itself: what it stands on, and that nothing of it is left."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, can_make_namespaces, find_obstacle
from tests.slurm.conftest import skip
from tests.slurm.test_finetune import find_processes

pytestmark = pytest.mark.slow


def test_two_hosts_with_gpus(cluster: Cluster) -> None:
    script = "echo $(hostname) $SLURM_NODEID $SLURM_GPUS_ON_NODE $CUDA_VISIBLE_DEVICES"
    result = cluster.run("srun", "--label", "--nodes=2", "--gpus-per-node=2", "bash", "-c", script)
    names = ("node1", "node2") if cluster.has_namespaces else (os.uname().nodename,) * 2
    assert sorted(result.stdout.splitlines()) == [f"{rank}: {name} {rank} 2 0,1" for rank, name in enumerate(names)]


def test_without_namespaces_both_nodes_share_this_host() -> None:
    obstacle = find_obstacle()
    if obstacle is not None:
        skip(obstacle)
    with tempfile.TemporaryDirectory(prefix="onecurve-slurm-") as folder:
        with Cluster(Path(folder) / "shared", has_namespaces=False).running() as cluster:
            result = cluster.run("srun", "--nodes=2", "printenv", "SLURMD_NODENAME")
            assert sorted(result.stdout.split()) == ["node1", "node2"]
            job_id = cluster.submit("--output=/dev/null", "--wrap", "srun sleep 1000")
            cluster.wait(job_id, "RUNNING", seconds=20)
        assert not find_processes(folder)
        assert not find_processes("sleep 1000")


def test_it_is_stopped_whatever_happens() -> None:
    obstacle = find_obstacle()
    if obstacle is not None:
        skip(obstacle)

    def break_off(folder: Path) -> None:
        with Cluster(folder, can_make_namespaces()).running() as cluster:
            cluster.submit("--output=/dev/null", "--wrap", "sleep 1001")
            raise ZeroDivisionError

    with tempfile.TemporaryDirectory(prefix="onecurve-slurm-") as folder:
        with pytest.raises(ZeroDivisionError):
            break_off(Path(folder) / "broken")
        assert not find_processes(folder)
        assert not find_processes("sleep 1001")
