"""Agreement of all ranks on what rank 0 found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from onecurve.training.errors import Fault
from onecurve.training.process import is_main_process

Answer = TypeVar("Answer")


def ask_main_process(question: Callable[[], Answer]) -> Answer:
    """Call `question` on rank 0 and return its answer on every rank; a Fault that it raises is raised on every rank.

    Raises:
        Fault: as `question` on rank 0.
    """
    answer_and_error: list[Any] = [None, None]
    if is_main_process():
        try:
            answer_and_error[0] = question()
        except Fault as error:
            answer_and_error[1] = error
    broadcast_object_list(answer_and_error)
    _finish_sending()
    if answer_and_error[1] is not None:
        raise answer_and_error[1]
    answer: Answer = answer_and_error[0]
    return answer


def _finish_sending() -> None:
    """Wait until a GPU has sent what was broadcast: rank 0 may exit next, and the others would not get its answer."""
    if torch.cuda.is_available() and torch.distributed.is_initialized():
        torch.cuda.synchronize()
