"""The comparison of accuracies cuts texts to many lengths, trains for real, and its arithmetic is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import accuracy


def test_texts_are_of_many_lengths_and_the_same_in_every_call(demo: Path) -> None:
    first = (accuracy.write_data() / "train.jsonl").read_text(encoding="utf-8")
    num_words = [len(json.loads(line)["text"].split()) for line in first.splitlines()]
    assert len(num_words) == 1703
    assert (min(num_words), max(num_words)) == accuracy.WORDS
    assert len(set(num_words)) == accuracy.WORDS[1] - accuracy.WORDS[0] + 1
    assert (accuracy.write_data() / "train.jsonl").read_text(encoding="utf-8") == first


@pytest.mark.slow
def test_a_way_trains(demo: Path) -> None:
    settings = list(accuracy.WAYS.values())[-1]
    found = accuracy.train({**settings, "max_train_steps": "3", "max_eval_samples": "20"}, 1, accuracy.write_data())
    assert found * 20 == pytest.approx(round(found * 20)), "a share of twenty texts"


def test_differences_are_taken_seed_by_seed() -> None:
    page = accuracy.to_markdown({"plain": [0.90, 0.96], "other": [0.91, 0.95]}, 100)
    assert "| plain | 93.00% | 90.0% to 96.0% |  |" in page
    assert "| other | 93.00% | 91.0% to 95.0% | +0.00 ± 1.00 |" in page
