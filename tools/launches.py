"""Run `accelerate launch`: for real, or by a server that has torch imported already (`tools.launch_server`).

python -m tools.launches --config_file accelerate_configs/multi_cpu.yaml training/run.py --config RECIPE.yaml
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from onecurve.training.cache import find_operators

ROOT = Path(__file__).parent.parent

# Variables that are read when a rank runs. Others may be read at import, which the server has behind it.
_READ_LATE = ("ONECURVE_", "ACCELERATE_", "PYTEST_", "TORCH_EXTENSIONS_DIR", "PYTHONPATH", "MLFLOW_", "WANDB_")


# Variables that packages set in a process that imports them, or trains. A launch begins without them.
_SET_BY_PACKAGES = frozenset(
    {
        "KERAS_BACKEND", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "PYTORCH_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK", "TOKENIZERS_PARALLELISM", "TORCHINDUCTOR_CACHE_DIR",
        "_MLFLOW_TELEMETRY_SESSION_ID",
    }
)  # fmt: skip


def build_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's variables, and those of a rehearsal on a CPU; scripts outside the checkout find its modules.

    One thread each: two processes with two threads on two cores wait for each other.
    """
    own = {name: value for name, value in os.environ.items() if name not in _SET_BY_PACKAGES}
    share_operators(own)
    return {**own, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **(more or {})}


def adapt_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """These variables, which a program derived from this process's own, as `build_environment` would give them to a launch."""
    more = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    gone = os.environ.keys() - environment.keys()
    return {name: value for name, value in build_environment(more).items() if name not in gone}


