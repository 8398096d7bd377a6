"""What a person sees before the first step and after the last one."""

from __future__ import annotations

import logging
import os
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from onecurve.training.data.plan import TrainingPlan
from onecurve.training.models.adapters import open_adapter
from onecurve.training.parallel.topology import describe_strategy
from onecurve.training.recipe import Recipe
from onecurve.training.record.evaluation import Evaluation
from onecurve.training.run_directory import RunDirectory
from onecurve.training.tasks.base import Task
from onecurve.training.work_progress import follow


def quiet_third_parties() -> None:
    """Keep load reports, fork warnings and deprecation noise of other packages off the screen; errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns on every import where it must find out itself.
    warnings.filterwarnings("ignore")
    for name in ("DeepSpeed", "accelerate", "torch.distributed", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(
        logging.CRITICAL
    )  # Its errors are raised as well, and reported in our words.
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if os.environ.get("RANK", "0") == "0":  # All processes load at the same time.
        transformers.logging.set_tqdm_hook(_follow_loading)


def _follow_loading(build: Callable[..., Any], arguments: tuple[Any, ...], keys: dict[str, Any]) -> Any:
    """In place of the bar of transformers: how far the weights are loaded, and the time left."""
    if keys.get("desc") == "Loading weights" and arguments:
        return follow("loading weights", list(arguments[0]), "tensors")
    return build(*arguments, **keys)


def describe_arithmetic(
    recipe: Recipe, accelerator: Accelerator, num_steps: int, plan: TrainingPlan, parameters: tuple[int, int]
) -> str:
    """The arithmetic of a run in two lines.

    Args:
        plan: its first step stands for all.
        parameters: trained and all.
    """
    first = plan.micro_batches(0)
    sizes = sorted({len(micro_batch.indices) for micro_batch in first if not micro_batch.is_empty})
    size = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    trained, total = parameters
    share = "all" if trained == total else f"{trained / total:.1%}"
    precision: str = recipe.mixed_precision
    if (
        precision == "no"
        and accelerator.device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        precision = "no (float32; this GPU is many times faster in bf16)"
    return (
        f"{size} examples a micro-batch x {first[0].num_micro_batches} accumulated x {processes} "
        f"({describe_strategy(accelerator)}, {accelerator.device.type}) = {first[0].num_examples} examples a step\n"
        f"{num_steps} steps; {trained / 1e6:.1f} M parameters trained ({share}); mixed precision {precision}"
    )


def print_evaluation(console: Console, task: Task, evaluation: Evaluation) -> None:
    """The metrics, and the task's table if it has one."""
    console.print(
        describe_metrics(evaluation.metrics, task.main_metrics), markup=False, highlight=False, soft_wrap=True
    )
    table = task.build_table(evaluation.results)
    if table is not None:
        console.print(table)


def print_next(console: Console, task: Task, run: RunDirectory, seconds: float) -> None:
    """Where everything is and what to do next."""
    console.print(f"Run directory  {run.path}  ({seconds:.0f} s)", markup=False, soft_wrap=True)
    console.print("Next", style="bold")
    load = ("load it", f'{task.auto_class}.from_pretrained("{run.final}")')
    if run.merged.is_dir():
        load = ("load it", f'{task.auto_class}.from_pretrained("{run.merged}")')
    elif open_adapter(run.final) is not None:
        load = ("make it whole", f"onecurve merge {shlex.quote(str(run.path))}")
    for what, how in (
        load,
        ("look at mistakes", str(run.eval_predictions)),
        ("see the curve", str(run.metrics)),
        ("train it again", f"onecurve run {shlex.quote(str(run.config))} --output_dir NEW_FOLDER"),
    ):
        console.print(f"  {what:<17}{how}", markup=False, highlight=False, soft_wrap=True)


def describe_metrics(metrics: Mapping[str, float], main_metrics: Sequence[str]) -> str:
    """The metrics that people look at first, in a line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.partition("_")[2] in main_metrics)
