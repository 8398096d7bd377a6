"""The text classification family: kinds of label, pairs, weights, smoothing, decoders; every format of input."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef, mean_squared_error

from onecurve.training.data.columns import open_examples
from tests.conftest import ROOT, Run
from tests.messages import names

Train = Callable[[Mapping[str, Any]], Run]
Settings = dict[str, Any]


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def rows(news: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: read_rows(news / f"{split}.jsonl") for split in ("train", "validation")}


def use(recipe: Settings, folder: Path, splits: Mapping[str, list[dict[str, Any]]]) -> Settings:
    files = {f"{split}_file": write_rows(folder / f"{split}.jsonl", rows) for split, rows in splits.items()}
    return {**recipe, **files, "max_train_steps": 40, "learning_rate": 3e-3}


# Kinds of label ------------------------------------------------------------------------------------------------------


def test_one_label(recipe: Settings, train: Train) -> None:
    run = train({**recipe, "max_train_steps": 60, "learning_rate": 3e-3})
    assert run.exit_code == 0, run.stderr
    predictions = read_rows(run.path / "eval_predictions.jsonl")
    labels, predicted = [row["label"] for row in predictions], [row["prediction"] for row in predictions]
    measured = run.evaluations[-1]
    assert measured["eval_accuracy"] == accuracy_score(labels, predicted)
    assert measured["eval_f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=0)
    assert measured["eval_matthews_correlation"] == matthews_corrcoef(labels, predicted)
    assert measured["eval_accuracy"] > 0.3
    report = run.read("eval_report.json")
    assert report["confusion_matrix"] == confusion_matrix(labels, predicted, labels=report["labels"]).tolist()
    assert set(report["per_class"]) == {"business", "entertainment", "politics", "sports", "tech"}
    assert set(report["per_class"]["tech"]) == {"precision", "recall", "f1-score", "support"}
    scores, is_right = np.array([row["score"] for row in predictions]), np.array(labels) == np.array(predicted)
    bins = [(scores >= low / 10) & (scores < (low + 1) / 10) for low in range(10)]
    error = sum(abs(scores[here].mean() - is_right[here].mean()) * here.mean() for here in bins if here.any())
    assert report["calibration"]["error"] == pytest.approx(error)
    assert [each["count"] for each in report["calibration"]["bins"]] == [here.sum() for here in bins if here.any()]
    hardest = report["hardest"]
    assert len(hardest) == 20
    assert [each["loss"] for each in hardest] == sorted((each["loss"] for each in hardest), reverse=True)
    texts = [row["text"] for row in read_rows(Path(recipe["validation_file"]))]
    for each in hardest:
        line = predictions[each["example"]]
        assert (each["label"], each["prediction"]) == (line["label"], line["prediction"])
        shown, text = ("".join(each.split()).lower() for each in (each["text"], texts[each["example"]]))
        assert shown[:12] == text[:12]
        if line["label"] == line["prediction"]:
            assert math.exp(-each["loss"]) == pytest.approx(line["score"], rel=1e-5)


@pytest.mark.parametrize("shape", ["lists", "columns"])
def test_several_labels(recipe: Settings, train: Train, tmp_path: Path, rows: Any, shape: str) -> None:
    names = ["business", "long", "tech"]
    for row in (row for split in rows.values() for row in split):
        on = [name for name in names if name == row["label"] or (name == "long" and len(row["text"].split()) > 30)]
        if shape == "lists":
            row["label"] = on
        else:
            row.update({name: int(name in on) for name in names})
    settings = {**use(recipe, tmp_path, rows), "problem_type": "multi_label_classification"}
    run = train({**settings, "label_column": "label" if shape == "lists" else names})
    assert run.exit_code == 0, run.stderr
    predictions = read_rows(run.path / "eval_predictions.jsonl")
    encode = [[[name in row[key] for name in names] for row in predictions] for key in ("label", "prediction")]
    measured = run.evaluations[-1]
    assert measured["eval_accuracy"] == accuracy_score(np.array(encode[0]), np.array(encode[1]))
    expected = f1_score(np.array(encode[0]), np.array(encode[1]), average="micro", zero_division=0)
    assert measured["eval_f1_micro"] == pytest.approx(expected, abs=0)
    assert run.losses[-1] < run.losses[0]
    assert np.shape(run.read("eval_report.json")["confusion_matrix"]["long"]) == (2, 2)


def test_regression(recipe: Settings, train: Train, tmp_path: Path, rows: Any) -> None:
    for row in (row for split in rows.values() for row in split):
        row["label"] = len(row["text"].split()) / 60
    run = train({**use(recipe, tmp_path, rows), "problem_type": "regression"})
    assert run.exit_code == 0, run.stderr
    predictions = read_rows(run.path / "eval_predictions.jsonl")
    measured = run.evaluations[-1]
    pair = [row["label"] for row in predictions], [row["prediction"] for row in predictions]
    assert measured["eval_mse"] == pytest.approx(mean_squared_error(*pair), rel=1e-12)
    assert measured["eval_mse"] == pytest.approx(measured["eval_loss"], rel=1e-5)
    assert measured["eval_pearson"] > 0.5
    assert {"eval_mae", "eval_spearman"} <= set(measured)


def test_pairs_of_texts(recipe: Settings, train: Train, tmp_path: Path, rows: Any) -> None:
    for split in rows.values():
        for number, row in enumerate(split):
            row["second"] = split[number - number % 2]["text"]
            row["label"] = "same" if row["second"] == row["text"] else "other"
    run = train({**use(recipe, tmp_path, rows), "text_pair_column": "second", "max_length": 128})
    assert run.exit_code == 0, run.stderr
    assert "sentence" not in run.stdout
    kinds = open_examples(newest_prepared() / "train")["token_type_ids"][:]
    assert set(kinds[0]) == {0, 1}, "the second text is marked as such"


def newest_prepared() -> Path:
    import os

    folders = [path for path in (Path(os.environ["ONECURVE_CACHE"]) / "prepared").iterdir() if path.is_dir()]
    return max(folders, key=lambda path: path.stat().st_mtime)


@pytest.mark.parametrize("labels", [[1, 2, 5], ["1 star", "2 star", "5 star"], [True, False, True]], ids=str)
def test_names_of_labels_are_kept(recipe: Settings, train: Train, tmp_path: Path, labels: list[Any]) -> None:
    rows = [{"text": f"news {number}", "label": labels[number % 3]} for number in range(30)]
    settings = {**recipe, "train_file": write_rows(tmp_path / "t.jsonl", rows), "max_train_steps": 2}
    del settings["validation_file"]
    run = train(settings)
    assert run.exit_code == 0, run.stderr
    names = json.loads((run.path / "final" / "config.json").read_text())["id2label"]
    assert list(names.values()) == [str(label).lower() for label in sorted(set(labels))]


def test_a_split_held_out_keeps_the_share_of_each_class(recipe: Settings, train: Train, tmp_path: Path) -> None:
    rows = [{"text": f"news {number}", "label": "rare" if number % 10 == 0 else "common"} for number in range(200)]
    del recipe["validation_file"]
    run = train(
        {
            **recipe,
            "train_file": write_rows(tmp_path / "t.jsonl", rows),
            "validation_fraction": 0.2,
            "max_train_steps": 1,
        }
    )
    assert run.exit_code == 0, run.stderr
    labels = [row["label"] for row in read_rows(run.path / "eval_predictions.jsonl")]
    assert (labels.count("rare"), labels.count("common")) == (4, 36)


def test_class_weights_and_smoothing_are_torchs(recipe: Settings, train: Train, rows: Any, tmp_path: Path) -> None:
    """The first step's loss is torch's own weighted, smoothed mean over the whole global batch."""
    weights = {"business": 3.0, "entertainment": 1.0, "politics": 0.5, "sports": 1.0, "tech": 2.0}
    settings = {**recipe, "class_weights": weights, "label_smoothing_factor": 0.2, "max_train_steps": 1}
    settings.update(train_batch_size=203, per_device_batch_size=7)
    run = train(settings)
    assert run.exit_code == 0, run.stderr
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(42)
    names = sorted(weights)
    model = AutoModelForSequenceClassification.from_pretrained(recipe["model_name_or_path"], num_labels=5).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe["model_name_or_path"])
    texts, labels = zip(*((row["text"], names.index(row["label"])) for row in rows["train"]), strict=True)
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
    expected = torch.nn.functional.cross_entropy(
        model(**inputs).logits,
        torch.tensor(labels),
        weight=torch.tensor([weights[name] for name in names]),
        label_smoothing=0.2,
    )
    # torch smooths with the mean of weights over classes; its reduction divides by the same sum of weights as ours.
    assert run.losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_balanced_weights_are_scikit_learns(recipe: Settings, train: Train) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    from onecurve.training.config import load_recipe
    from onecurve.training.data.columns import Dense
    from onecurve.training.tasks import build_task

    task = build_task(
        load_recipe(None, {"model_name_or_path": "x", "train_file": "y", "class_weights": "balanced"}).recipe
    )
    task.facts = {"label_names": ["a", "b", "c"]}
    labels = np.array([0] * 10 + [1] * 5 + [2] * 1)
    task.conclude({"labels": Dense(labels)})
    assert task.facts["class_weights"] == pytest.approx(
        compute_class_weight("balanced", classes=np.arange(3), y=labels)
    )


# Models --------------------------------------------------------------------------------------------------------------


# transformers adds this token to a Qwen tokenizer that lacks it.
END = {"gpt2": "<end>", "llama": "<end>", "qwen2": "<|endoftext|>"}


def make_decoder(folder: Path, kind: str) -> str:
    """A tiny decoder with random weights and a tokenizer that has no padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoModel, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

    end = END[kind]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [row["text"] for row in read_rows(ROOT / "build" / "demo" / "validation.jsonl")]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=["<unk>", end]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"vocab_size": 2000, "eos_token_id": 1, "bos_token_id": 1}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "gpt2": lambda: GPT2Config(**size, n_embd=32, n_layer=2, n_head=2, n_positions=128),
        "llama": lambda: LlamaConfig(**size, **shape, num_key_value_heads=1, max_position_embeddings=128),
        "qwen2": lambda: Qwen2Config(**size, **shape, num_key_value_heads=1, max_position_embeddings=128),
    }[kind]()
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_decoders_pad_with_their_end_of_text(recipe: Settings, train: Train, tmp_path: Path, kind: str) -> None:
    model = make_decoder(tmp_path / kind, kind)
    run = train({**recipe, "model_name_or_path": model, "max_train_steps": 60, "learning_rate": 5e-3})
    assert run.exit_code == 0, run.stderr
    assert names(run.stdout, "padding", f"'{END[kind]}'")
    assert json.loads((run.path / "final" / "config.json").read_text())["pad_token_id"] == 1
    assert sum(run.losses[-5:]) < 0.95 * sum(run.losses[:5])


