"""How a run ends: exit code, one message, a status file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from onecurve.training import outcome as outcomes
from onecurve.training.config import RecipeError
from onecurve.training.errors import BadInput, Diverged, Fault, Preempted, WrongTopology
from onecurve.training.outcome import Outcome, report_outcome
from tests.conftest import ROOT
from tests.messages import names


@pytest.fixture
def status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONECURVE_STATUS_FILE", str(tmp_path / "status.json"))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path / "status.json"


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_a_run_that_ends_well_is_finished(status: Path, tmp_path: Path) -> None:
    seen = []

    def main(arguments: Sequence[str], outcome: Outcome) -> None:
        assert not status.exists(), "no status before there is a run"
        outcome.add_status_file(tmp_path / "run" / "status.json", 3)
        seen.append(read(status))
        outcome.step = 8

    assert report_outcome(main, ["--seed", "1"]) == 0
    assert seen == [{"state": "running", "exit_code": None, "step": 3, "message": ""}]
    assert read(status) == {"state": "finished", "exit_code": 0, "step": 8, "message": ""}
    assert read(tmp_path / "run" / "status.json") == read(status)


@pytest.mark.parametrize(
    ("error", "exit_code", "state"),
    [
        (RecipeError("here", ["seed: wrong"]), 2, "failed"),
        (BadInput("row 7 is empty"), 2, "failed"),
        (WrongTopology("one came up"), 2, "failed"),
        (Diverged("loss is nan"), 3, "failed"),
        (Preempted("asked to stop"), 75, "preempted"),
        (Fault("disk full"), 1, "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_fault_is_reported_in_one_message(
    status: Path, capsys: pytest.CaptureFixture[str], error: Exception, exit_code: int, state: str
) -> None:
    def main(arguments: Sequence[str], outcome: Outcome) -> None:
        outcome.step = 5
        raise error

    assert report_outcome(main, []) == exit_code
    assert read(status) == {"state": state, "exit_code": exit_code, "step": 5, "message": str(error)}
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"onecurve: {error}\n")


def test_anything_else_is_a_bug_with_its_traceback(status: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: Sequence[str], outcome: Outcome) -> None:
        raise ZeroDivisionError("by zero")

    assert report_outcome(main, []) == 1
    assert read(status) == {
        "state": "failed",
        "exit_code": 1,
        "step": 0,
        "message": "ZeroDivisionError: by zero",
    }
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last)")
    assert 'raise ZeroDivisionError("by zero")' in shown


def test_without_a_place_for_the_status_the_exit_code_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONECURVE_STATUS_FILE", raising=False)

    def main(arguments: Sequence[str], outcome: Outcome) -> None:
        raise BadInput(arguments[0])

    assert report_outcome(main, ["x"]) == 2


def test_a_status_that_cannot_be_written_hides_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONECURVE_STATUS_FILE", str(tmp_path / "file" / "status.json"))

    def main(arguments: Sequence[str], outcome: Outcome) -> None:
        raise Diverged("loss is nan")

    assert report_outcome(main, []) == 3
    shown = capsys.readouterr().err
    assert names(shown, str(tmp_path / "file"))
    assert "onecurve: loss is nan" in shown


def test_only_rank_0_reports(status: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(outcomes, "_wait_for_main", lambda seconds: waited.append(True))

    def main(arguments: Sequence[str], outcome: Outcome) -> None:
        outcome.print_once("hello")
        raise BadInput("the same on every rank")

    assert report_outcome(main, []) == 2
    assert waited, "rank 0 has time to report it"
    assert not status.exists()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(("error", "is_retried"), [(ValueError("a bug"), True), (BadInput("a bad row"), False)])
def test_the_status_of_a_crash_counts_the_starts_that_follow(
    error: Exception, is_retried: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONECURVE_STATUS_FILE", str(tmp_path / "status.json"))
    monkeypatch.setenv("ONECURVE_RESTARTS_LEFT", "2")

    def fail(arguments: Sequence[str], outcome: Outcome) -> None:
        raise error

    report_outcome(fail, [])
    assert read(tmp_path / "status.json").get("restarts_left") == (2 if is_retried else None)


# What native threads do when Python ends under them.
_ABORTS_AT_PYTHONS_END = """\
import os, sys
from onecurve.training.outcome import end_process, report_outcome

class Thread:
    def __del__(self, abort=os.abort):
        abort()

kept = Thread()

def main(arguments, outcome):
    sys.stdout.write("worked")

code = report_outcome(main, [])
"""


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_program_that_has_worked_ends_without_pythons_own_end() -> None:
    ended = run_code(_ABORTS_AT_PYTHONS_END + "end_process(code)")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "worked", "")
    assert run_code(_ABORTS_AT_PYTHONS_END + "sys.exit(code)").returncode < 0, "it would abort"
