"""A process that has trained is as it was: an interrupt is its own again."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

from onecurve.training.launch_protocol import STOP_SIGNALS
from tests.conftest import Run

Train = Callable[[Mapping[str, Any]], Run]


def test_signals_are_as_before_a_training(train: Train, recipe: dict[str, Any]) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    assert train({**recipe, "max_train_steps": 1}).exit_code == 0
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
