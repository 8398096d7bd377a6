"""What was found of each token -> labels and predictions of the words of each row, and how well they agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecurve.training.tasks.tag_schemes import PLAIN, to_bioes
from onecurve.training.tasks.word_windows import NO_WORD

Array = NDArray[Any]

# Wrong words of one text.
_MOST_SHOWN = 8

_KIND = "single_label_classification"


def measured_names(tag_scheme: str) -> list[str]:
    """The metrics of labels of this scheme, without prefix."""
    from onecurve.training.tasks.metrics import entity_metric_names, metric_names

    return metric_names(_KIND) if tag_scheme == PLAIN else entity_metric_names()


def join_words(results: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Array]]]:
    """For each row its number, and by name the results of its words, in their order, from all windows of the row.

    Args:
        results: "row" of each example; of each example by name an array [tokens]: "word", which word the token begins, and
            "prediction", "score" and, in an evaluation, "label".
    """
    of_row = np.asarray(results["row"])
    borders = [0, *(np.flatnonzero(np.diff(of_row)) + 1).tolist(), len(of_row)]
    names = [name for name in ("word", "label", "prediction", "score") if name in results]
    for start, stop in pairwise(borders):
        begins = [np.asarray(words) != NO_WORD for words in results["word"][start:stop]]
        joined = {
            name: np.concatenate(
                [np.asarray(values)[here] for values, here in zip(results[name][start:stop], begins, strict=True)]
            )
            for name in names
        }
        words = joined.pop("word")
        assert np.array_equal(words, np.arange(len(words))), "each word of a row is predicted once"
        yield int(of_row[start]), joined


def show_words(
    results: Mapping[str, Any], number: int, tokens: Array, label_names: Sequence[str], tokenizer: Any
) -> dict[str, str]:
    """The text of one window, and the labels and predictions of those of its words whose prediction is wrong.

    Args:
        results: as `join_words` gets them.
        number: of the example.
        tokens: [tokens] of the example.
    """
    word, label, prediction = (np.asarray(results[name][number]) for name in ("word", "label", "prediction"))
    begins = np.flatnonzero(word != NO_WORD)
    wrong = [place for place in begins if label[place] != prediction[place]]
    more = f", and {len(wrong) - _MOST_SHOWN} more" if len(wrong) > _MOST_SHOWN else ""
    ends = dict(zip(begins.tolist(), [*begins[1:].tolist(), len(tokens)], strict=True))

    def show(found: Array) -> str:
        named = (
            (tokenizer.decode(tokens[place : ends[place]], skip_special_tokens=True).strip(), label_names[found[place]])
            for place in map(int, wrong[:_MOST_SHOWN])
        )
        return ", ".join(f"{text} {name}" for text, name in named) + more or "all right"

    return {
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "label": show(label),
        "prediction": show(prediction),
    }


class WordResults:
    """Labels and predictions of the words of an evaluation."""

    def __init__(self, results: Mapping[str, Any], label_names: Sequence[str], tag_scheme: str) -> None:
        self._rows = [words for _, words in join_words(results)]
        self._names, self._scheme = label_names, tag_scheme

    def _tags(self, kind: str) -> list[list[str]]:
        """Of each row its labels or predictions, as seqeval knows them."""
        known = [to_bioes(name) if self._scheme == "BILOU" else name for name in self._names]
        return [[known[number] for number in words[kind]] for words in self._rows]

    def _numbers(self, kind: str) -> Array:
        """[words] labels or predictions of all rows."""
        return np.concatenate([words[kind] for words in self._rows])

    def compute_metrics(self) -> dict[str, float]:
        """Of entities or, where labels are plain, of words."""
        from onecurve.training.tasks.metrics import build_entity_metric, build_metrics

        if self._scheme != PLAIN:
            found: dict[str, float] = build_entity_metric().compute(
                predictions=self._tags("prediction"), references=self._tags("label")
            )
            return found
        labels, predictions = self._numbers("label"), self._numbers("prediction")
        metrics = build_metrics(_KIND, len(self._names))
        return {
            name: value
            for metric in metrics
            for name, value in metric.compute(predictions=predictions, references=labels).items()
        }

    def report(self) -> dict[str, Any]:
        """Precision, recall, F1 and support of each kind of entity; of plain labels that of each, and the confusion matrix.

        And the calibration of the probabilities of all words.
        """
        from onecurve.training.tasks.metrics.calibration import build_calibration
        from onecurve.training.tasks.metrics.classification import build_report
        from onecurve.training.tasks.metrics.entities import build_entity_report

        label, prediction, score = (self._numbers(kind) for kind in ("label", "prediction", "score"))
        calibration = build_calibration(score, label == prediction, "the predicted label of a word")
        if self._scheme == PLAIN:
            return {
                **build_report(label, prediction, self._names, is_multi_label=False),
                "calibration": calibration,
            }
        return {
            "tag_scheme": self._scheme,
            "per_class": build_entity_report(self._tags("prediction"), self._tags("label")),
            "calibration": calibration,
        }
