"""Data is split fairly, tokenized once, cached by content, published whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoTokenizer

from onecurve.training.config import load_recipe
from onecurve.training.data import preparation as data
from onecurve.training.data import shared_answer
from onecurve.training.data.layout import Layout
from onecurve.training.data.loading import PlannedExamples
from onecurve.training.data.plan import MicroBatch
from onecurve.training.data.preparation import PreparedData, Split, hold_out, prepare_data
from onecurve.training.errors import BadInput
from onecurve.training.tasks import build_task
from tests.conftest import ROOT
from tests.messages import naming

Rows = list[dict[str, Any]]
Prepare = Callable[..., PreparedData]


def labels_of(split: Split) -> NDArray[Any]:
    return np.asarray(split.examples["labels"][:])


def tokens_of(split: Split) -> list[list[int]]:
    return [row.tolist() for row in split.examples["input_ids"][:]]


ROWS: Rows = [{"text": " ".join(["news"] * (1 + number % 7)), "label": "ab"[number % 2]} for number in range(40)]


# Holding out ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.floats(0.01, 0.9), st.integers(0, 1000))
def test_held_out_rows_keep_each_classs_share(strata: list[int], fraction: float, seed: int) -> None:
    labels = np.array(strata)
    kept, held_out = hold_out(len(labels), labels, fraction, seed)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(len(labels))), "each row is in one of the two"
    assert np.all(np.diff(kept) > 0)
    assert np.all(np.diff(held_out) > 0)
    taken = Counter(labels[held_out].tolist())
    for label, count in Counter(strata).items():
        if count == 1:
            assert taken[label] == 0, "a class's only row stays in training"
        else:
            assert 1 <= taken[label] <= count - 1, "a class of two is in both"
            assert abs(taken[label] - fraction * count) <= 1


@given(st.integers(2, 300), st.floats(0.01, 0.9), st.integers(0, 1000))
def test_without_classes_rows_are_held_out_at_random(num_rows: int, fraction: float, seed: int) -> None:
    kept, held_out = hold_out(num_rows, None, fraction, seed)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(num_rows))
    assert len(held_out) == min(max(round(num_rows * fraction), 1), num_rows - 1)


def test_the_seed_alone_decides_what_is_held_out() -> None:
    labels = np.arange(500) % 3
    splits = [hold_out(500, labels, 0.2, seed)[1].tolist() for seed in (1, 1, 2)]
    assert splits[0] == splits[1]
    assert len(set(splits[0]) & set(splits[2])) < 60, "two random fifths of 500 share about 20"


# Preparing -----------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONECURVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def prepare(tmp_path: Path, own_cache: Path, tokenizer: Any) -> Prepare:
    def run(rows: Rows = ROWS, **flags: str) -> PreparedData:
        write_rows(tmp_path / "train.jsonl", rows)
        files = {"model_name_or_path": "m", "train_file": str(tmp_path / "train.jsonl"), "max_length": "16"}
        recipe = load_recipe(None, {**files, **flags}).recipe
        return prepare_data(recipe, build_task(recipe), tokenizer)

    return run


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were tokenized, in order."""
    splits: list[str] = []
    original = data._encode

    def count(folder: Path, *others: Any) -> None:
        splits.append(folder.name)
        original(folder, *others)

    monkeypatch.setattr(data, "_encode", count)
    return splits


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_tokens_lengths_and_labels_belong_together(prepare: Prepare, tokenizer: Any) -> None:
    prepared = prepare(validation_fraction="0.25")
    assert (len(prepared.train), len(prepared.validation), prepared.test) == (30, 10, None)
    expected = Counter((tuple(tokenizer(row["text"])["input_ids"]), "ab".index(row["label"])) for row in ROWS)
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for split in (prepared.train, prepared.validation):
        assert split.lengths.tolist() == list(map(len, tokens_of(split)))
        assert split.counts.tolist() == [1.0] * len(split)
        found.update(zip(map(tuple, tokens_of(split)), labels_of(split).tolist(), strict=True))
    assert found == expected
    assert Counter(labels_of(prepared.validation).tolist()) == {0: 5, 1: 5}


