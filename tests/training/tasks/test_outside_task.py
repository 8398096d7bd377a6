"""A task that lives in one file outside the project trains, evaluates, predicts and resumes; nothing else knows of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecurve.training.outcome import report_outcome
from tests.conftest import Launch, Run
from tests.training.conftest import stop_and_resume

VOWELS = '''
"""Tags each token: does it begin with a vowel? Targets as long as the text; padding and special tokens have none."""

from pydantic import Field

from onecurve.training.recipe import Recipe
from onecurve.training.tasks.base import NO_TARGET, Forward, Task


class VowelsRecipe(Recipe):
    text_column: str = Field("text", description="column with the text")
    vowels: str = Field("aeiou", description="letters that count")


class Vowels(Task):
    recipe_class = VowelsRecipe
    main_metrics = ("loss", "token_accuracy")
    auto_class = "AutoModelForTokenClassification"
    ragged_results = frozenset({"label", "prediction"})

    @classmethod
    def columns(cls, recipe, with_targets=True):
        return {"text_column": [recipe.text_column]}

    def metric_names(self):
        return ["token_accuracy"]

    def encode(self, rows, tokenizer, with_targets=True):
        texts = rows.values(self.recipe.text_column)
        encoded = tokenizer(texts, truncation=True, max_length=self.recipe.max_length, return_special_tokens_mask=True)
        examples = {"input_ids": encoded["input_ids"]}
        if with_targets:
            words = [tokenizer.convert_ids_to_tokens(row) for row in encoded["input_ids"]]
            examples["labels"] = [
                [NO_TARGET if special else int(word[0] in self.recipe.vowels) for word, special in zip(row, mask)]
                for row, mask in zip(words, encoded["special_tokens_mask"])
            ]
        return examples

    def counts(self, examples):
        return [(row != NO_TARGET).sum() for row in examples["labels"][:]]

    def forward(self, model, batch, wants_results=False):
        import torch.nn.functional as F

        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        results = {"prediction": logits.argmax(-1)} if wants_results else {}
        if "labels" not in batch:
            return Forward(None, results)
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=NO_TARGET, reduction="none")
        return Forward(losses.sum(-1), {**results, "label": batch["labels"]} if wants_results else {})

    def compute_metrics(self, results):
        pairs = [pair for rows in zip(results["label"], results["prediction"]) for pair in zip(*rows) if pair[0] >= 0]
        return {"token_accuracy": sum(label == prediction for label, prediction in pairs) / len(pairs)}

    def describe_predictions(self, results):
        return [{"prediction": row.tolist()} for row in results["prediction"]]

    def prediction_example(self):
        return {"prediction": [0]}
'''

Settings = dict[str, Any]
Train = Callable[[Settings], Run]


@pytest.fixture
def vowels(recipe: Settings, tmp_path: Path) -> Settings:
    lines = VOWELS.strip().splitlines()
    assert len(lines) <= 60
    (tmp_path / "vowels.py").write_text(VOWELS, encoding="utf-8")
    return {**recipe, "task": f"{tmp_path / 'vowels.py'}:Vowels", "max_train_steps": 30, "learning_rate": 1e-2}


def test_it_trains_evaluates_and_describes(vowels: Settings, train: Train) -> None:
    run = train({**vowels, "metric_for_best_model": "eval_token_accuracy", "eval_steps": 10})
    assert run.exit_code == 0, run.stderr
    accuracies = [line["eval_token_accuracy"] for line in run.evaluations]
    assert len(accuracies) == 3
    assert accuracies[-1] > 0.9, "vowels are easily learned"
    lines = (run.path / "eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(61))
    assert run.read("environment.json")["main_metrics"] == ["loss", "token_accuracy"]
    assert "vowels: aeiou  # default" in (run.path / "config.yaml").read_text(encoding="utf-8")


def test_two_processes_learn_the_same(vowels: Settings, train: Train, launch: Launch, tmp_path: Path) -> None:
    one = train({**vowels, "per_device_batch_size": 16})
    two = launch({**vowels, "output_dir": str(tmp_path / "two"), "per_device_batch_size": 3}, "multi_cpu", 2)
    assert two.exit_code == 0, two.stderr
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert [line["grad_norm"] for line in two.steps] == pytest.approx(
        [line["grad_norm"] for line in one.steps], rel=1e-4
    )
    one_eval, two_eval = one.evaluations[-1], two.evaluations[-1]
    assert two_eval["eval_token_accuracy"] == one_eval["eval_token_accuracy"]
    assert two_eval["eval_loss"] == pytest.approx(one_eval["eval_loss"], rel=1e-5)


def test_the_loss_is_the_mean_over_all_targets_of_the_step(vowels: Settings, train: Train) -> None:
    """A step over all the data, against one evaluation of it before anything is learned."""
    whole = {**vowels, "train_batch_size": 203, "max_train_steps": 1, "validation_file": vowels["train_file"]}
    run = train({**whole, "learning_rate": 1e-12})
    assert run.losses[0] == pytest.approx(run.evaluations[0]["eval_loss"], rel=1e-6)


def test_it_resumes(vowels: Settings, train: Train, tmp_path: Path) -> None:
    whole = train({**vowels, "output_dir": str(tmp_path / "whole")})
    resumed = stop_and_resume(train, vowels, tmp_path)
    assert resumed.losses == whole.losses


def test_it_predicts(vowels: Settings, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onecurve.training import predict

    run = train(vowels)
    rows = [{"text": "an apple"}, {"text": "one more pear here"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--run", str(run.path), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert report_outcome(predict.main, words) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert found[0]["prediction"][1:3] == [1, 1]
    assert found[1]["prediction"][1:5] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("task", "named"),
    [
        ("nowhere.py:Vowels", "nowhere.py"),
        ("{folder}/vowels.py:Consonants", "Consonants"),
        ("{folder}/broken.py:Task", "ZeroDivisionError"),
        ("text_clasification", "text_classification"),
    ],
)
def test_a_task_that_is_not_there_is_refused(
    vowels: Settings, train: Train, tmp_path: Path, task: str, named: str
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    run = train({**vowels, "task": task.format(folder=tmp_path)})
    assert run.exit_code == 2
    assert named in run.stderr
    assert not run.path.exists()


def test_its_keys_are_checked_as_all_others(vowels: Settings, train: Train) -> None:
    run = train({**vowels, "vowel": "ae"})
    assert run.exit_code == 2
    assert "vowels" in run.stderr
    run = train({**vowels, "label_smoothing_factor": 0.1})
    assert run.exit_code == 2
    assert "text_classification" in run.stderr
