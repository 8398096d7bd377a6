"""Only one training at a time holds a run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onecurve.training.errors import BadInput
from onecurve.training.recovery import run_lock
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.run_directory import RunDirectory
from tests.conftest import ROOT
from tests.messages import names, naming
from tests.training.conftest import make_run


def test_a_run_directory_is_locked_until_the_training_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_TIMEOUT_SECONDS", 0.2)
    before = {path: path.stat().st_mtime_ns for path in make_run(tmp_path).path.iterdir()}
    with RunLock(RunDirectory(tmp_path)), pytest.raises(BadInput, match=naming(str(tmp_path))):
        RunLock(RunDirectory(tmp_path)).acquire()
    with RunLock(RunDirectory(tmp_path)):
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before, "it writes nothing"


def test_a_folder_without_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    with RunLock(RunDirectory(tmp_path)):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    before = {path.name for path in make_run(tmp_path).path.iterdir()}

    def refuse(descriptor: int, flags: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(RunDirectory(tmp_path)) as lock:
        assert names(capsys.readouterr().out, str(tmp_path), os.strerror(number))
        assert not lock.is_held
        assert {path.name for path in tmp_path.iterdir()} == before, "no marker that a kill would leave behind"


def test_a_folder_that_cannot_be_written_to_is_not_reported_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with RunLock(run) as lock:
        assert not lock.is_held
    assert capsys.readouterr().out == ""


def test_a_refusal_names_the_directory_and_the_stop_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_TIMEOUT_SECONDS", 0.2)
    run = make_run(tmp_path)
    with RunLock(run), pytest.raises(BadInput, match=naming("output_dir", str(tmp_path), str(run.stop))):
        RunLock(run).acquire()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.run_directory import RunDirectory

RunLock(RunDirectory(Path(sys.argv[1]))).acquire()
if os.fork() == 0:
    time.sleep(3)  # As a data loader's worker, which notices late that its parent has died.
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_lock_of_a_killed_training_ends_with_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    # A pipe would be open until the worker ends.
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL, timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    with RunLock(run) as lock:
        assert lock.is_held


def test_only_rank_0_takes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLock(make_run(tmp_path)):
        monkeypatch.setenv("RANK", "1")
        RunLock(RunDirectory(tmp_path)).acquire()
