"""Every shipped topology is launched, rehearsed on this machine's CPU with two processes where it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT, TINY, Launch, Run

CONFIGS = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))

# name: (processes asked for, further options, strategy)
EXPECTED: dict[str, tuple[int | None, tuple[str, ...], str]] = {
    "cpu": (None, (), "one process"),
    "single_gpu": (None, (), "one process"),
    "multi_cpu": (2, (), "DDP"),
    "multi_gpu": (2, (), "DDP"),
    "multi_node": (2, ("--num_machines", "1"), "DDP"),
    "fsdp": (2, (), "FSDP2"),
    "hsdp": (4, (), "HSDP"),
    "deepspeed_zero1": (2, (), "ZeRO-1"),
    "deepspeed_zero2": (2, (), "ZeRO-2"),
    "deepspeed_zero3": (2, (), "ZeRO-3"),
    "deepspeed_zero3_offload": (2, (), "ZeRO-3"),
}

# A quick sample runs with every change; the others take minutes.
QUICK = {"cpu", "hsdp"}  # tests/test_smoke.py has DDP and ZeRO-2.

# One of each library that divides models is launched as new processes: with imports, which a fork has behind it.
REAL = {"cpu", "fsdp", "deepspeed_zero3"}


def test_every_shipped_topology_is_tested() -> None:
    assert set(CONFIGS) == set(EXPECTED)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_topology_says_when_to_use_it_and_owns_no_mathematics(name: str) -> None:
    text = (ROOT / "accelerate_configs" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert f"accelerate_configs/{name}.yaml" in text
    content = yaml.safe_load(text)
    assert content["mixed_precision"] == "no"
    for key in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert key not in content.get("deepspeed_config", {})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS]
)
def test_a_topology_trains(recipe: dict[str, Any], launch: Launch, reference: list[float], name: str) -> None:
    processes, options, strategy = EXPECTED[name]
    run = launch({**recipe, **LONGER}, name, processes, launcher_options=options, is_real=name in REAL)
    assert run.exit_code == 0, run.stderr
    topology = run.read("environment.json")["topology"]
    assert (topology["num_processes"], topology["strategy"]) == (processes or 1, strategy)
    assert sum(run.losses[-5:]) < sum(run.losses[:5])
    # DeepSpeed's own CPU optimizer, used for offloading, rounds differently.
    assert run.losses == pytest.approx(reference, rel=1e-4 if "offload" in name else 1e-5)


LONGER = {"max_train_steps": 30, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def reference(tiny_model: Path, news: Path, tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> list[float]:
    """The losses of one process."""

    settings = {
        "model_name_or_path": str(tiny_model),
        "train_file": str(news / "train.jsonl"),
        "validation_file": str(news / "validation.jsonl"),
        "output_dir": str(tmp_path_factory.mktemp("reference") / "run"),
        **TINY,
        **LONGER,
    }
    run: Run = launch(settings)
    assert run.exit_code == 0, run.stderr
    return run.losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_in_bf16_begins_at_the_pretrained_weights(
    recipe: dict[str, Any], launch: Launch, tiny_model: Path, name: str
) -> None:
    """It would begin at their rounding to bf16, a relative 2e-3 away. The rate is too small to move them."""
    still = {"mixed_precision": "bf16", "learning_rate": 1e-12, "max_train_steps": 2}
    run = launch({**recipe, **still}, topology=name, num_processes=2)
    assert run.exit_code == 0, run.stderr
    found = load_file(run.path / "final" / "model.safetensors")
    for parameter, weights in load_file(tiny_model / "model.safetensors").items():
        torch.testing.assert_close(found[f"bert.{parameter}"], weights, rtol=0, atol=1e-10, msg=parameter)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi_cpu", "fsdp"])
def test_a_step_of_fewer_examples_than_processes_is_that_of_one_process(
    recipe: dict[str, Any], launch: Launch, tmp_path: Path, name: str
) -> None:
    """Every second step has one example: the other process runs a stand-in, of which nothing may be learned."""
    settings = {**recipe, "max_train_samples": 17, "max_train_steps": 6}
    alone = launch({**settings, "output_dir": str(tmp_path / "alone")})
    assert [step["examples"] for step in alone.steps] == [16, 1] * 3
    both = launch({**settings, "output_dir": str(tmp_path / "both")}, name, 2)
    assert both.exit_code == 0, both.stderr
    assert both.losses == pytest.approx(alone.losses, rel=1e-5)
    norms = [[step["grad_norm"] for step in run.steps] for run in (both, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
