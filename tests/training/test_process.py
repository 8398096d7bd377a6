"""What a process settles before torch is there: how memory of a GPU is taken, and whose death ends it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, "None"),
    ],
)
def test_segments_may_grow_unless_the_user_says_otherwise(given: dict[str, str], expected: str) -> None:
    code = (
        "import os, sys, onecurve.training.process; assert 'torch' not in sys.modules; "
        "print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "False"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "True"),
        ({"LOCAL_RANK": "0"}, "True"),
        ({"ONECURVE_STOP_FILE": "/nowhere/stop"}, "True"),
        ({"ONECURVE_STATUS_FILE": "/nowhere/status.json"}, "True"),
    ],
)
def test_the_death_of_a_launcher_counts_and_that_of_a_shell_does_not(given: dict[str, str], expected: str) -> None:
    code = (
        "import os, time; from onecurve.training import process; parent = os.getppid(); print('ready', flush=True)\n"
        "while os.getppid() == parent: time.sleep(0.01)\n"
        "print(process.launcher_has_died())"
    )
    own = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" & read line', sys.executable, code],
        cwd=ROOT, env=own | given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as shell:  # fmt: skip
        assert shell.stdin is not None
        assert shell.stdout is not None
        assert shell.stdout.readline() == "ready\n"
        shell.stdin.write("\n")
        shell.stdin.close()
        assert shell.wait() == 0
        assert shell.stdout.read().strip() == expected
