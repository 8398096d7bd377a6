"""The recipe: where a value comes from, what is refused, and with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from onecurve.training.config import (
    FREE_KEYS,
    RecipeError,
    ResolvedRecipe,
    build_recipe,
    known_keys,
    load_recipe,
    parse_arguments,
)
from onecurve.training.tasks.text_classification import TextClassification, TextClassificationRecipe
from tests.conftest import ROOT
from tests.messages import names

KEYS = known_keys(TextClassification)

BASE = {"model_name_or_path": "model", "train_file": "train.jsonl"}


def resolve(text: str = "", *arguments: str, folder: Path | None = None) -> ResolvedRecipe:
    """Load `text` as the recipe file where a folder is given, words of the command line, and BASE for what both lack."""
    given = {key: value for key, value in BASE.items() if f"{key}:" not in text and f"--{key}" not in arguments}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    if folder is not None:
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        words += ["--config", str(folder / "recipe.yaml")]
    return load_recipe(*parse_arguments([*words, *arguments]))


def refuse(*arguments: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolve("", *arguments)
    return caught.value.problems


# Where a value comes from --------------------------------------------------------------------------------------------


def test_a_flag_beats_the_recipe_and_the_recipe_beats_the_default(tmp_path: Path) -> None:
    resolved = resolve("seed: 7\nlearning_rate: 0.1\n", "--seed", "9", folder=tmp_path)
    assert (resolved.recipe.seed, resolved.recipe.learning_rate, resolved.recipe.max_length) == (9, 0.1, 512)
    assert resolved.sources["seed"] == "flag"
    assert resolved.sources["learning_rate"] == "recipe"
    assert resolved.sources["max_length"] == "default"
    assert list(resolved.sources) == KEYS


def test_a_flag_as_the_default_is_still_a_flag(tmp_path: Path) -> None:
    assert resolve("seed: 7\n", "--seed", "42", folder=tmp_path).sources["seed"] == "flag"


def test_a_flag_can_take_a_value_back_to_none(tmp_path: Path) -> None:
    resolved = resolve("max_train_steps: 10\n", "--max_train_steps", "null", folder=tmp_path)
    assert (resolved.recipe.max_train_steps, resolved.sources["max_train_steps"]) == (None, "flag")


def test_flags_are_written_as_people_write_them() -> None:
    assert parse_arguments(["--config=r.yaml", "--max-length=3", "--seed", "1"]) == (
        "r.yaml",
        {"max_length": "3", "seed": "1"},
    )
    assert parse_arguments([]) == (None, {})
    assert parse_arguments(["--train_file", "a=b.csv"]) == (None, {"train_file": "a=b.csv"})


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["seed", "7"], ("'seed'",)),
        (["--seed"], ("--seed",)),
        (["--seed", "--max_length", "9"], ("--seed",)),
        (["--seed", "1", "--seed=2"], ("--seed",)),
        (["--config", "a.yaml", "--config", "b.yaml"], ("--config",)),
    ],
    ids=str,
)
def test_a_malformed_command_line_is_refused(arguments: list[str], needed: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="the command line") as caught:
        parse_arguments(arguments)
    assert any(names(problem, *needed) for problem in caught.value.problems)


def test_eval_only_is_a_switch_and_no_setting(tmp_path: Path) -> None:
    resolved = resolve("seed: 7\n", "--eval_only", "--seed", "8", folder=tmp_path)
    assert resolved.eval_only
    assert resolved.recipe.seed == 8
    assert "eval_only" not in resolved.to_yaml()
    assert not resolve().eval_only
    assert "eval_only" not in TextClassificationRecipe.model_fields


# Types ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["5e-5", "5E-5", "5.0e-5", "0.00005", ".00005", "'5e-5'"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 5e-5 as text."""
    assert resolve(f"learning_rate: {text}\n", folder=tmp_path).recipe.learning_rate == 5e-5
    assert resolve("", "--learning_rate", text).recipe.learning_rate == 5e-5


