"""A process that has imported torch and its like, and forks a launcher or a script for each request: no start imports.

The launcher is accelerate's own (`accelerate launch`, torch's elastic agent in it), so ranks get the environment, signals
and exit codes that it gives. One thing differs: a rank is forked and runs its script as `__main__`, where it would be a
new Python. Nothing of `onecurve` is imported before that. `tools.launches` starts this program and talks to it.

What a fork can't show: what depends on variables that are read at import (`tools.launches` starts those launches for
real), the order of sets of strings (all ranks share a hash seed), and command lines in /proc.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

# What a rank and the launcher import; that is most of their start. None of it starts threads that a fork would lose.
IMPORTED = (
    "torch", "datasets", "transformers", "accelerate", "deepspeed", "evaluate", "accelerate.commands.launch",
    "torch.distributed.run", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo",
    "sklearn.metrics", "scipy.stats", "evaluate.evaluator", "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert", "rich.progress", "rich.table",
    "jinja2", "pydantic", "yaml", "filelock", "psutil", "safetensors.torch", "safetensors.numpy", "pyarrow.parquet",
    "transformers.trainer_utils", "torch.utils.cpp_extension", "deepspeed.runtime.zero.muon.muon_optimizer", "peft",
)  # fmt: skip

# The modules' path without this program's folder: what a new Python would start with.
_PATH = sys.path[1:]


class ForkedProcess:
    """What launchers use of `subprocess.Popen`, for `python [-u] script ...`: forked, and never started anew."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.args = args
        self.returncode: int | None = None
        environment = dict(os.environ if env is None else env)
        self.pid = os.fork()
        if self.pid:
            return
        if start_new_session:
            os.setsid()
        for descriptor, file in ((1, stdout), (2, stderr)):
            if file is not None:
                os.dup2(file.fileno(), descriptor)
        words = list(args[1:])
        is_unbuffered = words[0] == "-u"
        run_script(words[1:] if is_unbuffered else words, environment, is_unbuffered)

    def poll(self) -> int | None:
        """The exit code, negative for a signal, once it has ended."""
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises `subprocess.TimeoutExpired`."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def split_path(path: str | None) -> list[str]:
    """The folders of a variable like PYTHONPATH."""
    return [folder for folder in (path or "").split(os.pathsep) if folder]


def become(environment: Mapping[str, str], arguments: Sequence[str], is_unbuffered: bool = False) -> None:
    """Turn a fork into what a new process would be: its environment, arguments, signals and open files."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 65536 else 65536)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = arguments
    if is_unbuffered:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]


def exit_as_python_does(main: Callable[[], Any]) -> NoReturn:
    """Run a program and end this process with its exit code, as the interpreter would."""
    code = 0
    try:
        try:
            main()
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:  # KeyboardInterrupt too.
            traceback.print_exc()
            code = 1
        threading._shutdown()  # type: ignore[attr-defined]  # Waits for threads, as the end of a program does.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def run_script(words: Sequence[str], environment: Mapping[str, str], is_unbuffered: bool = False) -> NoReturn:
    """Be `python [-u] script ...`."""
    become(environment, words, is_unbuffered)
    sys.path[:] = [str(Path(words[0]).absolute().parent), *split_path(environment.get("PYTHONPATH")), *_PATH]
    exit_as_python_does(lambda: runpy.run_path(words[0], run_name="__main__"))


def run_launcher(arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Be `accelerate launch` with these arguments, with ranks that are forked."""
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    become(environment, ["accelerate-launch", *arguments])
    replacement = {**vars(subprocess), "Popen": ForkedProcess}
    launch.subprocess = types.SimpleNamespace(**replacement)
    subprocess_handler.Popen = ForkedProcess  # type: ignore[attr-defined, assignment]
    exit_as_python_does(launch.main)


def answer(connection: socket.socket) -> NoReturn:
    """Start what a request asks for; send its process id, and its exit code once it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, outputs, _, _ = socket.recv_fds(connection, 1, 2)
    with connection.makefile("rb") as stream:
        request = json.loads(stream.readline())
    launcher = os.fork()
    if launcher == 0:
        os.setsid()
        os.chdir(request["folder"])
        for descriptor, output in enumerate((os.open(os.devnull, os.O_RDONLY), *outputs)):
            os.dup2(output, descriptor)
        if request["is_launch"]:
            run_launcher(request["arguments"], request["environment"])
        run_script(request["arguments"], request["environment"])
    for output in outputs:
        os.close(output)
    try:
        connection.sendall(b"%d\n" % launcher)
        _, status = os.waitpid(launcher, 0)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    finally:
        os._exit(0)


def serve(address: str) -> None:
    """Answer requests until standard input ends, as it does when the program that started this one has."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # A collection in a fork would copy every page.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                answer(connection)
            connection.close()


if __name__ == "__main__":
    serve(sys.argv[1])
