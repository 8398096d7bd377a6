"""The tracker that `report_to` names: one run of it for one run directory, however often the training is started."""

from __future__ import annotations

import json
from typing import Any

from accelerate import Accelerator

from onecurve.training.atomic_files import write_atomically
from onecurve.training.config import ResolvedRecipe
from onecurve.training.errors import BadInput
from onecurve.training.run_directory import RunDirectory

_PROJECT = "onecurve"


def start_tracker(accelerator: Accelerator, run: RunDirectory, resolved: ResolvedRecipe, step: int) -> None:
    """Start the recipe's tracker, on the main process, with every setting as a hyperparameter.

    Args:
        step: steps that were made.

    Raises:
        BadInput: it can't start.
    """
    name = resolved.recipe.report_to
    if name == "none":
        return
    known = _read_id(run, name)
    options: dict[str, dict[str, Any]] = {
        # It forgets what a killed start wrote after these steps, and gets it again.
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"id": known, "resume": "allow"} if known else {},
        "mlflow": {"run_id": known} if known else {},
    }
    # MLflow refuses a parameter that has changed, as the size of a micro-batch may.
    settings = None if name == "mlflow" and known else _describe_settings(resolved)
    try:
        accelerator.init_trackers(_PROJECT, config=settings, init_kwargs={name: options[name]})
        if accelerator.is_main_process and name != "tensorboard":
            tracker: Any = accelerator.get_tracker(name, unwrap=True)
            own = tracker.id if name == "wandb" else tracker.info.run_id
            write_atomically(run.tracker, json.dumps({"report_to": name, "id": own}) + "\n")
    except Exception as error:  # Each tracker raises its own kind.
        reason = " ".join(str(error).split())
        again = f"; {run.tracker} names the run to go on with, without that file another one begins" if known else ""
        raise BadInput(f"report_to: {name} could not be started: {reason}{again}") from None


def _read_id(run: RunDirectory, name: str) -> str | None:
    """The tracker's own name for its run of this run directory, if an earlier start has begun one."""
    try:
        known = json.loads(run.tracker.read_text(encoding="utf-8"))
        return str(known["id"]) if known["report_to"] == name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe_settings(resolved: ResolvedRecipe) -> dict[str, Any]:
    settings = resolved.recipe.model_dump(mode="json")
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()}
