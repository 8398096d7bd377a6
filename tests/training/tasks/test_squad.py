"""Exact match and F1 are the official scripts', to the last digit: both are written again here, as the scripts have them."""

from __future__ import annotations

import collections
import random
import re
import string

import pytest

from onecurve.training.tasks.metrics.squad import find_best_threshold, normalize_answer, score_answer


def official_normalize(text: str) -> str:
    def without_articles(part: str) -> str:
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", part)

    kept = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(without_articles(kept).split())


def official_f1_of_1_1(prediction: str, truth: str) -> float:
    predicted, wanted = official_normalize(prediction).split(), official_normalize(truth).split()
    same = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(predicted), 1.0 * same / len(wanted)
    return (2 * precision * recall) / (precision + recall)


def official_f1_of_2_0(prediction: str, truth: str) -> float:
    predicted, wanted = official_normalize(prediction).split(), official_normalize(truth).split()
    if len(wanted) == 0 or len(predicted) == 0:
        return int(wanted == predicted)
    return official_f1_of_1_1(prediction, truth)


WORDS = [
    "the",
    "The",
    "a",
    "Paris,",
    "paris",
    "PARIS!",
    "œuvre",
    "l'été",
    "don't",
    "an",
    "—",
    "...",
    "of",
    "東京",
    "12.5",
    " ",
]


def make_pairs(may_be_empty: bool) -> list[tuple[str, list[str]]]:
    generator = random.Random(0)

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(0, 6)))

    return [(text(), [text() for _ in range(generator.randint(0 if may_be_empty else 1, 3))]) for _ in range(2_000)]


def test_version_1_1() -> None:
    found, expected = [], []
    for prediction, answers in make_pairs(may_be_empty=False):
        found.append(score_answer(prediction, answers, has_unanswerable=False))
        exact = max(official_normalize(prediction) == official_normalize(answer) for answer in answers)
        expected.append((exact, max(official_f1_of_1_1(prediction, answer) for answer in answers)))
    assert found == expected
    assert {0, 1} < {f1 for _, f1 in found}, "also partly right ones"


def test_version_2_0() -> None:
    found, expected = [], []
    for prediction, answers in make_pairs(may_be_empty=True):
        found.append(score_answer(prediction, answers, has_unanswerable=True))
        kept = [answer for answer in answers if official_normalize(answer)] or [""]
        exact = max(int(official_normalize(prediction) == official_normalize(answer)) for answer in kept)
        expected.append((exact, max(official_f1_of_2_0(prediction, answer) for answer in kept)))
    assert found == expected


def test_what_is_left_of_an_answer() -> None:
    assert normalize_answer("  The  U.S. of a  ") == "us of"
    assert normalize_answer("anthem «Œuvre»") == "anthem «œuvre»", "only ASCII punctuation, only whole articles"


def test_the_best_threshold() -> None:
    """Four questions, the third and fourth without an answer: giving the first two is best, up to 0.5."""
    assert find_best_threshold([1.0, 0.5, -1, -1], [-3.0, 0.5, 0.7, 9.0], 2) == (87.5, 0.5)
    assert find_best_threshold([0.5, -1], [0.0, -1.0], 1) == (50.0, 0.0), "giving none is best: the script's 0"


@pytest.mark.parametrize(("diffs", "best"), [([1.0, 1.0, 2.0], 1.0), ([2.0, 1.0, 1.0], 2.0)])
def test_ties_are_taken_in_the_order_of_the_data(diffs: list[float], best: float) -> None:
    assert find_best_threshold([1.0, 1.0, 1.0], diffs, 0) == (100.0, 2.0)
    assert find_best_threshold([1.0, 1.0, -1.0] if best == 1.0 else [-1.0, 1.0, 1.0], diffs, 1) == (100.0, 1.0)