def test_a_head_of_another_size_is_replaced_and_said(recipe: Settings, train: Train, tmp_path: Path, rows: Any) -> None:
    assert train({**recipe, "max_train_steps": 2}).exit_code == 0
    two = {split: [row for row in part if row["label"] in ("tech", "sports")] for split, part in rows.items()}
    settings = use(recipe, tmp_path, two)
    settings.update(model_name_or_path=str(Path(recipe["output_dir"]) / "final"), output_dir=str(tmp_path / "second"))
    run = train({**settings, "max_train_steps": 2})
    assert run.exit_code == 0, run.stderr
    assert names(run.stdout, "head", "5", "2")


@pytest.mark.slow
def test_compiled_layers_learn_the_same(recipe: Settings, train: Train, tmp_path: Path) -> None:
    eager = train({**recipe, "output_dir": str(tmp_path / "eager")})
    compiled = train({**recipe, "torch_compile": True})
    assert compiled.exit_code == 0, compiled.stderr
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    names = json.loads((compiled.path / "final" / "config.json").read_text())["id2label"]
    assert len(names) == 5


# Inputs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "glob", "folder", "folder_of_splits"])
def test_formats_hold_the_same_data(recipe: Settings, train: Train, tmp_path: Path, rows: Any, kind: str) -> None:
    recipe["max_train_steps"] = 3
    reference = train({**recipe, "output_dir": str(tmp_path / "reference")})
    settings = dict(recipe)
    if kind in ("csv", "tsv"):
        for split, part in rows.items():
            settings[f"{split}_file"] = str(tmp_path / f"{split}.{kind}")
            with Path(settings[f"{split}_file"]).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["label", "text"], delimiter="\t" if kind == "tsv" else ",")
                writer.writeheader()
                writer.writerows(part)
    elif kind == "parquet":
        for split, part in rows.items():
            settings[f"{split}_file"] = str(tmp_path / f"{split}.parquet")
            datasets.Dataset.from_list(part).to_parquet(settings[f"{split}_file"])
    elif kind == "glob":
        for number in range(4):
            write_rows(tmp_path / f"part-{number}.jsonl", rows["train"][number * 51 : (number + 1) * 51])
        settings["train_file"] = str(tmp_path / "part-*.jsonl")
    else:
        saved = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in rows.items()})
        (saved if kind == "folder_of_splits" else saved["train"]).save_to_disk(str(tmp_path / "saved"))
        del settings["train_file"], settings["validation_file"]
        settings["dataset_name"] = str(tmp_path / "saved")
        if kind == "folder_of_splits":
            settings["validation_split"] = "validation"
    run = train(settings)
    assert run.exit_code == 0, run.stderr
    if kind == "folder":
        assert len(read_rows(run.path / "eval_predictions.jsonl")) == 20
    else:
        assert run.losses == reference.losses