def test_a_digest_is_of_what_is_learned_wherever_the_files_lie(prepare: Prepare, tmp_path: Path) -> None:
    def digests(rows: Rows = ROWS, **flags: str) -> tuple[str, str]:
        prepared = prepare(rows, **flags)
        return prepared.train.digest, prepared.validation.digest

    here = digests()
    assert here[0] != here[1]
    write_rows(tmp_path / "elsewhere.jsonl", ROWS)
    assert digests(train_file=str(tmp_path / "elsewhere.jsonl")) == here
    swapped = [*ROWS[:-2], ROWS[-1], ROWS[-2]]
    other_label = [{**ROWS[0], "label": ROWS[1]["label"]}, *ROWS[1:]]
    other_text = [{**ROWS[0], "text": f"{ROWS[0]['text']} more"}, *ROWS[1:]]
    for rows in (swapped, other_label, other_text, [*ROWS, ROWS[0]]):
        assert digests(rows) != here
    renamed = [{**row, "label": f"{row['label']}2"} for row in ROWS]
    assert digests(renamed) != here


def test_nothing_is_held_in_memory(prepare: Prepare) -> None:
    split = prepare().train
    assert isinstance(split.lengths, np.memmap)
    assert not split.lengths.flags.writeable
    for feature in split.examples.values():
        assert all(isinstance(array, np.memmap) for array in feature.arrays), "features are read from their files"


def test_a_second_start_finds_the_cache(prepare: Prepare, own_cache: Path, tokenized: list[str]) -> None:
    first = prepare()
    assert tokenized == ["train", "validation"]
    before = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")}
    second = prepare()
    assert tokenized == ["train", "validation"], "nothing is tokenized twice"
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")} == before
    assert np.array_equal(labels_of(first.train), labels_of(second.train))
    assert first.train.digest == second.train.digest


