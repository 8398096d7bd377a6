"""Padded or packed, in micro-batches of any size: one curve. What can't be packed is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from onecurve.training.models import attention
from tests.conftest import TINY, Launch, Run
from tests.messages import names
from tests.training.models import next_token
from tools.decoders import build_decoder

Settings = dict[str, Any]
Train = Callable[[Mapping[str, Any]], Run]

TASK = f"{next_token.__file__}:NextToken"


@pytest.fixture(scope="module")
def decoders(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a GPT-2 of random weights, with their tokenizer."""
    folder = tmp_path_factory.mktemp("decoders")
    for family in ("llama", "gpt2"):
        build_decoder(folder / family, family)
    return folder


def describe_training(decoders: Path, news: Path, output: str) -> Settings:
    """A training of two epochs and a step, each with an uneven batch at its end; benchmarks/invariance.py makes fifty."""
    return {
        "task": TASK,
        "model_name_or_path": str(decoders / "llama"),
        "train_file": str(news / "train.jsonl"),
        "validation_file": str(news / "validation.jsonl"),
        "output_dir": output,
        **TINY,
        "max_train_steps": 27,
    }


@pytest.fixture
def settings(decoders: Path, news: Path, tmp_path: Path) -> Settings:
    return describe_training(decoders, news, str(tmp_path / "run"))


def check_same_curve(run: Run, expected: Run) -> None:
    assert run.exit_code == 0, run.stderr
    assert len(run.losses) == len(expected.losses)
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)
    norms = [[step["grad_norm"] for step in each.steps] for each in (run, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert run.evaluations[-1]["eval_loss"] == pytest.approx(expected.evaluations[-1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("family", "task"), [("llama", TASK), ("gpt2", "causal_lm")], ids=["outside task", "causal_lm"]
)
def test_packed_micro_batches_give_the_curve_of_padded_ones(
    settings: Settings, train: Train, decoders: Path, tmp_path: Path, family: str, task: str
) -> None:
    settings.update(task=task, model_name_or_path=str(decoders / family))
    padded = train({**settings, "layout": "padded", "output_dir": str(tmp_path / "padded")})
    assert padded.exit_code == 0, padded.stderr
    packed = train({**settings, "per_device_batch_size": 16, "per_device_batch_tokens": 100})
    check_same_curve(packed, padded)
    assert {step["padding"] for step in packed.steps} == {0.0}
    assert max(step["padding"] for step in padded.steps) > 0
    assert [step["tokens"] for step in packed.steps] == [step["tokens"] for step in padded.steps]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"adapter": "lora", "lora_r": 4, "lora_alpha": 8}, id="with an adapter"),
        pytest.param({"gradient_checkpointing": True, "loss_chunk_tokens": 40}, id="recomputed, loss in chunks"),
    ],
)
def test_what_changes_the_model_packs_too(
    settings: Settings, train: Train, tmp_path: Path, more: dict[str, Any]
) -> None:
    settings.update(task="causal_lm", max_train_steps=10, **more)
    padded = train({**settings, "layout": "padded", "output_dir": str(tmp_path / "padded")})
    packed = train(settings)
    check_same_curve(packed, padded)
    assert {step["padding"] for step in packed.steps} == {0.0}


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_run_goes_on_in_any_layout(settings: Settings, train: Train, tmp_path: Path, layout: str) -> None:
    settings.update(max_train_steps=8, checkpointing_steps=4)
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})
    assert train({**settings, "layout": layout}).exit_code == 0
    folder = Path(settings["output_dir"])
    for path in (folder / "checkpoints" / "step_00000008", folder / "final"):
        shutil.rmtree(path)
    (folder / "status.json").unlink()
    resumed = train({**settings, "layout": "packed"})
    check_same_curve(resumed, whole)
    assert [step["padding"] for step in resumed.steps[4:]] == [0.0] * 4
    if layout == "packed":
        assert resumed.losses == whole.losses, "the same bits"
    else:
        assert sum(step["padding"] for step in resumed.steps[:4]) > 0


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"sequence_lengths": None}, id="sequences see each other"),
        pytest.param({"sliding_window": 2}, id="what a layer sees"),
    ],
)
def test_a_model_whose_packed_logits_are_wrong_is_padded(
    settings: Settings, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: dict[str, Any]
) -> None:
    settings["max_train_steps"] = 4
    expected = train({**settings, "layout": "padded", "output_dir": str(tmp_path / "padded")})
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args, **others: attend(*args, **{**others, **broken}))
    run = train(settings)
    check_same_curve(run, expected)
    assert names(run.stdout, "padded", "deviate")
    assert run.steps[0]["padding"] == expected.steps[0]["padding"]


@pytest.mark.parametrize("layout", ["auto", "packed"])
def test_where_packing_would_be_slow_it_has_to_be_asked_for(
    settings: Settings, train: Train, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(attention, "find_slow_packing", lambda *what: "no such kernel")
    run = train({**settings, "max_train_steps": 2, "layout": layout})
    assert run.exit_code == 0, run.stderr
    assert (max(step["padding"] for step in run.steps) == 0) == (layout == "packed")
    assert names(run.stdout, "padded", "no such kernel") == (layout == "auto")


def test_a_task_that_does_not_pack_says_so_when_asked(recipe: Settings, train: Train) -> None:
    run = train({**recipe, "max_train_steps": 1, "layout": "packed"})
    assert run.exit_code == 0, run.stderr
    assert names(run.stdout, "padded", "text_classification")


def test_attention_of_the_users_choice_is_kept(settings: Settings, train: Train) -> None:
    run = train({**settings, "max_train_steps": 1, "attn_implementation": "eager"})
    assert run.exit_code == 0, run.stderr
    assert names(run.stdout, "padded", "attn_implementation")


@pytest.fixture(scope="module")
def reference(decoders: Path, news: Path, tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Run:
    """One process, padded."""
    output = str(tmp_path_factory.mktemp("reference") / "run")
    return launch({**describe_training(decoders, news, output), "layout": "padded"})


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "processes"), [("multi_cpu", 3), ("fsdp", 2), ("deepspeed_zero3", 2)])
def test_packed_on_several_processes(
    settings: Settings, launch: Launch, reference: Run, topology: str, processes: int
) -> None:
    run = launch({**settings, "per_device_batch_tokens": 100}, topology=topology, num_processes=processes)
    check_same_curve(run, reference)
    assert {step["padding"] for step in run.steps} == {0.0}
