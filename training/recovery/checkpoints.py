"""The checkpoints of a run: find the newest intact one, and read where its training stood.

    checkpoints/step_00000050/
        model.safetensors        weights by parameter name
        optimizer.safetensors    AdamW's moments as "<parameter name>.exp_avg" and ".exp_avg_sq"
        progress.json            step, schedule, best metric so far
        config.json, tokenizer   so that `from_pretrained` loads the checkpoint
        manifest.json            size and checksum of each of them; written last

One format serves every strategy, and nothing in it is pickled. It holds no random states: random numbers depend on
(seed, step, rank) only.
"""

from __future__ import annotations

import json
from pathlib import Path

from onecurve.training.errors import BadInput
from onecurve.training.models.saving import MODEL_CONFIG
from onecurve.training.process import is_main_process
from onecurve.training.recovery.manifest import find_fault
from onecurve.training.recovery.milestones import Progress
from onecurve.training.recovery.publishing import list_replaced
from onecurve.training.run_directory import PROGRESS_FILE, RunDirectory, list_checkpoints


def find_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest intact checkpoint in a folder, and what is wrong with each newer one.

    Replaced checkpoints count too: a process may have been killed before the new one got its name. Only rank 0 reads whole
    files: every rank starts where it does, and a thousand ranks would read the same terabyte.
    """
    faults: dict[Path, str] = {}
    candidates = [*list_replaced(folder), *list_checkpoints(folder)]
    for candidate in sorted(candidates, key=lambda path: path.name.strip("."), reverse=True):
        fault = find_fault(candidate, reads_content=is_main_process())
        if fault is None:
            return candidate, faults
        faults[candidate] = fault
    return None, faults


def find_model(run: RunDirectory, name: str | None) -> Path:
    """The folder of a model of this run: final/ if no name is given, "best", or a checkpoint by its name or its step.

    Raises:
        BadInput: there is none of that name, or it is a checkpoint that is not intact.
    """
    model = run.find_model(name)
    if model is None:
        raise BadInput(run.describe_missing_model(name))
    fault = find_fault(model) if model != run.final else None
    if fault is not None:
        raise BadInput(f"--checkpoint {name}: {model}: {fault}; give another one of {', '.join(run.list_models())}")
    if not any((model / each).is_file() for each in ("config.json", MODEL_CONFIG)):
        raise BadInput(f"--checkpoint {name}: {model} has no config.json: an older version of Onecurve wrote it")
    return model


def set_aside(checkpoint: Path) -> None:
    """Rename a corrupt checkpoint, so that it is neither resumed from nor overwritten."""
    number = 1
    while (aside := checkpoint.with_name(f"corrupt_{checkpoint.name}_{number}")).exists():
        number += 1
    checkpoint.rename(aside)


def load_progress(checkpoint: Path) -> Progress:
    """Read where the training stood."""
    return Progress(**json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8")))