def share_operators(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep DeepSpeed's Adam for the host, compiled for a minute or two, with the machine's cache.

    To be called before ONECURVE_CACHE names a program's own.
    """
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(find_operators()))


# Options with which a YAML for several machines is rehearsed on one.
_ON_ONE_MACHINE = {"hsdp": ("--num_machines", "1", "--parallelism_config_dp_shard_size", "2")}


def build_arguments(
    topology: str, num_processes: int | None, options: Sequence[str], script: str, arguments: Sequence[str]
) -> list[str]:
    """Arguments of `accelerate launch`: a topology as it is rehearsed, at a port that is free."""
    words = ["--config_file", f"accelerate_configs/{topology}.yaml"]
    if num_processes is not None:
        words += ["--num_processes", str(num_processes)]
    # Port 0: any that is free, as other trainings may run beside this one.
    words += ["--main_process_port", "0", "--mixed_precision", "no"]
    return [*words, *_ON_ONE_MACHINE.get(topology, ()), *options, script, *arguments]


_LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch")


def launch_for_real(
    arguments: Sequence[str], environment: Mapping[str, str], timeout_seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch` as a new process; raises `subprocess.TimeoutExpired`."""
    return subprocess.run(
        [*_LAUNCHER, *arguments],
        cwd=ROOT,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )


def start_for_real(
    arguments: Sequence[str], environment: Mapping[str, str], stdout: IO[str], stderr: IO[str]
) -> subprocess.Popen[str]:
    """Start `accelerate launch` as a new process, in a session of its own."""
    return _start_process([*_LAUNCHER, *arguments], environment, stdout, stderr)


def _start_process(
    words: Sequence[str], environment: Mapping[str, str], stdout: IO[str], stderr: IO[str], folder: Path = ROOT
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(words),
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


@dataclass(frozen=True)
class _Server:
    """A server that is ready."""

    process: subprocess.Popen[str]
    address: str
    folder: tempfile.TemporaryDirectory[str]


class ServedLauncher:
    """A launcher or script that a server has forked, with what `subprocess.Popen` has.

    Attributes:
        pid: of the launcher or script.
        returncode: its exit code, negative for a signal; None as long as nobody has seen it end.
    """

    def __init__(self, connection: socket.socket, arguments: Sequence[str]) -> None:
        self._connection, self._arguments, self._received = connection, list(arguments), b""
        self.pid = self._read_number(None)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            self.returncode = self._read_number(timeout)
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _read_number(self, timeout_seconds: float | None) -> int:
        self._connection.settimeout(timeout_seconds)
        while b"\n" not in self._received:
            try:
                part = self._connection.recv(64)
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self._arguments, timeout_seconds or 0.0) from None
            if not part:
                raise RuntimeError("the launch server ended")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return int(line)


class LaunchServer:
    """Starts launches from a process that has imported torch; that process begins with the first of them."""

    def __init__(self) -> None:
        self._server: _Server | None = None
        self._environment = build_environment()
        self._start = threading.Lock()

    def __enter__(self) -> LaunchServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether a launch with these variables can be forked: none that is read at import differs."""
        return sys.platform == "linux" and not self._find_differences(environment)

    def restore_variables(self) -> None:
        """Give this process the variables back that it had, where those that packages have set since would keep it from forking.

        torch's compiler sets one when it first runs, for example.
        """
        for name in self._find_differences(build_environment()):
            os.environ.pop(name, None)
            if name in self._environment:
                os.environ[name] = self._environment[name]

    def _find_differences(self, environment: Mapping[str, str]) -> set[str]:
        """Variables that may be read at import, and are not those of the server."""
        names = environment.keys() | self._environment.keys()
        return {
            name
            for name in names
            if not name.startswith(_READ_LATE) and environment.get(name) != self._environment.get(name)
        }

    def launch(
        self, arguments: Sequence[str], environment: Mapping[str, str], timeout_seconds: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `accelerate launch` with these arguments; raises `subprocess.TimeoutExpired`."""
        return _capture(self.start, arguments, environment, timeout_seconds)

    def run_script(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        timeout_seconds: float | None = None,
        folder: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """Run `python script ...` or `python -m onecurve ...` in a folder; raises `subprocess.TimeoutExpired`."""
        start = partial(self.start_script, folder=folder)
        return _capture(start, words, environment, timeout_seconds)

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], stdout: IO[str], stderr: IO[str]
    ) -> ServedLauncher | subprocess.Popen[str]:
        """Start `accelerate launch` with these arguments, as a new process where its variables can't be served."""
        if not self.serves(environment):
            return start_for_real(arguments, environment, stdout, stderr)
        return self._fork(arguments, environment, stdout, stderr, is_launch=True)

    def start_script(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        stdout: IO[str],
        stderr: IO[str],
        folder: Path = ROOT,
    ) -> ServedLauncher | subprocess.Popen[str]:
        """Start `python script ...` in a folder, or `python -m onecurve ...` whose launches are forked too.

        As a new process where its variables can't be served.
        """
        if not self.serves(environment):
            return _start_process([sys.executable, *words], environment, stdout, stderr, folder)
        return self._fork(words, environment, stdout, stderr, is_launch=False, folder=folder)

    def _fork(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        stdout: IO[str],
        stderr: IO[str],
        is_launch: bool,
        folder: Path = ROOT,
    ) -> ServedLauncher:
        with self._start:  # Several threads may launch.
            self._server = self._server or _start(self._environment)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._server.address)
        socket.send_fds(connection, [b"\0"], [stdout.fileno(), stderr.fileno()])
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": str(folder),
            "is_launch": is_launch,
        }
        connection.sendall(json.dumps(request).encode() + b"\n")
        return ServedLauncher(connection, arguments)

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            assert self._server.process.stdin is not None
            self._server.process.stdin.close()
            self._server.process.wait()
            self._server.folder.cleanup()
            self._server = None


_Start = Callable[[Sequence[str], Mapping[str, str], IO[str], IO[str]], "ServedLauncher | subprocess.Popen[str]"]


def _capture(
    start: _Start, words: Sequence[str], environment: Mapping[str, str], timeout_seconds: float | None
) -> subprocess.CompletedProcess[str]:
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stdout,
        tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
    ):
        process = start(words, environment, stdout, stderr)
        try:
            exit_code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            raise
        return subprocess.CompletedProcess(list(words), exit_code, _read(stdout), _read(stderr))


def _start(environment: Mapping[str, str]) -> _Server:
    folder = tempfile.TemporaryDirectory(prefix="onecurve-launches-")
    address = str(Path(folder.name) / "socket")
    variables = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "launch_server.py"), address],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        if not line:
            raise RuntimeError(f"the launch server ended with exit code {process.wait()} before it was ready")
    process.stdout.close()
    return _Server(process, address, folder)


def _kill(launcher: int) -> None:
    """kill -9 of a launcher and its ranks."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(launcher)
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                member.send_signal(signal.SIGKILL)


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


if __name__ == "__main__":
    with LaunchServer() as server:
        result = server.launch(sys.argv[1:], build_environment())
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    sys.exit(result.returncode)
