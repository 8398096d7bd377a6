"""Rank 0's answer, or its error, on every rank."""

from __future__ import annotations

import pytest
import torch

from onecurve.training.errors import BadInput
from onecurve.training.parallel import agreement
from onecurve.training.parallel.agreement import ask_main_process


@pytest.mark.parametrize("fails", [False, True])
def test_a_gpu_has_sent_the_answer_before_rank_0_goes_on(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """It may go on to its end: os._exit does not wait for the device."""
    done: list[str] = []
    monkeypatch.setattr(agreement, "broadcast_object_list", lambda objects: done.append("broadcast"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))

    def answer() -> int:
        if fails:
            raise BadInput("no")
        return 7

    if fails:
        with pytest.raises(BadInput, match="no"):
            ask_main_process(answer)
    else:
        assert ask_main_process(answer) == 7
    assert done == ["broadcast", "synchronize"]
