"""Token classification: no word is lost or counted twice, the loss is transformers', the metrics are seqeval's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seqeval.metrics import accuracy_score, classification_report, f1_score, precision_score, recall_score

from onecurve.training.config import load_recipe
from onecurve.training.outcome import report_outcome
from tests.conftest import TINY, Launch, Run, to_flags
from tests.messages import names
from tests.training.conftest import assert_refused, stop_and_resume

Settings = dict[str, Any]
Train = Callable[[Settings], Run]
Rows = list[dict[str, Any]]


def tag(words: Sequence[str]) -> list[str]:
    """B-NAME, I-NAME for words in a row that begin with a capital letter, B-LONG for other long ones."""
    tags: list[str] = []
    for word in words:
        if word[0].isupper():
            tags.append("I-NAME" if tags and tags[-1].endswith("NAME") else "B-NAME")
        else:
            tags.append("B-LONG" if len(word) > 8 else "O")
    return tags


def write(folder: Path, rows: Rows, name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def to_rows(path: Path) -> Rows:
    texts = [row["text"].split() for row in read(path)]
    return [{"tokens": words, "ner_tags": tag(words)} for words in texts]


@pytest.fixture
def words(tiny_model: Path, news: Path, tmp_path: Path) -> Settings:
    """Settings of a training that takes a second; about a third of its rows is read in several windows."""
    return {
        "task": "token_classification",
        "model_name_or_path": str(tiny_model),
        "train_file": write(tmp_path, to_rows(news / "train.jsonl"), "train.jsonl"),
        "validation_file": write(tmp_path, to_rows(news / "validation.jsonl"), "validation.jsonl"),
        "output_dir": str(tmp_path / "run"),
        **TINY,
        "max_length": 32,
    }


def predict(run: Run, source: Path, target: Path, *more: str) -> tuple[int, Rows]:
    from onecurve.training import predict

    code = report_outcome(
        predict.main, ["--run", str(run.path), "--input", str(source), "--output", str(target), *more]
    )
    return code, read(target) if target.exists() and target.suffix == ".jsonl" else []


def test_it_learns_and_its_metrics_are_those_of_seqeval(words: Settings, train: Train) -> None:
    run = train({**words, "max_train_steps": 60, "learning_rate": 5e-3, "metric_for_best_model": "eval_f1"})
    assert run.exit_code == 0, run.stderr
    found = run.read("eval_report.json")
    lines = read(run.path / "eval_predictions.jsonl")
    rows = read(Path(words["validation_file"]))
    assert [line["row"] for line in lines] == list(range(len(rows)))
    assert [line["label"] for line in lines] == [row["ner_tags"] for row in rows], "each word once, in its order"
    labels, predictions = [line["label"] for line in lines], [line["prediction"] for line in lines]
    metrics = found["metrics"]
    assert metrics["eval_f1"] == f1_score(labels, predictions)
    assert metrics["eval_precision"] == precision_score(labels, predictions)
    assert metrics["eval_recall"] == recall_score(labels, predictions)
    assert metrics["eval_accuracy"] == accuracy_score(labels, predictions)
    everything = [label for row in labels for label in row]
    assert metrics["eval_accuracy"] > everything.count("O") / len(everything) + 0.03, "more than the most common label"
    official = classification_report(labels, predictions, output_dict=True, zero_division=0)
    assert found["per_class"].keys() == {"LONG", "NAME", "micro avg"}
    for name, row in found["per_class"].items():
        assert row == official[name]
    assert found["tag_scheme"] == "BIO"
    assert sum(each["count"] for each in found["calibration"]["bins"]) == len(everything)
    assert len(found["hardest"]) == 20
    for each in found["hardest"]:
        line = lines[each["row"]]  # The example may be one of several windows.
        wrong = {pair for pair in zip(line["label"], line["prediction"], strict=True) if pair[0] != pair[1]}
        shown = [re.findall(r" (O|[BI]-[A-Z]+)(?=,|$)", each[key]) for key in ("label", "prediction")]
        assert set(zip(*shown, strict=True)) <= wrong
        assert shown[0] or each["label"] == "all right"
    card = (run.path / "final" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: token-classification" in card
    assert "B-NAME" in card
    config = json.loads((run.path / "final" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "B-LONG", "1": "B-NAME", "2": "I-NAME", "3": "O"}


@pytest.mark.parametrize("all_tokens", [False, True])
def test_the_loss_is_that_of_transformers(words: Settings, train: Train, tmp_path: Path, all_tokens: bool) -> None:
    """As run_ner aligns labels: a step over all the data, against its mean over one batch."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer, set_seed

    columns = ("tokens", "ner_tags")
    rows = [{name: row[name][:50] for name in columns} for row in read(Path(words["train_file"]))]  # One window each.
    words["train_file"] = write(tmp_path, rows, "short.jsonl")
    names_of_labels = ["B-LONG", "B-NAME", "I-NAME", "O"]
    settings = {**words, "max_length": 128, "train_batch_size": len(rows), "max_train_steps": 1}
    run = train({**settings, "label_all_tokens": all_tokens})
    assert run.exit_code == 0, run.stderr

    tokenizer = AutoTokenizer.from_pretrained(words["model_name_or_path"])
    batch = tokenizer([row["tokens"] for row in rows], is_split_into_words=True, padding=True, return_tensors="pt")
    batch_labels = []
    for number, row in enumerate(rows):
        labels, before = [], None
        for word in batch.word_ids(number):
            if word is None:
                labels.append(-100)
            elif word != before:
                labels.append(names_of_labels.index(row["ner_tags"][word]))
            else:
                name = row["ner_tags"][word].replace("B-NAME", "I-NAME")
                labels.append(names_of_labels.index(name) if all_tokens else -100)
            before = word
        batch_labels.append(labels)
    set_seed(42)
    model = AutoModelForTokenClassification.from_pretrained(
        words["model_name_or_path"], num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).eval()
    with torch.no_grad():
        loss = model(**batch, labels=torch.tensor(batch_labels)).loss.item()
    assert run.losses[0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("stride", [0, 5, 29, None])
def test_each_word_of_a_long_row_is_a_target_once(words: Settings, tiny_model: Path, stride: int | None) -> None:
    import pyarrow as pa
    from transformers import AutoTokenizer

    from onecurve.training.tasks.base import Rows as TaskRows
    from onecurve.training.tasks.token_classification import TokenClassification, TokenClassificationRecipe

    rows = read(Path(words["train_file"]))
    table = pa.Table.from_pylist(rows)
    flags = {"task": "token_classification", "model_name_or_path": "m", "train_file": "t.jsonl", "max_length": "32"}
    recipe = load_recipe(None, flags | ({} if stride is None else {"doc_stride": str(stride)})).recipe
    assert isinstance(recipe, TokenClassificationRecipe)
    task = TokenClassification(recipe)
    given = TaskRows(table, np.arange(len(rows)), "rows")
    task.facts = task.learn(given)
    examples = task.encode(given, AutoTokenizer.from_pretrained(tiny_model))
    assert len(examples["row"]) > len(rows) + 20
    assert max(map(len, examples["input_ids"])) == 32
    found: dict[int, list[int]] = {}
    for row, begins, labels in zip(examples["row"], examples["word"], examples["labels"], strict=True):
        found.setdefault(int(row), []).extend(word for word in begins if word >= 0)
        known = [task.label_names.index(rows[row]["ner_tags"][word]) for word in begins if word >= 0]
        assert [label for label in labels if label != -100] == known
    assert task.model_inputs({"input_ids": 1, "word": 2, "labels": 3}) == {"input_ids": 1}
    assert [found[row] for row in range(len(rows))] == [list(range(len(row["tokens"]))) for row in rows]


def test_it_resumes_to_the_same_bits(words: Settings, train: Train, tmp_path: Path) -> None:
    del words["dropout"]
    whole = train({**words, "output_dir": str(tmp_path / "whole")})
    resumed = stop_and_resume(train, words, tmp_path)
    assert resumed.losses == whole.losses
    assert resumed.evaluations[-1]["eval_f1"] == whole.evaluations[-1]["eval_f1"]


def test_it_predicts_what_transformers_does(words: Settings, train: Train, tmp_path: Path) -> None:
    """Each row alone, by the saved model; rows of more than one window too, a file of each kind."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    run = train({**words, "max_train_steps": 20})
    given = [
        {"tokens": ["London", "is", "\u200b", "large", "[SEP]"], "id": "a"},
        {"tokens": ["rain"], "id": "b"},
        {"tokens": ["word"] * 100, "id": "c"},
    ]
    code, labelled = predict(run, Path(write(tmp_path, given, "in.jsonl")), tmp_path / "out.jsonl")
    assert code == 0
    assert [{name: row[name] for name in ("tokens", "id")} for row in labelled] == given
    assert [len(row["prediction"]) for row in labelled] == [5, 1, 100]
    assert [len(row["score"]) for row in labelled] == [5, 1, 100]

    model = AutoModelForTokenClassification.from_pretrained(run.path / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.path / "final")
    with torch.no_grad():
        logits = model(**tokenizer([["rain"]], is_split_into_words=True, return_tensors="pt")).logits[0, 1]
    assert labelled[1]["prediction"] == [model.config.id2label[int(logits.argmax())]]
    assert labelled[1]["score"] == pytest.approx([float(logits.softmax(-1).max())], rel=1e-5)

    (tmp_path / "in.conll").write_text("London\nis\n\nrain\n", encoding="utf-8")
    code, labelled = predict(run, tmp_path / "in.conll", tmp_path / "conll.jsonl")
    assert code == 0
    assert [row["tokens"] for row in labelled] == [["London", "is"], ["rain"]]
    code, _ = predict(run, tmp_path / "in.conll", tmp_path / "out.parquet")
    assert code == 0
    code, _ = predict(run, tmp_path / "in.conll", tmp_path / "out.conll")
    assert code == 2


def test_check_shows_labels_and_an_example(words: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    from onecurve.training import check
    from onecurve.training.launch_protocol import EXAMPLE_LINE

    assert report_outcome(check.main, to_flags(words)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("labels") and "B-NAME" in line for line in lines)
    assert any(line.startswith("note") and names(line, "BIO") for line in lines)
    [example] = [json.loads(line.removeprefix(EXAMPLE_LINE)) for line in lines if line.startswith(EXAMPLE_LINE)]
    first = read(Path(words["train_file"]))[0]
    assert [text.strip().rpartition("/")[2] for text, is_target in example if is_target] == first["ner_tags"]
    assert example[0] == ["[CLS] ", False]


def test_words_without_tokens_keep_their_label(words: Settings, train: Train, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    rows = read(Path(words["validation_file"]))
    rows[3] = {"tokens": ["a", "\u200b", "b"], "ner_tags": ["O", "B-NAME", "O"]}
    run = train({**words, "validation_file": write(tmp_path, rows, "held.jsonl"), "max_train_steps": 1})
    assert run.exit_code == 0, run.stderr
    assert names(run.stdout + run.stderr, "row 4", "[UNK]")
    line = read(run.path / "eval_predictions.jsonl")[3]
    assert line["label"] == ["O", "B-NAME", "O"]
    model = AutoModelForTokenClassification.from_pretrained(run.path / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.path / "final")
    tokens = tokenizer.convert_tokens_to_ids(["[CLS]", "a", "[UNK]", "b", "[SEP]"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0, 1:-1]
    assert line["score"] == pytest.approx(logits.softmax(-1).max(-1).values.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "known", "scheme"),
    [
        ([["B-A", "I-A", "O"], ["B-A", "B-A", "O"]], (), "BIO"),
        ([["I-A", "I-A", "O"], ["I-A", "B-A", "O"]], (), "IOB1"),
        ([["I-A", "I-A", "O"], ["O", "B-A", "O"]], (), "mixed"),
        ([["I-A", "I-A", "O"], ["O", "I-A", "O"]], (), "IO"),
        ([["B-A", "E-A", "O"], ["O", "S-A", "O"]], (), "BIOES"),
        ([["B-A", "L-A", "O"], ["O", "U-A", "O"]], (), "BILOU"),
        ([["NN", "VB", "NN"], ["O", "B-X", "NN"]], (), "plain"),
        ([["A", "A", "O"], ["O", "B", "O"]], (), "plain"),
        ([[1, 2, 0], [0, 1, 0]], ("O", "B-A", "I-A"), "BIO"),
        ([[1, 2, 0], [0, 1, 0]], (), "plain"),
        ([[10, 9, 10], [9, 9, 9]], (), "plain"),
    ],
)
def test_how_labels_mark_entities_is_said(
    words: Settings, train: Train, tmp_path: Path, labels: list[list[Any]], known: tuple[str, ...], scheme: str
) -> None:
    rows = [{"tokens": ["red", "green", "blue"], "ner_tags": row} for row in labels] * 4
    path = write(tmp_path, rows)
    settings = {**words, "train_file": path, "validation_file": path, "max_train_steps": 1}
    run = train({**settings, **({"label_names": list(known)} if known else {})})
    assert run.exit_code == 0, run.stderr
    report = run.read("eval_report.json")
    assert report.get("tag_scheme", "plain") == scheme
    assert ("eval_f1" in report["metrics"]) == (scheme != "plain")
    assert ("eval_f1_macro" in report["metrics"]) == (scheme == "plain")
    given = [[known[label] if known else str(label) for label in row] for row in labels] * 4
    assert [line["label"] for line in read(run.path / "eval_predictions.jsonl")] == given


def test_entities_of_bilou_are_counted_as_what_they_mark() -> None:
    from onecurve.training.tasks.word_results import WordResults

    known = ["O", "U-A", "B-A", "L-A"]
    labels, predictions = [1, 1, 2, 3, 0], [1, 0, 2, 3, 0]
    of_tokens = {"word": [range(5)], "label": [labels], "prediction": [predictions], "score": [[0.5] * 5]}
    found = WordResults({"row": [0], **of_tokens}, known, "BILOU")
    assert found.compute_metrics() == {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "accuracy": 0.8}
    assert found.report()["per_class"]["A"]["support"] == 3


def test_names_of_a_schema_are_taken(words: Settings, train: Train, tmp_path: Path) -> None:
    import datasets

    feature = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-A", "I-A", "B-UNSEEN"])),
        }
    )
    rows = {"tokens": [["red", "green"]] * 8, "ner_tags": [[1, 2], [0, 1]] * 4}
    datasets.Dataset.from_dict(rows, feature).to_parquet(tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    run = train({**words, "train_file": path, "validation_file": path, "max_train_steps": 1})
    assert run.exit_code == 0, run.stderr
    assert read(run.path / "eval_predictions.jsonl")[0]["label"] == ["B-A", "I-A"]
    config = json.loads((run.path / "final" / "config.json").read_text(encoding="utf-8"))
    assert list(config["id2label"].values()) == ["O", "B-A", "I-A", "B-UNSEEN"]


def test_a_conll_file_is_learned_as_the_same_rows(words: Settings, train: Train, tmp_path: Path) -> None:
    for name in ("train", "validation"):
        rows = read(Path(words[f"{name}_file"]))
        lines = [[f"{word} x {label}" for word, label in zip(*row.values(), strict=True)] for row in rows]
        text = "-DOCSTART- -X- O\n\n" + "\n\n".join("\n".join(each) for each in lines) + "\n"
        (tmp_path / f"{name}.conll").write_text(text, encoding="utf-8")
    plain = train({**words, "max_train_steps": 2})
    files = {f"{name}_file": str(tmp_path / f"{name}.conll") for name in ("train", "validation")}
    run = train({**words, **files, "max_train_steps": 2, "output_dir": str(tmp_path / "conll")})
    assert run.exit_code == 0, run.stderr
    assert run.losses == plain.losses
    other = train({**words, **files, "label_column": "column_2", "output_dir": str(tmp_path / "other")})
    assert other.exit_code == 2
    assert names(other.stderr, "column_2")


GOOD: Rows = [{"tokens": ["Anna", "sings"], "ner_tags": ["B-NAME", "O"]}] * 12


def change(row: dict[str, Any]) -> Rows:
    return [*GOOD[:6], {**GOOD[0], **row}, *GOOD[6:]]


BAD_ROWS = {
    "words that are a text": (change({"tokens": None}), ("row 7", "'tokens'")),
    "no word": (change({"tokens": [], "ner_tags": []}), ("row 7", "'tokens'")),
    "an empty word": (change({"tokens": ["Anna", " "]}), ("row 7", "word 2", "'tokens'")),
    "a word that is null": (change({"tokens": ["Anna", None]}), ("row 7", "word 2")),
    "a label too few": (change({"ner_tags": ["O"]}), ("row 7", "'ner_tags'", "1 labels", "2 words")),
    "a label too many": (change({"ner_tags": ["O", "O", "O"]}), ("row 7", "3 labels", "2 words")),
    "no labels": (change({"ner_tags": None}), ("row 7", "'ner_tags'")),
    "an empty label": (change({"ner_tags": ["O", ""]}), ("row 7", "label 2", "'ner_tags'")),
    "a label that is null": (change({"ner_tags": ["O", None]}), ("row 7", "label 2")),
    "one label": ([{"tokens": ["a"], "ner_tags": ["O"]}] * 9, ("'ner_tags'", "'O'")),
    "a label that is no entity's": (change({"ner_tags": ["B-NAME", "NAME"]}), ("'NAME'", "tag_scheme")),
    "a label that others leave out": (
        [{"tokens": ["a", "b"], "ner_tags": [0, -100]}] * 9,
        ("row 1", "label 2", "-100"),
    ),
    "decimal labels": ([{"tokens": ["a"], "ner_tags": [0.5]}] * 9, ("row 1", "0.5")),
    "texts instead of lists": ([{"tokens": "a b", "ner_tags": ["O", "O"]}] * 9, ("row 1", "'tokens'", "'a b'")),
    "words that are numbers": ([{"tokens": [1, 2], "ner_tags": ["O", "B-A"]}] * 9, ("row 1", "word 1")),
    "lists of lists": ([{"tokens": ["a"], "ner_tags": [["O"]]}] * 9, ("row 1", "label 1", "list")),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_refused_by_its_number(words: Settings, train: Train, tmp_path: Path, fault: str) -> None:
    rows, needed = BAD_ROWS[fault]
    run = train({**words, "train_file": write(tmp_path, rows)})
    assert_refused(run, "rows.jsonl", *needed)


BAD_KEYS: dict[str, tuple[Settings, tuple[str, ...]]] = {
    "one column for both": ({"label_column": "tokens"}, ("label_column", "tokens_column")),
    "a name twice": ({"label_names": ["O", "O"]}, ("label_names",)),
    "windows that do not advance": ({"doc_stride": 32}, ("doc_stride", "32")),
    "no room for a word": ({"max_length": 2}, ("max_length", "2")),
    "no such column": ({"tokens_column": "token"}, ("tokens_column", "tokens")),
    "a key of another task": ({"text_column": "tokens"}, ("text_column", "text_classification")),
    "a metric that is none": ({"metric_for_best_model": "eval_rouge"}, ("metric_for_best_model", "eval_f1")),
    "a metric of plain labels": ({"metric_for_best_model": "eval_f1_macro"}, ("f1_macro", "eval_f1")),
    "no labels of entities": ({"tag_scheme": "entities", "label_column": "id"}, ("id", "tag_scheme")),
    "a head of no labels": ({"eval_only": True}, ("--eval_only",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_KEYS)
def test_a_bad_key_is_refused(words: Settings, train: Train, tmp_path: Path, fault: str) -> None:
    keys, needed = BAD_KEYS[fault]
    rows = [{**row, "id": ["X" + word[:1] for word in row["tokens"]]} for row in read(Path(words["train_file"]))]
    files = dict.fromkeys(("train_file", "validation_file"), write(tmp_path, rows))
    run = train({**words, **files, **keys})
    assert_refused(run, *needed)


@pytest.mark.parametrize(
    ("label", "keys", "needed"),
    [
        ("B-NAM", {}, ("row 2", "'B-NAM'", "'B-NAME'", "label_names")),
        (7, {"label_names": ["O", "B-NAME"]}, ("row 2", "label 7")),
        (-100, {"label_names": ["O", "B-NAME"]}, ("row 2", "-100")),
    ],
)
def test_a_label_that_only_the_validation_data_has_is_refused(
    words: Settings, train: Train, tmp_path: Path, label: Any, keys: Settings, needed: tuple[str, ...]
) -> None:
    usual: Any = "O" if isinstance(label, str) else 0
    rows = [{"tokens": ["a", "b"], "ner_tags": [usual, usual]}, {"tokens": ["a", "b"], "ner_tags": [usual, label]}]
    path = write(tmp_path, rows, "held.jsonl")
    run = train({**words, "train_file": write(tmp_path, GOOD), "validation_file": path, **keys})
    assert_refused(run, "held.jsonl", *needed)


def test_label_names_add_labels_that_the_training_data_lacks(words: Settings, train: Train, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "ner_tags": ["O", "B-PLACE"]}]
    files = {"train_file": write(tmp_path, GOOD), "validation_file": write(tmp_path, rows, "held.jsonl")}
    run = train({**words, **files, "label_names": ["O", "B-NAME", "B-PLACE"], "max_train_steps": 1})
    assert run.exit_code == 0, run.stderr
    assert read(run.path / "eval_predictions.jsonl")[0]["label"] == ["O", "B-PLACE"]


def test_a_bad_row_is_not_predicted(words: Settings, train: Train, tmp_path: Path, capsys: Any) -> None:
    run = train({**words, "max_train_steps": 1})
    faults: list[tuple[Rows, tuple[str, ...]]] = [
        ([{"tokens": ["a"]}, {"tokens": []}], ("row 2",)),
        ([{"words": ["a"]}], ("tokens_column",)),
    ]
    for rows, needed in faults:
        capsys.readouterr()
        code, _ = predict(run, Path(write(tmp_path, rows, "in.jsonl")), tmp_path / "out.jsonl")
        assert code == 2
        assert names(capsys.readouterr().err, *needed)
        assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_an_adapter_learns_predicts_and_is_merged(words: Settings, train: Train, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    from onecurve.training import merge

    run = train({**words, "adapter": "lora", "lora_r": 4, "max_train_steps": 30, "learning_rate": 5e-3})
    assert run.exit_code == 0, run.stderr
    assert (run.path / "final" / "adapter_config.json").exists()
    given = [{"tokens": row["tokens"]} for row in read(Path(words["validation_file"]))]
    code, labelled = predict(run, Path(write(tmp_path, given, "in.jsonl")), tmp_path / "out.jsonl")
    assert code == 0
    lines = read(run.path / "eval_predictions.jsonl")
    assert [row["prediction"] for row in labelled] == [line["prediction"] for line in lines]
    assert report_outcome(merge.main, [f"--run={run.path}", f"--output={tmp_path / 'merged'}"]) == 0
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label[1] == "B-NAME"


@pytest.mark.slow
def test_two_processes_write_the_same_metrics_and_predictions(words: Settings, launch: Launch, tmp_path: Path) -> None:
    one = launch({**words, "output_dir": str(tmp_path / "one")})
    two = launch({**words, "output_dir": str(tmp_path / "two")}, "multi_cpu", 2)
    assert two.exit_code == 0, two.stderr
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert [row["prediction"] for row in read(two.path / "eval_predictions.jsonl")] == [
        row["prediction"] for row in read(one.path / "eval_predictions.jsonl")
    ]
    assert np.isclose(two.evaluations[-1]["eval_loss"], one.evaluations[-1]["eval_loss"], rtol=1e-5)
