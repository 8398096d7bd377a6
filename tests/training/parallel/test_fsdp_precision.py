"""FSDP2 in bf16 adds gradients in float32, over ranks and micro-batches, as DDP does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.jobs import Job, write_script

# Trains as training/run.py does, and writes the share of each step's gradients that bf16 can't hold. What was added in bf16
# it can hold.
SPY = """
import json
from pathlib import Path

import torch

from onecurve.training.models import optimization

SHARES = []
clip = optimization.clip_gradients

def clip_and_note(accelerator, model, max_grad_norm):
    whole = [getattr(value.grad, "full_tensor", lambda value=value: value.grad)() for value in model.parameters()]
    gradients = torch.cat([value.flatten() for value in whole if value is not None])
    gradients = gradients[gradients != 0]
    SHARES.append((gradients.to(torch.bfloat16).float() != gradients).float().mean().item())
    return clip(accelerator, model, max_grad_norm)

optimization.clip_gradients = clip_and_note
"""
AT_END = 'Path(os.environ["ONECURVE_FOUND"], os.environ["RANK"]).write_text(json.dumps(SHARES))'


@pytest.mark.slow
@pytest.mark.parametrize("per_device_batch_size", [1, 8])
def test_gradients_are_added_in_float32(recipe: dict[str, Any], tmp_path: Path, per_device_batch_size: int) -> None:
    script = write_script(tmp_path / "spy.py", SPY, AT_END)
    settings = {
        **recipe,
        "max_train_steps": 2,
        "mixed_precision": "bf16",
        "per_device_batch_size": per_device_batch_size,
    }
    run = Job(settings, "fsdp", 2, script=script, environment={"ONECURVE_FOUND": str(tmp_path)}).finish()
    assert run.exit_code == 0, run.stderr
    shares = json.loads((tmp_path / "0").read_text())
    assert len(shares) == 2
    # A sum of two numbers of bf16 often is one.
    assert all(share > 0.3 for share in shares), shares