def test_the_tutorials_recipe_on_data_of_its_shape(tiny_model: Path, demo: Path, train: Train, tmp_path: Path) -> None:
    """yelp_review_full: `text` and a `label` that is a ClassLabel of "1 star" to "5 stars"."""
    names = ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]
    features = datasets.Features({"label": datasets.ClassLabel(names=names), "text": datasets.Value("string")})
    texts = [row["text"][:200] for row in read_rows(demo / "train.jsonl")][:1200]
    rows = [{"label": number % 5, "text": text} for number, text in enumerate(texts)]
    split = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "yelp"))
    run = train(
        {
            "config": "training/recipes/yelp.yaml",
            "dataset_name": str(tmp_path / "yelp"),
            "model_name_or_path": str(tiny_model),
            "max_length": 16,
            "max_train_steps": 4,
            "output_dir": str(tmp_path / "run"),
        }
    )
    assert run.exit_code == 0, run.stderr
    assert re.search(r"\b8 \D+ x 1 \D+ x 1 process\b.*\bcpu\b.* = 8 \D+ step", run.stdout)
    assert run.steps[0]["epoch"] == 1 / 125, "1000 examples in batches of 8"
    assert len(read_rows(run.path / "eval_predictions.jsonl")) == 1000
    assert list(json.loads((run.path / "final" / "config.json").read_text())["id2label"].values()) == names
    # The tutorial's own subset: .shuffle(seed=42).select(range(1000)).
    tokens = open_examples(newest_prepared() / "train")["input_ids"][:]
    expected = split.shuffle(seed=42).select(range(1000))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for index in (0, 1, 999):
        assert tokens[index].tolist() == tokenizer(expected[index]["text"], truncation=True, max_length=16)["input_ids"]


