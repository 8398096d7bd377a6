"""Compiled layers: how often they are compiled over an epoch of texts of all lengths, and that they learn the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

from onecurve.training.models import compilation
from tests.conftest import Launch, Run
from tests.messages import names
from tools.jobs import Job, write_script

Train = Callable[[dict[str, Any]], Run]

# Micro-batches of 2 and 3 texts, each of another length, and an epoch's last one of a single text.
COMPILED: dict[str, Any] = {
    "torch_compile": True,
    "max_length": 128,
    "train_batch_size": 14,
    "per_device_batch_size": 3,
    "length_window": 4,
    "max_train_steps": 15,
}


@pytest.mark.slow
def test_a_layer_is_compiled_at_most_three_times_in_an_epoch(
    recipe: dict[str, Any], train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What is compiled how often does not depend on what turns it into code.
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    eager = train({**recipe, **COMPILED, "torch_compile": False, "output_dir": str(tmp_path / "eager")})
    torch._dynamo.reset()
    clear_compilation_metrics()
    run = train({**recipe, **COMPILED})
    assert run.exit_code == 0, run.stderr
    assert run.losses == pytest.approx(eager.losses, rel=1e-5)
    compiled = Counter((metrics.co_filename, metrics.co_name) for metrics in get_compilation_metrics())
    assert compiled, "layers are compiled"
    assert max(compiled.values()) <= 3, compiled
    assert all("layer" in str(name) for name in compiled), "nothing else is"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "settings"), [("fsdp", "recipe"), ("fsdp", "causal"), ("deepspeed_zero3", "recipe")]
)
def test_every_strategy_learns_the_same_with_compiled_layers(
    request: pytest.FixtureRequest, launch: Launch, tmp_path: Path, topology: str, settings: str
) -> None:
    recipe: dict[str, Any] = request.getfixturevalue(settings)
    changes = "from onecurve.training.models import compilation\ncompilation.BACKEND = 'eager'"
    script = write_script(tmp_path / "compiled.py", changes)
    plain = launch({**recipe, "output_dir": str(tmp_path / "plain")}, topology, 2)
    run = Job({**recipe, "torch_compile": True}, topology, 2, script=script).finish()
    assert run.exit_code == 0, run.stderr
    assert run.losses == pytest.approx(plain.losses, rel=1e-5)
    assert [step["padding"] for step in run.steps] == [step["padding"] for step in plain.steps]


def test_a_model_without_layers_is_refused(
    recipe: dict[str, Any], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "list_stacks", lambda body: {})
    run = train({**recipe, "torch_compile": True})
    assert run.exit_code == 2
    assert names(run.stderr, "torch_compile", "BertForSequenceClassification")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dropout"), [("packed", 0.1), ("padded", 0.0)])
def test_a_decoders_layer_is_compiled_at_most_three_times_in_an_epoch(
    causal: dict[str, Any], train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str, dropout: float
) -> None:
    """With the attention, and its masks by example, that layers have without a compiler."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    settings = {**causal, **COMPILED, "layout": layout, "dropout": dropout, "num_samples": 2, "max_new_tokens": 4}
    eager = train({**settings, "torch_compile": False, "output_dir": str(tmp_path / "eager")})
    torch._dynamo.reset()
    clear_compilation_metrics()
    run = train(settings)
    assert run.exit_code == 0, run.stderr
    assert run.losses == pytest.approx(eager.losses, rel=1e-5)
    assert [step["padding"] for step in run.steps] == [step["padding"] for step in eager.steps]
    assert (max(step["padding"] for step in run.steps) == 0) == (layout == "packed")
    compiled = Counter((each.co_filename, each.co_name, each.co_firstlineno) for each in get_compilation_metrics())
    assert compiled, "layers are compiled"
    assert max(compiled.values()) <= 3, compiled
