"""Each example counts once on any number of processes: the same predictions to the last bit, scikit-learn's metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    precision_score,
    recall_score,
)

from onecurve.training.outcome import report_outcome
from onecurve.training.parallel.accelerator import forget_state
from onecurve.training.run import main
from tests.conftest import TINY, Launch, to_flags

NUM_EXAMPLES = 61  # A prime: no number of processes or micro-batches divides it.

Settings = dict[str, Any]


def read_rows(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.decode().splitlines()]


def check_metrics(measured: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The last bits too: both add the same numbers."""
    labels, predicted = [row["label"] for row in rows], [row["prediction"] for row in rows]
    assert measured["eval_accuracy"] == accuracy_score(labels, predicted)
    assert measured["eval_matthews_correlation"] == matthews_corrcoef(labels, predicted)
    names = ["business", "entertainment", "politics", "sports", "tech"]
    for average in ("macro", "micro", "weighted"):
        options = {"labels": names, "average": average, "zero_division": 0}
        assert measured[f"eval_precision_{average}"] == precision_score(labels, predicted, **options)
        assert measured[f"eval_recall_{average}"] == recall_score(labels, predicted, **options)
        assert measured[f"eval_f1_{average}"] == f1_score(labels, predicted, **options)


def run_here(settings: Settings) -> None:
    """One process, with one thread as the launched ones have: this one."""
    try:
        assert report_outcome(main, to_flags(settings)) == 0
    finally:
        forget_state()


@pytest.fixture(scope="module")
def trained(tiny_model: Path, news: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The settings of a finished training of one process, which an evaluation starts from."""
    settings: Settings = {
        "model_name_or_path": str(tiny_model),
        "train_file": str(news / "train.jsonl"),
        "validation_file": str(news / "validation.jsonl"),
        "output_dir": str(tmp_path_factory.mktemp("evaluation") / "run"),
        **TINY,
        "max_train_steps": 80,
        "learning_rate": 5e-3,
    }
    run_here(settings)
    # What the training wrote is not what is compared.
    (Path(settings["output_dir"]) / "eval_predictions.jsonl").unlink()
    return settings


Evaluate = Callable[[int, int], tuple[bytes, bytes]]


@pytest.fixture(scope="module")
def evaluate(trained: Settings, launch: Launch) -> Evaluate:
    """eval_predictions.jsonl and eval_report.json of (processes, per_device_batch_size), each evaluated once."""
    found: dict[tuple[int, int], tuple[bytes, bytes]] = {}

    def run(num_processes: int, per_device_batch_size: int) -> tuple[bytes, bytes]:
        key = num_processes, per_device_batch_size
        if key not in found:
            settings = {**trained, "per_device_batch_size": per_device_batch_size, "eval_only": True}
            if num_processes == 1:
                run_here(settings)
            else:
                result = launch(settings, topology="multi_cpu", num_processes=num_processes)
                assert result.exit_code == 0, result.stderr
            folder = Path(trained["output_dir"])
            written = [folder / name for name in ("eval_predictions.jsonl", "eval_report.json")]
            found[key] = written[0].read_bytes(), written[1].read_bytes()
            for path in written:
                path.unlink()
        return found[key]

    return run


@pytest.mark.parametrize("num_processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_predictions_are_the_same_bytes_on_any_number_of_processes(evaluate: Evaluate, num_processes: int) -> None:
    predictions, report = evaluate(1, 8)
    rows = read_rows(predictions)
    assert [row["index"] for row in rows] == list(range(NUM_EXAMPLES)), "each example once, in the order of the data"
    assert len({row["prediction"] for row in rows}) > 1, "the model tells classes apart"
    assert evaluate(num_processes, 8) == (predictions, report)


def test_labels_are_those_of_the_data(evaluate: Evaluate, news: Path) -> None:
    expected = [json.loads(line)["label"] for line in (news / "validation.jsonl").read_text().splitlines()]
    rows = read_rows(evaluate(1, 8)[0])
    assert [row["label"] for row in rows] == expected
    report = json.loads(evaluate(1, 8)[1])
    table = confusion_matrix(expected, [row["prediction"] for row in rows], labels=report["labels"])
    assert report["confusion_matrix"] == table.tolist()


# Micro-batches of one; and all examples in one micro-batch, so that two of three processes run a stand-in.
@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "per_device_batch_size"), [(1, 1), (2, 3), (3, 64)])
def test_another_micro_batch_size_rounds_scores_and_nothing_else(
    evaluate: Evaluate, num_processes: int, per_device_batch_size: int
) -> None:
    reference, other = (read_rows(evaluate(*key)[0]) for key in ((1, 8), (num_processes, per_device_batch_size)))
    for mine, theirs in zip(reference, other, strict=True):
        assert (mine["index"], mine["label"], mine["prediction"]) == (
            theirs["index"],
            theirs["label"],
            theirs["prediction"],
        )
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_metrics_of_several_processes_are_scikit_learns(
    trained: Settings, launch: Launch, tmp_path: Path, num_processes: int
) -> None:
    """As measured at the end of a training, on the file that it leaves."""
    settings = {**trained, "output_dir": str(tmp_path / "run")}
    run = launch(settings, topology="multi_cpu", num_processes=num_processes)
    assert run.exit_code == 0, run.stderr
    rows = read_rows((run.path / "eval_predictions.jsonl").read_bytes())
    assert [row["index"] for row in rows] == list(range(NUM_EXAMPLES))
    check_metrics(run.evaluations[-1], rows)
    assert 0.25 < run.evaluations[-1]["eval_accuracy"] < 1, "more than the largest class"
