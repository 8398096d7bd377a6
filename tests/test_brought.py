"""What people bring, from public reports: each input with two siblings, through training's own code and through `check`.

What is accepted gives the labels that are right; what one of the two refuses the other refuses with the same words.
"""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.facts.recipes import load_recipe as load_for_launcher
from onecurve.launcher.preflight import check_inputs
from onecurve.training.config import RecipeError, load_recipe
from onecurve.training.data.preparation import prepare_data
from onecurve.training.errors import BadInput
from onecurve.training.models.loading import load_config
from onecurve.training.tasks import build_task
from onecurve.training.tasks.processors import TOKENIZER
from tests.conftest import to_flags
from tests.messages import names

MULTI = {"problem_type": "multi_label_classification"}


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: of the report and which of its inputs: "zeros", "zeros 2", ...
        files: content by name; the first one is train_file. Lines are repeated by `repeat`.
        keys: of the recipe; "{folder}" is where the files are.
        refused: words of the message; none where it is accepted.
        labels: what is learned where it is accepted.
        notes: words of what is said about accepted data.
        is_late: only a look at all rows finds it, which a quick `check` leaves to the start.
    """

    name: str
    files: dict[str, bytes]
    keys: dict[str, Any] = field(default_factory=dict)
    refused: Sequence[str] = ()
    labels: Sequence[str] = ()
    notes: Sequence[str] = ()
    is_late: bool = False


def csv(*rows: str, header: str = "text,label", repeat: int = 12, end: str = "\n") -> bytes:
    return (header + end + (end.join(rows) + end) * repeat).encode()


def jsonl(*rows: dict[str, Any], repeat: int = 12) -> bytes:
    return ("".join(json.dumps(row) + "\n" for row in rows) * repeat).encode()


def of_labels(*labels: Any) -> bytes:
    return jsonl(*({"text": f"word {number}", "label": label} for number, label in enumerate(labels)))


AB = csv("a good one,a", "a bad one,b")

# Kinds 1: a CSV is text, whatever stands in it.
TABLES = [
    Case("quote", {"t.csv": csv("a,neg", '"b,pos', "c,neg", '"d,pos', repeat=1)}, refused=("t.csv", "line 5", "quote")),
    Case("quote 2", {"t.tsv": csv('"b\tpos', "c\tneg", header="text\tlabel", repeat=1)}, refused=("t.tsv", "line 2", "quote")),
    Case("quote 3", {"t.csv": csv("a,neg", "b,pos", repeat=200) + b'"c,pos\n'}, refused=("t.csv", "line 402"), is_late=True),
    Case("fields", {"t.csv": csv("the, match ended,neg")}, refused=("t.csv", "line 2", "3 fields", "2")),
    Case("fields 2", {"t.csv": csv("a,neg", "b")}, refused=("t.csv", "line 3", "1 fields", "2")),
    Case("fields 3", {"t.tsv": csv("a\tb\tneg", header="text\tlabel")}, refused=("t.tsv", "line 2", "3 fields", "2")),
    Case("zeros", {"t.csv": csv("a,007", "b,008")}, labels=("007", "008")),
    Case("zeros 2", {"t.csv": csv("a,1e3", "b,1000", "c,1_000")}, labels=("1000", "1_000", "1e3")),
    Case("zeros 3", {"t.tsv": csv("a\t1.0", "b\t1", "c\t+1", header="text\tlabel")}, labels=("+1", "1", "1.0")),
    Case("na", {"t.csv": csv("None,NA", "x,EU")}, labels=("EU", "NA")),
    Case("na 2", {"t.csv": csv("null,null", "nan,nan")}, labels=("nan", "null")),
    Case("na 3", {"t.csv": csv("NaN,#N/A", "n/a,-")}, labels=("#N/A", "-")),
    Case("late", {"t.csv": csv("a,0", "b,1", repeat=5_500) + b"c,other\nd,other\n"}, labels=("0", "1", "other")),
    Case("late 2", {"t.csv": csv("a,true", "b,false", repeat=600) + b"c,maybe\nd,maybe\n"}, labels=("false", "maybe", "true")),
    Case("late 3", {"t.csv": csv("a,2024-01-01", "b,2024-01-02", repeat=600) + b"c,never\nd,never\n"},
         labels=("2024-01-01", "2024-01-02", "never")),
    Case("valid", {"t.csv": csv("a,True", "b,False", "c,Unknown"), "v.csv": csv("a,True", "b,False")},
         {"validation_file": "{folder}/v.csv"}, labels=("False", "True", "Unknown")),
    Case("valid 2", {"t.csv": csv("a,0", "b,1", "c,x"), "v.csv": csv("a,0", "b,1")}, {"validation_file": "{folder}/v.csv"},
         labels=("0", "1", "x")),
    Case("valid 3", {"t.csv": csv("a,1.0", "b,2"), "v.csv": csv("a,1.0")}, {"validation_file": "{folder}/v.csv"},
         labels=("1.0", "2")),
    Case("sep", {"t.csv": csv("a;neg", "b;pos", header="text;label")}, refused=("t.csv", "semicolons")),
    Case("sep 2", {"t.csv": csv("a\tneg", "b\tpos", header="text\tlabel")}, refused=("t.csv", "tabs")),
    Case("sep 3", {"t.csv": csv("a|neg", "b|pos", header="text|label")}, refused=("t.csv", "text|label")),
    Case("header", {"t.csv": csv("a,neg,x", "b,pos,y", header="text,label,label")}, refused=("t.csv", "'label'")),
    Case("header 2", {"t.csv": csv("a,a,x", "b,b,y", header="text,text,label")}, refused=("t.csv", "'text'")),
    Case("header 3", {"t.tsv": csv("a\tx\t1\t2", "b\ty\t1\t2", header="text\tlabel\tid\tid")}, refused=("t.tsv", "'id'")),
    Case("spaces", {"t.csv": csv("a,pos", "b,pos ")}, labels=("pos", "pos "), notes=("'pos'", "'pos '")),
    Case("spaces 2", {"t.csv": csv("a,Pos", "b,pos")}, labels=("Pos", "pos"), notes=("'Pos'", "'pos'")),
    Case("spaces 3", {"t.csv": csv("a,caf\u00e9", "b,cafe\u0301")}, labels=("cafe\u0301", "caf\u00e9"), notes=("cafe\\u0301",)),
    Case("bom", {"t.csv": b"\xef\xbb\xbf" + AB}, labels=("a", "b")),
    Case("bom 2", {"t.jsonl": b"\xef\xbb\xbf" + of_labels("a", "b")}, labels=("a", "b")),
    Case("bom 3", {"t.tsv": b"\xef\xbb\xbf" + AB.replace(b",", b"\t")}, labels=("a", "b")),
    Case("field", {"t.csv": csv(f"{'word ' * 40_000},a", "b,b", repeat=2)}, labels=("a", "b")),
    Case("field 2", {"t.csv": csv('"' + "word\n" * 40_000 + '",a', "b,b", repeat=2)}, labels=("a", "b")),
    Case("field 3", {"t.jsonl": jsonl({"text": "word " * 40_000, "label": "a"}, {"text": "b", "label": "b"}, repeat=2)},
         labels=("a", "b")),
]  # fmt: skip

# Kind 2: JSON has types, and keeps them.
JSON = [
    Case("mixed", {"t.jsonl": of_labels(0, "0")}, refused=("t.jsonl", "row 2", "'label'")),
    Case("mixed 2", {"t.jsonl": of_labels(True, 0)}, refused=("t.jsonl", "row 2", "'label'")),
    Case("mixed 3", {"t.jsonl": of_labels("a", ["a"])}, refused=("t.jsonl", "row 2", "'label'")),
    Case("dates", {"t.jsonl": jsonl({"text": "2024-01-01", "label": "2024-01-01"}, {"text": "x", "label": "2024-01-02"})},
         labels=("2024-01-01", "2024-01-02")),
    Case("dates 2", {"t.jsonl": of_labels("12:30:00", "13:30:00")}, labels=("12:30:00", "13:30:00")),
    Case("dates 3", {"t.jsonl": of_labels("2024-01-01T00:00:00Z", "P1D")}, labels=("2024-01-01T00:00:00Z", "P1D")),
    Case("hot", {"t.jsonl": of_labels([0, 1, 0, 0, 0], [1, 0, 0, 0, 1])}, MULTI, refused=("row 1", "'label'", "twice")),
    Case("hot 2", {"t.jsonl": of_labels([1, 1], [0, 0])}, MULTI, refused=("row 1", "'label'", "twice")),
    Case("hot 3", {"t.jsonl": of_labels([True, False, True], [False, False, True])}, MULTI, refused=("row 1", "twice")),
    Case("none", {"t.jsonl": of_labels(["a"], ["b"], ["a", "b"]), "v.jsonl": of_labels([], [])},
         {**MULTI, "validation_file": "{folder}/v.jsonl"}, labels=("a", "b")),
    Case("none 2", {"t.jsonl": of_labels([], ["a"], ["b", "a"], [])}, MULTI, labels=("a", "b")),
    Case("none 3", {"t.jsonl": of_labels(["a"], ["b"]), "v.jsonl": of_labels([])},
         {**MULTI, "test_file": "{folder}/v.jsonl"}, labels=("a", "b")),
    Case("empty", {"t.jsonl": of_labels("a", None, "b")}, refused=("t.jsonl", "row 2", "'label'")),
    Case("empty 2", {"t.csv": csv("x,a", "y,", "z,b")}, refused=("t.csv", "row 2", "'label'")),
    Case("empty 3", {"t.csv": csv("x,a", " ,b", "z,b")}, refused=("t.csv", "row 2", "'text'")),
    Case("decimals", {"t.jsonl": of_labels(0.5, 1.5)}, refused=("'label'", "problem_type", "regression")),
    Case("decimals 2", {"t.jsonl": of_labels("x", "1.5")}, {"problem_type": "regression"}, refused=("row 1", "'label'", "'x'")),
    Case("decimals 3", {"t.csv": csv("x,1.5", "y,nan")}, {"problem_type": "regression"}, refused=("row 2", "'label'", "nan")),
]  # fmt: skip

# Kinds 4 and 5: texts, positions, paths, YAML.
OTHERS = [
    Case("eos", {"t.csv": csv("the end </s>,a", "[SEP] it,b")}, labels=("a", "b"), notes=("row 2", "'[SEP]'")),
    Case("eos 2", {"t.csv": csv("a [MASK] b,a", "c,b")}, labels=("a", "b"), notes=("t.csv", "'[MASK]'")),
    Case("eos 3", {"t.csv": csv("[CLS],a", "[PAD][PAD],b")}, labels=("a", "b"), notes=("t.csv", "'text'")),
    Case("length", {"t.csv": AB}, {"max_length": 129}, refused=("max_length", "129", "128")),
    Case("length 2", {"t.csv": AB}, {"max_length": 128}, labels=("a", "b")),
    Case("length 3", {"t.csv": AB}, {"max_length": 1}, refused=("max_length", "2", "1")),
    Case("glob", {"reviews[1].csv": AB}, labels=("a", "b")),
    Case("glob 2", {"what?.csv": AB}, labels=("a", "b")),
    Case("glob 3", {"a*.csv": AB, "ab.csv": csv("x,other", "y,b")}, labels=("a", "b")),
    Case("home2", {"t.csv": AB}, {"train_file": "~/t.csv"}, labels=("a", "b")),
    Case("home2 2", {"t.csv": AB}, {"train_file": "$HOME/t.csv"}, labels=("a", "b")),
    Case("home2 3", {"t.csv": AB}, {"model_name_or_path": "$NO_SUCH/m"}, refused=("model_name_or_path", "NO_SUCH")),
    Case("twice", {"t.csv": AB, "r.yaml": b"seed: 1\nlearning_rate: 1e-3\nlearning_rate: 1e-4\n"},
         refused=("learning_rate", "2", "3")),
    Case("twice 2", {"t.csv": AB, "r.yaml": b"class_weights:\n  a: 1\n  b: 2\n  a: 3\n"}, refused=("a", "2", "4")),
    Case("twice 3", {"t.csv": AB, "r.yaml": b"'seed': 1\nseed: 2\n"}, refused=("seed", "1", "2")),
    Case("yaml", {"t.csv": csv("x,yes", "y,no"), "r.yaml": b"class_weights: {yes: 2, no: 1}\n"}, labels=("no", "yes")),
    Case("yaml 2", {"t.csv": csv("x,on", "y,off"), "r.yaml": b"class_weights: {on: 2, off: 1}\n"}, labels=("off", "on")),
    Case("yaml 3", {"t.csv": csv("x,007", "y,08"), "r.yaml": b"class_weights: {007: 2, 08: 1}\n"}, labels=("007", "08")),
]  # fmt: skip


NOT_A_TABLE = {
    "utf-16": AB.decode().encode("utf-16"),
    "gzip": gzip.compress(AB),
    "bzip2": bz2.compress(AB),
    "zip": b"PK\x03\x04" + bytes(range(256)),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "HTML": b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n",
    "sep=": b"sep=,\n" + AB,
    "Parquet": b"PAR1" + bytes(100) + b"PAR1",
}

# More kinds, from public reports.
MORE = [
    *(Case(f"is {kind} {ending}", {f"t.{ending}": content}, refused=(f"t.{ending}", kind))
      for kind, content in NOT_A_TABLE.items() for ending in ("csv", "jsonl")),
    Case("is Git LFS parquet", {"t.parquet": NOT_A_TABLE["Git LFS"]}, refused=("t.parquet", "Git LFS")),
    Case("header spaces", {"t.csv": csv("a, x", "b, y", header="text, label")}, refused=("t.csv", "'label'", "' label'")),
    Case("header spaces 2", {"t.tsv": csv("a\tx", "b\ty", header="text \tlabel")}, refused=("t.tsv", "'text'", "'text '")),
    Case("header spaces 3", {"t.jsonl": jsonl({"text": "a", "label\u00a0": "x"}, {"text": "b", "label\u00a0": "y"})},
         refused=("t.jsonl", "'label'", "'label\\xa0'")),
    Case("one object", {"t.json": json.dumps({"data": [{"text": "a", "label": "x"}] * 9}).encode()},
         refused=("t.json", "'data'")),
    Case("one object 2", {"t.json": json.dumps({"rows": [{"text": "a", "label": "x"}, {"text": "b"}]}).encode()},
         refused=("t.json", "'rows'")),
    Case("one object 3", {"t.json": json.dumps({"text": {"0": "a"}, "label": {"0": "x"}}).encode()},
         refused=("t.json", "'text'", "'label'", "records")),
    Case("file twice", {"t.csv": AB}, {"train_file": '["{folder}/t.csv", "{folder}/*.csv"]'}, refused=("train_file", "t.csv")),
    Case("file twice 2", {"t.csv": AB}, {"train_file": '["{folder}/t.csv", "{folder}/../{name}/t.csv"]'},
         refused=("train_file",)),
    Case("file twice 3", {"t.csv": AB, "u.csv": csv("c,a", "d,b")}, {"train_file": '["{folder}/t.csv", "{folder}/u.csv"]'},
         labels=("a", "b")),
    Case("overlap", {"t.csv": AB}, {"validation_file": "{folder}/t.csv"}, labels=("a", "b"), notes=("24 of 24", "validation")),
    Case("overlap 2", {"t.csv": AB, "v.csv": csv("a good one,a", "new,b", repeat=1)}, {"test_file": "{folder}/v.csv"},
         labels=("a", "b"), notes=("1 of 2", "test")),
    Case("overlap 3", {"t.csv": AB, "v.csv": csv("a new one,a", "new,b", repeat=1)}, {"validation_file": "{folder}/v.csv"},
         labels=("a", "b")),
    Case("own label", {"t.csv": AB}, {"label_column": "text"}, refused=("label_column", "'text'")),
    Case("own label 2", {"t.csv": csv("a,x,1", header="text,a,b")}, {**MULTI, "label_column": '["text", "a"]'},
         refused=("label_column", "'text'")),
    Case("own label 3", {"t.csv": AB}, {"text_pair_column": "text"}, refused=("text_pair_column", "'text'")),
]  # fmt: skip


@pytest.fixture
def bring(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], list[Any]]:
    """Write a case's files; returns the recipe's path and the flags, as a recipe is loaded with them."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def write(case: Case) -> list[Any]:
        for name, content in case.files.items():
            (tmp_path / name).write_bytes(content)
        del recipe["validation_file"]
        recipe["train_file"] = str(tmp_path / next(iter(case.files)))
        given = {**recipe, "validation_fraction": 0.25, "dropout": 0.0, **case.keys}
        path = str(tmp_path / "r.yaml") if "r.yaml" in case.files else None
        flags = to_flags(given)
        values = [value.replace("{folder}", str(tmp_path)).replace("{name}", tmp_path.name) for value in flags[1::2]]
        return [path, dict(zip([name[2:] for name in flags[::2]], values, strict=True))]

    return write


