"""A small part of the matrix of `make invariance`, and its referee's eyes: a curve that deviates is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.invariance import Cell, build_data, compare, open_folder, read_curve, train
from tools.launches import LaunchServer

CELLS = [
    pytest.param(Cell("ddp", 2, "3"), id="ddp"),
    pytest.param(Cell("ddp", 3, "256 tokens"), id="ddp on three", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "256 tokens"), id="fsdp2", marks=pytest.mark.slow),
    pytest.param(Cell("hsdp", 4, "3", "dropout, next token"), id="hsdp", marks=pytest.mark.slow),
    pytest.param(Cell("zero1", 2, "3"), id="zero1", marks=pytest.mark.slow),
    pytest.param(Cell("zero2", 2, "16"), id="zero2", marks=pytest.mark.slow),
    pytest.param(Cell("zero3", 2, "16"), id="zero3", marks=pytest.mark.slow),
    pytest.param(Cell("zero1", 2, "3", "class weights"), id="class weights", marks=pytest.mark.slow),
    pytest.param(Cell("zero2", 2, "3", "label smoothing"), id="label smoothing", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "3", "several labels"), id="several labels", marks=pytest.mark.slow),
    pytest.param(Cell("zero3", 2, "16", "regression"), id="regression", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "1", "pairs"), id="pairs", marks=pytest.mark.slow),
    pytest.param(Cell("one process", 1, "3", "next token"), id="next token", marks=pytest.mark.slow),
    pytest.param(Cell("ddp", 2, "3", "next token"), id="next token, ddp", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "256 tokens", "next token"), id="next token, fsdp2", marks=pytest.mark.slow),
    pytest.param(Cell("zero1", 2, "3", "next token"), id="next token, zero1", marks=pytest.mark.slow),
    pytest.param(Cell("zero3", 2, "1", "next token"), id="next token, zero3", marks=pytest.mark.slow),
    pytest.param(Cell("one process", 1, "3", "next token, padded"), id="padded", marks=pytest.mark.slow),
    pytest.param(Cell("ddp", 2, "256 tokens", "next token, chunks"), id="chunks, ddp", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "3", "adapter"), id="adapter, fsdp2", marks=pytest.mark.slow),
    pytest.param(Cell("zero3", 2, "16", "next token, adapter"), id="adapter, zero3", marks=pytest.mark.slow),
    pytest.param(Cell("zero2", 2, "3", "completion"), id="completion, zero2", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "3", "chat"), id="chat, fsdp2", marks=pytest.mark.slow),
    pytest.param(Cell("zero2", 2, "3", "words"), id="words, zero2", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "256 tokens", "choices"), id="choices, fsdp2", marks=pytest.mark.slow),
    pytest.param(Cell("zero3", 2, "256 tokens", "questions"), id="questions, zero3", marks=pytest.mark.slow),
    pytest.param(Cell("ddp", 2, "256 tokens", "questions"), id="questions, ddp", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "3", "text to text"), id="text to text, fsdp2", marks=pytest.mark.slow),
    pytest.param(Cell("zero3", 2, "16", "text to text, adapter"), id="text to text, zero3", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "256 tokens", "dropout, masked words"), id="masked, fsdp2", marks=pytest.mark.slow),
    pytest.param(Cell("zero3", 2, "3", "masked tokens"), id="masked, zero3", marks=pytest.mark.slow),
    pytest.param(Cell("zero3", 2, "3", "images"), id="images, zero3", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "256 tokens", "dropout, images"), id="images, fsdp2", marks=pytest.mark.slow),
    pytest.param(Cell("ddp", 2, "3", "dropout"), id="dropout, ddp", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "256 tokens", "dropout"), id="dropout, fsdp2", marks=pytest.mark.slow),
    pytest.param(Cell("zero2", 2, "1", "dropout"), id="dropout, zero2", marks=pytest.mark.slow),
    pytest.param(Cell("zero3", 2, "3", "dropout, recomputed"), id="dropout, zero3", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "3", "dropout, next token"), id="dropout, packed", marks=pytest.mark.slow),
    pytest.param(
        Cell("one process", 1, "3", "dropout, next token, padded"), id="dropout, padded", marks=pytest.mark.slow
    ),
    pytest.param(Cell("ddp", 2, "3", "dropout, choices"), id="dropout, choices", marks=pytest.mark.slow),
    pytest.param(Cell("zero2", 2, "3", "dropout, adapter"), id="dropout, adapter", marks=pytest.mark.slow),
    pytest.param(Cell("ddp", 2, "3", is_float64=True), id="ddp in float64", marks=pytest.mark.slow),
    pytest.param(Cell("fsdp2", 2, "3", is_float64=True), id="fsdp2 in float64", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def folder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("invariance")
    build_data(path)
    return path


@pytest.mark.parametrize("cell", CELLS)
def test_the_curve_is_that_of_one_process(folder: Path, cell: Cell, launch_server: LaunchServer) -> None:
    curve = train(cell, folder, launch_server.launch)
    assert len(curve.losses) == 52
    assert min(examples for examples, _ in curve.examples) < 16, "the last batch of an epoch is uneven"
    assert compare(curve, train(cell.reference, folder, launch_server.launch)).find_fault(cell.is_float64) is None


def test_a_deviation_is_seen(folder: Path, launch_server: LaunchServer) -> None:
    reference = train(Cell("one process", 1, "16"), folder, launch_server.launch)
    assert compare(reference, reference).find_fault(is_float64=True) is None
    for fault, curve in {
        "loss deviates": replace(reference, losses=reference.losses * (1 + 2e-5 * (np.arange(52) == 40))),
        "grad_norm deviates": replace(reference, grad_norms=reference.grad_norms * (1 + 2e-4)),
        "weights deviates": replace(
            reference, weights={name: value * 1.0001 for name, value in reference.weights.items()}
        ),
        "examples differ": replace(reference, examples=reference.examples[::-1]),
        "learning rates differ": replace(reference, learning_rates=reference.learning_rates[::-1]),
        "metrics differ": replace(reference, evaluation={**reference.evaluation, "eval_accuracy": 0.123}),
        "loss deviates by nan": replace(reference, losses=reference.losses * np.nan),
    }.items():
        assert fault in str(compare(curve, reference).find_fault(is_float64=False))


def test_the_last_learning_rate_is_the_schedules(folder: Path) -> None:
    output = folder / Cell("one process", 1, "16").name.replace(" ", "_").replace(",", "")
    rates = read_curve(output).learning_rates
    # Warm-up over ceil(0.1 x 52) = 6 steps, then down to one part in 46 at the last step; 0 would be the step after.
    assert rates[0] == 0
    assert rates[6] == 1e-3
    assert rates[-1] == pytest.approx(1e-3 / 46, rel=1e-12)


def test_trainings_of_another_commit_are_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "revision").write_text("0123456789ab", encoding="utf-8")
    assert open_folder(tmp_path, "0123456789ab") is None
    assert "0123456789ab" in str(open_folder(tmp_path, "fedcba987654"))
    (tmp_path / "revision").unlink()
    (tmp_path / "model").mkdir()
    assert open_folder(tmp_path, "0123456789ab") is not None
