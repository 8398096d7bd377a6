"""Questions are learned, answered and scored from windows, on any topology; what can't be an answer is refused by its row."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onecurve.training.outcome import report_outcome
from tests.conftest import TINY, Launch, Run
from tests.messages import names
from tests.training.conftest import assert_refused, stop_and_resume
from tests.training.tasks.test_squad import official_f1_of_1_1, official_f1_of_2_0, official_normalize
from tools.questions import DRINKS, QUESTION, build_questions

Settings = dict[str, Any]
Train = Callable[[Settings], Run]

# Windows of few tokens: most contexts have several.
WINDOWS = {"task": "question_answering", "max_length": 32, "doc_stride": 8}


@pytest.fixture(scope="module")
def data(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def data_with_unanswerable(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_questions(tmp_path_factory.mktemp("unanswerable"), has_unanswerable=True)


@pytest.fixture
def settings(tiny_model: Path, data: Path, tmp_path: Path) -> Settings:
    files = {f"{split}_file": str(data / f"{split}.jsonl") for split in ("train", "validation")}
    return {**TINY, **WINDOWS, "model_name_or_path": str(tiny_model), **files, "output_dir": str(tmp_path / "run")}


def with_unanswerable(settings: Settings, data: Path) -> Settings:
    files = {f"{split}_file": str(data / f"{split}.jsonl") for split in ("train", "validation")}
    return {**settings, **files, "version_2_with_negative": True}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


LEARN = {"max_train_steps": 60, "learning_rate": 5e-3}


def test_it_is_learned_and_scored_by_question(settings: Settings, data: Path, train: Train) -> None:
    run = train({**settings, **LEARN, "metric_for_best_model": "eval_f1", "eval_steps": 20})
    assert run.exit_code == 0, run.stderr
    rows, lines = read_lines(data / "validation.jsonl"), read_lines(run.path / "eval_predictions.jsonl")
    assert [line["row"] for line in lines] == list(range(61)), "a line for each question, not for each window"
    assert [line["answers"] for line in lines] == [row["answers"]["text"] for row in rows]
    report = run.read("eval_report.json")
    assert report["questions"] == 61 < report["windows"]
    exact, f1 = 0.0, 0.0
    for line in lines:
        exact += max(official_normalize(line["prediction"]) == official_normalize(each) for each in line["answers"])
        f1 += max(official_f1_of_1_1(line["prediction"], each) for each in line["answers"])
    assert report["metrics"]["eval_exact_match"] == 100.0 * exact / 61
    assert report["metrics"]["eval_f1"] == 100.0 * f1 / 61
    assert report["metrics"]["eval_f1"] > 90
    for line, row in zip(lines, rows, strict=True):
        assert row["context"].startswith(line["prediction"], line["answer_start"])
        assert line["n_best"][0]["text"] == line["prediction"]
    for each in report["hardest"]:
        assert each["label"] == (" / ".join(lines[each["row"]]["answers"]) or "no answer")
        shown, asked = ("".join(each.split()).lower() for each in (each["text"], rows[each["row"]]["question"]))
        assert shown[:8] == asked[:8]
        assert 1 <= len(line["n_best"]) <= 20
        assert sum(each["score"] for each in line["n_best"]) == pytest.approx(1)
    card = (run.path / "final" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: question-answering\n" in card


def test_questions_without_an_answer(settings: Settings, data_with_unanswerable: Path, train: Train) -> None:
    run = train({**with_unanswerable(settings, data_with_unanswerable), **LEARN})
    assert run.exit_code == 0, run.stderr
    lines, report = read_lines(run.path / "eval_predictions.jsonl"), run.read("eval_report.json")
    scores = [max(official_f1_of_2_0(line["prediction"], each) for each in (line["answers"] or [""])) for line in lines]
    assert report["metrics"]["eval_f1"] == 100.0 * sum(scores) / 61
    without = [score for score, line in zip(scores, lines, strict=True) if not line["answers"]]
    assert (report["NoAns_total"], report["HasAns_total"]) == (21, 40)
    assert report["NoAns_f1"] == 100.0 * sum(without) / 21
    assert report["metrics"]["eval_f1"] > 80
    assert report["best_f1"] >= report["metrics"]["eval_f1"]
    for line in lines:
        assert (line["prediction"] == "") == (line["null_score_diff"] > 0)
        certainty = line["score"] if not line["prediction"] else 1 - sum(each["score"] for each in line["n_best"])
        assert 0 <= certainty <= 1
    # At the threshold that the report calls the best, an evaluation gives just that score.
    again = train({**with_unanswerable(settings, data_with_unanswerable), **LEARN, "output_dir": f"{run.path}-again",
                   "null_score_diff_threshold": report["best_f1_threshold"]})  # fmt: skip
    assert again.read("eval_report.json")["metrics"]["eval_f1"] == pytest.approx(report["best_f1"])


def test_the_loss_of_a_batch_is_that_of_transformers(settings: Settings) -> None:
    """Without padding; and with it that of each window alone, which transformers' own loss then is not."""
    from onecurve.training.config import load_recipe
    from onecurve.training.data.layout import Collator, Layout
    from onecurve.training.data.preparation import prepare_data
    from onecurve.training.models.loading import build_model, load_task
    from onecurve.training.tasks.answer_windows import ENDS, STARTS
    from tools.trainings import to_flags

    flags = dict(zip(*[iter(word.removeprefix("--") for word in to_flags(settings))] * 2, strict=True))
    recipe = load_recipe(None, flags).recipe
    task, config, tokenizer = load_task(recipe)
    examples = prepare_data(recipe, task, tokenizer).train.examples
    model = build_model(recipe, config, task, tokenizer).eval()

    def compare(numbers: list[int]) -> tuple[torch.Tensor, float]:
        kept = ("input_ids", "token_type_ids", "labels")
        batch = Collator(task, tokenizer, Layout(mask="always"))({name: examples[name][numbers] for name in kept})
        places = {
            name: (batch["labels"].clamp(min=0) & which).argmax(dim=1)
            for name, which in (("start_positions", STARTS), ("end_positions", ENDS))
        }
        inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        with torch.no_grad():
            losses = task.forward(model, batch).losses
            assert losses is not None
            return losses, float(model(**inputs, **places).loss)

    lengths = examples["input_ids"].lengths  # type: ignore[union-attr]
    full = np.flatnonzero(lengths == 32)[:16].tolist()
    losses, theirs = compare(full)
    assert float(losses.mean()) == pytest.approx(theirs, rel=1e-6)
    mixed = np.argsort(lengths, kind="stable")[[0, 5, -1]].tolist()
    padded, theirs_padded = compare(mixed)
    alone = [compare([number]) for number in mixed]
    assert padded.tolist() == pytest.approx([loss for _, loss in alone], rel=1e-5)
    assert theirs_padded != pytest.approx(float(padded.mean()), rel=1e-3), "transformers counts padding as places"


