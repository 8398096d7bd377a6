"""A process that makes no progress is ended; the message says who was silent. Whole hangs: tests/test_faults.py."""

from __future__ import annotations

import io
import json
import re
import subprocess
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
from onecurve.training.recovery.watchdog import SLOW_PHASE_FACTOR, Watchdog
from tests.conftest import ROOT, Run
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
def test_the_silent_process_is_named(
    reports: dict[int, dict[str, Any]], num_processes: int, needed: tuple[str, ...]
) -> None:
    message = describe_hang(reports, num_processes, 3.2, Path("run/hangs"))
    assert names(message, "3 seconds", "hang_timeout_seconds", "run/hangs", *needed)
    # Where the stacks do not tell which rank holds up the others, none is named.
    assert bool(needed) == bool(re.search(r"rank \d", message))


HANGING = """
import sys, time
from pathlib import Path
from onecurve.training.recovery.watchdog import Watchdog

def work(watchdog):
    {work}

with Watchdog(Path(sys.argv[1]), 0, 1, 0.3, lambda message: print("told:", message, flush=True)) as watchdog:
    watchdog.beat()
    work(watchdog)
print("done")
"""


def hang(folder: Path, work: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HANGING.replace("{work}", work), str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_process_that_hangs_is_ended_with_its_stacks(tmp_path: Path) -> None:
    result = hang(tmp_path / "hangs", "time.sleep(60)")
    assert result.returncode == 1
    assert names(result.stderr, "onecurve", "0 seconds")
    assert names(result.stdout, "told", "0 seconds")
    assert "in work" in (tmp_path / "hangs" / "process_00000.txt").read_text()


@pytest.mark.parametrize(
    "work",
    [
        "[(time.sleep(0.1), watchdog.beat()) for _ in range(8)]",
        "with watchdog.slow_phase(): time.sleep(0.8)",
    ],
)
def test_who_works_or_was_given_time_is_left_alone(tmp_path: Path, work: str) -> None:
    result = hang(tmp_path / "hangs", work)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    assert not (tmp_path / "hangs").exists()


def test_a_slow_start_is_watched_where_standard_error_has_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = threading.Semaphore(0)

    def look() -> bool:
        looked.release()
        return False

    monkeypatch.setattr(sys, "stderr", io.StringIO())  # As in a notebook, or in a test that captures it.
    watchdog = Watchdog(tmp_path, 0, 1, 1.0, lambda message: None, look)
    watchdog.start()
    assert looked.acquire(timeout=30)
    assert looked.acquire(timeout=30)  # The first look did not end its thread.
    with watchdog:
        pass
    assert not watchdog._thread.is_alive()


ORPHANED = """
import time
from pathlib import Path
from onecurve.training.recovery import watchdog

watchdog._SECONDS_WITHOUT_LAUNCHER = 0.2
told = lambda message: print("told:", message, flush=True)
with watchdog.Watchdog(Path("none"), 3, 4, 1.0, told, lambda: True) as watched:
    {beat}
    time.sleep({seconds})
print("done")
"""


@pytest.mark.parametrize("trains", [False, True])
def test_a_start_ends_without_its_launcher_and_a_training_agrees_on_a_stop(trains: bool) -> None:
    script = ORPHANED.replace("{beat}", "watched.beat()" if trains else "").replace(
        "{seconds}", "0.9" if trains else "60"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    if trains:
        assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    else:
        assert result.returncode == 1
        assert names(result.stderr, "onecurve: rank 3", "launcher")
        assert names(result.stdout, "told: rank 3", "launcher")


def test_a_start_ends_though_nobody_reads_what_it_says() -> None:
    script = ORPHANED.replace("{beat}", "").replace("{seconds}", "60")
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        process.stderr.close()
        try:
            assert process.wait(30) == 1
        finally:
            process.kill()


def test_a_disk_that_takes_no_stacks_keeps_no_hang_alive(tmp_path: Path) -> None:
    result = hang(tmp_path / "hangs", "Path(sys.argv[1]).touch(); time.sleep(60)")  # No folder can be made there.
    assert result.returncode == 1
    assert names(result.stderr, "onecurve", "rank 0", "0 seconds")
    assert "in work" in result.stderr, "the stacks go where somebody can see them"
    assert names(result.stdout, "told", "rank 0")


def test_stacks_of_an_earlier_larger_training_answer_for_nobody(tmp_path: Path) -> None:
    own, late, stale = (tmp_path / f"process_{number:05d}.txt" for number in (0, 1, 2))
    own.write_text(json.dumps(waiting()) + "\n")
    stale.write_text(json.dumps(waiting()) + "\n")
    timer = threading.Timer(0.3, late.write_text, [json.dumps(silent()) + "\n"])
    timer.start()
    assert HangReports(tmp_path, 0, 2).gather() == {0: waiting(), 1: silent()}


def test_who_reads_what_a_device_has_not_computed_yet_is_waiting(
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
    for place in ("cpu in evaluation.py", "tolist in reporter.py", "copy_ in host_copy.py"):
        assert is_waiting([frames[place]]), place
    assert not is_waiting([sys._getframe()])


def test_after_a_signal_the_limit_is_short_but_longer_than_a_step(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, 1, 1800, print)
    assert watchdog._limit_seconds() == 1800 * SLOW_PHASE_FACTOR, "the first step may compile"
    watchdog.beat()
    assert watchdog._limit_seconds() == 1800
    watchdog._longest_seconds = 40.0
    watchdog.shorten_limit()
    assert watchdog._limit_seconds() == 80
    with watchdog.slow_phase():
        assert watchdog._limit_seconds() == 80 * SLOW_PHASE_FACTOR
