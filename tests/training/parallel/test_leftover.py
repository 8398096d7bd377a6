"""Variables of an earlier launch that are left over: said at once, and no wait of hours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from onecurve.training.parallel import launch
from onecurve.training.parallel.launch import Launch, check_processes, limited_joining
from tests.conftest import ROOT, Run, to_flags
from tests.messages import names

LEFT_OVER = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "10.9.9.9"}


def set_variables(patch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in (*launch.GROUP_VARIABLES, "TORCHELASTIC_RUN_ID", "ONECURVE_NUM_PROCESSES"):
        patch.delenv(name, raising=False)
    for name, value in variables.items():
        patch.setenv(name, value)


@pytest.mark.parametrize("changed", [{}, {"RANK": "0", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_a_process_that_waits_for_others_says_so(
    changed: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {**LEFT_OVER, **changed}
    set_variables(monkeypatch, **variables)
    check_processes()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert names(said, f"rank {variables['RANK']}", f"{variables['WORLD_SIZE']} processes", "10.9.9.9:29500")
    assert names(said, "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR")


@pytest.mark.parametrize("starter", [{"TORCHELASTIC_RUN_ID": "none"}, {"PMI_SIZE": "4"}])
def test_processes_that_something_started_together_say_nothing(
    starter: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_variables(monkeypatch, **LEFT_OVER, **starter)
    check_processes()
    assert capsys.readouterr().err == ""


def test_a_variable_that_is_no_number_is_refused(
    recipe: dict[str, Any], train: Callable[[Mapping[str, Any]], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, RANK="$SLURM_PROCID")
    run = train(recipe)
    assert run.exit_code == 2
    assert names(run.stderr, "$RANK", "$SLURM_PROCID")


def test_a_group_that_meets_in_time_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **LEFT_OVER)
    monkeypatch.setattr(launch, "JOINING_SECONDS", 0.2)
    with limited_joining(Launch.from_environment(), lambda message: None):
        pass
    # Had the limit stayed, this process would end while it waits here.
    subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{}, {"RANK": "0", "LOCAL_RANK": "0"}])
def test_the_wait_ends_after_minutes(recipe: dict[str, Any], changed: Mapping[str, str]) -> None:
    code = (
        "import sys; from onecurve.training.parallel import launch; launch.JOINING_SECONDS = 3.0\n"
        "from onecurve.training.run import main; from onecurve.training.outcome import report_outcome\n"
        "sys.exit(report_outcome(main, sys.argv[1:]))"
    )
    variables = {**os.environ, **LEFT_OVER, "MASTER_PORT": "29777", **changed}
    result = subprocess.run(
        [sys.executable, "-c", code, *to_flags(recipe)], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    first, last = (line for line in result.stderr.splitlines() if line.startswith("onecurve: "))
    assert names(first, "10.9.9.9:29777", "unset RANK")
    assert names(last, "4 processes", "10.9.9.9:29777", "unset RANK")
