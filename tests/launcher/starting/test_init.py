"""`onecurve init` as a user meets it: what it writes and refuses, what flags overrule, and that its recipe trains."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from onecurve.training.config import load_recipe
from onecurve.training.data.sources import find_files
from tests.conftest import Run
from tests.launcher.conftest import Onecurve
from tests.launcher.starting.conftest import Command
from tests.messages import names
from tools.images import write_image
from tools.init_files import NUM_ROWS, Row, rows_of, write_photos, write_rows, write_split_pictures, write_text


def write_reviews(path: Path, build: Callable[[int], Row] | None = None) -> Path:
    """Texts with a label of two classes."""
    rows_of(build or (lambda number: {"text": write_text(number), "label": "ab"[number % 2]}))(path)
    return path


def read(path: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return content


def test_a_recipe_is_written_and_the_next_commands_are_printed(command: Command, tmp_path: Path) -> None:
    write_reviews(tmp_path / "reviews.csv")
    result = command("init", "reviews.csv")
    assert (result.exit_code, result.stderr) == (0, "")
    assert read("reviews.yaml")["train_file"] == "reviews.csv"
    last = [shlex.split(line) for line in result.stdout.splitlines()[-2:]]
    assert last == [["onecurve", "check", "reviews.yaml", "--deep"], ["onecurve", "run", "reviews.yaml"]]


def test_a_recipe_that_exists_is_replaced_only_when_that_is_asked_for(command: Command, tmp_path: Path) -> None:
    write_reviews(tmp_path / "reviews.csv")
    (tmp_path / "reviews.yaml").write_text("mine", encoding="utf-8")
    for words in (["reviews.csv"], ["reviews.csv", "--output", "reviews.yaml"]):
        result = command("init", *words)
        assert result.exit_code == 2
        assert names(result.stderr, "reviews.yaml", "--overwrite", "--output")
        assert (tmp_path / "reviews.yaml").read_text(encoding="utf-8") == "mine"
    assert command("init", "reviews.csv", "--overwrite").exit_code == 0
    assert read("reviews.yaml")["label_column"] == "label"


def test_flags_overrule_what_was_found(command: Command, tmp_path: Path) -> None:
    write_reviews(
        tmp_path / "data.csv", lambda number: {"text": write_text(number), "label": number % 2, "topic": number % 3}
    )
    flags = {"label_column": "topic", "learning_rate": 1e-4, "max_length": 96, "seed": 7, "per_device_batch_size": 4,
             "metric_for_best_model": "eval_loss"}  # fmt: skip
    words = [f"--{key}={value}" for key, value in flags.items()]
    assert command("init", "data.csv", *words, "--output", "topics.yaml").exit_code == 0
    assert read("topics.yaml") == {**read("topics.yaml"), **flags}
    result = command("init", "data.csv", "--task", "masked-lm", "--json", "--output", "words.yaml")
    assert json.loads(result.stdout)["task"] == read("words.yaml")["task"] == "masked_lm"
    # A column that init would not have taken for a label.
    assert command("init", "data.csv", "--label_column", "text", "--output", "no.yaml").exit_code == 2


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["reviews.cvs"], ["reviews.csv"]),
        (["reviews.csv", "--learning_rte", "1"], ["learning_rte", "learning_rate"]),
        (["reviews.csv", "--max_length", "1"], ["max_length"]),
        (["reviews.csv", "--task", "guessing"], ["task"]),
        (["reviews.csv", "--task", "question_answering"], ["text", "label"]),
        (["reviews.csv", "--train_file", "other.csv"], ["train_file"]),
        (["reviews.csv", "--model", "a", "--model_name_or_path", "b"], ["--model"]),
        (["reviews.csv", "--output", "reviews.csv"], [".yaml"]),
        (["empty.csv"], ["empty.csv"]),
        (["folder"], ["folder"]),
        (["semicolons.csv"], ["text;label", "semicolons"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_can_not_be_is_refused_and_nothing_is_written(
    words: list[str], needed: list[str], command: Command, tmp_path: Path
) -> None:
    write_reviews(tmp_path / "reviews.csv")
    (tmp_path / "empty.csv").write_text("text,label\n", encoding="utf-8")
    (tmp_path / "semicolons.csv").write_text("text;label\na;b\n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    result = command("init", *words, "--json")
    assert result.exit_code == json.loads(result.stdout)["exit_code"] == 2
    assert names(result.stderr, *needed), result.stderr
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == before


def test_other_splits_beside_the_file_are_used(command: Command, tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
        write_reviews(tmp_path / name)
    assert command("init", "train.jsonl", "--output", "a.yaml").exit_code == 0
    found = read("a.yaml")
    assert (found["validation_file"], found["test_file"]) == ("dev.jsonl", "test.jsonl")
    assert "validation_fraction" not in found
    rows = [{"text": write_text(number), "label": None} for number in range(9)]
    write_rows(tmp_path / "test.jsonl", rows)
    (tmp_path / "dev.jsonl").unlink()
    assert command("init", "train.jsonl", "--output", "b.yaml").exit_code == 0
    assert (read("b.yaml").get("test_file"), read("b.yaml")["validation_fraction"]) == (None, 0.2)


def test_several_files_are_one_table(command: Command, tmp_path: Path) -> None:
    for part in ("a", "b"):
        write_reviews(tmp_path / f"{part}.csv")
    for number, words in enumerate((["a.csv", "b.csv", "--seed", "3"], ["?.csv", "--seed", "3"])):
        result = command("init", *words, "--output", f"{number}.yaml", "--json")
        assert json.loads(result.stdout)["num_rows"] == 2 * NUM_ROWS
        assert len(find_files("train_file", load_recipe(f"{number}.yaml").recipe.train_file or ())) == 2
        assert read(f"{number}.yaml")["seed"] == 3


def test_names_of_any_kind_are_written_so_that_they_are_read_again(command: Command, tmp_path: Path) -> None:
    name = "it's: 100% # of 'them'.csv"
    columns = ["my text: #1", 'the "label"']
    write_reviews(tmp_path / name, lambda number: dict(zip(columns, (write_text(number), number % 2), strict=True)))
    result = command("init", name, "--output", "my recipe.yaml", "--json")
    recipe: Any = load_recipe("my recipe.yaml").recipe
    assert [*recipe.train_file, recipe.text_column, recipe.label_column] == [name, *columns]
    assert shlex.split(json.loads(result.stdout)["commands"][1]) == ["onecurve", "run", "my recipe.yaml"]


def test_a_length_is_the_99th_percentile_by_the_tokenizer(command: Command, tmp_path: Path, tiny_model: Path) -> None:
    texts = [write_text(number, 40 if number == 7 else 5 + number % 20) for number in range(NUM_ROWS)]
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
    write_rows(tmp_path / "texts.csv", rows)
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = sorted(len(tokenizer.encode(text).ids) for text in texts)
    result = command("init", "texts.csv", "--model", tiny_model, "--json")
    found = json.loads(result.stdout)["lengths"]["max_length"]
    assert lengths[118] < lengths[119]
    assert (found["p99"], found["most"], found["is_counted"]) == (lengths[118], lengths[119], True)
    assert 0 <= read("texts.yaml")["max_length"] - lengths[118] < 8
    result = command("init", "texts.csv", "--json", "--overwrite")
    assert json.loads(result.stdout)["lengths"]["max_length"]["is_counted"] is False


def test_classes_of_unequal_size_choose_the_metric(command: Command, tmp_path: Path) -> None:
    for name, rare in (("even", 2), ("odd", 9)):
        rows = [{"text": write_text(number), "label": int(number % rare == 0)} for number in range(NUM_ROWS)]
        write_rows(tmp_path / f"{name}.csv", rows)
        assert command("init", f"{name}.csv").exit_code == 0
    metrics = [read(f"{name}.yaml")["metric_for_best_model"] for name in ("even", "odd")]
    assert metrics == ["eval_accuracy", "eval_f1_macro"]
    assert "\n# class_weights: balanced" in Path("odd.yaml").read_text(encoding="utf-8")
    assert "class_weights" not in Path("even.yaml").read_text(encoding="utf-8")


def test_rows_that_will_be_refused_are_told(command: Command, tmp_path: Path) -> None:
    rows = [{"text": write_text(number), "label": number % 2} for number in range(NUM_ROWS)]
    write_rows(tmp_path / "gaps.jsonl", [*rows, {"text": " ", "label": 1}])
    result = command("init", "gaps.jsonl", "--json")
    assert [remark for remark in json.loads(result.stdout)["remarks"] if names(remark, "1", "121", "text", "check")]


def test_paths_of_images_lead_from_where_they_are_found(command: Command, tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        write_photos(tmp_path / place / "photos.csv")
    rows = (tmp_path / "here" / "photos.csv").read_text(encoding="utf-8")
    (tmp_path / "photos.csv").write_text(rows.replace("photos/", "here/photos/"), encoding="utf-8")
    assert command("init", "photos.csv", "--output", "a.yaml").exit_code == 0
    assert command("init", "there/photos.csv", "--output", "b.yaml").exit_code == 0
    assert [read(name).get("image_folder") for name in ("a.yaml", "b.yaml")] == [None, "there"]
    (tmp_path / "table.csv").write_text(rows, encoding="utf-8")
    assert command("init", "table.csv", "--output", "c.yaml").exit_code == 2
    assert command("init", "table.csv", "--image_folder", "here", "--output", "c.yaml").exit_code == 0


def test_folders_of_images_are_classes_or_splits(command: Command, tmp_path: Path) -> None:
    """A class may be called `train`."""
    write_split_pictures(tmp_path / "digits")
    assert command("init", "digits").exit_code == 0
    assert (read("digits.yaml")["train_file"], read("digits.yaml")["validation_file"]) == ("digits/train", "digits/val")
    for number in range(12):
        write_image(tmp_path / "vehicles" / ("train", "bus")[number % 2] / f"{number}.png", number)
    result = command("init", "vehicles", "--json")
    assert json.loads(result.stdout)["facts"]["labels"] == {"bus": 6, "train": 6}


@pytest.mark.slow
def test_the_recipe_of_the_demo_trains(
    command: Command, train: Callable[[dict[str, Any]], Run], demo: Path, tmp_path: Path
) -> None:
    result = command("init", demo / "train.jsonl", "--model", demo / "model", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    checked = command(*shlex.split(answer["commands"][0])[1:-1], "--json")
    assert (checked.exit_code, json.loads(checked.stdout)["findings"]) == (0, [])
    few = {"max_train_steps": 3, "max_train_samples": 48, "max_eval_samples": 16, "max_length": 64}
    run = train({"config": answer["recipe"], **few, "output_dir": str(tmp_path / "run")})
    assert run.exit_code == 0, run.stderr
    assert [line["step"] for line in run.steps] == [1, 2, 3]
    assert run.evaluations[-1]["eval_accuracy"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_check_that_init_recommends_goes_through(
    command: Command, build_model: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """All of it: `--deep` prepares the data and loads the model, in a process of its own. A row that it must refuse is named."""
    if kind == "decoder":
        ask, say = {"role": "user", "content": "Say it"}, {"role": "assistant", "content": "It is said."}
        path = write_reviews(tmp_path / "chats.jsonl", lambda number: {"messages": [ask, say]})
    else:
        path = write_reviews(tmp_path / "reviews.jsonl")
    answer = json.loads(command("init", path.name, "--model", build_model(kind), "--json").stdout)
    words = [*shlex.split(answer["commands"][0])[1:], "--json"]
    assert "--deep" in words
    checked = command(*words)
    report = json.loads(checked.stdout)
    assert (checked.exit_code, report["findings"]) == (0, []), checked.stdout
    data = [fact for fact in report["facts"] if fact.startswith("data ")]
    assert all(names(fact, each) for fact, each in zip(data, ("96", "24"), strict=True)), data  # A fifth is held out.
    if kind == "encoder":
        assert "example" not in report
        return
    assert "".join(each["text"] for each in report["example"] if each["is_target"]) == "It is said.<|im_end|>"

    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:4], json.dumps({"messages": [say]}), *lines[5:]]), encoding="utf-8")
    refused = command(*words)
    assert refused.exit_code == 2
    assert names(json.loads(refused.stdout)["findings"][0]["message"], path.name, "row 5")


@pytest.mark.slow
def test_a_name_of_no_file_is_looked_for_on_the_hub(onecurve: Onecurve, tmp_path: Path) -> None:
    result = onecurve("init", "nobody/no_such_data_set", "--output", tmp_path / "a.yaml")
    assert (result.returncode, (tmp_path / "a.yaml").exists()) == (2, False)
    assert names(result.stderr, "nobody/no_such_data_set")
