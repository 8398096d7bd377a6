"""Texts are learned from texts: transformers' loss, the texts of its own search, ROUGE and BLEU of their packages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from onecurve.training.outcome import report_outcome
from onecurve.training.tasks.metrics.written import score_texts
from tests.conftest import TINY, Launch, Run
from tests.messages import names
from tests.training.conftest import assert_refused, stop_and_resume
from tools.seq2seq import build_pairs, build_seq2seq
from tools.trainings import to_flags

Settings = dict[str, Any]
Train = Callable[[Settings], Run]

TEXTS = {"task": "seq2seq_lm", "max_length": 64, "max_target_length": 16, "learning_rate": 5e-3}
LOSS_ONLY = {"predict_with_generate": False}


@pytest.fixture(scope="module")
def pairs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def models(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("seq2seq")
    return {family: build_seq2seq(folder / family, family) for family in ("t5", "bart")}


@pytest.fixture
def settings(models: Mapping[str, Path], pairs: Path, tmp_path: Path) -> Settings:
    files = {f"{split}_file": str(pairs / f"{split}.jsonl") for split in ("train", "validation")}
    return {**TINY, **TEXTS, "model_name_or_path": str(models["t5"]), **files, "output_dir": str(tmp_path / "run")}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(settings: Settings) -> tuple[Any, Any, Any, Any]:
    """Task, tokenizer, model and training examples."""
    from onecurve.training.config import load_recipe
    from onecurve.training.data.preparation import prepare_data
    from onecurve.training.models.loading import build_model, load_task

    words = iter(to_flags(settings))
    recipe = load_recipe(None, {key.removeprefix("--"): value for key, value in zip(words, words, strict=True)}).recipe
    task, config, tokenizer = load_task(recipe)
    examples = prepare_data(recipe, task, tokenizer).train.examples
    return task, tokenizer, build_model(recipe, config, task, tokenizer).eval(), examples


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_loss_and_texts_are_those_of_transformers(settings: Settings, models: Mapping[str, Path], family: str) -> None:
    """Also with padding in source and target; and what is written does not depend on what stands beside it."""
    from onecurve.training.data.layout import Collator

    given = {**settings, "model_name_or_path": str(models[family]), "num_beams": 3}
    task, tokenizer, model, examples = load(given)
    numbers = [0, 1, 2, 3, 40, 41]
    batch = Collator(task, tokenizer)({name: examples[name][numbers] for name in ("input_ids", "labels")})
    assert (batch["labels"] == -100).any()
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        found = task.forward(model, batch, wants_results=True)
        theirs = model(**batch).loss
        written = task.generate(model, batch)["generated"]
    assert float(found.losses.sum() / found.results["targets"].sum()) == pytest.approx(float(theirs), rel=1e-6)
    assert written.shape == (6, 16)
    for number, own in zip(numbers, written.tolist(), strict=True):
        source = torch.as_tensor(examples["input_ids"][[number]][0].copy()).long()[None]
        alone = model.generate(source, max_new_tokens=16, num_beams=3, do_sample=False)[0, 1:].tolist()
        assert [token for token in own if token >= 0] == [token for token in alone if token != tokenizer.pad_token_id]


def test_texts_are_written_and_measured_by_their_packages(settings: Settings, train: Train) -> None:
    from jiwer import wer
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, corpus_chrf

    run = train({**settings, "max_train_steps": 60, "num_beams": 2})
    assert run.exit_code == 0, run.stderr
    metrics, lines = run.read("eval_report.json")["metrics"], read_lines(run.path / "eval_predictions.jsonl")
    rows = read_lines(Path(settings["validation_file"]))
    assert [line["reference"] for line in lines] == [row["target"] for row in rows]
    texts, references = [line["prediction"] for line in lines], [line["reference"] for line in lines]
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        scorer = RougeScorer([name], use_stemmer=True)
        scores = [scorer.score(wanted, text)[name].fmeasure for text, wanted in zip(texts, references, strict=True)]
        assert metrics[f"eval_{name}"] == 100 * sum(scores) / 61
    assert metrics["eval_bleu"] == corpus_bleu(texts, [references]).score
    for each in run.read("eval_report.json")["hardest"]:
        assert (each["label"], each["prediction"]) == (references[each["example"]], texts[each["example"]])
    assert metrics["eval_chrf"] == corpus_chrf(texts, [references]).score
    assert metrics["eval_word_error_rate"] == 100 * wer(references, texts)
    assert metrics["eval_rougeL"] > 10, "it has begun to write drinks"
    assert metrics["eval_loss"] < 2
    assert metrics["eval_loss"] == pytest.approx(
        sum(line["loss"] * line["targets"] for line in lines) / sum(line["targets"] for line in lines), rel=1e-6
    )
    assert metrics["eval_accuracy"] == sum(line["right"] for line in lines) / sum(line["targets"] for line in lines)
    assert "pipeline_tag: text2text-generation\n" in (run.path / "final" / "README.md").read_text(encoding="utf-8")


def test_the_loss_is_the_mean_over_target_tokens(settings: Settings, train: Train) -> None:
    """A step over all rows, against an evaluation of them before anything is learned."""
    whole = {**settings, **LOSS_ONLY, "train_batch_size": 203, "validation_file": settings["train_file"]}
    run = train({**whole, "max_train_steps": 1, "learning_rate": 1e-12})
    assert run.losses[0] == pytest.approx(run.evaluations[0]["eval_loss"], rel=1e-6)
    assert "eval_rougeL" not in run.evaluations[0]


def test_sizes_of_source_and_target_are_the_cost(settings: Settings) -> None:
    task, _, _, examples = load(settings)
    sizes = [
        len(source) + len(target)
        for source, target in zip(examples["input_ids"][:], examples["labels"][:], strict=True)
    ]
    assert task.lengths(examples).tolist() == sizes
    assert task.counts(examples).tolist() == [len(target) for target in examples["labels"][:]]


def test_a_prefix_and_translations_are_read(settings: Settings) -> None:
    keys = {
        "translation_column": "translation",
        "source_lang": "en",
        "target_lang": "de",
        "source_prefix": "to German: ",
    }
    _, tokenizer, _, examples = load({**settings, **keys})
    row = read_lines(Path(settings["train_file"]))[0]
    [source], [target] = examples["input_ids"][[0]], examples["labels"][[0]]
    assert tokenizer.decode(source.tolist()) == f"to German: {row['source']}</s>"
    assert tokenizer.decode(target.tolist()) == f"{row['target']}</s>"


def test_it_resumes(settings: Settings, train: Train, tmp_path: Path) -> None:
    settings = {**settings, **LOSS_ONLY, "dropout": 0.1}
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})
    resumed = stop_and_resume(train, settings, tmp_path)
    assert resumed.losses == whole.losses


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["fsdp", "deepspeed_zero3", "multi_cpu"])
def test_processes_write_the_same_texts(settings: Settings, train: Train, launch: Launch, topology: str) -> None:
    given = {**settings, "num_beams": 2, "max_train_steps": 30, "max_eval_samples": 21}
    one, two = train({**given, "per_device_batch_size": 16}), None
    two = launch({**given, "output_dir": f"{one.path}-2", "per_device_batch_size": 8}, topology, 2)
    assert two.exit_code == 0, two.stderr
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    mine, theirs = (read_lines(run.path / "eval_predictions.jsonl") for run in (one, two))
    assert [line["prediction"] for line in mine] == [line["prediction"] for line in theirs]
    assert any(line["prediction"] for line in mine)


@pytest.mark.slow
def test_an_adapter_answers_a_file_and_is_merged(settings: Settings, train: Train, tmp_path: Path) -> None:
    from onecurve.training import merge, predict
    from onecurve.training.parallel.accelerator import forget_state

    run = train({**settings, "adapter": "lora", "max_train_steps": 20})
    assert run.exit_code == 0, run.stderr
    try:
        words = [
            "--run",
            str(run.path),
            "--input",
            settings["validation_file"],
            "--output",
            str(tmp_path / "out.jsonl"),
        ]
        assert report_outcome(predict.main, words) == 0
    finally:
        forget_state()
    found, evaluated = read_lines(tmp_path / "out.jsonl"), read_lines(run.path / "eval_predictions.jsonl")
    assert [row["prediction"] for row in found] == [line["prediction"] for line in evaluated]
    assert report_outcome(merge.main, ["--run", str(run.path), "--output", str(tmp_path / "merged")]) == 0


def test_a_deep_check_shows_source_and_target(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    from onecurve.training import check
    from onecurve.training.launch_protocol import EXAMPLE_LINE

    assert report_outcome(check.main, to_flags({**settings, "max_target_length": 7})) == 0
    lines = capsys.readouterr().out.splitlines()
    example = json.loads(next(line for line in lines if line.startswith(EXAMPLE_LINE)).removeprefix(EXAMPLE_LINE))
    row = read_lines(Path(settings["train_file"]))[0]
    assert "".join(text for text, is_target in example if is_target) == f"{row['target']}</s>"
    assert "".join(text for text, is_target in example if not is_target) == f"{row['source']}</s>"
    assert any("max_target_length" in line for line in lines), "some targets are cut"


TRANSLATED = {"translation_column": "translation", "source_lang": "en", "target_lang": "de"}
BAD_ROWS: dict[str, tuple[Settings, Any, tuple[str, ...]]] = {
    "an empty source": ({}, {"source": " ", "target": "b"}, ("row 2", "'source'")),
    "an empty target": ({}, {"source": "a", "target": ""}, ("row 2", "'target'")),
    "no target": ({}, {"source": "a", "target": None}, ("row 2", "'target'")),
    "a translation that is null": (TRANSLATED, {"translation": None}, ("row 2", "'translation'", "en", "de")),
    "a language that is lacking": (
        TRANSLATED,
        {"translation": {"en": "a", "de": None}},
        ("row 2", "'translation'", "de"),
    ),
    "an empty translation": (TRANSLATED, {"translation": {"en": "a", "de": " "}}, ("row 2", "'translation.de'")),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(settings: Settings, train: Train, tmp_path: Path, case: str) -> None:
    change, row, named = BAD_ROWS[case]
    good = {"translation": {"en": "a", "de": "b"}} if change else {"source": "a", "target": "b"}
    rows = [good, row, *[good] * 10]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    run = train({**settings, **change, "train_file": str(tmp_path / "bad.jsonl")})
    assert_refused(run, "bad.jsonl", *named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target_column": "source"}, ("target_column", "'source'")),
        ({"target_column": "summary"}, ("target_column", "'summary'")),
        ({"source_lang": "en"}, ("source_lang", "translation_column")),
        ({"translation_column": "translation"}, ("source_lang", "target_lang")),
        (
            {"translation_column": "translation", "source_lang": "en", "target_lang": "en"},
            ("source_lang", "target_lang"),
        ),
        ({**TRANSLATED, "source_column": "text"}, ("source_column", "translation_column")),
        ({"translation_column": "source", "source_lang": "en", "target_lang": "de"}, ("'source'", "row 1")),
        ({"num_beams": 0}, ("num_beams",)),
        ({"max_target_length": 1}, ("max_target_length",)),
        ({"metric_for_best_model": "eval_rougel"}, ("metric_for_best_model", "eval_rougeL")),
        ({"predict_with_generate": False, "metric_for_best_model": "eval_bleu"}, ("metric_for_best_model",)),
        ({"text_column": "source"}, ("text_column",)),
    ],
    ids=str,
)
def test_bad_keys_are_named(settings: Settings, train: Train, change: Settings, named: tuple[str, ...]) -> None:
    run = train({**settings, **change})
    assert_refused(run, *named)


def test_a_model_that_can_not_is_refused(
    settings: Settings, train: Train, tiny_model: Path, decoder: Path, models: Mapping[str, Path]
) -> None:
    for model, named in ((tiny_model, "bert"), (decoder, "llama")):
        run = train({**settings, "model_name_or_path": str(model)})
        assert run.exit_code == 2
        assert names(run.stderr, "model_name_or_path", named)
    run = train({**settings, "model_name_or_path": str(models["bart"]), "max_target_length": 257})
    assert run.exit_code == 2
    assert names(run.stderr, "max_target_length", "256")
    run = train({**settings, "tokenizer_name": str(decoder)})
    assert run.exit_code == 2
    assert names(run.stderr, "tokenizer_name"), "its tokenizer does not end a text"


def test_rouge_compares_stems_and_bleu_words() -> None:
    found = score_texts(["two cats running home", "x"], ["two cat run home", "x"])
    assert found["rouge1"] == found["rougeL"] == 100
    assert found["bleu"] < 100
    assert found["chrf"] < 100
    assert found["word_error_rate"] == 100 * 2 / 5, "of five words two are wrong"
