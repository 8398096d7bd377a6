"""Multiple choice: rows of different numbers of choices, the loss of transformers, bad rows by their number."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score

from onecurve.training.config import load_recipe
from onecurve.training.outcome import report_outcome
from onecurve.training.tasks.multiple_choice import MultipleChoiceRecipe
from tests.conftest import TINY, Launch, Run, to_flags
from tests.messages import names
from tests.training.conftest import assert_refused, stop_and_resume

Settings = dict[str, Any]
Train = Callable[[Settings], Run]
Rows = list[dict[str, Any]]


def write(folder: Path, rows: Rows, name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


def read(path: Path | str) -> Rows:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def build_rows(path: Path) -> Rows:
    """Two to five choices; the right one is the one that writes the context's first word."""
    rows = []
    texts = [row["text"].split() for row in read(path)]
    for number, words in enumerate(texts):
        count = 2 + number % 4
        right = number * 7 % count
        choices = [" ".join(texts[number - each - 1][: 1 + (number + each) % 9]) + " good" for each in range(count)]
        choices[right] = " ".join([words[0], *words[2 : 3 + number % 5], "bad"])
        rows.append({"context": " ".join(words), "choices": choices, "label": right})
    return rows


@pytest.fixture
def choices(tiny_model: Path, news: Path, tmp_path: Path) -> Settings:
    """Settings of a training that takes a second."""
    return {
        "task": "multiple_choice",
        "model_name_or_path": str(tiny_model),
        "train_file": write(tmp_path, build_rows(news / "train.jsonl"), "train.jsonl"),
        "validation_file": write(tmp_path, build_rows(news / "validation.jsonl"), "validation.jsonl"),
        "output_dir": str(tmp_path / "run"),
        **TINY,
    }


def build_recipe() -> MultipleChoiceRecipe:
    recipe = load_recipe(None, {"task": "multiple_choice", "model_name_or_path": "m", "train_file": "t.jsonl"}).recipe
    assert isinstance(recipe, MultipleChoiceRecipe)
    return recipe


def predict(run: Run, source: Path, target: Path, *more: str) -> tuple[int, Rows]:
    from onecurve.training import predict

    words = ["--run", str(run.path), "--input", str(source), "--output", str(target), *more]
    code = report_outcome(predict.main, words)
    return code, read(target) if target.exists() else []


def test_it_learns_and_its_accuracy_is_that_of_scikit_learn(choices: Settings, train: Train) -> None:
    run = train({**choices, "max_train_steps": 60, "learning_rate": 3e-3, "metric_for_best_model": "eval_accuracy"})
    assert run.exit_code == 0, run.stderr
    lines = read(run.path / "eval_predictions.jsonl")
    rows = read(choices["validation_file"])
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    found = accuracy_score([line["label"] for line in lines], [line["prediction"] for line in lines])
    report = run.read("eval_report.json")
    assert report["metrics"]["eval_accuracy"] == found
    for each in report["hardest"]:
        assert each["label"] == f"choice {rows[each['example']]['label']}"
        assert each["text"].count("\n") == len(rows[each["example"]]["choices"]), "what they share, and each"
    assert found > 0.9, "chance is 0.32"
    weights = load_file(run.path / "final" / "model.safetensors")
    assert weights["classifier.bias"].item() == 0, "it adds the same to all choices, and would learn what is rounded"
    assert "pipeline_tag: multiple-choice" in (run.path / "final" / "README.md").read_text(encoding="utf-8")


def load_plain(path: str) -> Any:
    from transformers import AutoModelForMultipleChoice, set_seed

    set_seed(42)
    return AutoModelForMultipleChoice.from_pretrained(
        path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).eval()


