"""How an ending is judged, what of the tools' output is let through, and when a crash is tried again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onecurve.launcher.errors import LaunchFailed
from onecurve.launcher.launching.agent_output import drop_agent_noise
from onecurve.launcher.launching.command import Command
from onecurve.launcher.launching.ending import Ending, judge
from onecurve.launcher.launching.supervise import supervise, supervise_with_restarts
from tests.conftest import ROOT
from tests.messages import names, naming

NOISE = """\
onecurve: model_name_or_path: 'x' does not exist
W1123 05:01:31.682000 9004 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 9011 closing signal SIGTERM
W1123 05:01:31.682000 9004 .venv/lib/python3.11/site-packages/torch/distributed/elastic/agent/server/api.py:7] Closing
E1123 05:01:33.302000 9004 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 2) local_rank: 0
Traceback (most recent call last):
  File "bin/accelerate", line 8, in <module>
    sys.exit(main())
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
training/run.py FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  exitcode  : 2 (pid: 9010)
============================================================
"""
REAL = """\
Traceback (most recent call last):
  File "training/run.py", line 3, in main
    raise KeyError("x")
KeyError: 'x'
a line behind it
"""


def test_only_the_message_is_left() -> None:
    left = list(drop_agent_noise(NOISE.splitlines(keepends=True)))
    assert left == ["onecurve: model_name_or_path: 'x' does not exist\n"]


def test_a_real_traceback_comes_through_whole() -> None:
    text = REAL + NOISE + REAL
    left = "".join(drop_agent_noise(text.splitlines(keepends=True)))
    assert left == REAL + "onecurve: model_name_or_path: 'x' does not exist\n" + REAL


def test_an_unfinished_traceback_is_not_swallowed() -> None:
    lines = REAL.splitlines(keepends=True)[:2]
    assert list(drop_agent_noise(lines)) == lines


@pytest.mark.parametrize(
    ("return_code", "status", "exit_code", "needed"),
    [
        (0, {"state": "finished", "exit_code": 0}, 0, ()),
        (1, {"state": "failed", "exit_code": 2, "message": "said already"}, 2, ()),
        (1, {"state": "failed", "exit_code": 3, "message": "said already"}, 3, ()),
        (1, {"state": "preempted", "exit_code": 75}, 75, ()),
        (
            1,
            {"state": "failed", "exit_code": 1, "step": 4, "message": "KeyError: x"},
            1,
            ("step 4", "KeyError: x"),
        ),
        (1, {"state": "running", "exit_code": None, "step": 9}, 1, ("step 9",)),
        (-9, None, 1, ("signal 9",)),
        (1, {"state": "finished", "exit_code": 0}, 1, ("accelerate launch", "exit code 1")),
        (0, None, 0, ()),
    ],
)
def test_the_status_is_the_truth(
    return_code: int, status: dict[str, object] | None, exit_code: int, needed: tuple[str, ...]
) -> None:
    ending = judge(return_code, status)
    assert ending.exit_code == exit_code
    assert names(ending.message, *needed)
    assert bool(needed) == bool(ending.message)


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_an_ending_that_would_repeat_is_not_tried_again(code: int) -> None:
    starts: list[int] = []

    def start(num_starts: int, restarts_left: int) -> Ending:
        starts.append(num_starts)
        return Ending(code)

    assert supervise_with_restarts(start, 5, print).exit_code == code
    assert starts == [0]


def test_a_crash_is_tried_again_until_it_ends_well_or_is_stopped() -> None:
    said: list[str] = []
    endings = [Ending(1, "died"), Ending(1, "died"), Ending(0)]
    assert supervise_with_restarts(lambda num_starts, left: endings[num_starts], 2, said.append).exit_code == 0
    assert names(said[1], "restart 2 of 2")
    assert supervise_with_restarts(lambda num_starts, left: endings[num_starts], 1, said.append).exit_code == 1
    assert supervise_with_restarts(lambda *_: Ending(1, was_stopped=True), 3, said.append).was_stopped


def test_a_start_with_smaller_micro_batches_is_no_restart() -> None:
    endings = [Ending(1, has_shrunk=True), Ending(1, "died"), Ending(1, has_shrunk=True), Ending(0)]
    asked: list[tuple[int, int]] = []

    def start(*numbers: int) -> Ending:
        asked.append((numbers[0], numbers[1]))
        return endings[numbers[0]]

    assert supervise_with_restarts(start, 1, print).exit_code == 0
    assert asked == [(0, 1), (1, 1), (2, 0), (3, 0)]
    del endings[0], asked[:]
    assert supervise_with_restarts(start, 0, print).exit_code == 1
    assert asked == [(0, 0)]


def test_a_process_is_told_where_to_answer(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import json, os, sys\n"
        "assert os.environ['ONECURVE_NUM_PROCESSES'] == '3' and os.getpgid(0) == os.getpid()\n"
        "assert not os.path.exists(os.environ['ONECURVE_STOP_FILE']) and os.environ['MINE'] == 'x'\n"
        "json.dump({'state': 'preempted', 'exit_code': 75}, open(os.environ['ONECURVE_STATUS_FILE'], 'w'))\n"
        "print('a line', file=sys.stderr)\n"
        "sys.exit(1)\n"
    )
    ending = supervise(Command((sys.executable, "-c", code), {"MINE": "x"}, 3), None)
    assert ending == Ending(75)
    assert capfd.readouterr().err == "a line\n"


def test_a_signal_becomes_a_stop_file() -> None:
    code = (
        "import json, os, signal, time\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "while not os.path.exists(os.environ['ONECURVE_STOP_FILE']): time.sleep(0.01)\n"
        "json.dump({'state': 'preempted', 'exit_code': 75}, open(os.environ['ONECURVE_STATUS_FILE'], 'w'))\n"
    )
    ending = supervise(Command((sys.executable, "-c", code), {}, 1), None)
    assert ending == Ending(75, was_stopped=True)


def test_under_nohup_the_terminal_may_go() -> None:
    code = (
        "import os, signal, time\n"
        "os.kill(os.getppid(), signal.SIGHUP)\n"
        "time.sleep(0.5)\n"
        "assert not os.path.exists(os.environ['ONECURVE_STOP_FILE'])\n"
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup leaves it.
    try:
        assert supervise(Command((sys.executable, "-c", code), {}, 1), None) == Ending(0)
    finally:
        signal.signal(signal.SIGHUP, before)


MINDED = """
import sys
from onecurve.launcher.launching.command import Command
from onecurve.launcher.launching.supervise import supervise

