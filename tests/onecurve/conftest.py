"""Processes of the Python API are forked by the launch server; those of a caller in a process of its own are new ones."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

import onecurve.process
from tools.launches import LaunchServer, ServedLauncher, adapt_environment


@pytest.fixture(scope="package", autouse=True)
def commands_are_forked(launch_server: LaunchServer) -> Iterator[None]:
    """What `onecurve.process` starts, in the folder that the test is in."""

    def start(
        words: Sequence[str], env: Mapping[str, str], stdout: IO[str], stderr: IO[str], **others: Any
    ) -> ServedLauncher | subprocess.Popen[Any]:
        command = ["-m", "onecurve", *words[2:]]
        return launch_server.start_script(command, adapt_environment(env), stdout, stderr, Path.cwd())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onecurve.process, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
        yield
