"""The memory table is what the arithmetic says today, and what was measured is near it."""

from __future__ import annotations

import ast
import re

import pytest

from benchmarks.memory import predict
from launcher.machine import MIB
from launcher.memory import STRATEGIES, Work, plan_memory
from launcher.shape import build_shape
from tests.launcher.conftest import ROOT
from tests.launcher.test_topology import BERT

_ROW = re.compile(
    r"^\| ([\w-]+) \| ([^|]+?)(?:, 1 of 8)? \| (\d+) x (\d+) \| ([^|]+) \| ([\d,]+) \| ([\d,]+) \|", re.MULTILINE
)
ROWS = _ROW.findall((ROOT / "benchmarks" / "memory.md").read_text(encoding="utf-8"))


def test_every_strategy_was_measured_on_both_models() -> None:
    assert {row[1] for row in ROWS} == set(STRATEGIES)
    assert len({(row[0], row[2], row[3]) for row in ROWS if row[1] == "one process"}) >= 12


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_prediction_is_within_15_percent(row: tuple[str, ...]) -> None:
    model, strategy, num_examples, length, changed, predicted, measured = row
    options = {}
    if changed != "-":
        key, value = changed.split()
        options[key] = value if key == "mixed_precision" else ast.literal_eval(value)
    plan = predict(model, strategy, int(num_examples), int(length), options)  # type: ignore[arg-type]
    bytes_now = plan.peak + plan.host
    assert f"{bytes_now / MIB:,.0f}" == predicted, "the arithmetic has changed: run benchmarks/memory.py again"
    assert bytes_now / MIB == pytest.approx(int(measured.replace(",", "")), rel=0.15)


def test_deepspeeds_bucket_is_whole_however_small_the_model() -> None:
    shape = build_shape(BERT, 2)
    ddp, zero = (plan_memory(shape, strategy, Work(8, 64), 8) for strategy in ("DDP", "ZeRO-3"))
    assert zero.buffers >= 4 * 500_000_000
    assert zero.peak > ddp.peak
