"""What SkyPilot and Kubernetes do with a job file, as far as a test needs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT


def read_documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


def expand(argument: str, variables: Mapping[str, str]) -> str:
    """What Kubernetes makes of a container's argument: `$$` is `$`, `$(NAME)` is a variable if there is such a one."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda match: "$" if match[0] == "$$" else variables.get(match[1], match[0]),
        argument,
    )


def name_variables(platform: str, rank: int = 0, num_nodes: int = 1, port: int = 29400) -> dict[str, str]:
    """The variables that a platform sets on one of several nodes, which are all on this machine."""
    if platform == "skypilot":
        return {
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NUM_NODES": str(num_nodes),
            "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * num_nodes),
            "SKYPILOT_NUM_GPUS_PER_NODE": "0",
            "ONECURVE_PORT": str(port),
        }
    return {
        "PET_NNODES": str(num_nodes),
        "PET_NODE_RANK": str(rank),
        "PET_NPROC_PER_NODE": "auto",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
    }


def read_script(platform: str, text: str, variables: Mapping[str, str]) -> str:
    """The script that a node runs."""
    documents = read_documents(text)
    if platform == "skypilot":
        return str(documents[0]["run"])
    return expand(documents[1]["spec"]["trainer"]["args"][0], variables)


def start_node(
    platform: str, text: str, variables: Mapping[str, str], path: str, output: Path
) -> subprocess.Popen[str]:
    """Run a node's script as its platform does, in the project's folder, with the programs of `path`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ONECURVE_NUM", "PET_"))}
    with output.open("a") as file:
        return subprocess.Popen(
            ["bash", "-c", read_script(platform, text, variables)],
            cwd=ROOT,
            env={**inherited, **variables, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )


def write_onecurve(folder: Path, script: str = f'exec {sys.executable} -m onecurve "$@"') -> str:
    """A folder for PATH with this checkout's `onecurve`, or with a script in its place."""
    folder.mkdir(exist_ok=True)
    program = folder / "onecurve"
    program.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    return str(folder)