def test_the_loss_is_the_mean_over_windows(settings: Settings, train: Train) -> None:
    """A step over all windows, against an evaluation of them before anything is learned."""
    whole = {**settings, "train_batch_size": 1000, "max_train_steps": 1, "validation_file": settings["train_file"]}
    run = train({**whole, "learning_rate": 1e-12})
    report = run.read("eval_report.json")
    assert run.steps[0]["examples"] == report["windows"] > 203 == report["questions"]
    assert run.losses[0] == pytest.approx(run.evaluations[0]["eval_loss"], rel=1e-6)


@pytest.mark.slow
def test_three_processes_answer_the_same(settings: Settings, train: Train, launch: Launch) -> None:
    one = train({**settings, **LEARN, "per_device_batch_size": 16})
    three = launch({**settings, **LEARN, "output_dir": f"{one.path}-3", "per_device_batch_size": 3}, "multi_cpu", 3)
    assert three.exit_code == 0, three.stderr
    assert three.losses == pytest.approx(one.losses, rel=1e-5)
    mine, theirs = (read_lines(run.path / "eval_predictions.jsonl") for run in (one, three))
    assert [line["prediction"] for line in mine] == [line["prediction"] for line in theirs]


def test_it_resumes(settings: Settings, train: Train, tmp_path: Path) -> None:
    settings = {**settings, "dropout": 0.1}
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})
    resumed = stop_and_resume(train, settings, tmp_path)
    assert resumed.losses == whole.losses
    assert (resumed.path / "eval_predictions.jsonl").read_bytes() == (
        whole.path / "eval_predictions.jsonl"
    ).read_bytes()


