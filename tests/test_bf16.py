"""In bf16 curves stay within a bound; where a step is cut into the same micro-batches, they are those of one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bf16 import compare
from benchmarks.bf16_batches import compare_batches
from tests.conftest import Launch, Run

BF16 = {"mixed_precision": "bf16", "dropout": 0.1, "eval_steps": 8, "max_eval_samples": 20}

# Relative, of a step's loss: ten times what a small model showed in its first steps, and less than other dropout masks do.
MAX_DEVIATION = 1e-4


def test_another_micro_batch_stays_within_the_bound(
    recipe: Mapping[str, Any], train: Callable[[Mapping[str, Any]], Run], tmp_path: Path
) -> None:
    whole = train({**recipe, **BF16, "per_device_batch_size": 16})
    cut = train({**recipe, **BF16, "per_device_batch_size": 3, "output_dir": str(tmp_path / "cut")})
    assert (whole.exit_code, cut.exit_code) == (0, 0)
    assert len(whole.losses) == 8
    assert compare(cut, whole).largest <= MAX_DEVIATION


@pytest.mark.slow
def test_the_same_micro_batches_on_two_processes(recipe: Mapping[str, Any], launch: Launch, tmp_path: Path) -> None:
    one = launch({**recipe, **BF16})
    two = launch({**recipe, **BF16, "output_dir": str(tmp_path / "two")}, "multi_cpu", 2)
    assert (one.exit_code, two.exit_code) == (0, 0)
    assert len(one.losses) == 8
    assert compare(two, one).num_equal == 8


def test_a_forward_of_one_example_has_the_same_bits_beside_any_others(demo: Path) -> None:
    [alone] = compare_batches(num_examples=4, rounds=1, names=["each alone"])
    assert alone.num_equal == 4
    assert alone.gradient < 1e-5, "float32 sums in another order"


def write_run(path: Path, losses: Sequence[float], loss: float, accuracy: float) -> Run:
    """A run directory with these losses of steps and this evaluation."""
    lines: list[dict[str, Any]] = [{"event": "train", "loss": each} for each in losses]
    lines.append({"event": "eval", "eval_loss": loss, "eval_accuracy": accuracy})
    path.mkdir()
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return Run(0, "", "", path)


def test_deviations_are_relative_and_accuracy_is_in_points(tmp_path: Path) -> None:
    wanted = write_run(tmp_path / "wanted", [2.0, 1.0, 1.0], 0.5, 0.80)
    found = compare(write_run(tmp_path / "found", [2.0, 1.25, 0.95], 0.6, 0.79), wanted)
    assert found.largest == pytest.approx(0.25)
    assert found.median == pytest.approx(0.05)
    assert found.mean == pytest.approx(0.2 / 4)
    assert found.evaluation == pytest.approx(0.2)
    assert found.accuracy == pytest.approx(-1)
    assert found.num_equal == 1
    assert compare(wanted, wanted).num_equal == 3
