"""slurm/finetune.sh refuses too few cores; seen without Slurm, in a job's environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.messages import names


@pytest.mark.parametrize(
    ("gpus", "cpus", "is_refused"), [("8", "4", True), ("4", "7", True), ("4", "8", False), (None, "1", False)]
)
def test_two_cores_for_each_gpu(tmp_path: Path, gpus: str | None, cpus: str, is_refused: bool) -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path / "gone"), "SLURM_CPUS_PER_TASK": cpus}
    job |= {} if gpus is None else {"SLURM_GPUS_ON_NODE": gpus}
    result = subprocess.run(
        ["bash", str(ROOT / "slurm" / "finetune.sh"), "--config", "r.yaml"],
        env={**os.environ, **job}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert names(result.stderr, f"{cpus} cores", "--cpus-per-task") == is_refused
    # What is not refused ends where it looks for the folder that it was submitted from.
    assert result.returncode == (2 if is_refused else 1)
    assert list(tmp_path.iterdir()) == []
