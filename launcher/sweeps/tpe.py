"""Optuna's TPE and its median pruner, asked anew for each decision.

The study is rebuilt from the sweep's trials each time, with a seed that follows from the sweep's and the trial's number. So
a decision is a function of the sweep file and of the trials before: a sweep that was killed goes on as if it had not been,
and no storage has to be kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onecurve.launcher.errors import Unsuitable
from onecurve.launcher.sweeps.settings import format_drawn
from onecurve.launcher.sweeps.sweep_file import Range, Sweep
from onecurve.launcher.sweeps.trials import Trial

if TYPE_CHECKING:
    import optuna


def check_optuna() -> None:
    """Refuse strategy tpe where Optuna is not installed.

    Raises:
        Unsuitable: it is not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise Unsuitable(
            "strategy tpe needs Optuna, which is not installed: pip install 'onecurve[sweep]', or take strategy random"
        ) from None


def choose_settings(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, str]:
    """The settings of the next trial, learned from the trials before it."""
    study, distributions = _build_study(sweep, trials), _build_distributions(sweep)
    chosen = study.ask(distributions).params
    return {
        key: format_drawn(values, chosen[key]) if isinstance(values, Range) else str(chosen[key])
        for key, values in sweep.parameters.items()
    }


def count_until_pruned(sweep: Sweep, trials: Sequence[Trial], values: Sequence[float | None]) -> int | None:
    """After how many of its evaluations a trial is to be stopped; None if it may go on.

    It is, once the best of its values is worse than the median of the finished trials' values at the same evaluation.

    Args:
        trials: those before it.
        values: of its evaluations so far.
    """
    import optuna

    if not sweep.prunes:
        return None
    study, pruner = _build_study(sweep, trials), optuna.pruners.MedianPruner(sweep.num_startup_trials)
    for count in range(1, len(values) + 1):
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING, intermediate_values=_number(values[:count])
        )
        if pruner.prune(study, trial):
            return count
    return None


def _build_study(sweep: Sweep, trials: Sequence[Trial]) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = random.Random(f"{sweep.seed}:{len(trials)}").getrandbits(32)
    study = optuna.create_study(
        direction="minimize" if sweep.is_lower_better else "maximize",
        sampler=optuna.samplers.TPESampler(n_startup_trials=sweep.num_startup_trials, seed=seed),
    )
    distributions = _build_distributions(sweep)
    for trial in trials:
        # A trial that diverged counts as a pruned one: worse than all that ended. One that failed says nothing.
        state = {"finished": "COMPLETE", "pruned": "PRUNED", "diverged": "PRUNED"}.get(trial.state, "FAIL")
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[state],
                value=trial.value if state == "COMPLETE" else None,
                params={key: _parse(sweep, key, text) for key, text in trial.settings.items()},
                distributions=distributions,
                intermediate_values={} if trial.state == "diverged" else _number(trial.values),
            )
        )
    return study


def _build_distributions(sweep: Sweep) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    return {
        key: CategoricalDistribution(values)
        if not isinstance(values, Range)
        else IntDistribution(int(values.low), int(values.high), log=values.log)
        if values.is_whole
        else FloatDistribution(values.low, values.high, log=values.log)
        for key, values in sweep.parameters.items()
    }


def _parse(sweep: Sweep, key: str, text: str) -> str | float | int:
    values = sweep.parameters[key]
    if not isinstance(values, Range):
        return text
    return int(text) if values.is_whole else float(text)


def _number(values: Sequence[float | None]) -> dict[int, float]:
    """The values by the number of their evaluation, from 0. The steps of trials with other batch sizes differ."""
    return {number: math.nan if value is None else value for number, value in enumerate(values)}
