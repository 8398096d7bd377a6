"""The memory table is what the arithmetic says today, and what was measured is near it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import sharding
from benchmarks.memory import MODELS, Case, describe_case, list_cases, predict
from onecurve.launcher.facts.shape import build_shape
from onecurve.launcher.planning.memory import STRATEGIES, count_loading_bytes, count_saving_bytes, estimate_memory
from onecurve.launcher.planning.work import Work
from onecurve.launcher.units import MIB
from onecurve.training.run_directory import PIECE_BYTES
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


def test_prediction_of_divided_models_is_within_10_percent() -> None:
    """Of whole processes on a CPU, by the kernel's count of their memory."""
    page = (ROOT / "benchmarks" / "sharding.md").read_text(encoding="utf-8").splitlines()
    header = next(line for line in page if line.startswith("| model |")).split(" | ")
    rows = [
        line.strip("| ").split(" | ")
        for line in page
        if line.startswith(tuple(f"| {size} |" for size in sharding.SHAPES))
    ]
    assert len({row[1].partition(",")[0] for row in rows}) == len(sharding.TOPOLOGIES)
    for row in rows:
        cells = dict(zip((name.strip("| ") for name in header), row, strict=True))
        planned = sharding.predict(cells["model"], cells["case"]) / sharding.GB
        assert cells["plan"].split()[0] == f"{planned:.2f}", "the arithmetic has changed: write the page again"
        assert planned == pytest.approx(float(cells["steps"].split()[-1]), rel=0.10)


def test_deepspeeds_bucket_is_whole_however_small_the_model() -> None:
    """ZeRO-3's is not: its engine gets one of the model's size."""
    shape = build_shape(BERT)
    ddp, zero, divided = (estimate_memory(shape, strategy, Work(8, 64), 8) for strategy in ("DDP", "ZeRO-2", "ZeRO-3"))
    assert zero.buffers >= 4 * 500_000_000
    assert zero.peak > ddp.peak > divided.peak


def test_a_machine_loads_a_model_for_each_process_or_each_process_its_share() -> None:
    shape = build_shape(BERT)
    whole = shape.num_parameters
    assert count_loading_bytes(shape, "DDP", "bf16", 8, 16) == 8 * 4 * whole
    assert count_loading_bytes(shape, "ZeRO-2", "bf16", 8, 16) == 8 * 6 * whole
    assert count_loading_bytes(shape, "FSDP2", "no", 8, 16, uses_dora=True) == 8 * 4 * whole
    one_tensor = 4 * max(shape.embedding_parameters, shape.layer_parameters)
    assert count_loading_bytes(shape, "FSDP2", "bf16", 8, 16) == pytest.approx(4 * whole / 2 + 8 * one_tensor, abs=100)
    assert count_loading_bytes(shape, "ZeRO-3", "bf16", 8, 16) == pytest.approx(6 * whole / 2 + 8 * one_tensor, abs=100)


def test_a_machine_holds_its_processes_shares_of_a_checkpoint() -> None:
    shape = build_shape(BERT)
    assert count_saving_bytes(shape, 8, 8) == 12 * shape.num_parameters
    assert count_saving_bytes(shape, 8, 512) == pytest.approx(12 * shape.num_parameters / 64, abs=1)
    assert count_saving_bytes(shape, 1, 2, trained_parameters=100) == 600
    assert count_saving_bytes(shape, 1, 2, in_pieces=True) == 6 * shape.num_parameters < 3 * PIECE_BYTES
    large = replace(shape, num_parameters=10**10)
    assert count_saving_bytes(large, 2, 4, in_pieces=True) == 2 * 3 * PIECE_BYTES < count_saving_bytes(large, 2, 4)
