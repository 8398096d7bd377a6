"""A process that has imported torch and its like, and forks a launcher or a script for each request: no start imports.

The launcher is accelerate's own (`accelerate launch`, torch's elastic agent in it), so ranks get the environment, signals
and exit codes that it gives. One thing differs: a rank is forked and runs its script as `__main__`, where it would be a
new Python. Of `onecurve`, only what `training/run.py` imports is there before that, and no other script finds it. A script
may be a launcher too, such as `onecurve run`: what it starts is forked as well. `tools.launches` starts this program and
talks to it.

What a fork can't show: what depends on variables that are read at import (`tools.launches` starts those launches for
real), the order of sets of strings (all ranks share a hash seed), and command lines in /proc.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# What a rank and the launcher import; that is most of their start. None of it starts threads that a fork would lose.
IMPORTED = (
    "torch", "datasets", "transformers", "accelerate", "deepspeed", "evaluate", "accelerate.commands.launch",
    "torch.distributed.run", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo",
    "sklearn.metrics", "scipy.stats", "evaluate.evaluator", "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert", "rich.progress", "rich.table",
    "jinja2", "pydantic", "yaml", "filelock", "psutil", "safetensors.torch", "safetensors.numpy", "pyarrow.parquet",
    "transformers.trainer_utils", "torch.utils.cpp_extension", "deepspeed.runtime.zero.muon.muon_optimizer", "peft",
    "torch.nn.attention.varlen", "transformers.optimization", "transformers.trainer_pt_utils", "transformers.conversion_mapping",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer", "torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks", "rich._emoji_codes",
    "torch._subclasses.schema_check_mode",
)  # fmt: skip

# The one script whose modules are imported before a fork too. Others may change a module before the rest is imported.
_RUN = Path(__file__).resolve().parents[1] / "training" / "run.py"
_RUN_MODULE = "onecurve.training.run"

# The modules' path without this program's folder: what a new Python would start with.
_PATH = sys.path[1:]

_NEW_PROCESS = subprocess.Popen

# What Python's own class gets when it is about to start a process, by name. It has no public seam there.
_CHILD = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


class ForkedProcess(subprocess.Popen[Any]):
    """`subprocess.Popen` for launchers: a Python program and `accelerate launch` are forked, anything else is started anew."""

    def _execute_child(self, *values: Any) -> None:
        given = _CHILD.bind(self, *values).arguments
        environment = dict(os.environ if given["env"] is None else given["env"])
        program = None if given["shell"] else find_program(given["args"], environment)
        if program is None:
            super()._execute_child(*values)  # type: ignore[misc]
            return
        sys.stdout.flush()  # What is buffered here would be written by both.
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            self._close_pipe_fds(*(given[name] for name in _PIPES))  # type: ignore[attr-defined]
            return
        if given["cwd"] is not None:
            os.chdir(given["cwd"])
        if given["start_new_session"]:
            os.setsid()
        if given["process_group"] >= 0:
            os.setpgid(0, given["process_group"])
        if given["preexec_fn"] is not None:
            given["preexec_fn"]()
        for descriptor, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
            if given[name] not in (-1, descriptor):
                os.dup2(given[name], descriptor)
        program()


def find_program(args: Sequence[str], environment: Mapping[str, str]) -> Callable[[], NoReturn] | None:
    """What a fork does in place of `python [-u] script ...`, `python -m package ...` or `accelerate launch ...`."""
    program, *words = args
    if Path(program).name == "accelerate" and words[:1] == ["launch"]:
        return lambda: run_launcher(words[1:], environment)
    is_unbuffered = words[:1] == ["-u"]
    words = words[is_unbuffered:]
    if program != sys.executable or not words or not (words[0] == "-m" or words[0].endswith(".py")):
        return None
    return lambda: run_script(words, environment, is_unbuffered)


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
    atexit._clear()  # What the program that forked has to do at its end.
    # New streams: those at hand know whether the files that they were opened for can be sought.
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    if is_unbuffered:
        sys.stdout.reconfigure(write_through=True)
        sys.stderr.reconfigure(write_through=True)


def prepare_project(script: str) -> None:
    """Let `training/run.py` find its modules imported.

    Any other program imports them itself, and so does a `training/run.py` that such a program starts.
    """
    if Path(script).resolve() == _RUN and _RUN_MODULE in sys.modules:
        importlib.reload(sys.modules["onecurve.training.process"])  # It reads what the launcher has set.
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "onecurve"]:
        del sys.modules[name]


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
    """Be `python [-u] script ...`, or `python -m package ...`."""
    is_module = words[0] == "-m"
    fork_programs(is_module)  # A rank has threads, which a fork would lose.
    become(environment, words[is_module:], is_unbuffered)
    prepare_project(words[0])
    first = os.getcwd() if is_module else str(Path(words[0]).absolute().parent)
    sys.path[:] = [first, *split_path(environment.get("PYTHONPATH")), *_PATH]
    if is_module:
        exit_as_python_does(lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True))
    exit_as_python_does(lambda: runpy.run_path(words[0], run_name="__main__"))


def run_launcher(arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Be `accelerate launch` with these arguments, with ranks that are forked."""
    fork_programs(is_launcher=True)
    become(environment, ["accelerate-launch", *arguments])
    from accelerate.commands import launch

    exit_as_python_does(launch.main)


def fork_programs(is_launcher: bool) -> None:
    """Let launchers fork: `accelerate launch` its script, torch's elastic agent its ranks, `onecurve` what it starts."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    chosen = ForkedProcess if is_launcher else _NEW_PROCESS
    subprocess.Popen = chosen  # type: ignore[misc]
    subprocess_handler.Popen = chosen  # type: ignore[attr-defined]


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
    # 1,100 patterns that transformers compiles and keeps when it first loads a model.
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("bert")
    # It looks for all packages of data frames when it is first called.
    sys.modules["sklearn.metrics"].accuracy_score([0], [0])
    sys.path.insert(0, str(_RUN.parents[1]))
    importlib.import_module(_RUN_MODULE)
    del sys.path[0]
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
