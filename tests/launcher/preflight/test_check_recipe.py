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
from tests.messages import names


def test_a_good_recipe_has_no_findings(recipe: dict[str, Any]) -> None:
    assert messages(recipe, machine()) == []


def test_all_problems_come_at_once_errors_first(recipe: dict[str, Any], tmp_path: Path) -> None:
    wrong = {**recipe, "train_file": str(tmp_path / "no.jsonl"), "max_length": 999, "train_batch_size": 1}
    told = messages(wrong, machine(), "multi_cpu", 4)
    assert [line.split(":")[0] for line in told] == ["error", "error", "warning"]
    assert any(names(line, "train_file", str(tmp_path / "no.jsonl")) for line in told)
    assert any(names(line, "max_length", "128") for line in told)
    assert names(told[-1], "4 processes")


@pytest.mark.parametrize(
    ("name", "content", "needed"),
    [
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"\n', ("line 2",)),
        ("a.jsonl", '{"text": "x", "label": 1}\n[1]\n', ("line 2",)),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x", "label": "1"}\n', ("row 2", "'label'")),
        ("a.jsonl", '{"text": " ", "label": 1}\n', ("row 1", "'text'")),
        ("a.jsonl", '{"text": 5, "label": 1}\n', ("row 1", "'text'")),
        ("a.jsonl", '{"text": "x", "label": null}\n', ("row 1", "'label'")),
        ("a.jsonl", '{"text": "x", "label": 1.5}\n', ("row 1", "'label'")),
        ("a.json", '[{"text": "x", "label": 1}, 5]', ("row 2", "line 1")),
        ("a.csv", "text,label\nx,1,2\n", ("line 2", "3", "2")),
        ("a.csv", "text,label\nx\n", ("line 2", "1", "2")),
        ("a.csv", 'text,label\ny,1\n"x,1\nz,1\n', ("line 3",)),
        ("a.csv", "text;label\nx;1\n", ("semicolons",)),
        ("a.csv", "text,label,label\nx,1,2\n", ("'label'",)),
        ("a.csv", "text,label\n", ("no rows",)),
        ("a.tsv", "text\tlabel\n", ("no rows",)),
        ("a.jsonl", "", ("empty",)),
        ("a.txt", "x", (".csv", ".parquet")),
        ("a.parquet", "x", ("parquet",)),
        ("a.jsonl", b"\xff\xff", ("line 1", "0xff")),
    ],
)
def test_bad_data(
    name: str, content: str | bytes, needed: tuple[str, ...], recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    told = messages({**recipe, "train_file": str(path)}, machine())
    assert len(told) == 1
    assert names(told[0], name, *needed)


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
    assert any(names(line, "1 weight files") for line in told)
    assert any("no tokenizer files" in line for line in told)
    weights.unlink()
    (broken / "pytorch_model.bin").touch()
    assert any(names(line, "pickled") for line in messages({**recipe, "model_name_or_path": str(broken)}, machine()))


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
    assert names(told[0], "row 2", "'text'", "1 more", "4")
    assert names(told[1], "row 3", "'label'")
    told = messages({**recipe, "train_file": str(path), "label_column": "lable"}, machine())
    assert sum(names(line, "a.jsonl", "label_column", "'lable'") for line in told) == 1
    assert sum(names(line, "row 2", "'text'") for line in told) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_one_wrong_key_hides_nothing(recipe_file: Path, onecurve: Onecurve, as_json: bool) -> None:
    words = ["--learning_rat", "1", "--seed", "x", "--warmup_ratio", "0.1", "--num_warmup_steps", "5"]
    words += ["--train_file", "no.jsonl", "--model_name_or_path", "./nowhere", "--topology", "fdsp"]
    result = onecurve("check", recipe_file, *words, *(["--json"] if as_json else []))
    assert result.returncode == 2
    assert result.stderr == ""
    lines = " ".join(result.stdout.split()).split("error ")
    for needed in (
        ("learning_rat", "learning_rate"), ("seed",), ("num_warmup_steps", "warmup_ratio"),
        ("train_file", "'no.jsonl'"), ("'./nowhere'",), ("fsdp",),
    ):  # fmt: skip
        assert any(names(line, *needed) for line in lines), (needed, result.stdout)
    if as_json:
        assert len(json.loads(result.stdout)["findings"]) == 6


def test_the_models_size_is_shown(recipe_file: Path, onecurve: Onecurve) -> None:
    shown = onecurve("check", recipe_file)
    assert shown.returncode == 0
    assert re.search(r"^model +bert, \d\.\d M parameters, \d+ MiB of weights$", shown.stdout, re.MULTILINE), (
        shown.stdout
    )


def test_a_conversation_that_is_none_is_found_without_a_tokenizer(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "gpt", "content": "a"}]},
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = str(tmp_path / "chats.jsonl")
    chats = {**recipe, "task": "causal_lm", "train_file": path, "validation_file": path, "messages_column": "messages"}
    told = messages(chats, machine())
    assert len(told) == 2
    assert all(names(line, "chats.jsonl", "row 2", "'gpt'", "assistant") for line in told)
