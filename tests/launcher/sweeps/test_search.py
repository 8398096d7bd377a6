"""The trials of a sweep: each is made once, whatever stops the sweep in between; bad ones are pruned, failed ones named."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from onecurve.launcher.errors import UsageError
from onecurve.launcher.launching.ending import Ending
from onecurve.launcher.sweeps.settings import list_settings
from onecurve.launcher.sweeps.sweep_file import load_sweep
from onecurve.launcher.sweeps.trials import load_trials, rank_trials
from onecurve.launcher.views.sweep_table import build_results, list_best_runs
from tests.launcher.sweeps.conftest import Start, Trainings, WriteSweep
from tests.messages import names, naming

RANGES: dict[str, Any] = {
    "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
    "num_train_epochs": {"low": 1, "high": 4},
    "train_batch_size": {"low": 1, "high": 4},
    "seed": [1, 2],
}
TPE: dict[str, Any] = {"strategy": "tpe", "num_trials": 12, "num_startup_trials": 3, "parameters": RANGES}


def rise(overrides: Mapping[str, str]) -> list[float]:
    """Accuracies at three evaluations, the higher the nearer the learning rate is to 1e-3."""
    import math

    distance = abs(math.log10(float(overrides["learning_rate"])) + 3)
    return [(1 - distance / 10) * part for part in (0.5, 0.8, 1.0)]


def test_each_trial_is_made_once_and_the_best_is_found(write_sweep: WriteSweep, start: Start, tmp_path: Path) -> None:
    path, trainings = write_sweep(), Trainings(rise)
    ending = start(path, trainings, max_length="8")
    assert ending.exit_code == 0
    assert trainings.names == ["run_00", "run_01", "run_02", "run_03"]
    assert trainings.made[2] == {
        "max_length": "8", "learning_rate": "0.001", "seed": "1", "output_dir": str(tmp_path / "sweep" / "run_02"),
    }  # fmt: skip
    assert {trial.state for trial in ending.trials} == {"finished"}
    assert [trial.value for trial in ending.trials] == pytest.approx([0.9, 0.9, 1.0, 1.0])
    ranking = [trial.number for trial in rank_trials(load_sweep(path), ending.trials)]
    assert ranking == [2, 3, 0, 1], "of equal ones the first"
    lowest = rank_trials(load_sweep(write_sweep("other.yaml", mode="min")), ending.trials)
    assert [trial.number for trial in lowest] == [0, 1, 2, 3]
    again = start(path, trainings, max_length="8")
    assert (len(trainings.made), again) == (4, ending), "nothing is repeated"


@pytest.mark.parametrize("stop_at", [0, 2])
def test_a_stopped_sweep_goes_on_with_the_trial_that_ran(write_sweep: WriteSweep, start: Start, stop_at: int) -> None:
    path, trainings = write_sweep(), Trainings(rise)
    trainings.endings[f"run_{stop_at:02d}"] = 75
    ending = start(path, trainings)
    assert ending.exit_code == 75
    assert [trial.state for trial in ending.trials] == ["finished"] * stop_at + ["running"]
    ending = start(path, trainings)
    assert ending.exit_code == 0
    assert trainings.names == sorted([*(f"run_{number:02d}" for number in range(4)), f"run_{stop_at:02d}"])


def test_a_killed_sweep_goes_on(write_sweep: WriteSweep, start: Start) -> None:
    """Between the end of a training and its note; and in the middle of a training."""
    path, trainings = write_sweep(), Trainings(rise)

    class Killed(BaseException):
        pass

    def train(overrides: Mapping[str, str]) -> Ending:
        ending = trainings(overrides)
        if len(trainings.made) == 2:
            raise Killed
        return ending

    with pytest.raises(Killed):
        start(path, train)
    trainings.endings["run_02"] = 75
    assert start(path, trainings).exit_code == 75
    assert start(path, trainings).exit_code == 0
    assert trainings.names == ["run_00", "run_01", "run_02", "run_02", "run_03"]


def test_a_failed_trial_is_named_and_does_not_end_the_sweep(write_sweep: WriteSweep, start: Start) -> None:
    path, trainings = write_sweep(), Trainings(rise)
    trainings.endings.update(run_01=1, run_02=3, run_03=2)
    ending = start(path, trainings)
    assert ending.exit_code == 0
    assert [trial.state for trial in ending.trials] == ["finished", "failed", "diverged", "failed"]
    assert names(ending.trials[1].message, "1", "a cause")
    assert names(ending.trials[3].message, "2", "a wrong key")
    again = start(path, trainings)
    assert trainings.names[4:] == ["run_01", "run_03"], "one that diverged would diverge again"
    assert [trial.state for trial in again.trials] == ["finished", "finished", "diverged", "finished"]


def test_what_is_wrong_with_the_first_trial_ends_the_sweep(write_sweep: WriteSweep, start: Start) -> None:
    path, trainings = write_sweep(), Trainings(rise)
    trainings.endings["run_00"] = 2
    assert start(path, trainings).exit_code == 2
    assert trainings.names == ["run_00"]
    assert start(path, trainings).exit_code == 0


def test_random_values_follow_from_seed_and_number(write_sweep: WriteSweep) -> None:
    keys = {"strategy": "random", "parameters": RANGES}
    few, many = (list_settings(load_sweep(write_sweep(**keys, num_trials=number))) for number in (5, 200))
    assert many[:5] == few
    other = list_settings(load_sweep(write_sweep(**keys, num_trials=5, seed=1)))
    assert other != few
    rates = [float(settings["learning_rate"]) for settings in many]
    assert min(rates) >= 1e-5
    assert max(rates) <= 1e-1
    assert 0.4 < sum(rate < 1e-3 for rate in rates) / 200 < 0.6, "even in the logarithm"
    for key in ("train_batch_size", "seed"):
        values = [settings[key] for settings in many]
        assert sorted(set(values)) == (["1", "2", "3", "4"] if key == "train_batch_size" else ["1", "2"])
        assert min(map(values.count, set(values))) > 200 / len(set(values)) * 0.6, "each as often"


def test_tpe_comes_near_the_best_and_is_repeatable(write_sweep: WriteSweep, start: Start, tmp_path: Path) -> None:
    keys = {**TPE, "num_trials": 25, "num_startup_trials": 8, "seed": 1, "prune": False}
    path, trainings = write_sweep(**keys), Trainings(rise)
    ending = start(path, trainings)
    rates = [float(trial.settings["learning_rate"]) for trial in ending.trials]
    assert sum(1e-4 < rate < 1e-2 for rate in rates[8:]) > 12, "by chance 8 of 17 lie in that half of the range"
    (tmp_path / "sweep").rename(tmp_path / "first")
    # Stopped in three places, it makes the same trials.
    again = Trainings(rise)
    for number in (2, 9, 20):
        again.endings[f"run_{number:02d}"] = 75
        assert start(path, again).exit_code == 75
    assert start(path, again) == ending


def test_a_bad_trial_is_pruned_by_its_evaluations(write_sweep: WriteSweep, start: Start) -> None:
    def curve(overrides: Mapping[str, str]) -> list[float]:
        number = int(Path(overrides["output_dir"]).name.removeprefix("run_"))
        return {3: [0.6, 0.3, 0.9], 4: [0.4, 0.9, 0.9], 5: [0.5, 0.7, 0.1]}.get(number, [0.5, 0.7, 0.9])

    path, trainings = write_sweep(**{**TPE, "num_trials": 6}), Trainings(curve)
    trials = start(path, trainings).trials
    # Optuna's rule: the best value so far against the median of the finished trials at the same evaluation.
    assert [(trial.state, len(trial.values)) for trial in trials] == [
        ("finished", 3), ("finished", 3), ("finished", 3), ("pruned", 2), ("pruned", 1), ("finished", 3),
    ]  # fmt: skip
    assert [trial.value for trial in trials[3:]] == [None, None, 0.1], "after the last step nothing is left to prune"
    path = write_sweep("all.yaml", **{**TPE, "num_trials": 6, "prune": False})
    with pytest.raises(UsageError, match=naming("prunes")):
        start(path, trainings)


def test_a_pruned_trial_is_stopped_at_an_evaluation_by_a_stop_file(
    write_sweep: WriteSweep, start: Start, tmp_path: Path
) -> None:
    quick = Trainings(lambda overrides: [0.5, 0.7, 0.9])

    def train(overrides: Mapping[str, str]) -> Ending:
        run = Path(overrides["output_dir"])
        if run.name != "run_03":
            return quick(overrides)
        quick.endings[run.name] = 75
        quick.curve = lambda overrides: [0.1]
        ending = quick(overrides)
        is_asked = threading.Event()
        for _ in range(400):  # Up to 20 s; it takes half a second.
            if (run / "STOP").exists():
                is_asked.set()
                break
            is_asked.wait(0.05)
        assert is_asked.is_set()
        return ending

    ending = start(write_sweep(**{**TPE, "num_trials": 4}), train)
    assert ending.exit_code == 0
    assert (ending.trials[3].state, ending.trials[3].values) == ("pruned", (0.1,))
    assert not (tmp_path / "sweep" / "run_03" / "STOP").exists(), "a later start of that run is not stopped"


def test_more_trials_go_on_but_another_sweep_is_refused(write_sweep: WriteSweep, start: Start, tmp_path: Path) -> None:
    keys = {"strategy": "random", "parameters": RANGES}
    trainings = Trainings(rise)
    start(write_sweep(**keys, num_trials=2), trainings)
    assert len(start(write_sweep(**keys, num_trials=4), trainings).trials) == 4
    assert trainings.names == ["run_00", "run_01", "run_02", "run_03"]
    before = (tmp_path / "sweep" / "sweep.json").read_bytes()
    for sweep, overrides, needed in (
        (load_sweep(write_sweep(**keys, num_trials=4, seed=5)), {}, "seed"),
        (load_sweep(write_sweep(**keys, num_trials=4, metric="loss")), {}, "metric"),
        (load_sweep(write_sweep(**keys, num_trials=4)), {"max_length": "8"}, "flags"),
    ):
        with pytest.raises(UsageError, match=naming(str(tmp_path / "sweep"), needed)):
            start(sweep, trainings, **overrides)
    assert (tmp_path / "sweep" / "sweep.json").read_bytes() == before
    # What may change between starts of a run may change here.
    assert start(write_sweep(**keys, num_trials=4), trainings, per_device_batch_size="4").exit_code == 0


def test_only_one_sweep_at_a_time(write_sweep: WriteSweep, start: Start, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    with FileLock(tmp_path / "sweep" / ".lock"), pytest.raises(UsageError, match=naming(str(tmp_path / "sweep"))):
        start(write_sweep(), Trainings(rise))


def test_the_value_is_that_of_the_model_in_final(write_sweep: WriteSweep, start: Start, tmp_path: Path) -> None:
    path, trainings = write_sweep(), Trainings(lambda overrides: [0.5, 0.9, 0.7])
    assert {trial.value for trial in start(path, trainings).trials} == {0.7}

    def train(overrides: Mapping[str, str]) -> Ending:
        ending = trainings(overrides)
        with (Path(overrides["output_dir"]) / "config.yaml").open("a", encoding="utf-8") as file:
            file.write("metric_for_best_model: accuracy\n")
        return ending

    (tmp_path / "sweep").rename(tmp_path / "last")
    assert {trial.value for trial in start(path, train).trials} == {0.9}


def test_results_name_runs_and_the_best(write_sweep: WriteSweep, start: Start, tmp_path: Path) -> None:
    path, trainings = write_sweep(), Trainings(rise)
    trainings.endings["run_02"] = 1
    ending = start(path, trainings)
    sweep = load_sweep(path)
    results = build_results(sweep, tmp_path / "sweep", load_trials(sweep, {}, tmp_path / "sweep"))
    assert results == build_results(sweep, tmp_path / "sweep", ending.trials)
    assert (results["best"], results["metric"], results["mode"]) == (3, "eval_accuracy", "max")
    assert list_best_runs(results, 2) == [tmp_path / "sweep" / f"run_{number:02d}" for number in (3, 0)]
    assert results["trials"][2]["state"] == "failed"
    assert results["trials"][3]["run"] == str(tmp_path / "sweep" / "run_03")