def test_cola_on_data_of_its_shape(tiny_model: Path, train: Train, tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["unacceptable", "acceptable"]),
            "idx": datasets.Value("int32"),
        }
    )
    rows = [{"sentence": f"She sing {number}.", "label": number % 2, "idx": number} for number in range(64)]
    split = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(str(tmp_path / "cola"))
    settings = {"config": "training/recipes/cola.yaml", "dataset_name": str(tmp_path / "cola"), "max_train_steps": 2}
    run = train({**settings, "model_name_or_path": str(tiny_model), "output_dir": str(tmp_path / "run")})
    assert run.exit_code == 0, run.stderr
    assert (run.path / "best").is_symlink()


# Test data -----------------------------------------------------------------------------------------------------------


def test_test_data_is_evaluated_at_the_end_and_alone(
    recipe: Settings, train: Train, news: Path, tmp_path: Path
) -> None:
    recipe["test_file"] = write_rows(tmp_path / "test.jsonl", read_rows(news / "validation.jsonl")[:40])
    run = train(recipe)
    assert run.exit_code == 0, run.stderr
    line = run.lines[-1]
    assert (line["event"], line["step"]) == ("test", 8)
    predictions = read_rows(run.path / "test_predictions.jsonl")
    assert line["test_accuracy"] == sum(row["label"] == row["prediction"] for row in predictions) / 40
    before, metrics = (run.path / "test_predictions.jsonl").read_bytes(), (run.path / "metrics.jsonl").read_bytes()
    (run.path / "test_predictions.jsonl").unlink()
    again = train({**recipe, "eval_only": True})
    assert again.exit_code == 0, again.stderr
    assert f"accuracy {line['test_accuracy']:.4f}" in again.stdout
    assert (run.path / "test_predictions.jsonl").read_bytes() == before
    assert (run.path / "metrics.jsonl").read_bytes() == metrics


