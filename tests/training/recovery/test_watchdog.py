"""A training that makes no progress is ended. Whole hangs: tests/test_faults.py."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from onecurve.training.recovery.watchdog import SLOW_PHASE_FACTOR, Watchdog
from tests.conftest import ROOT
from tests.messages import names

HANGING = """
import sys, time
from pathlib import Path
from onecurve.training.recovery.watchdog import Watchdog

def work(watchdog):
    {work}

with Watchdog(Path(sys.argv[1]), 0, 1, 0.3, lambda message: print("reported:", message, flush=True)) as watchdog:
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
    assert names(result.stdout, "reported", "0 seconds")
    assert "in work" in (tmp_path / "hangs" / "process_00000.txt").read_text()


@pytest.mark.parametrize(
    "work",
    [
        "[(time.sleep(0.1), watchdog.beat()) for _ in range(8)]",
        "with watchdog.slow_phase(): time.sleep(0.8)",
    ],
)
def test_a_rank_with_heartbeats_or_in_a_slow_phase_goes_on(tmp_path: Path, work: str) -> None:
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
report = lambda message: print("reported:", message, flush=True)
with watchdog.Watchdog(Path("none"), 3, 4, 1.0, report, lambda: True) as watched:
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
        assert names(result.stdout, "reported: rank 3", "launcher")


def test_a_start_ends_though_nobody_reads_its_messages() -> None:
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


def test_a_hang_ends_even_if_its_stacks_cannot_be_written(tmp_path: Path) -> None:
    result = hang(tmp_path / "hangs", "Path(sys.argv[1]).touch(); time.sleep(60)")  # No folder can be made there.
    assert result.returncode == 1
    assert names(result.stderr, "onecurve", "rank 0", "0 seconds")
    assert "in work" in result.stderr, "the stacks go where somebody can see them"
    assert names(result.stdout, "reported", "rank 0")


LEFT_ALONE = """
import sys, time
from pathlib import Path
from onecurve.training.recovery.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), 0, 2, 1800, lambda message: None) as watchdog:
    watchdog.beat()
    print("told to end", flush=True)
    watchdog.shorten_limit()
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_rank_that_waits_for_a_dead_one_reports_before_torch_kills_it(tmp_path: Path) -> None:
    """torch's agent waits for 30 seconds after SIGTERM."""
    with subprocess.Popen(
        [sys.executable, "-c", LEFT_ALONE, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "told to end\n"
        try:
            _, stderr = process.communicate(timeout=27)
        finally:
            process.kill()
    assert process.returncode == 1
    assert names(stderr, "onecurve", "rank 1")


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
