"""Fine-tune pretrained transformers: one recipe, one loss curve, any machine.

    import onecurve

    run = onecurve.train("recipe.yaml", learning_rate=3e-5)
    pandas.DataFrame(run.metrics)
    run.evaluate(test_file="test.jsonl")
    run.predict(["a text", "another"])

What can go wrong is an exception with the command line's message. The trees are drawn in onecurve/training/errors.py (the
training's: `Fault`) and onecurve/launcher/errors.py (before a training starts: `LauncherError`); a wrong recipe is a
`RecipeError`. Guide: docs/python.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onecurve.api import Run, evaluate, load_run, plan, predict, train
    from onecurve.launcher.errors import (
        LauncherError,
        LaunchFailed,
        NotARun,
        PreflightFailed,
        UncountableModel,
        Undecided,
        UnknownTopology,
        UnreadableModel,
        Unsuitable,
        UsageError,
    )
    from onecurve.training.config import RecipeError
    from onecurve.training.errors import (
        BadInput,
        Diverged,
        Fault,
        LostLauncher,
        Preempted,
        SlowPrecision,
        WrongDevice,
        WrongTopology,
    )

__version__ = "0.1.0"

__all__ = [
    "BadInput",
    "Diverged",
    "Fault",
    "LaunchFailed",
    "LauncherError",
    "LostLauncher",
    "NotARun",
    "Preempted",
    "PreflightFailed",
    "RecipeError",
    "Run",
    "SlowPrecision",
    "UncountableModel",
    "Undecided",
    "UnknownTopology",
    "UnreadableModel",
    "Unsuitable",
    "UsageError",
    "WrongDevice",
    "WrongTopology",
    "__version__",
    "evaluate",
    "load_run",
    "plan",
    "predict",
    "train",
]

_MODULES = ("onecurve.api", "onecurve.launcher.errors", "onecurve.training.config", "onecurve.training.errors")


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: each process of a training imports this package as well."""
    if name in __all__:
        for module in map(importlib.import_module, _MODULES):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
