"""The memory table is what the arithmetic says today, and what was measured is near it."""

from __future__ import annotations

import pytest

from benchmarks.memory import MODELS, Case, describe_case, list_cases, predict
from onecurve.launcher.facts.shape import build_shape
from onecurve.launcher.planning.memory import STRATEGIES, count_loading_bytes, estimate_memory
from onecurve.launcher.planning.work import Work
from onecurve.launcher.units import MIB
from tests.launcher.conftest import ROOT
from tests.launcher.planning.test_topology import BERT

TABLE = (ROOT / "benchmarks" / "memory.md").read_text(encoding="utf-8")


def test_the_rows_are_those_that_the_script_measures() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith(tuple(f"| {model} |" for model in MODELS))]
    assert [row.rsplit("|", 4)[0] + "|" for row in rows] == [describe_case(case) for case in list_cases()]
    assert {case[1] for case in list_cases()} == set(STRATEGIES)


@pytest.mark.parametrize("case", list_cases(), ids=describe_case)
def test_prediction_is_within_15_percent(case: Case) -> None:
    row = next(line for line in TABLE.splitlines() if line.startswith(describe_case(case)))
    predicted, measured = row.split("|")[5:7]
    plan = predict(case)
    bytes_now = plan.peak + plan.host
    assert f"{bytes_now / MIB:,.0f}" == predicted.strip(), "the arithmetic has changed: run benchmarks/memory.py again"
    assert bytes_now / MIB == pytest.approx(int(measured.replace(",", "")), rel=0.15)


def test_deepspeeds_bucket_is_whole_however_small_the_model() -> None:
    shape = build_shape(BERT)
    ddp, zero = (estimate_memory(shape, strategy, Work(8, 64), 8) for strategy in ("DDP", "ZeRO-3"))
    assert zero.buffers >= 4 * 500_000_000
    assert zero.peak > ddp.peak


def test_each_process_of_a_machine_loads_the_whole_model() -> None:
    shape = build_shape(BERT)
    assert count_loading_bytes(shape, "FSDP2", "bf16", 8) == 8 * 4 * shape.num_parameters
    assert count_loading_bytes(shape, "ZeRO-3", "bf16", 8) == 8 * 6 * shape.num_parameters
    assert count_loading_bytes(shape, "ZeRO-3", "no", 1) == 4 * shape.num_parameters
