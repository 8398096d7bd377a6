"""The benchmarks of causal language models count what is learned, and their pages say what was measured."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.causal_lm_data import CHAT
from benchmarks.causal_lm_page import to_table
from benchmarks.causal_lm_ways import NO_TARGET, Gate, PlannedBatches, Work
from benchmarks.peers import FirstStep, to_rows
from onecurve.training.data.plan import Order
from tests.benchmarks.test_speed import run_benchmark


def test_padding_and_what_is_not_learned_are_no_work() -> None:
    gate = Gate()
    gate.forget()
    labels = torch.tensor([[NO_TARGET, 4, 5], [NO_TARGET, 6, NO_TARGET]])
    gate.work.add(5, labels.numel(), labels)
    assert gate.describe() == {"tokens": 5, "places": 6, "targets": 3}
    gate.forget()
    assert gate.describe() == vars(Work(0, 0, 0))


def test_ratios_are_taken_within_a_round_and_by_tokens_without_padding() -> None:
    ours = [make_turn(seconds=1.0), make_turn(seconds=4.0)]
    theirs = [make_turn(seconds=2.0, places=200), make_turn(seconds=8.0, places=200, targets=20)]
    pair = {"ours": ours, "theirs": theirs, "ready": {"e": {"target_share": 0.4}}}
    table = to_table({"workload": "dialogues", "precision": "no", "pairs": {"t": pair}, "machine": {}})
    own, row = (next(line for line in table if line.startswith(f"| {way} ")) for way in "et")
    assert "| 62 | 25 | 0.0% |" in own
    assert "| 31 | 12 | 50.0% |" in row, "whatever the targets of a few steps are"
    assert row.count("2.00 (2.00 to 2.00)") == 2, "by tokens, in seconds and in processor time"


def make_turn(seconds: float, places: int = 100, targets: int = 40) -> dict[str, Any]:
    return {
        "seconds": seconds, "cpu_seconds": seconds, "tokens": 100, "places": places, "targets": targets, "peak_bytes": 0
    }  # fmt: skip


def test_a_rival_can_have_the_very_batches_of_onecurve() -> None:
    order = Order(10, 4, 42, np.arange(10), 1)
    rows = PlannedBatches(order)
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        assert len(found := list(rows)) == len(rows) == 10
        for number in range(3):
            expected = order.global_batch(3 * epoch + number).tolist()
            assert found[4 * number : 4 * (number + 1)] == expected


def test_a_peer_is_as_far_off_as_its_distance_from_the_referee() -> None:
    rows = to_rows({(1, 4): {"referee": FirstStep(2.0, 0.5), "Trainer": FirstStep(8.0, 0.5)}})
    assert rows[0][:2] == ["1 x 4", "Trainer"]
    assert [rows[0][3], rows[0][5]] == ["3.0e+00", "0.0e+00"]
    assert rows[-1][1] == "referee"


@pytest.mark.slow
@pytest.mark.skipif(not (CHAT / "complete").exists(), reason="`make demo-chat` builds the tokenizer")
def test_every_way_takes_its_turn() -> None:
    pytest.importorskip("trl")
    result = run_benchmark("causal_lm", ["--quick", "--rounds", "1", "--rivals", "fp"])
    assert result.returncode == 0, result.stderr
    rows = dict(re.findall(r"^\| ([a-z]) .*? \| ([\d.,% |]+)", result.stdout, re.MULTILINE))
    assert list(rows) == ["e", "f", "p"]
    assert "| 0.0% |" in rows["e"]
    assert "| 0.0% |" in rows["p"]


@pytest.mark.slow
@pytest.mark.skipif(not (CHAT / "complete").exists(), reason="`make demo-chat` builds the tokenizer")
def test_an_adapter_of_trl_has_the_same_batches() -> None:
    """Else the benchmark ends with an error: their tokens are compared turn by turn."""
    pytest.importorskip("trl")
    result = run_benchmark("causal_lm", ["--quick", "--adapter", "--rounds", "1", "--rivals", "t"])
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^\| ([a-z]) ", result.stdout, re.MULTILINE) == ["e", "t"]


@pytest.mark.slow
@pytest.mark.skipif(not (CHAT / "complete").exists(), reason="`make demo-chat` builds the tokenizer")
def test_the_arithmetic_is_part_of_a_step() -> None:
    pytest.importorskip("trl")
    result = run_benchmark("causal_lm_ceiling", ["quick"])
    assert result.returncode == 0, result.stderr
    rows = re.findall(
        r"^\| ([a-z]) \| ([\d.]+) ms \| ([\d.]+) ms \| ([\d.]+) ms \| ([\d.]+) \|$", result.stdout, re.MULTILINE
    )
    assert [way for way, *_ in rows] == ["t", "e"]
    for _, products, attention, other, ratio in rows:
        assert min(float(products), float(attention), float(other)) > 0
        assert float(ratio) > 1