supervise(Command((sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"), {}, 1), None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells of a parent's death")
def test_a_launcher_that_is_killed_leaves_nothing_behind() -> None:
    with subprocess.Popen([sys.executable, "-c", MINDED], cwd=ROOT, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "here\n"
        started = time.monotonic()
        launcher.kill()
        assert launcher.stdout.read() == "", "the launched process held it open, and has ended"
        assert time.monotonic() - started < 10


ORPHANED = """
import json, os, signal, subprocess, sys, time
launcher = os.getpid()
if os.fork() == 0:
    os.setsid()
    os.kill(launcher, signal.SIGKILL)
    while os.getppid() == launcher:
        time.sleep(0.01)
    time.sleep(0.5)  # A checkpoint.
    json.dump({"state": "preempted", "exit_code": 75}, open(os.environ["ONECURVE_STATUS_FILE"], "w"))
    os._exit(0)
time.sleep(60)
"""


def test_processes_of_a_killed_launcher_are_waited_for_and_the_training_starts_again() -> None:
    endings: list[Ending] = []

    def start(num_starts: int, restarts_left: int) -> Ending:
        code = ORPHANED if num_starts == 0 else "pass"
        endings.append(supervise(Command((sys.executable, "-c", code), {}, 1), None))
        return endings[-1]

    assert supervise_with_restarts(start, 1, print) == Ending(0)
    assert endings[0] == Ending(75, was_orphaned=True), "what they said last, and not that they still run"


def test_a_batch_shell_names_the_files_that_all_machines_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECURVE_STOP_FILE", str(tmp_path / "STOP"))
    monkeypatch.setenv("ONECURVE_STATUS_FILE", str(tmp_path / "status.json"))
    code = (
        "import json, os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'STOP')!r}).touch()\n"
        "while not os.path.exists(os.environ['ONECURVE_STOP_FILE']): time.sleep(0.01)\n"
        "json.dump({'state': 'preempted', 'exit_code': 75}, open(os.environ['ONECURVE_STATUS_FILE'], 'w'))\n"
    )
    assert supervise(Command((sys.executable, "-c", code), {}, 1), None) == Ending(75, was_stopped=True)
    (tmp_path / "STOP").unlink()
    ending = supervise(Command((sys.executable, "-c", "raise SystemExit(1)"), {}, 1), None)
    assert ending.exit_code == 1, "a status that an earlier start has left says nothing of this one"


def test_another_machine_waits_for_the_word_of_the_first(tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    status.write_text('{"state": "preempted", "exit_code": 75}', encoding="utf-8")  # Of an earlier start.
    first = f"import json, time; time.sleep(0.5); json.dump({{'state': 'failed', 'exit_code': 3}}, open({str(status)!r}, 'w'))"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {first!r}]); sys.exit(1)"
    words = (sys.executable, "-c", code, "--machine_rank", "1")
    assert supervise(Command(words, {}, 2), tmp_path).exit_code == 3


def test_another_machine_that_has_finished_does_not_wait(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "running", "exit_code": null}', encoding="utf-8")
    words = (sys.executable, "-c", "pass", "--machine_rank", "1")
    assert supervise(Command(words, {}, 2), tmp_path) == Ending(0)


def test_the_same_request_twice_is_one_request() -> None:
    code = (
        "import json, os, signal, time\n"
        "for _ in range(2): os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.1)\n"
        "json.dump({'state': 'preempted', 'exit_code': 75}, open(os.environ['ONECURVE_STATUS_FILE'], 'w'))\n"
    )
    assert supervise(Command((sys.executable, "-c", code), {}, 1), None) == Ending(75, was_stopped=True)


def test_a_forced_end_loses_the_steps_since_the_last_checkpoint() -> None:
    code = (
        "import os, signal, time\n"
        "for _ in range(2): os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.7)\n"
        "time.sleep(60)\n"
    )
    ending = supervise(Command((sys.executable, "-c", code), {}, 1), None)
    assert (ending.exit_code, ending.was_stopped) == (1, True)
    assert names(ending.message, "ended at once")


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LaunchFailed, match=naming(str(tmp_path / "nothing"))):
        supervise(Command((str(tmp_path / "nothing"),), {}, 1), None)