def ask_training(recipe: list[Any]) -> tuple[str, list[str], str]:
    """What a start would refuse, or the labels and the notes: the code that runs before the first step."""
    try:
        settings = load_recipe(*recipe).recipe
        task, config = build_task(settings), load_config(settings)
        task.read_config(config)
        data = prepare_data(settings, task, TOKENIZER.load(settings, config))
    except (BadInput, RecipeError) as error:
        return str(error), [], ""
    return "", task.facts["label_names"], "\n".join(data.notes)


def ask_check(recipe: list[Any]) -> list[str]:
    """The errors that `onecurve check` finds."""
    try:
        settings = load_for_launcher(*recipe).recipe
    except RecipeError as error:
        return [str(error)]
    return [finding.message for finding in check_inputs(settings) if finding.severity == "error"]


@pytest.mark.parametrize("case", [*TABLES, *JSON, *OTHERS, *MORE], ids=lambda case: case.name)
def test_training_and_check_agree_on_what_people_bring(case: Case, bring: Callable[[Case], list[Any]]) -> None:
    recipe = bring(case)
    refused, labels, notes = ask_training(recipe)
    found = ask_check(recipe)
    if not case.refused:
        assert (refused, labels, found) == ("", list(case.labels), [])
        assert names(notes, *case.notes)
        is_small = "overlap" not in case.name and case.keys.keys() & {
            "validation_file",
            "test_file",
        }  # They share rows.
        assert is_small or bool(notes) == bool(case.notes)
        return
    assert names(refused, *case.refused), refused
    if not case.is_late:
        assert any(message.startswith(refused) for message in found), (refused, found)