def score(model: Any, tokenizer: Any, row: dict[str, Any]) -> torch.Tensor:
    """[1, choices] logits by plain transformers, as run_swag encodes a row."""
    contexts = [row["context"]] * len(row["choices"])
    batch = tokenizer(contexts, row["choices"], truncation=True, max_length=64, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits: torch.Tensor = model(**{name: values[None] for name, values in batch.items()}).logits
    return logits


def test_the_loss_is_that_of_transformers(choices: Settings, train: Train, tmp_path: Path) -> None:
    """A step over all the data, against the mean over rows that transformers takes one by one; and four at once, of four."""
    from transformers import AutoTokenizer

    rows = read(choices["train_file"])
    tokenizer = AutoTokenizer.from_pretrained(choices["model_name_or_path"])
    model = load_plain(choices["model_name_or_path"])
    run = train({**choices, "train_batch_size": len(rows), "max_train_steps": 1})
    losses = [
        torch.nn.functional.cross_entropy(score(model, tokenizer, row), torch.tensor([row["label"]])).item()
        for row in rows
    ]
    assert run.losses[0] == pytest.approx(np.mean(losses), rel=1e-6)

    four = [row for row in rows if len(row["choices"]) == 4][:16]
    settings = {**choices, "train_file": write(tmp_path, four, "four.jsonl"), "output_dir": str(tmp_path / "four")}
    run = train({**settings, "train_batch_size": 16, "per_device_batch_size": 16, "max_train_steps": 1})
    contexts = [row["context"] for row in four for _ in range(4)]
    seconds = [choice for row in four for choice in row["choices"]]
    batch = tokenizer(contexts, seconds, truncation=True, max_length=64, padding=True, return_tensors="pt")
    inputs = {name: values.view(16, 4, -1) for name, values in batch.items()}
    with torch.no_grad():
        loss = model(**inputs, labels=torch.tensor([row["label"] for row in four])).loss.item()
    assert run.losses[0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_choices_become_sequences_that_are_padded_where_the_tokenizer_says(side: str) -> None:
    from types import SimpleNamespace

    from onecurve.training.data.layout import Collator
    from onecurve.training.tasks.multiple_choice import MultipleChoice

    task = MultipleChoice(build_recipe())
    collator = Collator(task, SimpleNamespace(padding_side=side, pad_token_id=9))
    batch = collator({"input_ids": [[1, 2, 3], [4, 5, 6, 7]], "sizes": [[1, 2], [1, 1, 2]]})
    right = [[1, 9], [2, 3], [4, 9], [5, 9], [6, 7]]
    left = [[9, 1], [2, 3], [9, 4], [9, 5], [6, 7]]
    assert batch["input_ids"].tolist() == (left if side == "left" else right)
    assert batch["attention_mask"].tolist() == [
        [int(token != 9) for token in row] for row in batch["input_ids"].tolist()
    ]
    assert batch["is_choice"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["places"][0, :2].tolist() == [0, 1]
    assert batch["places"][1].tolist() == [2, 3, 4]


def test_choices_of_other_lengths_are_masked_though_rows_are_as_long() -> None:
    from types import SimpleNamespace

    from onecurve.training.data.layout import Collator, Layout
    from onecurve.training.tasks.multiple_choice import MultipleChoice

    task = MultipleChoice(build_recipe())
    collator = Collator(task, SimpleNamespace(padding_side="right", pad_token_id=9), Layout(mask="padding"))
    batch = collator({"input_ids": [[1, 2, 3], [4, 5, 6]], "sizes": [[1, 2], [2, 1]]})
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1], [1, 1], [1, 0]]
    assert collator({"input_ids": [[1, 2], [4, 5]], "sizes": [[1, 1], [1, 1]]})["attention_mask"] is None


def test_dropout_is_that_of_the_row_whatever_the_micro_batches_are(
    choices: Settings, train: Train, tmp_path: Path
) -> None:
    del choices["dropout"]
    runs = [
        train({**choices, "per_device_batch_size": size, "output_dir": str(tmp_path / f"by_{size}")})
        for size in (16, 3)
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
    assert "statistically" not in runs[0].stdout + runs[0].stderr
    still = train({**choices, "dropout": 0.0, "output_dir": str(tmp_path / "still")})
    assert still.losses[0] != pytest.approx(runs[0].losses[0], rel=1e-5), "it is on"


def test_it_resumes_to_the_same_bits(choices: Settings, train: Train, tmp_path: Path) -> None:
    del choices["dropout"]
    whole = train({**choices, "output_dir": str(tmp_path / "whole")})
    resumed = stop_and_resume(train, choices, tmp_path)
    assert resumed.losses == whole.losses


def test_it_predicts_what_transformers_does(choices: Settings, train: Train, tmp_path: Path) -> None:
    from transformers import AutoModelForMultipleChoice, AutoTokenizer

    run = train({**choices, "max_train_steps": 20})
    given = [{**row, "label": None} for row in read(choices["validation_file"])[:9]]
    code, labelled = predict(run, Path(write(tmp_path, given, "in.jsonl")), tmp_path / "out.jsonl")
    assert code == 0
    model = AutoModelForMultipleChoice.from_pretrained(run.path / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.path / "final")
    for row, found in zip(given, labelled, strict=True):
        expected = score(model, tokenizer, row).softmax(-1)[0]
        assert found["probabilities"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert found["prediction"] == int(expected.argmax())
        assert {name: found[name] for name in row} == row


def test_check_knows_the_task(choices: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    from onecurve.training import check

    assert report_outcome(check.main, to_flags(choices)) == 0
    assert any(line.startswith("data") and "203 rows" in line for line in capsys.readouterr().out.splitlines())


def test_choices_may_stand_in_columns_with_a_question_before_them(
    choices: Settings, train: Train, tmp_path: Path
) -> None:
    """The columns of SWAG; letters and text of CSV as labels; an empty last cell is no choice."""
    rows = read(choices["train_file"])[:40]
    whole = [{**row, "choices": [f"It is {choice}" for choice in row["choices"][:3]]} for row in rows]
    whole = [row for row in whole if row["label"] < len(row["choices"])]
    one = train({**choices, "train_file": write(tmp_path, whole), "max_train_steps": 2, "validation_fraction": 0.2})
    for number, labels in enumerate(("012", "ABC")):
        path = tmp_path / f"rows{number}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["sent1", "sent2", "ending0", "ending1", "ending2", "gold"])
            for row in whole:
                endings = [choice.removeprefix("It is ") for choice in row["choices"]]
                writer.writerow([row["context"], "It is", *(endings + [""] * 3)[:3], labels[row["label"]]])
        keys = {"context_column": "sent1", "question_column": "sent2", "label_column": "gold"}
        endings_keys = {"choice_columns": ["ending0", "ending1", "ending2"]}
        settings = {**choices, **keys, **endings_keys, "train_file": str(path), "validation_file": str(path)}
        run = train({**settings, "max_train_steps": 2, "output_dir": str(tmp_path / f"run{number}")})
        assert run.exit_code == 0, run.stderr
        assert run.losses == one.losses


GOOD: Rows = [
    {"context": "It rains.", "choices": ["Take a coat.", "Swim."], "label": number % 2} for number in range(12)
]


def change(row: dict[str, Any]) -> Rows:
    return [*GOOD[:6], {**GOOD[0], **row}, *GOOD[6:]]


BAD_ROWS = {
    "no context": (change({"context": None}), ("row 7", "'context'")),
    "an empty context": (change({"context": " "}), ("row 7", "'context'")),
    "no choices": (change({"choices": None}), ("row 7", "'choices'")),
    "one choice": (change({"choices": ["a"], "label": 0}), ("row 7", "one choice")),
    "an empty list": (change({"choices": [], "label": 0}), ("row 7", "no choices")),
    "an empty choice": (change({"choices": ["a", " "]}), ("row 7", "choice 1", "'choices'")),
    "a choice that is null": (change({"choices": ["a", None]}), ("row 7", "choice 1")),
    "no label": (change({"label": None}), ("row 7", "'label'")),
    "a label too large": (change({"label": 2}), ("row 7", "choice 2", "has 2")),
    "a negative label": (change({"label": -1}), ("row 7", "choice -1")),
    "choices that are a text": ([{**row, "choices": "a, b"} for row in GOOD], ("row 1", "'choices'", "choice_columns")),
    "choices that are numbers": ([{**row, "choices": [1, 2]} for row in GOOD], ("row 1", "choice 0")),
    "the text of a choice": ([{**row, "label": "Swim."} for row in GOOD], ("row 1", "'label'", "'Swim.'")),
    "a decimal label": ([{**row, "label": 0.5} for row in GOOD], ("row 1", "0.5")),
    "a label that is true": ([{**row, "label": True} for row in GOOD], ("row 1", "True")),
    "a context that is a list": ([{**row, "context": ["a"]} for row in GOOD], ("row 1", "'context'")),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_refused_by_its_number(choices: Settings, train: Train, tmp_path: Path, fault: str) -> None:
    rows, needed = BAD_ROWS[fault]
    run = train({**choices, "train_file": write(tmp_path, rows)})
    assert_refused(run, "rows.jsonl", *needed)


BAD_KEYS: dict[str, tuple[Settings, tuple[str, ...]]] = {
    "a column that is two things": ({"label_column": "context"}, ("label_column", "'context'")),
    "a choice twice": ({"choice_columns": ["choices", "choices"]}, ("choice_columns", "'choices'")),
    "no choices": ({"choice_columns": []}, ("choice_columns",)),
    "no such column": ({"context_column": "contxt"}, ("context_column", "context")),
    "a key of another task": ({"text_column": "context"}, ("text_column", "text_classification")),
    "a metric that is none": ({"metric_for_best_model": "eval_f1"}, ("metric_for_best_model", "eval_accuracy")),
    "a head that was not trained": ({"eval_only": True}, ("--eval_only",)),
}


@pytest.mark.parametrize("fault", BAD_KEYS)
def test_a_bad_key_is_refused(choices: Settings, train: Train, fault: str) -> None:
    keys, needed = BAD_KEYS[fault]
    run = train({**choices, **keys})
    assert_refused(run, *needed)


def test_a_gap_between_columns_of_choices_is_refused(choices: Settings, train: Train, tmp_path: Path) -> None:
    (tmp_path / "gap.csv").write_text("context,a,b,c,label\nx,1,2,3,0\ny,1,,3,0\n", encoding="utf-8")
    files = dict.fromkeys(("train_file", "validation_file"), str(tmp_path / "gap.csv"))
    run = train({**choices, **files, "choice_columns": ["a", "b", "c"]})
    assert run.exit_code == 2
    assert names(run.stderr, "gap.csv", "row 2", "'b'")


def test_what_may_be_a_mistake_is_said(choices: Settings, train: Train, tmp_path: Path) -> None:
    rows = [
        {"context": "a", "choices": ["b " * 99, "b " * 98 + "c", "d"], "label": 1 + number % 2} for number in range(20)
    ]
    path = write(tmp_path, rows)
    run = train({**choices, "train_file": path, "validation_file": path, "max_train_steps": 1})
    assert run.exit_code == 0, run.stderr
    assert names(run.stdout + run.stderr, "'label'", "choice 0")
    assert names(run.stdout + run.stderr, "row 1", "max_length", "64")


@pytest.mark.slow
def test_an_adapter_learns_predicts_and_is_merged(choices: Settings, train: Train, tmp_path: Path) -> None:
    from transformers import AutoModelForMultipleChoice

    from onecurve.training import merge

    run = train({**choices, "adapter": "lora", "lora_r": 4, "max_train_steps": 30, "learning_rate": 5e-3})
    assert run.exit_code == 0, run.stderr
    code, labelled = predict(run, Path(choices["validation_file"]), tmp_path / "out.jsonl")
    assert code == 0
    lines = read(run.path / "eval_predictions.jsonl")
    assert [row["prediction"] for row in labelled] == [line["prediction"] for line in lines]
    assert report_outcome(merge.main, [f"--run={run.path}", f"--output={tmp_path / 'merged'}"]) == 0
    AutoModelForMultipleChoice.from_pretrained(tmp_path / "merged")


@pytest.mark.slow
def test_two_processes_write_the_same_predictions(choices: Settings, launch: Launch, tmp_path: Path) -> None:
    one = launch({**choices, "output_dir": str(tmp_path / "one")})
    two = launch({**choices, "output_dir": str(tmp_path / "two")}, "multi_cpu", 2)
    assert two.exit_code == 0, two.stderr
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    found = [read(run.path / "eval_predictions.jsonl") for run in (one, two)]
    assert [line["prediction"] for line in found[0]] == [line["prediction"] for line in found[1]]
