"""Families of decoders, tiny: each learns what plain transformers would, resumes, and generates with a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Launch, Run
from tools.decoders import FAMILIES, build_decoder

Settings = dict[str, Any]
Train = Callable[[Settings], Run]


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_resumes_and_generates(causal: Settings, train: Train, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_path = build_decoder(tmp_path / "model", family, initializer_range=0.2)
    settings = {
        **causal,
        "model_name_or_path": str(model_path),
        "max_train_steps": 3,
        "train_batch_size": 203,
        "eval_steps": 3,
        "num_samples": 2,
        "max_new_tokens": 8,
        "dropout": 0.0,
    }
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})
    assert whole.exit_code == 0, whole.stderr
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in read_rows(causal["train_file"]):
            tokens = torch.tensor([(tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id])[:64]])
            total += model(input_ids=tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
            count += tokens.shape[1] - 1
    assert whole.losses[0] == pytest.approx(total / count, rel=1e-5)
    assert ("router" in whole.stdout) == (family == "mixtral")

    (tmp_path / "stop").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONECURVE_STOP_FILE", str(tmp_path / "stop"))
        assert train(settings).exit_code == 75
    resumed = train(settings)
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.losses == whole.losses

    final = AutoModelForCausalLM.from_pretrained(whole.path / "final", dtype=torch.float32).eval()
    samples = read_rows(whole.path / "samples.jsonl")
    assert len(samples) == 2
    for line in samples:
        prompt = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
        written = final.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        assert line["generated"] == tokenizer.decode(written)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["multi_cpu", "fsdp", "deepspeed_zero3"])
def test_samples_are_the_same_on_two_processes(causal: Settings, launch: Launch, tmp_path: Path, topology: str) -> None:
    settings = {**causal, "max_train_steps": 4, "eval_steps": 2, "num_samples": 3, "max_new_tokens": 8}
    one = launch({**settings, "output_dir": str(tmp_path / "one")})
    assert one.exit_code == 0, one.stderr
    two = launch({**settings, "output_dir": str(tmp_path / "two")}, topology, 2)
    assert two.exit_code == 0, two.stderr
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    samples = read_rows(two.path / "samples.jsonl")
    assert len(samples) == 6
    assert samples == read_rows(one.path / "samples.jsonl")
