"""The comparison of accuracies cuts texts to many lengths, trains for real, and its arithmetic is right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import permutation_test

from benchmarks import accuracy
from tools.launches import LaunchServer


def test_texts_are_of_many_lengths_and_the_same_in_every_call(demo: Path) -> None:
    first = (accuracy.write_data() / "train.jsonl").read_text(encoding="utf-8")
    num_words = [len(json.loads(line)["text"].split()) for line in first.splitlines()]
    assert len(num_words) == 1703
    assert (min(num_words), max(num_words)) == accuracy.WORDS
    assert len(set(num_words)) == accuracy.WORDS[1] - accuracy.WORDS[0] + 1
    assert (accuracy.write_data() / "train.jsonl").read_text(encoding="utf-8") == first


@pytest.mark.slow
def test_a_way_trains(demo: Path, launch_server: LaunchServer) -> None:
    settings = list(accuracy.WAYS.values())[-1]
    few = {**settings, "max_train_steps": "3", "max_eval_samples": "20", "allow_slow_bf16": "true"}
    found = accuracy.train(few, 1, accuracy.write_data(), launch_server)
    assert found * 20 == pytest.approx(round(found * 20)), "a share of twenty texts"


def test_differences_are_taken_seed_by_seed() -> None:
    section = accuracy.to_markdown("masks", {"plain": [0.90, 0.96], "other": [0.91, 0.95]}, 100)
    assert "| plain | 93.00% | 4.24 | 90.0% to 96.0% |  |  |" in section
    assert "| other | 93.00% | 2.83 | 91.0% to 95.0% | +0.00 ± 1.00 | 1.00 |" in section


@pytest.mark.parametrize(
    ("differences", "wanted"),
    [([1, 2, 3], 2 / 8), ([-1, -2, -3], 2 / 8), ([1, 2, -3], 1), ([1, -2, 3], 6 / 8), ([0, 0, 0], 1)],
    ids=str,
)
def test_chance_is_the_share_of_signs_that_differ_as_much(differences: list[float], wanted: float) -> None:
    assert accuracy.find_chance(differences) == wanted


def test_chance_is_that_of_scipy() -> None:
    differences = np.random.default_rng(0).normal(0.3, 1, 10)
    wanted = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=2000)
    assert accuracy.find_chance(list(differences)) == pytest.approx(wanted.pvalue, abs=1e-9)


def test_a_section_takes_the_place_of_its_own() -> None:
    page = "# Title\n\n## One\n\nold\n\n## Two\n\nkept\n"
    assert accuracy.replace_section(page, "## One\n\nnew\n") == page.replace("old", "new")
    assert accuracy.replace_section(page, "## Three\n\nmore\n") == page + "\n## Three\n\nmore\n"
