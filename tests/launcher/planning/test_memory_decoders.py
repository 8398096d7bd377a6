"""Memory of language models: the table is what the arithmetic says today, and what was measured is near it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.memory_decoders import CASES, PAGE, Case, predict
from onecurve.launcher.facts.shape import build_shape
from onecurve.launcher.planning.compute import count_flops
from onecurve.launcher.planning.memory import count_logits, estimate_memory
from onecurve.launcher.planning.work import build_work
from onecurve.launcher.units import MIB

TABLE = PAGE.read_text(encoding="utf-8")
CONFIG = {
    "model_type": "qwen3", "vocab_size": 150_000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=Case.describe)
def test_prediction_is_within_15_percent(case: Case) -> None:
    [row] = [line for line in TABLE.splitlines() if line.startswith(case.describe())]
    predicted, measured = row.split("|")[4:6]
    now = predict(case).peak / MIB
    assert f"{now:,.0f}" == predicted.strip(), "the arithmetic has changed: run benchmarks/memory_decoders.py again"
    assert now == pytest.approx(int(measured.replace(",", "")), rel=0.15)


def test_memory_grows_with_the_chunks_and_not_with_all_logits() -> None:
    shape = build_shape(CONFIG, predicts_tokens=True)
    recipe = replace(CASES[0], num_examples=4, length=2048, keys={"gradient_checkpointing": True}).build_recipe()

    def peak(chunk_tokens: int | str) -> float:
        changed = recipe.model_copy(update={"loss_chunk_tokens": chunk_tokens})
        return estimate_memory(shape, "one process", build_work(changed, shape, "cpu", 2048, 1), 1).peak / MIB

    of_a_token = 8 * 150_000 / MIB
    assert peak(8192) - peak(4096) == pytest.approx(4096 * of_a_token, rel=1e-6)
    assert peak(1_000_000) == peak(8192), "a micro-batch has no more tokens"
    assert peak("auto") == peak(223)


def test_the_head_is_computed_for_every_token() -> None:
    flops = [count_flops(build_shape(CONFIG, predicts_tokens=each), 100, 10) for each in (False, True)]
    assert flops[1] - flops[0] == 6 * 150_000 * 1024 * 100


def test_a_frozen_head_has_no_gradient() -> None:
    shape = build_shape(CONFIG, predicts_tokens=True)
    work = build_work(CASES[0].build_recipe(), shape, "cpu", 256, 1)
    of_all, of_adapter = count_logits(shape, work), count_logits(shape, replace(work, trained_parameters=1000))
    assert [mine - other for mine, other in zip(of_all, of_adapter, strict=True)] == [4 * 150_000 * 1024] * 2
