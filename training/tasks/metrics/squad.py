"""Exact match and F1 of answers, as SQuAD's official scripts define them: version 1.1, and 2.0 for questions without an answer.

Rajpurkar et al. 2016 (1.1) and 2018 (2.0). Shares are percentages, as the scripts give them, and are added up in the same
order, so that the figures are theirs to the last digit.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """A text without case, ASCII punctuation, English articles and superfluous spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def score_answer(prediction: str, answers: Sequence[str], has_unanswerable: bool) -> tuple[int, float]:
    """Exact match (0 or 1) and F1 (0 to 1): each the best over all answers.

    Args:
        answers: right ones; none of a question that has none.
        has_unanswerable: count as version 2.0 does: an answer of which nothing is left when it is normalized does not count,
            and a question without one is answered by a text of which nothing is left.
    """
    if has_unanswerable:
        answers = [answer for answer in answers if normalize_answer(answer)] or [""]
    pairs = [(normalize_answer(prediction), normalize_answer(answer)) for answer in answers]
    exact = max(int(predicted == answer) for predicted, answer in pairs)
    return exact, max(_score_words(predicted.split(), answer.split(), has_unanswerable) for predicted, answer in pairs)


def _score_words(predicted: list[str], answer: list[str], has_unanswerable: bool) -> float:
    if has_unanswerable and not (predicted and answer):
        return float(predicted == answer)
    common = sum((Counter(predicted) & Counter(answer)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(answer)
    return (2 * precision * recall) / (precision + recall)


def find_best_threshold(
    gains: Sequence[float], null_diffs: Sequence[float], num_unanswerable: int
) -> tuple[float, float]:
    """The best mean score that a threshold could give, as a percentage, and that threshold: version 2.0's `find_best_thresh`.

    Args:
        gains: of each question, what the score gains when its best answer is given: the answer's score, and -1 of a question
            that has none.
        null_diffs: of each question, how much likelier no answer is than that one. Above the threshold none is given.
        num_unanswerable: questions without an answer; without any prediction that is the score.
    """
    total: float = num_unanswerable
    best, threshold = total, 0.0
    for number in sorted(range(len(gains)), key=null_diffs.__getitem__):
        total += gains[number]
        if total > best:
            best, threshold = total, float(null_diffs[number])
    return 100.0 * best / len(gains), threshold
