"""Families of decoders, tiny: each learns what plain transformers would, resumes, and generates with a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Launch, Run
from tests.training.conftest import stop_and_resume
from tools.decoders import FAMILIES, build_decoder
from tools.launches import LaunchServer, build_arguments, build_environment

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

    resumed = stop_and_resume(train, settings, tmp_path)
    assert resumed.losses == whole.losses

    final = AutoModelForCausalLM.from_pretrained(whole.path / "final", dtype=torch.float32).eval()
    samples = read_rows(whole.path / "samples.jsonl")
    assert [line["step"] for line in samples] == [0, 0, 3, 3], "before the training and at its evaluation"
    for line in samples:
        prompt = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
        written = (final if line["step"] else model).generate(prompt, max_new_tokens=8, do_sample=False)[
            0, prompt.shape[1] :
        ]
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
    assert [line["step"] for line in samples] == [0] * 3 + [2] * 3 + [4] * 3, "one before the training"
    assert samples == read_rows(one.path / "samples.jsonl")


@pytest.mark.slow
def test_two_processes_generate_what_one_does(
    causal: Settings, train: Train, launch_server: LaunchServer, tmp_path: Path
) -> None:
    """More rows than a chunk holds; rows keep their order."""
    model_path = build_decoder(tmp_path / "model", initializer_range=0.5)
    run = train({**causal, "model_name_or_path": str(model_path), "max_train_steps": 1, "max_new_tokens": 3})
    assert run.exit_code == 0, run.stderr
    rows = [
        {"text": row["text"][: 4 + number % 9], "id": number}
        for number, row in enumerate(read_rows(causal["train_file"]) * 6)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outputs = []
    for num_processes, topology in ((1, "cpu"), (2, "multi_cpu")):
        target = tmp_path / f"out{num_processes}.jsonl"
        words = [
            "--run",
            str(run.path),
            "--input",
            str(tmp_path / "in.jsonl"),
            "--output",
            str(target),
            "--batch_size",
            "64",
        ]
        words = build_arguments(topology, num_processes, (), "training/predict.py", words)
        result = launch_server.launch(words, build_environment(), 200)
        assert result.returncode == 0, result.stderr
        outputs.append(target.read_text(encoding="utf-8"))
    assert outputs[0] == outputs[1]
    found = [json.loads(line) for line in outputs[0].splitlines()]
    assert [row["id"] for row in found] == list(range(len(rows)))
    assert len({row["prediction"] for row in found}) > 100
