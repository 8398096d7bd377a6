"""The tracker that `report_to` names. All starts of a training continue the same run of the tracker."""

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
    """Start the recipe's tracker on rank 0, with every setting as a hyperparameter.

    Args:
        step: steps done so far.

    Raises:
        BadInput: the tracker cannot be started.
    """
    name = resolved.recipe.report_to
    if name == "none":
        return
    known = _read_id(run, name)
    options: dict[str, dict[str, Any]] = {
        # TensorBoard drops what a killed start logged after these steps; they are logged again.
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"id": known, "resume": "allow"} if known else {},
        "mlflow": {"run_id": known} if known else {},
    }
    # MLflow refuses a changed parameter, and the size of a micro-batch may change.
    settings = None if name == "mlflow" and known else _describe_settings(resolved)
    try:
        accelerator.init_trackers(_PROJECT, config=settings, init_kwargs={name: options[name]})
        if accelerator.is_main_process and name != "tensorboard":
            tracker: Any = accelerator.get_tracker(name, unwrap=True)
            own = tracker.id if name == "wandb" else tracker.info.run_id
            write_atomically(run.tracker, json.dumps({"report_to": name, "id": own}) + "\n")
    except Exception as error:  # Each tracker has its own exceptions.
        reason = " ".join(str(error).split())
        again = (
            f"; it should continue the run named in {run.tracker}: remove that file to begin a new one" if known else ""
        )
        raise BadInput(f"report_to: {name} could not be started: {reason}{again}") from None


def _read_id(run: RunDirectory, name: str) -> str | None:
    """The id of the tracker's run, if an earlier start has begun one."""
    try:
        known = json.loads(run.tracker.read_text(encoding="utf-8"))
        return str(known["id"]) if known["report_to"] == name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe_settings(resolved: ResolvedRecipe) -> dict[str, Any]:
    settings = resolved.recipe.model_dump(mode="json")
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()}