@pytest.mark.parametrize(
    "flags",
    [
        {"max_length": "8"},
        {"seed": "7"},
        {"validation_fraction": "0.3"},
        {"max_train_samples": "20"},
        {"max_eval_samples": "2"},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_a_key_that_shapes_the_data_makes_it_anew(
    prepare: Prepare, own_cache: Path, tokenized: list[str], flags: dict[str, str]
) -> None:
    prepare()
    prepare(**flags)
    assert len(folders(own_cache)) == 2
    assert len(tokenized) == 4


@pytest.mark.parametrize(
    "flags",
    [{"learning_rate": "0.1"}, {"train_batch_size": "8"}, {"num_train_epochs": "9"}, {"output_dir": "elsewhere"}],
    ids=lambda flags: next(iter(flags)),
)
def test_a_key_that_does_not_shape_the_data_finds_it(
    prepare: Prepare, tokenized: list[str], flags: dict[str, str]
) -> None:
    prepare()
    prepare(**flags)
    assert len(tokenized) == 2


def test_other_content_under_the_same_name_and_age_is_read_again(
    prepare: Prepare, tmp_path: Path, own_cache: Path, tokenized: list[str]
) -> None:
    prepare()
    age = (tmp_path / "train.jsonl").stat()
    changed = [dict(row) for row in ROWS]
    changed[7]["label"] = "a" if changed[7]["label"] == "b" else "b"
    write_rows(tmp_path / "train.jsonl", changed)
    os.utime(tmp_path / "train.jsonl", ns=(age.st_atime_ns, age.st_mtime_ns))
    assert (tmp_path / "train.jsonl").stat().st_size == age.st_size
    labels = labels_of(prepare(changed).train)
    assert len(tokenized) == 4
    assert len(folders(own_cache)) == 2
    assert len(labels) == 36


def test_one_process_of_a_machine_reads_the_data_to_name_it(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """Every process names prepared data by the bytes of all files; only one has to read them."""
    reads: list[str] = []
    digest = hashlib.file_digest

    def count(file: Any, name: str) -> Any:
        reads.append(file.name)
        return digest(file, name)

    def start_process(launch: str) -> str:
        monkeypatch.setattr(shared_answer, "_numbers", itertools.count())
        monkeypatch.setattr(shared_answer, "identify_launch", lambda: launch)
        return prepare().train.digest

    alone = prepare().train.digest
    monkeypatch.setattr(hashlib, "file_digest", count)
    assert [start_process("first") for _ in range(4)] == [alone] * 4
    assert len(reads) == 1
    assert start_process("second") == alone
    assert len(reads) == 2, "the data may have changed in between"
    assert len(list(own_cache.glob("[!.]*/meta.json"))) == 1, "the name of prepared data is the same"


def test_processes_of_one_launch_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from onecurve.training.process import identify_launch; print(identify_launch())"
    found = []
    for count in ("1", "2", "2", "x"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        command = [sys.executable, "-c", code]
        found.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip())
    assert found[0] == found[3] == "None"
    assert found[1] == found[2]
    assert str(os.getpid()) in found[1], "what started them"


def test_another_tokenizer_makes_it_anew(
    prepare: Prepare, own_cache: Path, tiny_model: Path, tmp_path: Path, tokenized: list[str]
) -> None:
    prepare()
    recipe = load_recipe(
        None, {"model_name_or_path": "m", "train_file": str(tmp_path / "train.jsonl"), "max_length": "16"}
    ).recipe
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.add_tokens(["news"])
    prepare_data(recipe, build_task(recipe), other)
    assert len(tokenized) == 4
    assert len(folders(own_cache)) == 2


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full disk", "interrupt"]
)
@pytest.mark.parametrize("failing", ["train", "validation"])
def test_a_failure_leaves_no_folder_and_the_next_start_succeeds(
    prepare: Prepare, own_cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, failing: str
) -> None:
    original = data._encode

    def fail(folder: Path, *others: Any) -> None:
        original(folder, *others)
        if folder.name == failing:
            raise error

    monkeypatch.setattr(data, "_encode", fail)
    with pytest.raises(type(error)):
        prepare()
    assert folders(own_cache) == []
    monkeypatch.setattr(data, "_encode", original)
    assert len(prepare().train) == 36
    assert len(folders(own_cache)) == 1


def test_bad_input_leaves_no_folder(prepare: Prepare, own_cache: Path) -> None:
    with pytest.raises(BadInput, match=naming("row 4", "'label'")):
        prepare([*ROWS[:3], {"text": "x", "label": None}, *ROWS[3:]])
    assert folders(own_cache) == []


def test_a_subset_is_the_start_of_a_seeded_shuffle(prepare: Prepare, tokenizer: Any) -> None:
    numbered: Rows = [{"text": f"news {number}", "label": "ab"[number % 2]} for number in range(100)]
    small = prepare(numbered, max_train_samples="10", validation_fraction="0.1")
    larger = prepare(numbered, max_train_samples="20", validation_fraction="0.1")

    def texts(split: Split) -> list[str]:
        return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in tokens_of(split)]

    assert texts(small.train) == texts(larger.train)[:10]
    assert texts(small.validation) == texts(larger.validation)
    assert len(set(texts(larger.train))) == 20
    assert not set(texts(larger.train)) & set(texts(larger.validation))


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_micro_batch_is_padded_to_its_longest_on_the_tokenizers_side(
    prepare: Prepare, tiny_model: Path, side: str
) -> None:
    split = prepare().train
    padding = AutoTokenizer.from_pretrained(tiny_model, padding_side=side)
    indices: NDArray[np.int64] = np.array([3, 0, 6])
    micro_batch = MicroBatch(indices)
    recipe = load_recipe(None, {"model_name_or_path": "m", "train_file": "t"}).recipe
    batch = PlannedExamples(split, build_task(recipe), padding, Layout(pads_left=side == "left")).__getitems__(
        micro_batch
    )
    longest = int(split.lengths[indices].max())
    assert batch["micro_batch"].indices is indices
    assert batch["labels"].tolist() == labels_of(split)[indices].tolist()
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape == (3, longest)
    assert batch["input_ids"].dtype == torch.int64
    for row, index in enumerate(indices):
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == tokens_of(split)[int(index)]
        assert mask.sum() == split.lengths[index]
        assert (batch["input_ids"][row][~mask] == padding.pad_token_id).all()
        if side == "right":
            assert mask[: int(mask.sum())].all()
        else:
            assert mask[-int(mask.sum()) :].all()
