"""The benchmark for GPUs runs from end to end on a CPU, at tiny sizes, and reports what fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import curves
from benchmarks.gpu.scene import Row, Scene
from tools.launches import LaunchServer, build_environment


def verdicts(path: Path, part: str) -> list[str]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["parts"][part]["rows"]
    return [row["verdict"] for row in rows]


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(demo: Path, tmp_path: Path, launch_server: LaunchServer) -> None:
    """But that of speed, which is `benchmarks.mfu`'s and has its own test."""
    output = tmp_path / "gpu.json"
    words = ["-m", "benchmarks.gpu", "--tiny", "--only", "invariance,resume,run,decoder", "--output", str(output)]
    result = launch_server.run_script(words, build_environment(), 500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert verdicts(output, "invariance") == ["holds"] * 4
    assert verdicts(output, "resume") == ["same bits"]
    rows = {row["what"]: row["figure"] for row in json.loads(output.read_text())["parts"]["run"]["rows"]}
    assert "training waits" in rows["a checkpoint"]
    assert verdicts(output, "decoder") == [""] * 4


@pytest.mark.slow
def test_a_training_that_fails_leaves_the_others_their_rows(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"encoder": curves.Group({}, {"broken": {"train_file": "nothing.jsonl"}, **curves.FEW_EXAMPLES})}
    monkeypatch.setattr(curves, "TINY_GROUPS", groups)
    monkeypatch.setattr(curves, "list_topologies", lambda scene, precision: [])
    rows = curves.measure_invariance(Scene(tmp_path, True, 0, lambda: 300.0))
    assert [row.verdict for row in rows] == ["FAILED", "holds"]
    assert "nothing.jsonl" in rows[0].figure, "whoever gets the table knows why"


def test_a_part_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(scene: Scene) -> list[Row]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(program, "PARTS", {"first": fail, "second": lambda scene: [Row("figure", "1", "holds")]})
    output = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--tiny", "--only", "first,second", "--output", str(output)])
    assert program.main() == 1
    assert verdicts(output, "first") == ["FAILED"]
    assert verdicts(output, "second") == ["holds"]


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    scene = Scene(tmp_path, True, 0, lambda: -1.0)
    assert [row.verdict for row in program.run_part("resume", scene)] == ["SKIPPED"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert program.main() == 2
