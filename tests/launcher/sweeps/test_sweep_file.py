"""A sweep file is read strictly, and all that is wrong with it is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from onecurve.launcher.sweeps.check import check_sweep
from onecurve.launcher.sweeps.settings import list_settings
from onecurve.launcher.sweeps.sweep_file import Range, SweepKeys, load_sweep
from onecurve.training.config import RecipeError, load_recipe
from onecurve.training.tasks.text_classification import TextClassificationRecipe
from tests.conftest import ROOT
from tests.launcher.sweeps.conftest import WriteSweep
from tests.messages import names, naming


def test_a_grid_is_every_combination(write_sweep: WriteSweep) -> None:
    settings = list_settings(load_sweep(write_sweep()))
    assert len(settings) == 4
    assert settings[:2] == [{"learning_rate": "0.0001", "seed": "1"}, {"learning_rate": "0.0001", "seed": "2"}]


def test_a_list_of_trials_keeps_types(write_sweep: WriteSweep) -> None:
    settings = {"class_weights": {"tech": 2.0}, "mixed_precision": False, "text_column": "a b", "max_train_steps": None}
    path = write_sweep(strategy=None, parameters=None, runs=[settings, {"seed": 1}])
    sweep = load_sweep(path)
    assert (sweep.strategy, sweep.num_trials) == ("runs", 2)
    first = load_recipe(str(ROOT / "training/recipes/demo.yaml"), list_settings(sweep)[0]).recipe
    assert isinstance(first, TextClassificationRecipe)
    assert first.class_weights == {"tech": 2.0}
    assert (first.mixed_precision, first.text_column, first.max_train_steps) == ("no", "a b", None)


def test_values_are_taken_as_they_are_written(write_sweep: WriteSweep, tmp_path: Path) -> None:
    path = write_sweep()
    text = "recipe: r.yaml\nmetric: eval_loss\nstrategy: grid\nparameters: {text_column: [0123, yes], learning_rate: [1e-5]}"
    path.write_text(text, encoding="utf-8")
    assert list_settings(load_sweep(path))[0] == {"text_column": "0123", "learning_rate": "1e-5"}


@pytest.mark.parametrize(
    ("bounds", "key", "expected"),
    [
        ("{low: 1e-5, high: 1e-3, log: true}", "learning_rate", Range(1e-5, 1e-3, True)),
        ("{low: 8, high: 64}", "train_batch_size", Range(8, 64, is_whole=True)),
        # A key that takes fractions gets them, also between whole bounds.
        ("{low: 0, high: 1}", "dropout", Range(0, 1)),
    ],
)
def test_a_range(write_sweep: WriteSweep, bounds: str, key: str, expected: Range) -> None:
    path = write_sweep()
    text = f"recipe: r.yaml\nmetric: eval_loss\nstrategy: random\nnum_trials: 2\nparameters: {{{key}: {bounds}}}"
    path.write_text(text, encoding="utf-8")
    assert load_sweep(path).parameters[key] == expected


def test_better_is_what_the_metric_says_unless_the_file_does(write_sweep: WriteSweep) -> None:
    found = [load_sweep(write_sweep(metric=metric, mode=mode)) for metric in ("loss", "f1") for mode in (None, "max")]
    assert [(sweep.metric, sweep.is_lower_better) for sweep in found] == [
        ("eval_loss", True), ("eval_loss", False), ("eval_f1", False), ("eval_f1", False),
    ]  # fmt: skip


RANDOM = {"strategy": "random", "num_trials": 2}


@pytest.mark.parametrize(
    ("keys", "needed"),
    [
        ({"recipe": None}, [("recipe",)]),
        ({"metric": None, "stratgy": "grid"}, [("stratgy", "strategy"), ("metric",)]),
        ({"parameters": None}, [("parameters",)]),
        ({"strategy": None}, [("strategy", "grid", "random", "tpe")]),
        ({"strategy": "bayes"}, [("strategy", "bayes")]),
        ({"strategy": "random"}, [("num_trials", "random")]),
        ({"num_trials": 3, "prune": True}, [("num_trials",), ("prune", "tpe")]),
        ({**RANDOM, "num_trials": 0}, [("num_trials", "0")]),
        ({**RANDOM, "prune": True}, [("prune", "tpe")]),
        ({"parameters": {"seed": 1}}, [("parameters", "seed")]),
        ({"parameters": {"seed": []}}, [("parameters", "seed")]),
        ({"parameters": {"seed": [1, 1]}}, [("seed", "1", "twice")]),
        ({"parameters": [1]}, [("parameters",)]),
        ({"parameters": {"output_dir": ["a", "b"]}}, [("output_dir",)]),
        ({"parameters": {"seed": {"low": 1, "high": 2}}}, [("seed", "grid")]),
        ({**RANDOM, "parameters": {"seed": {"low": 1, "hi": 2}}}, [("seed", "high"), ("seed", "hi")]),
        ({**RANDOM, "parameters": {"seed": {"low": 2, "high": 1}}}, [("seed", "low", "high", "2", "1")]),
        ({**RANDOM, "parameters": {"dropout": {"low": 0, "high": 1, "log": True}}}, [("dropout", "log", "0")]),
        ({"runs": [{"seed": 1}]}, [("runs", "parameters", "strategy")]),
        ({"strategy": None, "parameters": None, "runs": []}, [("runs",)]),
        ({"strategy": None, "parameters": None, "runs": [1]}, [("runs",)]),
        ({"parameters": {"seed": list(range(2000)), "max_length": list(range(2000))}}, [("4,000,000",)]),
    ],
)
def test_what_is_wrong_with_the_file(
    write_sweep: WriteSweep, keys: dict[str, Any], needed: list[tuple[str, ...]]
) -> None:
    path = write_sweep(**keys)
    with pytest.raises(RecipeError, match=naming(str(path))) as error:
        load_sweep(path)
    for words, problem in zip(needed, error.value.problems, strict=True):
        assert names(problem, *words), problem


@pytest.mark.parametrize(("text", "needed"), [("seed: [1", "YAML"), ("metric: a\nmetric: b", "metric"), ("", "recipe")])
def test_a_file_that_is_no_mapping_of_keys(tmp_path: Path, text: str, needed: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=naming(needed)):
        load_sweep(path)
    with pytest.raises(RecipeError, match=naming("nowhere.yaml")):
        load_sweep(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("keys", "needed"),
    [
        (
            {"metric": "loss", "parameters": {"learning_rate": [1.0, -1.0], "seed": [1, 2]}},
            [("learning_rate", "2", "4")],
        ),
        ({"parameters": {"sead": [1, 2]}}, [("sead", "seed")]),
        pytest.param(
            {"metric": "accuracie"},
            [("metric", "eval_accuracie", "eval_loss", "eval_accuracy")],
            marks=pytest.mark.slow,  # A process that imports torch and scikit-learn.
        ),
        (
            {
                "strategy": "tpe",
                "num_trials": 50,
                "parameters": {"dropout": {"low": 0.1, "high": 1.5}, "seed": [1, "x"]},
            },
            [("dropout",), ("seed", "x")],
        ),
    ],
)
def test_a_value_that_no_recipe_takes_is_found_before_anything_starts(
    write_sweep: WriteSweep, tmp_path: Path, keys: dict[str, Any], needed: list[tuple[str, ...]]
) -> None:
    path = write_sweep(**keys)
    with pytest.raises(RecipeError, match=naming(str(path))) as error:
        check_sweep(load_sweep(path), {}, tmp_path / "run")
    for words, problem in zip(needed, error.value.problems, strict=True):
        assert names(problem, *words), problem
    assert not (tmp_path / "run").exists()


def test_the_example_and_the_page_name_every_key() -> None:
    assert load_sweep(ROOT / "slurm" / "sweep_example.yaml").num_trials == 4
    text = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
    assert not [key for key in SweepKeys.model_fields if f"| `{key}` |" not in text]
    assert yaml.safe_load((ROOT / "slurm" / "sweep_example.yaml").read_text(encoding="utf-8"))["strategy"] == "grid"
