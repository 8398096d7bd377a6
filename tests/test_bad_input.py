"""Bad input: exit code 2, one message that names the cause, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecurve.training.config import RecipeError, load_recipe
from onecurve.training.tasks.text_classification import TextClassificationRecipe
from tests.conftest import Run
from tests.messages import names

Settings = dict[str, Any]
Rows = list[dict[str, Any]]

GOOD: Rows = [{"text": f"word{number} news", "label": "ab"[number % 2]} for number in range(20)]


def write_rows(folder: Path, rows: Rows, name: str = "bad.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def with_row(row: dict[str, Any]) -> Rows:
    return [*GOOD[:6], row, *GOOD[6:]]


def no_such_file(given: Settings, folder: Path) -> None:
    given["train_file"] = given["train_file"].replace("train.jsonl", "trian.jsonl")


def empty_file(given: Settings, folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    given["train_file"] = str(folder / "empty.jsonl")


def header_only(given: Settings, folder: Path) -> None:
    (folder / "header.csv").write_text("text,label\n")
    given["train_file"] = str(folder / "header.csv")


def wrong_text_column(given: Settings, folder: Path) -> None:
    given["text_column"] = "txt"


def wrong_label_column(given: Settings, folder: Path) -> None:
    given["label_column"] = "category"


def empty_text(given: Settings, folder: Path) -> None:
    given["train_file"] = write_rows(folder, with_row({"text": "  ", "label": "a"}))


def text_is_a_number(given: Settings, folder: Path) -> None:
    given["train_file"] = write_rows(folder, [{"text": number, "label": "ab"[number % 2]} for number in range(9)])


def null_label(given: Settings, folder: Path) -> None:
    given["train_file"] = write_rows(folder, with_row({"text": "no label", "label": None}))


def decimal_label(given: Settings, folder: Path) -> None:
    given["train_file"] = write_rows(folder, [{"text": "x", "label": number / 2} for number in range(9)])


def one_class(given: Settings, folder: Path) -> None:
    given["train_file"] = write_rows(folder, [{"text": "x y", "label": "only"}] * 9)


def unknown_validation_label(given: Settings, folder: Path) -> None:
    given["train_file"] = write_rows(folder, GOOD, "train.jsonl")
    given["validation_file"] = write_rows(folder, [*GOOD[:3], {"text": "new", "label": "c"}], "validation.jsonl")


def broken_json(given: Settings, folder: Path) -> None:
    path = Path(write_rows(folder, GOOD))
    lines = path.read_text().splitlines()
    lines[4] = '{"text": "cut off'
    path.write_text("\n".join(lines))
    given["train_file"] = str(path)


def broken_csv(given: Settings, folder: Path) -> None:
    (folder / "bad.csv").write_text("text,label\ngood,a\nfine,b\ntoo,many,fields\nlast,a\n")
    given["train_file"] = str(folder / "bad.csv")


def not_utf8(given: Settings, folder: Path) -> None:
    (folder / "latin.csv").write_bytes(b"text,label\ngood,a\ncaf\xe9,b\n")
    given["train_file"] = str(folder / "latin.csv")


def unknown_format(given: Settings, folder: Path) -> None:
    (folder / "data.xlsx").write_text("x")
    given["train_file"] = str(folder / "data.xlsx")


def glob_without_match(given: Settings, folder: Path) -> None:
    given["train_file"] = str(folder / "part-*.jsonl")


def unknown_key(given: Settings, folder: Path) -> None:
    given["learning_rat"] = 1e-4


def wrong_type(given: Settings, folder: Path) -> None:
    given["max_train_steps"] = "ten"


def not_a_number(given: Settings, folder: Path) -> None:
    given["learning_rate"] = ".nan"


def negative(given: Settings, folder: Path) -> None:
    given["weight_decay"] = -0.1


def batch_of_nothing(given: Settings, folder: Path) -> None:
    given["train_batch_size"] = 0


def absurd_batch(given: Settings, folder: Path) -> None:
    given["train_batch_size"] = 10**9


def too_many_samples(given: Settings, folder: Path) -> None:
    given["max_train_samples"] = 5000


def too_long(given: Settings, folder: Path) -> None:
    given["max_length"] = 512


def no_model(given: Settings, folder: Path) -> None:
    given["model_name_or_path"] = str(folder / "nowhere")


def model_is_a_file(given: Settings, folder: Path) -> None:
    given["model_name_or_path"] = given["train_file"]


def model_without_weights(given: Settings, folder: Path) -> None:
    given["model_name_or_path"] = copy_model(given, folder, "model.safetensors")


def model_without_config(given: Settings, folder: Path) -> None:
    given["model_name_or_path"] = copy_model(given, folder, "config.json")


def pickled_weights(given: Settings, folder: Path) -> None:
    given["model_name_or_path"] = copy_model(given, folder, "model.safetensors")
    (Path(given["model_name_or_path"]) / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def damaged_weights(given: Settings, folder: Path) -> None:
    given["model_name_or_path"] = copy_model(given, folder)
    weights = Path(given["model_name_or_path"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def no_tokenizer(given: Settings, folder: Path) -> None:
    given["model_name_or_path"] = copy_model(given, folder, "tokenizer.json", "vocab.txt", "tokenizer_config.json")


def copy_model(given: Settings, folder: Path, *without: str) -> str:
    target = folder / "model"
    shutil.copytree(given["model_name_or_path"], target)
    for name in without:
        (target / name).unlink()
    return str(target)


def output_is_a_file(given: Settings, folder: Path) -> None:
    (folder / "file").write_text("mine")
    given["output_dir"] = str(folder / "file")


def output_below_a_file(given: Settings, folder: Path) -> None:
    (folder / "file").write_text("mine")
    given["output_dir"] = str(folder / "file" / "run")


def hub_model_without_network(given: Settings, folder: Path) -> None:
    given["model_name_or_path"] = "bert-base-cased"


def hub_data_without_network(given: Settings, folder: Path) -> None:
    del given["train_file"], given["validation_file"]
    given["dataset_name"] = "yelp_review_full"


def nothing_to_train_on(given: Settings, folder: Path) -> None:
    del given["train_file"]


def fp16_on_cpu(given: Settings, folder: Path) -> None:
    given["mixed_precision"] = "fp16"


def no_such_attention(given: Settings, folder: Path) -> None:
    given["attn_implementation"] = "flash_attention_2"


def weight_for_no_class(given: Settings, folder: Path) -> None:
    given["class_weights"] = {"sports": 2.0, "weather": 1.0}


def weights_for_regression(given: Settings, folder: Path) -> None:
    given.update(problem_type="regression", class_weights="balanced")


def regression_of_words(given: Settings, folder: Path) -> None:
    given["problem_type"] = "regression"


def regression_of_infinity(given: Settings, folder: Path) -> None:
    (folder / "bad.csv").write_text("text,label\na,1.5\nb,inf\nc,2\n")
    given.update(problem_type="regression", train_file=str(folder / "bad.csv"), validation_fraction=0.5)


def indicator_of_two(given: Settings, folder: Path) -> None:
    (folder / "bad.csv").write_text("text,x,y\na,1,0\nb,0,2\nc,1,1\n")
    given.update(problem_type="multi_label_classification", label_column='["x", "y"]')
    given.update(train_file=str(folder / "bad.csv"), validation_file=str(folder / "bad.csv"))


def no_such_metric(given: Settings, folder: Path) -> None:
    given["metric_for_best_model"] = "eval_acuracy"


def missing_split(given: Settings, folder: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(GOOD)}).save_to_disk(str(folder / "saved"))
    del given["train_file"], given["validation_file"]
    given.update(dataset_name=str(folder / "saved"), validation_split="dev")


def checkpoint_nowhere(given: Settings, folder: Path) -> None:
    given["resume"] = str(folder / "step_00000001")


def tokens_below_length(given: Settings, folder: Path) -> None:
    given["per_device_batch_tokens"] = 32


# What the message has to name: the key and its value, the file and its row, what is there instead.
CASES: dict[Callable[[Settings, Path], None], tuple[str, ...]] = {
    no_such_file: ("train_file", "trian.jsonl'", "'train.jsonl'"),
    empty_file: ("train_file", "empty.jsonl'", "empty"),
    header_only: ("header.csv", "rows"),
    wrong_text_column: ("text_column", "'txt'", "text", "label"),
    wrong_label_column: ("label_column", "'category'", "text", "label"),
    empty_text: ("bad.jsonl", "row 7", "'text'"),
    text_is_a_number: ("'text'", "int64"),
    null_label: ("bad.jsonl", "row 7", "'label'"),
    decimal_label: ("decimal", "problem_type", "regression"),
    one_class: ("'only'", "two"),
    unknown_validation_label: ("validation.jsonl", "row 4", "'c'", "2", "'a'", "'b'"),
    broken_json: ("bad.jsonl", "line 5", "JSON"),
    broken_csv: ("bad.csv", "line 4", "3 fields", "2"),
    not_utf8: ("latin.csv", "line 3", "0xe9", "UTF-8"),
    unknown_format: ("data.xlsx'", ".csv", ".tsv", ".json", ".jsonl", ".parquet"),
    glob_without_match: ("train_file", "part-*.jsonl'"),
    unknown_key: ("learning_rat", "learning_rate"),
    wrong_type: ("max_train_steps", "'ten'"),
    not_a_number: ("learning_rate", "nan"),
    negative: ("weight_decay", "0", "-0.1"),
    batch_of_nothing: ("train_batch_size", "1", "0"),
    absurd_batch: ("train_batch_size", "1000000", "1000000000"),
    too_many_samples: ("max_train_samples", "5000", "203"),
    too_long: ("max_length", "512", "128"),
    no_model: ("model_name_or_path", "nowhere'"),
    model_is_a_file: ("model_name_or_path", "file", "config.json"),
    model_without_weights: ("model_name_or_path", "weights"),
    model_without_config: ("model_name_or_path", "config.json"),
    pickled_weights: ("model_name_or_path", "pickled", ".bin"),
    damaged_weights: ("model_name_or_path", "model'"),
    no_tokenizer: ("tokenizer",),
    output_is_a_file: ("output_dir", "file'"),
    output_below_a_file: ("output_dir", "run'", "file'"),
    hub_model_without_network: ("model_name_or_path", "'bert-base-cased'", "folder"),
    hub_data_without_network: ("dataset_name", "'yelp_review_full'", "files"),
    nothing_to_train_on: ("train_file", "dataset_name"),
    fp16_on_cpu: ("mixed_precision", "fp16", "GPU", "cpu"),
    no_such_attention: ("model_name_or_path", "FlashAttention2"),
    weight_for_no_class: ("class_weights", "'weather'"),
    weights_for_regression: ("class_weights", "single_label_classification"),
    regression_of_words: ("'label'", "numbers", "regression"),
    regression_of_infinity: ("bad.csv", "row 2", "'label'", "inf"),
    indicator_of_two: ("bad.csv", "row 2", "'y'", "0", "1", "2"),
    no_such_metric: ("metric_for_best_model", "eval_acuracy", "eval_accuracy"),
    missing_split: ("validation_split", "'dev'", "train"),
    checkpoint_nowhere: ("resume", "step_00000001"),
    tokens_below_length: ("per_device_batch_tokens", "32", "max_length", "64"),
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_bad_input_is_told_in_one_message(
    recipe: Settings, train: Callable[[Mapping[str, Any]], Run], tmp_path: Path, cache: Path, spoil: Callable[..., None]
) -> None:
    spoil(recipe, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run = train(recipe)
    assert run.exit_code == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.startswith("onecurve: ")
    assert run.stderr.count("onecurve: ") == 1
    assert names(" ".join(run.stderr.split()), *CASES[spoil]), run.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before, (
        "nothing is written or lost"
    )
    assert not list((cache / "prepared").glob(".*.*")), "no half-made data is left"


def test_all_problems_of_a_recipe_are_told_at_once(recipe: Settings, train: Callable[[Mapping[str, Any]], Run]) -> None:
    run = train({**recipe, "learning_rat": 1, "weight_decay": -1, "train_batch_size": 0, "lr_scheduler_type": "liner"})
    assert "4 problems" in run.stderr
    for name in ("learning_rat", "weight_decay", "train_batch_size", "lr_scheduler_type"):
        assert f"\n  {name}: " in run.stderr
    assert names(run.stderr, "linear")


def test_an_output_dir_of_another_recipe_is_refused(
    recipe: Settings, train: Callable[[Mapping[str, Any]], Run]
) -> None:
    recipe["max_train_steps"] = 2
    assert train(recipe).exit_code == 0
    kept = {path: path.read_bytes() for path in Path(recipe["output_dir"]).rglob("*") if path.is_file()}
    run = train({**recipe, "learning_rate": 2e-3, "seed": 1})
    assert run.exit_code == 2
    assert names(run.stderr, recipe["output_dir"])
    assert "learning_rate: 0.001 -> 0.002" in run.stderr
    assert "seed: 42 -> 1" in run.stderr
    assert {path: path.read_bytes() for path in Path(recipe["output_dir"]).rglob("*") if path.is_file()} == kept


def test_a_row_too_few_to_split_is_told(
    recipe: Settings, train: Callable[[Mapping[str, Any]], Run], tmp_path: Path
) -> None:
    del recipe["validation_file"]
    run = train({**recipe, "train_file": write_rows(tmp_path, GOOD[:2])})
    assert run.exit_code == 2
    assert names(run.stderr, "2 rows", "0.1")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers() | st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.sampled_from(sorted(TextClassificationRecipe.model_fields)) | st.text(max_size=10), VALUES, max_size=8
    )
)
def test_any_recipe_is_accepted_or_refused_in_words(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    resolved, problems = None, [""]
    try:
        resolved = load_recipe(str(path))
    except RecipeError as error:
        problems = error.problems
    if resolved is None:
        assert problems
        assert all(problem.strip() for problem in problems)
        return
    (tmp_path / "again.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
    assert load_recipe(str(tmp_path / "again.yaml")).recipe == resolved.recipe


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_as_a_recipe_is_refused_in_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(str(path))
