"""A run that moves: each start on another strategy or number of processes, the curve that of one which stayed.

With dropout on: masks go with the examples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Launch, Run

Settings = dict[str, Any]

STRATEGIES = ("multi_cpu", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")


def find_tour(names: tuple[str, ...]) -> list[str]:
    """A way that goes from each name to each other one exactly once (Hierholzer's algorithm)."""
    left = {name: [other for other in names if other != name] for name in names}
    tour, stack = [], [names[0]]
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            tour.append(stack.pop())
    return tour


def test_the_tour_takes_each_step_once() -> None:
    assert sorted(pairwise(find_tour(STRATEGIES))) == sorted(permutations(STRATEGIES, 2))


def move(
    settings: Settings, launch: Launch, tmp_path: Path, places: list[tuple[str, int, int]]
) -> tuple[Run, list[int]]:
    """Train a few steps at each place (topology, processes, micro-batch size), and to the end at the last one."""
    stop_file, status = tmp_path / "stop", tmp_path / "status.json"
    stop_file.touch()  # Noticed at the first step, obeyed three steps later.
    variables = {"ONECURVE_STOP_FILE": str(stop_file), "ONECURVE_STATUS_FILE": str(status)}
    steps = []
    for number, (topology, num_processes, size) in enumerate(places):
        if number + 1 == len(places):
            stop_file.unlink()
        here = {**settings, "per_device_batch_size": size}
        run = launch(here, topology, num_processes, environment=variables)
        ending = json.loads(status.read_text())
        assert ending["exit_code"] == (75 if stop_file.exists() else 0), f"{topology}\n{run.stderr}"
        steps.append(ending["step"])
    return run, steps


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_moves_between_all_strategies(
    recipe: Settings, train: Callable[[Mapping[str, Any]], Run], launch: Launch, tmp_path: Path
) -> None:
    settings = {**recipe, "dropout": 0.1, "max_train_steps": 66, "save_total_limit": 1, "eval_steps": 1000}
    places = [(name, 2, 8) for name in find_tour(STRATEGIES)]
    moved, steps = move(settings, launch, tmp_path, places)
    assert steps[:-1] == list(range(3, 3 * len(places), 3)), "each start goes on where the last one stopped"
    compare(moved, train({**settings, "output_dir": str(tmp_path / "stayed")}))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_moves_between_numbers_of_processes_and_sizes_of_micro_batches(
    recipe: Settings, train: Callable[[Mapping[str, Any]], Run], launch: Launch, tmp_path: Path
) -> None:
    settings = {**recipe, "dropout": 0.1, "max_train_steps": 30, "save_total_limit": 1, "eval_steps": 10}
    places = [
        ("multi_cpu", 2, 8), ("cpu", 1, 5), ("multi_cpu", 2, 3), ("multi_cpu", 3, 8), ("fsdp", 3, 2), ("hsdp", 4, 4),
        ("fsdp", 2, 16),
        ("deepspeed_zero3", 3, 4), ("cpu", 1, 16),
    ]  # fmt: skip
    moved, _ = move(settings, launch, tmp_path, places)
    compare(moved, train({**settings, "output_dir": str(tmp_path / "stayed")}))


def compare(moved: Run, stayed: Run) -> None:
    """One curve within float summation error (invariant 1), and one model at its end."""
    assert stayed.exit_code == 0, stayed.stderr
    for name in ("step", "examples", "tokens", "learning_rate"):
        assert [line[name] for line in moved.steps] == [line[name] for line in stayed.steps]
    assert moved.losses == pytest.approx(stayed.losses, rel=1e-5)
    norms = [[line["grad_norm"] for line in run.steps] for run in (moved, stayed)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert [line["step"] for line in moved.evaluations] == [line["step"] for line in stayed.evaluations]
    weights = [load_file(run.path / "final" / "model.safetensors") for run in (moved, stayed)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-4, atol=1e-6)
