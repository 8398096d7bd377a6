"""Examples and their lengths before anything is prepared: what `plan` and `check` know of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.facts.recipes import predicts_tokens
from onecurve.launcher.facts.shape import load_shape
from onecurve.launcher.planning.data_estimate import estimate_data
from onecurve.launcher.planning.memory import count_activations
from onecurve.launcher.planning.plan import build_plan
from onecurve.launcher.planning.work import build_work
from onecurve.launcher.units import GIB
from onecurve.launcher.views.plan_table import describe_plan
from onecurve.training.config import build_recipe
from onecurve.training.data.preparation import prepare_data
from onecurve.training.models.loading import load_task
from tests.launcher.conftest import cluster, machine, messages
from tests.messages import names
from tools.decoders import build_decoder
from tools.images import CLASSES, build_vit, write_image
from tools.seq2seq import build_seq2seq


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Any]:
    """Twenty images in folders, and a model of 16 patches."""
    for number in range(20):
        write_image(tmp_path / "train" / CLASSES[number % 3] / f"{number}.png", number)
    return {
        "task": "image_classification",
        "model_name_or_path": str(build_vit(tmp_path / "vit")),
        "train_file": str(tmp_path / "train"),
        "output_dir": str(tmp_path / "run"),
    }


def test_an_image_has_as_many_tokens_as_the_model_makes_patches(images: dict[str, Any]) -> None:
    found = estimate_data(build_recipe(images))
    assert (found.num_examples, found.mean_length, found.longest, found.padding) == (18, 16, 16, 0)


def test_check_looks_for_the_image_processor_and_at_the_images(images: dict[str, Any], tmp_path: Path) -> None:
    assert messages(images, machine()) == []
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    (tmp_path / "train" / "dark" / "3.png").write_bytes(b"no image")
    found = "\n".join(messages(images, machine()))
    assert names(found, "image processor", "preprocessor_config.json")
    assert names(found, "row", "3.png")


# What each task reads, against what the training prepares -------------------------------------------------------

WORDS = ["the", "old", "man", "went", "over", "the", "hill", "and", "saw", "a", "ship", "unbelievably", "far", "away"]


def write_text(number: int) -> str:
    return " ".join(WORDS[(number + place) % len(WORDS)] for place in range(5 + number * 7 % 60))


def build_row(number: int) -> dict[str, Any]:
    text, words = write_text(number), write_text(number).split()
    return {
        "text": text,
        "question": "Where?",
        "context": text,
        "answers": {"text": [words[0]], "answer_start": [0]},
        "tokens": words,
        "ner_tags": ["B-A", *["O"] * (len(words) - 1)],
        "choices": [write_text(number + place) for place in range(2 + number % 3)],
        "label": number % 2,
        "target": write_text(number + 5),
        "en_de": {"en": text, "de": write_text(number + 3)},
        "messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": text}],
    }


CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "texts": ("bert", {"task": "text_classification"}, True),
    "pairs": ("bert", {"task": "text_classification", "text_pair_column": "target"}, True),
    "windows of contexts": ("bert", {"task": "question_answering", "doc_stride": 8}, False),
    "windows of words": ("bert", {"task": "token_classification"}, False),
    "choices": ("bert", {"task": "multiple_choice", "context_column": "text", "choice_columns": ["choices"]}, True),
    "masks": ("bert", {"task": "masked_lm"}, False),
    "pieces with masks": ("bert", {"task": "masked_lm", "long_texts": "split"}, False),
    "cut texts": ("llama", {"task": "causal_lm"}, False),
    "pieces": ("llama", {"task": "causal_lm", "long_texts": "split"}, False),
    "completions": ("llama", {"task": "causal_lm", "prompt_column": "target", "completion_column": "text"}, False),
    "two texts": ("t5", {"task": "seq2seq_lm", "source_column": "text", "max_target_length": 24}, True),
    "a translation": (
        "t5",
        {"task": "seq2seq_lm", "translation_column": "en_de", "source_lang": "en", "target_lang": "de"},
        True,
    ),
}


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"bert": tiny_model, "llama": build_decoder(folder / "llama"), "t5": build_seq2seq(folder / "t5")}


@pytest.mark.parametrize("case", CASES)
def test_examples_and_tokens_are_those_that_the_training_prepares(
    case: str, models: dict[str, Path], tmp_path: Path
) -> None:
    model, keys, is_exact = CASES[case]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(build_row(number)) + "\n" for number in range(100)), encoding="utf-8")
    settings = {"train_file": str(path), "validation_file": str(path), "max_length": 32, **keys}
    recipe = build_recipe({"model_name_or_path": str(models[model]), **settings})
    task, _, processor = load_task(recipe)
    prepared = prepare_data(recipe, task, processor).train
    found = estimate_data(recipe)
    assert (found.num_rows, found.num_examples) == (100, len(prepared))
    assert (found.doubt == "") == is_exact
    assert found.mean_length == pytest.approx(prepared.lengths.mean(), rel=0.01)
    assert found.longest == prepared.lengths.max()
    assert (len(prepared) > 100) == (case.startswith(("windows", "pieces")))
    assert found.most_sequences == (4 if case == "choices" else 1)


def test_a_number_that_is_an_estimate_is_said_to_be_one(models: dict[str, Path], tmp_path: Path) -> None:
    """Conversations, whose template is not known here; labels that are held out; and data that is elsewhere."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(build_row(number)) + "\n" for number in range(100)), encoding="utf-8")

    def describe(model: str, **keys: Any) -> dict[str, str]:
        recipe = build_recipe({"model_name_or_path": str(models[model]), **keys})
        plan = build_plan(
            recipe,
            load_shape(recipe.model_name_or_path, predicts_tokens(recipe)),
            estimate_data(recipe),
            cluster("1xL4"),
        )
        return dict(describe_plan(plan, recipe))

    file = {"train_file": str(path)}
    chat = describe("llama", task="causal_lm", messages_column="messages", max_length=64, **file)
    assert names(chat["data"], "about 90 examples of 90 rows")
    assert names(chat["steps"], "about")
    held_out = describe("bert", **file)
    assert names(held_out["data"], "about 90 examples of 90 rows")
    assert names(held_out["about"], "label", "onecurve check --deep")
    plain = describe("bert", **file, validation_file=str(path))
    assert names(plain["data"], "100 examples")
    assert "about" not in plain | {"all": plain["data"] + plain["steps"]}
    elsewhere = describe("bert", task="question_answering", dataset_name="squad", max_train_samples=100)
    assert names(elsewhere["data"], "about 100 examples of 100 rows")
    fixed = describe("llama", task="causal_lm", max_train_steps=7, **file)
    assert fixed["steps"].startswith("7 (about ")


@pytest.mark.parametrize("task", ["multiple_choice", "text_classification"])
def test_choices_are_sequences_in_memory(task: str, models: dict[str, Path], tmp_path: Path) -> None:
    """A micro-batch for which one sequence of each row needs 3 GiB of a device's 9."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(build_row(number)) + "\n" for number in range(9)), encoding="utf-8")
    keys: dict[str, Any] = (
        {"context_column": "text", "choice_columns": ["choices"]} if task == "multiple_choice" else {}
    )
    settings = {
        "model_name_or_path": str(models["bert"]),
        "train_file": str(path),
        "task": task,
        "dropout": 0.0,
        **keys,
    }
    shape, recipe = load_shape(str(models["bert"])), build_recipe({**settings, "train_batch_size": 1})
    each = count_activations(shape, build_work(recipe, shape, "cpu", recipe.max_length, 1))[0]
    size = 3 * GIB // each
    settings |= {"train_batch_size": size, "per_device_batch_size": size, "output_dir": str(tmp_path / "run")}
    found = [message for message in messages(settings, machine(gib=9)) if "per_device_batch_size" in message]
    assert len(found) == (task == "multiple_choice")
