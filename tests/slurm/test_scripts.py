"""The batch scripts as text: their syntax, and what must stand in each of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / ".ci" / "run"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_the_shell_reads_it(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck is not None
    for command in (["bash", "-n"], [shellcheck]):
        result = subprocess.run([*command, script], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    assert script.stat().st_mode & 0o111


def read_options(script: str) -> list[str]:
    return re.findall(r"^#SBATCH .*", (ROOT / "slurm" / script).read_text(encoding="utf-8"), re.MULTILINE)


def test_a_task_of_a_sweep_is_a_job_like_any_other() -> None:
    assert read_options("sweep.sh") == read_options("finetune.sh")


def test_options_hold_no_variable() -> None:
    assert not [option for option in read_options("finetune.sh") if "$" in option], "sbatch expands none"


@pytest.mark.parametrize("script", ["finetune.sh", "sweep.sh"])
def test_outside_a_job_it_says_what_it_is(script: str) -> None:
    result = subprocess.run(
        ["bash", ROOT / "slurm" / script, "--config", "x.yaml"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "this is a batch script" in result.stderr