@pytest.fixture(scope="module")
def trained(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learned the answers."""
    from onecurve.training.parallel.accelerator import forget_state
    from onecurve.training.run import main
    from tools.trainings import to_flags

    folder = tmp_path_factory.mktemp("trained") / "run"
    files = {f"{split}_file": str(data / f"{split}.jsonl") for split in ("train", "validation")}
    given = {**TINY, **WINDOWS, **LEARN, **files, "model_name_or_path": str(tiny_model), "output_dir": str(folder)}
    try:
        assert report_outcome(main, to_flags({**given, "adapter": "lora", "learning_rate": 2e-2})) == 0
    finally:
        forget_state()
    return folder


Predict = Callable[[Path, str], tuple[int, str, Path]]


@pytest.fixture
def predict(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Predict:
    """Answer a file: exit code, what was said, the file that was written."""
    from onecurve.training import predict
    from onecurve.training.parallel.accelerator import forget_state

    def answer(source: Path, name: str) -> tuple[int, str, Path]:
        target = tmp_path / name
        words = ["--run", str(trained), "--input", str(source), "--output", str(target)]
        capsys.readouterr()
        try:
            code = report_outcome(predict.main, words)
        finally:
            forget_state()
        said = capsys.readouterr()
        return code, said.out + said.err, target

    return answer


def test_an_adapter_answers_a_file_as_the_evaluation_did(trained: Path, data: Path, predict: Predict) -> None:
    code, said, target = predict(data / "validation.jsonl", "out.jsonl")
    assert code == 0, said
    found, evaluated = read_lines(target), read_lines(trained / "eval_predictions.jsonl")
    assert [row["id"] for row in found] == [str(number) for number in range(61)], "the same rows in the same order"
    assert [row["prediction"] for row in found] == [line["prediction"] for line in evaluated]
    assert [row["answer_start"] for row in found] == [line["answer_start"] for line in evaluated]
    scores = [[row["score"] for row in rows] for rows in (found, evaluated)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_a_csv_file_is_answered(predict: Predict, tmp_path: Path) -> None:
    context = "word " * 60 + DRINKS[2] + " word" * 60
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["question", "context"], [QUESTION, context], [QUESTION, f"Two: {DRINKS[0]}!"]])
    code, said, target = predict(tmp_path / "in.csv", "out.csv")
    assert code == 0, said
    with target.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        assert row["context"].startswith(row["prediction"], int(row["answer_start"]))
        assert json.loads(row["n_best"])[0]["text"] == row["prediction"]
    assert rows[0]["prediction"] in ("cold", DRINKS[2]), "it stands in one of several windows"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"question": "", "context": "a"}, ("row 2", "'question'")),
        ({"question": "who?", "context": None}, ("row 2", "'context'")),
        ({"question": "who " * 40, "context": "a"}, ("row 2", "max_length", "doc_stride")),
    ],
    ids=str,
)
def test_a_row_that_can_not_be_answered_is_named(
    predict: Predict, tmp_path: Path, row: Mapping[str, Any], named: tuple[str, ...]
) -> None:
    rows = [{"question": QUESTION, "context": "some tea"}, row]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    code, said, target = predict(tmp_path / "in.jsonl", "out.jsonl")
    assert code == 2
    assert names(said, "in.jsonl", *named)
    assert not target.exists()


def answered(text: Any, start: Any) -> dict[str, Any]:
    return {"answers": {"text": text, "answer_start": start}}


# What is wrong with the third row, and what the message names.
BAD_ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an empty question": ({"question": " "}, ("'question'",)),
    "no context": ({"context": None}, ("'context'",)),
    "an answer that does not match": (answered(["Paris"], [2]), ("'answers'", "'Paris'", "3")),
    "an answer counted in bytes": (answered(["Rome"], [11]), ("'answers'", "'Rome'", "10")),
    "an answer behind the end": (answered(["Paris"], [99]), ("'answers'", "'Paris'", "99")),
    "the second answer does not match": (answered(["Paris", "Rome"], [3, 12]), ("'answers'", "'Rome'", "10")),
    "no answer": (answered([], []), ("'answers'", "version_2_with_negative")),
    "answers that are null": ({"answers": None}, ("'answers'", "answer_start")),
    "lists of different length": (answered(["Paris", "Rome"], [3]), ("'answers'", "2", "1")),
    "a negative start": (answered(["Paris"], [-1]), ("'answers'", "-1")),
    "an answer of spaces": (answered([" "], [2]), ("'answers'",)),
    "an answer that is null": (answered([None], [2]), ("'answers'", "None")),
    "a question that is too long": ({"question": "why " * 30}, ("max_length", "doc_stride")),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(settings: Settings, train: Train, tmp_path: Path, case: str) -> None:
    change, named = BAD_ROWS[case]
    good = {"question": "Where?", "context": "é: Paris; Rome.", **answered(["Paris"], [3])}
    rows = [good, good, {**good, **change}, *[good] * 10]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = train({**settings, "train_file": str(tmp_path / "bad.jsonl")})
    assert_refused(run, "bad.jsonl", "row 3", *named)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"question": "a?", "context": "a b", "answers": "a"}\n', ("row 1", "'answers'", "'a'")),
        ('{"question": "a?", "context": "a b", "answers": {"text": "a", "answer_start": 0}}\n', ("row 1", "'answers'")),
        ('{"question": "a?", "context": "a b", "answers": {"text": ["a"], "answer_start": [0.5]}}\n', ("row 1", "0.5")),
        ('{"question": "a?", "context": "a b", "answers": {"text": ["a"]}}\n', ("row 1", "answer_start")),
        ('{"question": 5, "context": "a b", "answers": {"text": ["a"], "answer_start": [0]}}\n', ("'question'",)),
        ('{"question": "a?", "context": "a b"}\n', ("answers_column", "'answers'")),
    ],
    ids=str,
)
def test_a_bad_column_is_named(
    settings: Settings, train: Train, tmp_path: Path, content: str, named: tuple[str, ...]
) -> None:
    (tmp_path / "bad.jsonl").write_text(content * 9, encoding="utf-8")
    run = train({**settings, "train_file": str(tmp_path / "bad.jsonl")})
    assert run.exit_code == 2
    assert names(run.stderr, "bad.jsonl", *named), run.stderr


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"doc_stride": 32}, ("doc_stride", "max_length")),
        ({"context_column": "question"}, ("context_column", "question_column")),
        ({"null_score_diff_threshold": 1.0}, ("null_score_diff_threshold", "version_2_with_negative")),
        ({"n_best_size": 0}, ("n_best_size",)),
        ({"max_answer_length": 0}, ("max_answer_length",)),
        ({"label_column": "answers"}, ("label_column",)),
        ({"metric_for_best_model": "eval_exact"}, ("metric_for_best_model", "eval_exact_match")),
        ({"loss_chunk_tokens": 64}, ("loss_chunk_tokens",)),
    ],
    ids=str,
)
def test_bad_keys_are_named(settings: Settings, train: Train, change: Settings, named: tuple[str, ...]) -> None:
    run = train({**settings, **change})
    assert_refused(run, *named)


def test_a_model_without_a_head_is_not_evaluated(settings: Settings, train: Train) -> None:
    run = train({**settings, "eval_only": True})
    assert run.exit_code == 2
    assert names(run.stderr, "--eval_only")


def test_a_tokenizer_without_offsets_is_refused() -> None:
    from transformers import PreTrainedTokenizer

    from onecurve.training.errors import BadInput
    from tests.training.tasks.test_answer_windows import make_task

    with pytest.raises(BadInput, match="tokenizer_name"):
        make_task().configure_processor(PreTrainedTokenizer.__new__(PreTrainedTokenizer))


ENDS_OF_SIX = (("f", 10), ("b c d e f", 2), ("c d e f", 4))


def test_an_answer_that_is_whole_in_no_window_is_said(
    settings: Settings, train: Train, tmp_path: Path, tiny_model: Path
) -> None:
    context = " ".join(f"w{number}" for number in range(60))
    row = {
        "question": "Which?",
        "context": context,
        **answered([context[90:-20].strip()], [90 + context[90:91].isspace()]),
    }
    short = {"question": "Which?", "context": "w1 w2", **answered(["w1"], [0])}
    rows = [row, *[short] * 10, row]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    run = train({**settings, "train_file": str(tmp_path / "long.jsonl"), "max_train_steps": 1})
    assert run.exit_code == 0, run.stderr
    assert names(run.stdout, "2", "doc_stride")


def test_an_answer_that_is_too_long_to_be_given_is_said(settings: Settings, train: Train, tmp_path: Path) -> None:
    """It stands at the very end of its context."""
    rows = [
        {"question": "Which?", "context": "a b c d e f", **answered([text], [start])} for text, start in ENDS_OF_SIX
    ]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    keys = {**settings, "train_file": str(tmp_path / "long.jsonl"), "max_train_steps": 1}
    for most, is_said in ((5, False), (4, True)):
        run = train({**keys, "max_answer_length": most, "output_dir": str(tmp_path / f"most_{most}")})
        assert run.exit_code == 0, run.stderr
        assert names(run.stdout, "row 2", "5 tokens", f"max_answer_length: {most}") == is_said


def test_a_deep_check_shows_a_window_and_its_answer(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    from onecurve.training import check
    from onecurve.training.launch_protocol import EXAMPLE_LINE
    from tools.trainings import to_flags

    assert report_outcome(check.main, to_flags(settings)) == 0
    lines = capsys.readouterr().out.splitlines()
    example = json.loads(next(line for line in lines if line.startswith(EXAMPLE_LINE)).removeprefix(EXAMPLE_LINE))
    answer = "".join(text.removeprefix("##") for text, is_target in example if is_target)
    assert answer == DRINKS[0].replace(" ", "")
    [facts] = [line.split() for line in lines if line.startswith("questions")]
    assert facts[1] == "264"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_causal_model_learns_it_too(
    settings: Settings, train: Train, decoder: Path, tmp_path: Path, family: str
) -> None:
    """Its batches are tried without a mask, and padding must then be no place of an answer."""
    from tools.decoders import build_decoder

    folder = build_decoder(tmp_path / family, family)
    given = {**settings, "model_name_or_path": str(folder), "max_length": 64, "doc_stride": 16, "max_train_steps": 2}
    losses = [
        train({**given, "output_dir": str(tmp_path / f"run{size}"), "per_device_batch_size": size}).losses
        for size in (1, 16)
    ]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_merged_model_is_checked(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    from onecurve.training import merge

    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    words = ["--run", str(trained), "--output", str(tmp_path / "merged")]
    assert report_outcome(merge.main, words) == 0
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == 2
