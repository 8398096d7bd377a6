"""Labels mean what the data says: in the model's order where it has them, and never a list of flags by mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from onecurve.training.errors import BadInput
from onecurve.training.tasks.base import Rows
from onecurve.training.tasks.labels import (
    describe_near_duplicates,
    encode_lists,
    find_class_names,
    find_label_problem,
    read_numbers,
)
from tests.conftest import Run
from tests.messages import names, naming


def rows_of(**columns: Any) -> Rows:
    table = pa.table(columns)
    return Rows(table, np.arange(table.num_rows), "a.jsonl")


@pytest.mark.parametrize("flags", [[0, 1, 0, 0, 0], [1, 1], ["a", "b", "a"]], ids=str)
def test_a_list_that_names_a_label_twice_is_refused(flags: list[Any]) -> None:
    rows = rows_of(label=[flags[:1], flags])
    names = find_class_names(rows_of(label=[flags, [2 if isinstance(flags[0], int) else "c"]]), "label", is_list=True)
    with pytest.raises(BadInput, match=naming("a.jsonl", "row 2", "'label'")):
        encode_lists(rows, "label", names)


def test_rows_without_a_label_are_rows_of_no_label() -> None:
    assert encode_lists(rows_of(label=[[], []]), "label", ["a", "b"]).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("truth", [True, "true", "False"])
def test_a_truth_is_a_flag_and_no_number(truth: bool | str) -> None:
    rows = rows_of(a=[truth])
    assert read_numbers(rows, "a", is_indicator=True).tolist() == [float(str(truth).lower() == "true")]
    with pytest.raises(BadInput, match=naming("'a'")):
        read_numbers(rows, "a")
    assert find_label_problem(truth, "a", "regression") is not None


@pytest.mark.parametrize("label", ["nan", "inf", "one", float("nan")])
def test_what_is_no_finite_number_is_no_target(label: Any) -> None:
    assert find_label_problem(label, "a", "regression") is not None


def test_numbers_of_a_text_file_are_numbers() -> None:
    assert read_numbers(rows_of(a=["1", "0.5", "1e2"]), "a").tolist() == [1.0, 0.5, 100.0]
    with pytest.raises(BadInput, match=naming("row 2", "'a'", "one")):
        read_numbers(rows_of(a=["1", "one"]), "a")


def test_the_same_labels_in_another_order_keep_the_models(
    recipe: dict[str, Any], train: Callable[[dict[str, Any]], Run], tmp_path: Path
) -> None:
    """A model that was trained on renamed classes, whose sorted order is another one, goes on where it was."""
    first = train({**recipe, "max_train_steps": 40, "learning_rate": 5e-3})
    config = first.path / "final" / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    turned = dict(zip(sorted(content["label2id"]), sorted(content["label2id"], reverse=True), strict=True))
    content["id2label"] = {number: turned[name] for number, name in content["id2label"].items()}
    content["label2id"] = {turned[name]: number for name, number in content["label2id"].items()}
    config.write_text(json.dumps(content), encoding="utf-8")
    files = {}
    for key in ("train_file", "validation_file"):
        lines = [json.loads(line) for line in Path(recipe[key]).read_text(encoding="utf-8").splitlines()]
        turned_lines = [json.dumps({**line, "label": turned[line["label"]]}) for line in lines]
        files[key] = str(tmp_path / Path(recipe[key]).name)
        Path(files[key]).write_text("\n".join(turned_lines) + "\n", encoding="utf-8")
    again = {"model_name_or_path": str(first.path / "final"), "output_dir": str(tmp_path / "again"), **files}
    second = train({**recipe, **again, "max_train_steps": 1, "learning_rate": 1e-12})
    assert second.exit_code == 0, second.stderr
    assert second.evaluations[0]["eval_loss"] == pytest.approx(first.evaluations[-1]["eval_loss"], rel=1e-5)
    assert second.evaluations[0]["eval_accuracy"] == first.evaluations[-1]["eval_accuracy"]


@pytest.mark.parametrize(
    ("labels", "needed"),
    [
        (["neg", "pos", "pos "], ("'pos'", "'pos '")),
        (["Sport", "politics", "sport"], ("'Sport'", "'sport'")),
        (["Stra\u00dfe", "Strasse"], ("'Strasse'", "Stra\\xdfe")),
        (["caf\u00e9", "cafe\u0301", "tea"], ("caf\\xe9", "cafe\\u0301")),
        (["a b", "a\u00a0b", "c"], ("'a b'", "a\\xa0b")),
        (["a b", "a  b"], ("'a b'", "'a  b'")),
    ],
)
def test_labels_that_look_alike_are_named(labels: list[str], needed: tuple[str, ...]) -> None:
    assert names(describe_near_duplicates(labels), *needed)


@pytest.mark.parametrize("labels", [["pos", "neg"], ["0", "1"], ["007", "7"], ["a", "\u00e4"]])
def test_different_labels_are_not(labels: list[str]) -> None:
    assert describe_near_duplicates(labels) is None


def test_look_alikes_are_told_once_and_learned_as_they_are(
    recipe: dict[str, Any], train: Callable[[dict[str, Any]], Run], tmp_path: Path
) -> None:
    rows = [{"text": f"word{number}", "label": ("pos", "pos ")[number % 2]} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe |= {"train_file": str(tmp_path / "rows.jsonl"), "max_train_steps": 1}
    del recipe["validation_file"]
    for folder in ("first", "from the cache"):
        run = train({**recipe, "output_dir": str(tmp_path / folder)})
        assert run.exit_code == 0, run.stderr
        assert names(run.stdout, str(tmp_path / "rows.jsonl"), "'pos'", "'pos '")
        assert run.stdout.count("'pos '") == 1
