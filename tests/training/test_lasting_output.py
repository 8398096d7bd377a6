"""A run goes on when nobody reads what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onecurve.training.lasting_output import LastingStream
from tests.conftest import ROOT

PROGRAM = """
import sys
from onecurve.training.lasting_output import protect_output
protect_output()
for number in range(20_000):
    print("Fu\u00dfball", number)
sys.stdout.flush()
print("end", file=sys.stderr, flush=True)
"""


def run(prefix: str, suffix: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = f'{prefix} {sys.executable} -c "$PROGRAM" {suffix}'
    environment = {**os.environ, "PROGRAM": PROGRAM, **variables}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("suffix", ["| head -1", ">&-", "> /dev/full", "> /dev/null"])
def test_output_never_ends_a_process(suffix: str) -> None:
    result = run("", suffix)
    assert result.returncode == 0
    assert result.stderr == "end\n"


def test_a_character_that_the_output_lacks_is_replaced() -> None:
    result = run("", "| head -1", PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert result.stdout == "Fu?ball 0\n"


def test_a_closed_file_takes_what_is_written(tmp_path: Path) -> None:
    file = (tmp_path / "a").open("w")
    stream = LastingStream(file)
    assert stream.write("a") == 1
    file.close()
    assert stream.write("bc") == 2
    stream.flush()
    stream.close()
