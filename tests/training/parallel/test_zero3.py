"""ZeRO-3 divides a model before it reaches a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.jobs import Job, write_script

# Trains as training/run.py does, and writes what a whole model would betray: the content of the parameters whenever the
# model is moved, and whether they are divided when the engine starts.
SPY = """
import json
from pathlib import Path

import deepspeed
import torch


FOUND = {"moved": [], "undivided": None}
move, initialize = torch.nn.Module.to, deepspeed.initialize

def move_and_note(module, *arguments, **options):
    FOUND["moved"].append(sum(parameter.numel() for parameter in module.parameters()))
    return move(module, *arguments, **options)

def initialize_and_note(*arguments, **options):
    model = options["model"]
    FOUND["undivided"] = [name for name, value in model.named_parameters() if not hasattr(value, "ds_id") or value.numel()]
    return initialize(*arguments, **options)

torch.nn.Module.to, deepspeed.initialize = move_and_note, initialize_and_note
"""
AT_END = """
engine = run._KEPT[-1].optimizer.optimizer
pairs = zip(engine.fp16_partitioned_groups_flat, engine.fp32_partitioned_groups_flat, strict=True)
FOUND["held_once"] = [weights.data_ptr() == masters.data_ptr() for weights, masters in pairs]
Path(os.environ["ONECURVE_FOUND"], os.environ["RANK"]).write_text(json.dumps(FOUND))
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_no_rank_moves_a_whole_model(recipe: dict[str, Any], tmp_path: Path, precision: str) -> None:
    script = write_script(tmp_path / "spy.py", SPY, AT_END)
    settings = {**recipe, "max_train_steps": 2, "mixed_precision": precision}
    run = Job(settings, "deepspeed_zero3", 2, script=script, environment={"ONECURVE_FOUND": str(tmp_path)}).finish()
    assert run.exit_code == 0, run.stderr
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found["undivided"] == []
        assert found["moved"], "the buffers are moved to the device"
        assert set(found["moved"]) == {0}
        # In bf16 the optimizer needs float32 weights of its own.
        assert found["held_once"]
        assert set(found["held_once"]) == {precision == "no"}
