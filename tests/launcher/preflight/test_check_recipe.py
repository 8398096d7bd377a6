"""All problems at once, each with its fix, before anything is started."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.preflight import check_machine
from onecurve.launcher.preflight.model import find_truncation
from onecurve.training.data.tables import read_head
from onecurve.training.errors import BadInput
from tests.launcher.conftest import ROOT, Onecurve, machine, messages


def test_a_good_recipe_has_no_findings(recipe: dict[str, Any]) -> None:
    assert messages(recipe, machine()) == []


def test_all_problems_come_at_once_errors_first(recipe: dict[str, Any], tmp_path: Path) -> None:
    wrong = {**recipe, "train_file": str(tmp_path / "no.jsonl"), "max_length": 999, "train_batch_size": 1}
    told = messages(wrong, machine(), "multi_cpu", 4)
    assert [line.split(":")[0] for line in told] == ["error", "error", "warning"]
    assert any("does not exist" in line for line in told)
    assert any("more than the model's 128 positions" in line for line in told)
    assert "less than 4 processes" in told[-1]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"\n', "line 2"),
        ("a.jsonl", '{"text": "x", "label": 1}\n[1]\n', "line 2"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x", "label": "1"}\n', "row 2: column 'label'"),
        ("a.jsonl", '{"text": " ", "label": 1}\n', "row 1: text column 'text'"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "row 1: text column 'text'"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "row 1: label column 'label'"),
        ("a.jsonl", '{"text": "x", "label": 1.5}\n', "row 1: label column 'label'"),
        ("a.json", '[{"text": "x", "label": 1}, 5]', "row 2 (line 1)"),
        ("a.csv", "text,label\nx,1,2\n", "line 2: 3 fields where the header has 2"),
        ("a.csv", "text,label\nx\n", "line 2: 1 fields where the header has 2"),
        ("a.csv", 'text,label\ny,1\n"x,1\nz,1\n', "line 3"),
        ("a.csv", "text;label\nx;1\n", "semicolons"),
        ("a.csv", "text,label,label\nx,1,2\n", "'label'"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.tsv", "text\tlabel\n", "has no rows"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", "x", "is none of .csv"),
        ("a.parquet", "x", "cannot be read as parquet"),
        ("a.jsonl", b"\xff\xfe", "line 1: byte 0xff"),
    ],
)
def test_bad_data(name: str, content: str | bytes, expected: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    told = messages({**recipe, "train_file": str(path)}, machine())
    assert len(told) == 1
    assert expected in told[0]


def test_a_model_that_is_not_whole(recipe: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = broken / "model.safetensors"
    assert find_truncation(weights) is None
    weights.write_bytes(weights.read_bytes()[:-100])
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in ("tokenizer.json", "vocab.txt"):
        (broken / name).unlink()
    told = messages({**recipe, "model_name_or_path": str(broken)}, machine())
    assert len(told) == 3
    assert any("instead of" in line for line in told)
    assert any("1 weight files are missing" in line for line in told)
    assert any("no tokenizer files" in line for line in told)
    weights.unlink()
    (broken / "pytorch_model.bin").touch()
    assert any(
        "only pickled weights" in line for line in messages({**recipe, "model_name_or_path": str(broken)}, machine())
    )


def test_the_machine_is_in_order() -> None:
    errors = [finding for finding in check_machine(ROOT, machine()) if finding.severity == "error"]
    assert errors == []


def test_check_reads_only_the_head(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "label": 1}\n' * 300 + "broken\n", encoding="utf-8")
    assert len(read_head(path, 200).rows) == 200
    with pytest.raises(BadInput, match="line 301"):
        read_head(path, 301)


def test_every_kind_of_bad_row_is_told_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"text": "x", "label": "a"},
        {"text": "", "label": "a"},
        {"text": "y", "label": None},
        {"text": " ", "label": "b"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = messages({**recipe, "train_file": str(path)}, machine())
    assert len(told) == 2
    assert "row 2: text column 'text' is empty; fill or remove the row (and 1 more such of the first 4)" in told[0]
    assert "row 3: label column 'label' is empty" in told[1]
    told = messages({**recipe, "train_file": str(path), "label_column": "lable"}, machine())
    assert sum("a.jsonl: label_column 'lable' is not a column" in line for line in told) == 1
    assert sum("text column 'text' is empty" in line for line in told) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_one_wrong_key_hides_nothing(recipe_file: Path, onecurve: Onecurve, as_json: bool) -> None:
    words = ["--learning_rat", "1", "--seed", "x", "--warmup_ratio", "0.1", "--num_warmup_steps", "5"]
    words += ["--train_file", "no.jsonl", "--model_name_or_path", "./nowhere", "--topology", "fdsp"]
    result = onecurve("check", recipe_file, *words, *(["--json"] if as_json else []))
    assert result.returncode == 2
    assert result.stderr == ""
    for problem in (
        "learning_rat: unknown key", "seed: input should be a valid",
        "num_warmup_steps and warmup_ratio: give one of them",
        "train_file: 'no.jsonl' does not exist", "'./nowhere' does not exist", "did you mean fsdp?",
    ):  # fmt: skip
        assert problem in result.stdout, (problem, result.stdout)
    if as_json:
        assert len(json.loads(result.stdout)["findings"]) == 6


def test_the_models_size_is_shown(recipe_file: Path, onecurve: Onecurve) -> None:
    shown = onecurve("check", recipe_file)
    assert shown.returncode == 0
    assert re.search(r"^model +bert, \d\.\d M parameters, \d+ MiB of weights$", shown.stdout, re.MULTILINE), (
        shown.stdout
    )
