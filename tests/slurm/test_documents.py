"""Every command of docs/slurm.md that speaks to Slurm is one that a real Slurm takes."""

from __future__ import annotations

import sys

import pytest

from tests.conftest import ROOT
from tests.docs.test_commands import COMMANDS, Command
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slow

SUBMITTING = [
    command
    for command in COMMANDS
    if command.words[0] == "sbatch" or (command.words[:2] == ["onecurve", "submit"] and "--to" not in command.words)
]


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize("command", SUBMITTING, ids=lambda command: f"{command.page}: {command.text}")
def test_slurm_takes_the_command(cluster: Cluster, command: Command) -> None:
    words = command.words
    if words[0] == "sbatch":
        words.insert(1, "--test-only")
    else:
        words = [sys.executable, "-m", "onecurve", *words[1:], *(["--dry-run"] if "--dry-run" not in words else [])]
    result = cluster.run(*words, folder=ROOT)
    assert result.returncode == 0, result.stderr
    assert "to start at" in result.stderr


def test_the_page_has_commands() -> None:
    assert len(SUBMITTING) >= 8
