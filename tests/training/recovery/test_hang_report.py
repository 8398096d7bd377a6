"""Which rank is stuck, and where. Whole hangs: tests/test_faults.py."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from onecurve.training.recovery.hang_report import HangReports, describe_hang, is_waiting
from onecurve.training.recovery.host_copy import copy_in_pieces
from tests.conftest import Run
from tests.messages import names


def waiting(place: str = "training/run.py:9 (make_steps)") -> dict[str, Any]:
    return {"is_waiting": True, "place": place}


def silent(place: str = "training/data/preparation.py:7 (load)") -> dict[str, Any]:
    return {"is_waiting": False, "place": place}


@pytest.mark.parametrize(
    ("reports", "num_processes", "needed"),
    [
        ({0: waiting(), 1: silent()}, 2, ("rank 1", "training/data/preparation.py:7 (load)")),
        (
            {0: silent("a.py:1 (f)"), 1: waiting(), 2: silent()},
            3,
            ("rank 0", "a.py:1 (f)", "rank 2", "training/data/preparation.py:7 (load)"),
        ),
        ({0: waiting(), 2: waiting()}, 4, ("rank 1", "rank 3")),
        ({0: waiting(), 1: waiting()}, 2, ()),
        ({0: silent(), 1: silent()}, 2, ()),
        ({0: silent()}, 1, ("rank 0", "training/data/preparation.py:7 (load)")),
        ({0: waiting()}, 1, ("rank 0", "training/run.py:9 (make_steps)")),
    ],
)
def test_the_stuck_rank_is_named(
    reports: dict[int, dict[str, Any]], num_processes: int, needed: tuple[str, ...]
) -> None:
    message = describe_hang(reports, num_processes, 3.2, Path("run/hangs"))
    assert names(message, "3 seconds", "hang_timeout_seconds", "run/hangs", *needed)
    # Where the stacks do not tell which rank holds up the others, none is named.
    assert bool(needed) == bool(re.search(r"rank \d", message))


def test_reports_of_an_earlier_larger_training_are_ignored(tmp_path: Path) -> None:
    own, late, stale = (tmp_path / f"process_{number:05d}.txt" for number in (0, 1, 2))
    own.write_text(json.dumps(waiting()) + "\n")
    stale.write_text(json.dumps(waiting()) + "\n")
    timer = threading.Timer(0.3, late.write_text, [json.dumps(silent()) + "\n"])
    timer.start()
    assert HangReports(tmp_path, 0, 2).gather() == {0: waiting(), 1: silent()}


def test_a_rank_that_reads_a_result_from_the_device_is_waiting(
    recipe: dict[str, Any], train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: dict[str, FrameType] = {}

    def note(name: str, native: Any) -> Any:
        def call(*arguments: Any) -> Any:
            caller = sys._getframe(1)  # A native function has no frame: this is the innermost.
            if "training" in caller.f_code.co_filename:
                frames[f"{name} in {Path(caller.f_code.co_filename).name}"] = caller
            return native(*arguments)

        return call

    monkeypatch.setattr(torch.Tensor, "cpu", note("cpu", torch.Tensor.cpu))
    monkeypatch.setattr(torch.Tensor, "tolist", note("tolist", torch.Tensor.tolist))
    assert train(recipe).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", note("copy_", torch.Tensor.copy_))
        copy_in_pieces(torch.ones(3), torch.empty(3), torch.empty(8, dtype=torch.uint8))
    for place in ("cpu in gathering.py", "tolist in late_values.py", "copy_ in host_copy.py"):
        assert is_waiting([frames[place]]), place
    assert not is_waiting([sys._getframe()])


@pytest.mark.parametrize(
    "place",
    [
        "torch/cuda/streams.py",  # Where the reporter waits for an event.
        "deepspeed/runtime/zero/stage3.py",
        "deepspeed/comm/comm.py",
    ],
)
def test_a_rank_that_waits_inside_a_library_is_waiting(place: str) -> None:
    names: dict[str, Any] = {}
    exec(
        compile("import sys\ndef synchronize():\n    return sys._getframe()", f"/site-packages/{place}", "exec"), names
    )
    assert is_waiting([names["synchronize"]()])
