"""The test cluster, one for all tests of this folder, and recipes on a disk that its nodes share."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm.cluster import Cluster, can_make_namespaces, find_obstacle


def skip(reason: str) -> None:
    """Skip, or fail where continuous integration says that Slurm has to be there."""
    if os.environ.get("ONECURVE_NEEDS_SLURM"):
        pytest.fail(f"$ONECURVE_NEEDS_SLURM is set, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """Two nodes; jobs find this environment's programs, and one thread a process."""
    obstacle = find_obstacle()
    if obstacle is not None:
        skip(obstacle)
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with (
        tempfile.TemporaryDirectory(prefix="onecurve-slurm-") as folder,
        Cluster(Path(folder) / "cluster", can_make_namespaces(), variables).running() as cluster,
    ):
        yield cluster


@pytest.fixture
def write_recipe(recipe: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """A small recipe as a file: write_recipe("name", seed=3); its run directory is `tmp_path/name`."""

    def write(name: str = "run", **settings: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        content = {**recipe, "output_dir": str(tmp_path / name), **settings}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_nvidia_smi(cluster: Cluster, tmp_path: Path) -> Callable[[int], dict[str, str]]:
    """Variables of a node whose nvidia-smi lists GPUs, as a node does that a job has not got alone."""

    def write(count: int) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        rows = "".join(
            f"{index}, GPU-{index}, NVIDIA H100 80GB HBM3, 81559, 4, 9.0, 570.86.15\n" for index in range(count)
        )
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{rows}END\n", encoding="utf-8")
        (folder / "nvidia-smi").chmod(0o755)
        return {"PATH": f"{folder}{os.pathsep}{cluster.environment['PATH']}"}

    return write