def test_a_model_without_a_head_is_not_evaluated(recipe: Settings, train: Train) -> None:
    run = train({**recipe, "eval_only": True})
    assert run.exit_code == 2
    assert names(run.stderr, "eval_only", "head")


# Best, early stopping, retention, trackers ---------------------------------------------------------------------------


def test_the_best_checkpoint_is_kept_and_the_rest_rotated(recipe: Settings, train: Train) -> None:
    settings = {"max_train_steps": 24, "eval_steps": 4, "checkpointing_steps": 4, "save_total_limit": 2}
    run = train({**recipe, **settings, "metric_for_best_model": "eval_loss", "learning_rate": 2e-3})
    assert run.exit_code == 0, run.stderr
    losses = {line["step"]: line["eval_loss"] for line in run.evaluations}
    best = min(losses, key=lambda step: losses[step])
    assert (run.path / "best").resolve().name == f"step_{best:08d}"
    kept = {path.name for path in (run.path / "checkpoints").iterdir()}
    assert kept == {"step_00000020", "step_00000024", f"step_{best:08d}"}


def test_training_stops_early(recipe: Settings, train: Train) -> None:
    settings = {
        "metric_for_best_model": "accuracy",
        "early_stopping_patience": 2,
        "eval_steps": 2,
        "max_train_steps": 50,
    }
    run = train({**recipe, **settings, "learning_rate": 1e-9})
    assert run.exit_code == 0, run.stderr
    assert "stopped early" in run.stdout
    assert run.steps[-1]["step"] == 6
    assert run.read("status.json")["state"] == "finished"


def test_tensorboard_gets_every_number(recipe: Settings, train: Train) -> None:
    run = train({**recipe, "report_to": "tensorboard"})
    assert run.exit_code == 0, run.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "onecurve"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(run.losses)
    assert events.Scalars("eval_accuracy")[0].value == pytest.approx(run.evaluations[0]["eval_accuracy"])