@pytest.mark.parametrize("text", ["no", "'no'", "No", "false"])
def test_no_precision_needs_no_quotes(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads a bare `no` as false."""
    assert resolve(f"mixed_precision: {text}\n", folder=tmp_path).recipe.mixed_precision == "no"


def test_a_precision_that_is_true_is_refused() -> None:
    assert "mixed_precision" in refuse("--mixed_precision", "yes")[0]


@pytest.mark.parametrize("key", ["learning_rate", "max_length", "seed", "dropout", "max_train_steps", "warmup_ratio"])
@pytest.mark.parametrize("value", ["true", "no"])
def test_a_boolean_is_no_number(key: str, value: str) -> None:
    (problem,) = refuse(f"--{key}", value)
    assert problem.startswith(f"{key}: ")
    assert names(problem, "number", "boolean")


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "inf", "1e999"])
def test_only_finite_numbers_are_numbers(value: str) -> None:
    (problem,) = refuse("--learning_rate", value)
    assert problem.startswith("learning_rate: ")
    assert names(problem, "finite")


@pytest.mark.parametrize("text", ["2024", "0123", "2026-11-23", "1e5", "yes", "a: b", "[x"])
def test_a_name_stays_the_words_that_it_was(text: str) -> None:
    """Whatever YAML would take them for."""
    recipe = resolve("", "--model_name_or_path", text, "--output_dir", text, "--text_pair_column", text).recipe
    assert isinstance(recipe, TextClassificationRecipe)
    assert (recipe.model_name_or_path, recipe.output_dir, recipe.text_pair_column) == (text, text, text)


def test_one_file_or_several(tmp_path: Path) -> None:
    one = resolve("", "--train_file", "a.csv").recipe
    several = resolve("", "--train_file", "[a.csv, b.csv]").recipe
    assert (one.train_file, several.train_file) == (("a.csv",), ("a.csv", "b.csv"))
    listed = resolve("train_file:\n- a.csv\n- b.csv\n", folder=tmp_path).recipe
    assert listed.train_file == several.train_file


def test_a_recipe_cannot_be_changed() -> None:
    recipe = resolve().recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


# Problems ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rat", "learning_rate"),
        ("batch_size", "train_batch_size"),
        ("num_epochs", "num_train_epochs"),
        ("train_files", "train_file"),
        ("warmup_steps", "num_warmup_steps"),
        ("lr_scheduler", "lr_scheduler_type"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_name(key: str, nearest: str) -> None:
    (problem,) = refuse(f"--{key}", "1")
    assert problem.startswith(f"{key}: ")
    assert names(problem, nearest)


def test_an_unknown_key_like_no_other_is_told_where_the_keys_are() -> None:
    (problem,) = refuse("--zzz", "1")
    assert names(problem, "zzz", "docs/recipes.md")


@pytest.mark.parametrize("key", ["gradient_accumulation_steps", "num_processes", "local_rank"])
def test_what_is_derived_or_belongs_to_a_topology_is_no_key(key: str) -> None:
    assert refuse(f"--{key}", "2")[0].startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("lr_scheduler_type", "liner", "linear"),
        ("problem_type", "regresion", "regression"),
        ("report_to", "tensorbord", "tensorboard"),
    ],
)
def test_a_wrong_choice_is_told_with_the_nearest_one(key: str, value: str, nearest: str) -> None:
    (problem,) = refuse(f"--{key}", value)
    assert problem.startswith(f"{key}: ")
    assert names(problem, value, nearest)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--dataset_name", "x"], ("train_file", "dataset_name")),
        (["--train_file", "null"], ("train_file", "dataset_name")),
        (["--num_warmup_steps", "5", "--warmup_ratio", "0.1"], ("num_warmup_steps", "warmup_ratio")),
        (["--per_device_batch_tokens", "99", "--max_length", "100"], ("per_device_batch_tokens", "99", "100")),
        (["--early_stopping_patience", "2"], ("early_stopping_patience", "metric_for_best_model")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_keys_that_contradict_each_other_are_refused(arguments: list[str], needed: tuple[str, ...]) -> None:
    (found,) = refuse(*arguments)
    assert names(found, *needed)


def test_all_problems_come_at_once_and_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve("seeds: 1\nmax_length: 1\nwarmup_ratio: 2\nreport_to: none\n", folder=tmp_path)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["seeds", "max_length", "warmup_ratio"]
    assert names(caught.value, "3 problems", str(tmp_path / "recipe.yaml"), "seeds")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: [", "YAML"),
        (b"- a\n- b\n", "mapping"),
        (b"1: 2\n", "mapping"),
        (b"a: \xe9", "UTF-8|utf-8"),
    ],
    ids=str,
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=problem):
        load_recipe(str(tmp_path / "recipe.yaml"))
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(str(tmp_path / "other.yaml"))


# config.yaml ---------------------------------------------------------------------------------------------------------

TRICKY: dict[str, Any] = {
    "output_dir": "out: colon # and hash",
    "text_column": "no",
    "label_column": "yes",
    "train_file": ["ä/1.jsonl", "- b.csv"],
    "learning_rate": 1e-12,
    "class_weights": {"no": 1.5, "1": 2.0},
    "resume": "1e5",
    "mixed_precision": "no",
}


def test_config_yaml_is_itself_the_recipe() -> None:
    resolved = load_recipe(
        None,
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in {**BASE, **TRICKY}.items()},
    )
    for key, value in TRICKY.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(resolved.recipe, key) == expected
    read = yaml.safe_load(resolved.to_yaml())
    assert {key: read[key] for key in TRICKY} == TRICKY
    assert list(read) == KEYS


def test_config_yaml_tells_the_source_of_each_value(tmp_path: Path) -> None:
    lines = resolve("seed: 7\n", "--max_length", "9", folder=tmp_path).to_yaml().splitlines()
    assert {"seed: 7  # recipe", "max_length: 9  # flag", "weight_decay: 0.0  # default"} <= set(lines)
    assert len(lines) == 1 + len(KEYS)


TEXT_WITH_NEXT_LINE, TEXT_WITH_WIDE_SPACE = "a\x85b", "text\xa0"
RARE_SPACES = [chr(code) for code in range(0x80, 0x10000) if chr(code).isspace()]
texts = st.text(st.characters(exclude_characters=RARE_SPACES, codec="utf-8"), min_size=1, max_size=12)
# A variable that is not set, such as $0, is refused when the recipe is read.
paths = st.text(st.characters(exclude_characters=[*RARE_SPACES, "$"], codec="utf-8"), min_size=1, max_size=12)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "text_column": texts,
            "label_column": st.lists(texts, min_size=1, max_size=1),
            "output_dir": paths,
            "seed": st.integers(0, 2**63 - 1),
            "learning_rate": st.floats(0, 1, exclude_min=True),
            "class_weights": st.dictionaries(texts, st.floats(0.001, 1e300), max_size=3),
            "model_revision": texts,
        },
    )
)
def test_any_recipe_survives_its_own_config_yaml(tmp_path: Path, content: dict[str, Any]) -> None:
    assume(content.get("label_column", ["label"])[0] != content.get("text_column", "text"))  # That is refused.
    check_round_trip(tmp_path, content)


@pytest.mark.parametrize(
    "text", ["a\u2028b", "a\nb", "a\r\nb", "a\tb ", " # no comment", "'", '"', "\U0001f600", "\0"], ids=ascii
)
def test_rare_characters_survive_config_yaml(tmp_path: Path, text: str) -> None:
    check_round_trip(tmp_path, {"text_column": text})


@pytest.mark.parametrize("text", [TEXT_WITH_NEXT_LINE, TEXT_WITH_WIDE_SPACE], ids=ascii)
def test_rare_spaces_survive_config_yaml(tmp_path: Path, text: str) -> None:
    check_round_trip(tmp_path, {"text_column": text})


def check_round_trip(tmp_path: Path, content: dict[str, Any]) -> None:
    recipe = build_recipe({**BASE, **content})
    text = ResolvedRecipe(recipe, dict.fromkeys(KEYS, "flag")).to_yaml()
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    again = load_recipe(str(tmp_path / "config.yaml"))
    assert again.recipe == recipe
    assert set(again.sources.values()) == {"recipe"}


# The shipped recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(str(path)).recipe.train_batch_size >= 1


def test_keys_that_a_resumed_run_may_change_are_no_mathematics() -> None:
    assert set(TextClassificationRecipe.model_fields) > FREE_KEYS
    assert not {"train_batch_size", "seed", "learning_rate", "mixed_precision", "length_window"} & FREE_KEYS


# YAML ----------------------------------------------------------------------------------------------------------------


def test_a_key_that_stands_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve("learning_rate: 0.1\nseed: 1\nlearning_rate: 0.2\n", folder=tmp_path)
    (problem,) = caught.value.problems
    assert names(problem, "learning_rate", "1", "3")


@pytest.mark.parametrize("written", ["yes", "0123456", "1e5", "2026-11-25", "on", "~user", "0x1f", "1_000"])
def test_text_is_taken_as_it_is_written(tmp_path: Path, written: str) -> None:
    recipe = resolve(f"model_revision: {written}\ntrain_file: [{written}, b.csv]\n", folder=tmp_path).recipe
    assert recipe.model_revision == written
    assert recipe.train_file == (written, "b.csv")


def test_names_of_labels_are_taken_as_they_are_written(tmp_path: Path) -> None:
    recipe = resolve("class_weights: {yes: 2, no: 1, 007: 3}\n", folder=tmp_path).recipe
    assert isinstance(recipe, TextClassificationRecipe)
    assert recipe.class_weights == {"yes": 2, "no": 1, "007": 3}


@pytest.mark.parametrize("written", ["010", "-07", "00"])
def test_an_octal_number_is_refused(tmp_path: Path, written: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(f"seed: {written}\n", folder=tmp_path)
    (problem,) = caught.value.problems
    assert names(problem, "seed", written)


def test_null_is_no_text(tmp_path: Path) -> None:
    recipe = resolve("tokenizer_name: null\nvalidation_split: ~\n", folder=tmp_path).recipe
    assert (recipe.tokenizer_name, recipe.validation_split) == (None, None)


# Paths ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["output_dir", "model_name_or_path", "resume", "tokenizer_name", "dataset_name"])
def test_home_and_variables_are_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    base = {"model_name_or_path": "m", **({} if key == "dataset_name" else {"train_file": "t"})}
    for written, expected in {"~/a": "/home/me/a", "$SCRATCH/b": "/scratch/b", "${SCRATCH}/c": "/scratch/c"}.items():
        assert getattr(load_recipe(None, {**base, key: written}).recipe, key) == expected


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    (problem,) = refuse("--output_dir", "$NOWHERE/a")
    assert names(problem, "output_dir", "NOWHERE")
