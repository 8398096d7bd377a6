"""How a command's end becomes an exception."""

from __future__ import annotations

from typing import Any

import pytest

import onecurve
from onecurve.process import build_error


@pytest.mark.parametrize(
    ("exit_code", "answer", "kind"),
    [
        (2, {"message": "m"}, onecurve.BadInput),
        (3, {"message": "m"}, onecurve.Diverged),
        (75, {"message": "m"}, onecurve.Preempted),
        (1, {"message": "m"}, onecurve.Fault),
        (2, {"error": "UnknownTopology", "message": "m"}, onecurve.UnknownTopology),
        (1, {"error": "LaunchFailed", "message": "m"}, onecurve.LaunchFailed),
        (2, {"error": "NoSuchOption", "message": "m"}, onecurve.LauncherError),
        (1, {"error": "Sequence", "message": "m"}, onecurve.LauncherError),
        (130, None, KeyboardInterrupt),
        (-2, None, KeyboardInterrupt),
        (-9, None, onecurve.LaunchFailed),
        (1, None, onecurve.LaunchFailed),
    ],
)
def test_an_exit_code_and_an_answer_make_an_exception(
    exit_code: int, answer: dict[str, Any] | None, kind: type[BaseException]
) -> None:
    error = build_error(exit_code, answer)
    assert type(error) is kind
    assert answer is None or str(error) == answer["message"]


@pytest.mark.parametrize("kind", [onecurve.PreflightFailed, onecurve.RecipeError])
def test_problems_stay_a_list(kind: type[Exception]) -> None:
    error = build_error(2, {"error": kind.__name__, "message": "m", "problems": ["a", "b"]})
    assert type(error) is kind
    assert error.problems == ["a", "b"]  # type: ignore[attr-defined]
