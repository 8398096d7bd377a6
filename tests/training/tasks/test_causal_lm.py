"""Causal language models on plain texts: what is a target, what a step's loss is, what an evaluation measures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run

Settings = dict[str, Any]
Train = Callable[[Settings], Run]


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def encode_alone(tokenizer: Any, text: str, max_length: int) -> torch.Tensor:
    return torch.tensor([(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])[:max_length]])


def test_a_step_is_that_of_plain_transformers_one_example_at_a_time(causal: Settings, train: Train) -> None:
    """Loss and gradient of a step over all the data, against the model's own loss of each text alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = {**causal, "train_batch_size": 203, "max_train_steps": 1, "max_grad_norm": 0}
    run = train({**settings, "per_device_batch_size": 7})
    assert run.exit_code == 0, run.stderr
    model = AutoModelForCausalLM.from_pretrained(causal["model_name_or_path"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(causal["model_name_or_path"])
    total, count = 0.0, 0
    for row in read_rows(causal["train_file"]):
        tokens = encode_alone(tokenizer, row["text"], causal["max_length"])
        num_targets = tokens.shape[1] - 1
        loss = model(input_ids=tokens, labels=tokens).loss * num_targets
        loss.backward()
        total, count = total + loss.item(), count + num_targets
    norm = math.sqrt(sum(float((weight.grad / count).square().sum()) for weight in model.parameters()))
    assert run.steps[0]["loss"] == pytest.approx(total / count, rel=1e-6)
    assert run.steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)


def test_an_evaluation_weighs_every_token_alike(causal: Settings, train: Train) -> None:
    """Loss, perplexity and accuracy over all targets, whatever the batches are."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = []
    for size in (1, 5):
        settings = {**causal, "per_device_batch_size": size, "max_train_steps": 4}
        run = train({**settings, "output_dir": f"{causal['output_dir']}{size}"})
        assert run.exit_code == 0, run.stderr
        found.append(run.evaluations[-1])
    model = AutoModelForCausalLM.from_pretrained(run.path / "final", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.path / "final")
    losses, right = [], []
    with torch.no_grad():
        for row in read_rows(causal["validation_file"]):
            tokens = encode_alone(tokenizer, row["text"], causal["max_length"])
            logits = model(input_ids=tokens).logits[0, :-1]
            losses += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none").tolist()
            right += (logits.argmax(-1) == tokens[0, 1:]).tolist()
    loss = math.fsum(losses) / len(losses)
    for evaluation in found:
        assert evaluation["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert evaluation["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert evaluation["eval_accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-9)
