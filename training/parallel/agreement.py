"""Agreement of all ranks on what one of them found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object

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


def raise_together(problem: str | None) -> None:
    """Raise the problem of the first rank that has one, on every rank.

    Raises:
        Fault: with that problem.
    """
    problems = gather_object([problem])
    _finish_sending()
    first = next((each for each in problems if each is not None), None)
    if first is not None:
        raise Fault(first)


def work_together(work: Callable[[], Answer], describe: Callable[[Exception], str]) -> list[Answer]:
    """Do this rank's part of a work; returns what each rank's part gave, in the order of ranks.

    Raises:
        Fault: on every rank, if the part of one failed, as `describe` says it.
    """
    answer, problem = None, None
    try:
        answer = work()
    except Exception as error:
        problem = describe(error)
    raise_together(problem)
    answers: list[Answer] = gather_object([answer])
    return answers


def _finish_sending() -> None:
    """Wait until a GPU has sent what was broadcast: rank 0 may exit next, and the others would not get its answer."""
    if torch.cuda.is_available() and torch.distributed.is_initialized():
        torch.cuda.synchronize()
