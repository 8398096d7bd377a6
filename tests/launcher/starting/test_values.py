"""Values that a machine decides: precision, micro-batches, an adapter where the whole model does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.facts.machine import Machine
from onecurve.launcher.starting.beginning import Beginning, begin
from onecurve.launcher.starting.data import Data
from onecurve.training.survey import survey_rows
from tests.launcher.conftest import machine
from tests.messages import names
from tools.init_files import write_text

# Of Llama-2-7b, whose weights alone take 25 GiB in float32.
_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(_LLAMA), encoding="utf-8")
    return tmp_path / "llama"


def build(on: Machine, num_words: int = 30, num_rows: int = 50, model: Path | None = None, **flags: str) -> Beginning:
    """What init makes of prompts with completions."""
    rows = [
        {"prompt": write_text(number, num_words), "completion": write_text(number, 20)} for number in range(num_rows)
    ]
    flags |= {} if model is None else {"model_name_or_path": str(model)}
    data = Data({"train_file": "a.csv"}, "a", "a file", survey_rows(rows))
    return begin(data, flags, on, Path("a.yaml"), ["a.csv"])


def test_the_machine_chooses_precision_and_the_size_of_the_model() -> None:
    found: list[dict[str, Any]] = [
        dict(build(on).keys) for on in (machine(), machine(1, gib=80), machine(1, gib=16, capability=7.0))
    ]
    assert [keys.get("mixed_precision") for keys in found] == [None, "bf16", None]
    models = [keys["model_name_or_path"] for keys in found]
    assert models[0] != models[1] == models[2]


def test_an_adapter_is_taken_where_the_whole_model_does_not_fit(llama: Path) -> None:
    whole, part = (build(machine(1, gib=gib), model=llama) for gib in (192, 48))
    assert "adapter" not in whole.keys
    assert (part.keys["adapter"], part.keys["learning_rate"]) == ("lora", 2e-4)
    asked = build(machine(1, gib=48), model=llama, adapter="none")
    assert (asked.keys["adapter"], asked.keys["per_device_batch_size"]) == ("none", 1)


def test_micro_batches_shrink_until_they_fit(llama: Path) -> None:
    sizes = [
        build(machine(1, gib=gib), 3_000, model=llama, adapter="none").keys["per_device_batch_size"]
        for gib in (192, 140, 130)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_a_length_never_exceeds_the_model_or_what_is_sensible(llama: Path) -> None:
    assert build(machine(), 10).values.lengths["max_length"].share_cut <= 0.01
    long = build(machine(), 4_000, model=llama)
    assert (long.keys["max_length"], long.values.lengths["max_length"].share_cut) == (2048, 1.0)
    (llama / "config.json").write_text(json.dumps({**_LLAMA, "max_position_embeddings": 1024}), encoding="utf-8")
    assert build(machine(), 4_000, model=llama).keys["max_length"] == 1024


def test_the_share_that_is_held_out_depends_on_the_rows() -> None:
    shares = [build(machine(), 5, number).keys["validation_fraction"] for number in (100, 2_000)]
    assert shares == [0.2, 0.1]


def test_rows_that_were_not_read_are_told() -> None:
    rows = [{"prompt": write_text(number), "completion": write_text(number + 1)} for number in range(9)]
    for most, told in ((9, []), (8, ["8"])):
        data = Data({"train_file": "a.csv"}, "a", "a file", survey_rows(rows, most))
        remarks = begin(data, {}, machine(), Path("a.yaml"), ["a.csv"]).to_json()["remarks"]
        assert (len(remarks), all(names(remark, *told) for remark in remarks)) == (len(told), True)
