"""After the last step, back to the best model by metric_for_best_model, as transformers' load_best_model_at_end does."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from onecurve.training.parallel.agreement import ask_main_process
from onecurve.training.parallel.states import replace_weights
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.manifest import find_fault
from onecurve.training.recovery.milestones import Progress


def load_best_model(
    accelerator: Accelerator, model: torch.nn.Module, checkpoints: CheckpointWriter, progress: Progress
) -> tuple[bool, str | None]:
    """Replace the weights by the best checkpoint's, unless the last step's are the best.

    The state of the last step is held: a checkpoint that is still written, on a stop, is of it.

    Returns:
        Whether the weights have changed, and a line for the user; no line without a best model.
    """
    if progress.best_step is None:
        return False, None
    if progress.best_step == progress.step:
        return False, f"The best model is that of the last step, {progress.step}: final/ and the reports are of it."
    checkpoints.hold(progress)
    best = checkpoints.run.checkpoint(progress.best_step)
    problem = ask_main_process(lambda: find_fault(best)) or _find_blind_rank(accelerator, best)
    if problem is not None:
        return False, f"The best model can't be loaded: {best}: {problem}. final/ and the reports are of the last step."
    replace_weights(best, accelerator, model)
    value = "" if progress.best_metric is None else f" ({progress.best_metric:.4f})"
    return True, (
        f"The best model is that of step {progress.best_step}{value}, not of the last step, {progress.step}: final/ and the "
        "reports are of the best."
    )


def _find_blind_rank(accelerator: Accelerator, checkpoint: Path) -> str | None:
    is_here = torch.tensor([checkpoint.is_dir()], device=accelerator.device)
    here = accelerator.gather(is_here).tolist()
    return None if all(here) else f"rank {here.index(False)} does not see it, because its machine has another disk"
