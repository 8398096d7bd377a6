"""The scripts of rendered job files train for real: on one node, and on two that are both this machine."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.cluster.elsewhere import Place
from onecurve.launcher.cluster.job_file import Platform, write_job_file
from onecurve.launcher.cluster.request import Request
from tests.conftest import ROOT, Run
from tests.launcher.cluster.platforms import name_variables, start_node, write_onecurve
from tools.jobs import write_held_task

pytestmark = pytest.mark.slow

RECIPE = "training/recipes/demo.yaml"

Train = Callable[[Mapping[str, Any]], Run]


@pytest.fixture
def port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path, port: int) -> Iterator[Callable[..., list[Any]]]:
    """Start all nodes of a job file."""
    started = []
    path = write_onecurve(tmp_path / "bin")

    def run(platform: Platform, text: str, num_nodes: int) -> list[Any]:
        nodes = []
        for rank in range(num_nodes):
            variables = name_variables(platform, rank, num_nodes, port)
            nodes.append(start_node(platform, text, variables, path, tmp_path / f"node{rank}.output"))
        started.extend(nodes)
        return nodes

    yield run
    for node in started:
        node.kill()
        node.wait()


def render(platform: Platform, settings: Mapping[str, Any], folder: Path, num_nodes: int) -> str:
    overrides = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    request = Request(recipe=RECIPE, overrides=overrides, num_nodes=num_nodes)
    place = Place(volume="runs", mount=str(folder), image="registry/onecurve:1")
    return write_job_file(ROOT, platform, request, place, None, True, print).text


def test_two_nodes_stop_together_and_go_on(
    recipe: dict[str, Any], train: Train, start: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Kubernetes ends one pod; both write the checkpoint, and when both are started again the curve is the one of one start."""
    held = write_held_task(tmp_path, step=4)
    recipe = {**recipe, "task": held.task, "output_dir": str(tmp_path / "run")}
    text = render("kubernetes", recipe, tmp_path, num_nodes=2)
    nodes = start("kubernetes", text, 2)
    held.wait_until_reached(nodes[0])
    nodes[1].send_signal(signal.SIGTERM)  # not the one with rank 0
    output = (tmp_path / "node1.output").read_text(encoding="utf-8")
    assert [node.wait(300) for node in nodes] == [75, 75], output
    assert Run(0, "", "", tmp_path / "run").read("status.json")["state"] == "preempted"
    assert [node.wait(300) for node in start("kubernetes", text, 2)] == [0, 0]
    run = Run(0, "", "", tmp_path / "run")
    assert run.read("status.json")["state"] == "finished"
    alone = train({"config": RECIPE, **recipe, "output_dir": str(tmp_path / "alone")})
    assert [line["step"] for line in run.steps] == [line["step"] for line in alone.steps]
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)


def test_one_node_of_skypilot(recipe: dict[str, Any], start: Callable[..., list[Any]], tmp_path: Path) -> None:
    text = render("skypilot", {**recipe, "output_dir": "runs/x", "max_train_steps": 2}, tmp_path, num_nodes=1)
    [node] = start("skypilot", text, 1)
    assert node.wait(300) == 0, (tmp_path / "node0.output").read_text(encoding="utf-8")
    # On the volume, because the project's folder does not outlive a node.
    assert Run(0, "", "", tmp_path / "runs" / "x").read("status.json")["state"] == "finished"
