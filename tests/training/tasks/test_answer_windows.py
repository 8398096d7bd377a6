"""Windows hold the whole of a context, labels are where the answer is, and candidates are the best spans: by brute force."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onecurve.training.tasks.answer_windows import ENDS, STARTS, find_answer_problem, find_candidates, read_answers
from onecurve.training.tasks.base import Rows
from onecurve.training.tasks.question_answering import QuestionAnswering, QuestionAnsweringRecipe

CONTEXT = "Voilà: the café's naïve owner — Zoë 🦉 Müller — sold 1,024 crème brûlées in 1998, and none in 1999. "


def make_task(**keys: Any) -> QuestionAnswering:
    given = {"max_length": 24, "doc_stride": 6, "model_name_or_path": "m", "train_file": "t.jsonl", "output_dir": "o"}
    return QuestionAnswering(QuestionAnsweringRecipe(**{**given, **keys}))


def make_rows(contexts: list[str], answers: list[Any], question: str = "who?") -> Rows:
    columns = {"question": [question] * len(contexts), "context": contexts, "answers": answers}
    return Rows(pa.Table.from_pydict(columns), np.arange(len(contexts)), "a.jsonl")


@pytest.fixture(scope="module", params=["word pieces", "bytes", "bytes with spaces", "roberta"])
def tokenizer(request: pytest.FixtureRequest, tiny_model: Path, decoder: Path) -> Any:
    """Offsets of four kinds: without spaces, of one character for several tokens, and with the space before a word."""
    if request.param == "word pieces":
        return AutoTokenizer.from_pretrained(tiny_model)
    from tokenizers import Tokenizer, pre_tokenizers, processors

    backend = Tokenizer.from_str(AutoTokenizer.from_pretrained(decoder).backend_tokenizer.to_str())
    if request.param == "bytes":
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    elif request.param == "roberta":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        ends = [(name, backend.token_to_id(name) or 0) for name in ("<|endoftext|>", "<s>")]
        backend.post_processor = processors.RobertaProcessing(
            ends[0], ends[1], trim_offsets=True, add_prefix_space=True
        )
    tokens = {"eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    if request.param == "roberta":
        tokens["cls_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def find_answers(context: str) -> list[tuple[str, int]]:
    """Every run of up to three words."""
    words = [match.span() for match in re.finditer(r"\S+", context)]
    return [
        (context[start:end], start) for number, (start, _) in enumerate(words) for _, end in words[number : number + 3]
    ]


@pytest.mark.parametrize(("max_length", "doc_stride"), [(40, 0), (40, 12), (64, 24), (400, 100)], ids=str)
def test_an_answer_is_found_where_it_stands(tokenizer: Any, max_length: int, doc_stride: int) -> None:
    found = find_answers(CONTEXT)
    rows = make_rows([CONTEXT] * len(found), [{"text": [text], "answer_start": [start]} for text, start in found])
    examples = make_task(max_length=max_length, doc_stride=doc_stride).encode(rows, tokenizer)
    labelled = set()
    for number, labels in enumerate(examples["labels"]):
        first, last = (int(np.argmax(np.array(labels) & which)) for which in (STARTS, ENDS))
        text, start = found[examples["row"][number]]
        if first == last == examples["null_place"][number] and examples["starts"][number][first] < 0:
            begin = min(each for each in examples["starts"][number] if each >= 0)
            assert not (begin <= start and start + len(text) <= max(examples["ends"][number])), (
                "it is whole in this window"
            )
            continue
        labelled.add(int(examples["row"][number]))
        span = CONTEXT[examples["starts"][number][first] : examples["ends"][number][last]]
        assert text in span, "all of the answer"
        if " " not in text.strip() or not CONTEXT[start - 1 : start].strip():
            assert span.strip().startswith(text[0])
    if doc_stride == 24 or max_length == 400:
        tokens = [len(tokenizer(" " + text, add_special_tokens=False)["input_ids"]) for text, _ in found]
        short = {number for number, count in enumerate(tokens) if count <= doc_stride}
        assert short <= labelled, "an answer that is not longer than the overlap is whole in a window"


def test_windows_hold_all_of_the_context_and_overlap(tokenizer: Any) -> None:
    rows = make_rows([CONTEXT, "short"], [{"text": [], "answer_start": []}] * 2)
    examples = make_task(max_length=28, doc_stride=8, version_2_with_negative=True).encode(rows, tokenizer)
    whole = tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    windows = [
        [token for token, start in zip(tokens, starts, strict=True) if start >= 0]
        for tokens, starts, row in zip(examples["input_ids"], examples["starts"], examples["row"], strict=True)
        if row == 0
    ]
    assert len(windows) > 1
    joined = windows[0]
    for window in windows[1:]:
        assert joined[-8:] == window[:8], "they overlap by doc_stride tokens"
        joined = joined + window[8:]
    assert joined == whole
    assert max(map(len, examples["input_ids"])) == 28
    assert examples["row"].tolist() == [0] * len(windows) + [1]


def test_characters_are_counted_not_bytes(tokenizer: Any) -> None:
    start = CONTEXT.index("Müller")
    rows = make_rows([CONTEXT], [{"text": ["Müller"], "answer_start": [start]}])
    examples = make_task(max_length=200, doc_stride=0).encode(rows, tokenizer)
    [labels] = examples["labels"]
    first, last = (int(np.argmax(np.array(labels) & which)) for which in (STARTS, ENDS))
    assert CONTEXT[examples["starts"][0][first] : examples["ends"][0][last]].strip() == "Müller"


def test_what_touches_an_answer_is_no_part_of_it(tokenizer: Any) -> None:
    rows = make_rows(["in (Paris), yes"], [{"text": ["Paris"], "answer_start": [4]}])
    examples = make_task().encode(rows, tokenizer)
    [labels] = examples["labels"]
    first, last = (int(np.argmax(np.array(labels) & which)) for which in (STARTS, ENDS))
    assert "in (Paris), yes"[examples["starts"][0][first] : examples["ends"][0][last]] == "Paris"


def search_all(number: int, results: dict[str, Any], context: str, max_tokens: int) -> tuple[float, str]:
    """The best span by trying all of them."""
    starts, ends = results["starts"][number], results["ends"][number]
    best = (-np.inf, "")
    pairs = itertools.combinations_with_replacement(range(len(starts)), 2)
    for i, j in (pair for pair in pairs if pair[1] - pair[0] < max_tokens):
        if starts[i] >= 0 and starts[j] >= 0 and (text := context[starts[i] : ends[j]].strip()):
            best = max(best, (float(results["start_logits"][number][i] + results["end_logits"][number][j]), text))
    return best


def test_the_best_candidate_is_the_best_of_all_spans(tokenizer: Any) -> None:
    rows = make_rows([CONTEXT], [{"text": [], "answer_start": []}])
    examples = make_task(max_length=40, doc_stride=12, version_2_with_negative=True).encode(rows, tokenizer)
    generator = np.random.default_rng(0)
    for _ in range(20):
        logits = {
            name: [generator.normal(size=len(tokens)).astype(np.float32) for tokens in examples["input_ids"]]
            for name in ("start_logits", "end_logits")
        }
        results = {**examples, **logits}
        for number in range(len(examples["input_ids"])):
            found = list(find_candidates(number, results, most=10_000, max_tokens=7))
            best = max(found, key=lambda each: each.score)
            assert (best.score, best.text) == search_all(number, results, CONTEXT, 7)
            assert all(CONTEXT[each.start : each.end] == each.text for each in found)


def test_answers_are_read_in_both_forms() -> None:
    assert read_answers({"text": ["a", "b"], "answer_start": [0, 5]}) == [("a", 0), ("b", 5)]
    assert read_answers([{"text": "a", "answer_start": 0}, {"text": "b", "answer_start": 5}]) == [("a", 0), ("b", 5)]
    assert read_answers({"text": [], "answer_start": []}) == read_answers([]) == []


def test_a_wrong_start_names_the_right_one() -> None:
    context = "é: Paris, and Paris"
    assert find_answer_problem("Paris", 3, context) is None
    assert "3" in str(find_answer_problem("Paris", 4, context)), "bytes were counted"
    assert "14" in str(find_answer_problem("Paris", 12, context)), "the nearest"
    assert find_answer_problem("Rome", 3, context) is not None


def answer_officially(
    rows: list[int], results: dict[str, Any], context: str, n_best: int, max_tokens: int, threshold: float | None
) -> str:
    """What `postprocess_qa_predictions` of transformers' example answers, from the windows of one row."""
    spans, nulls = [], []
    for number in rows:
        first, second = results["start_logits"][number], results["end_logits"][number]
        null = results["null_place"][number]
        nulls.append(first[null] + second[null])
        for i in np.argsort(first)[-1 : -n_best - 1 : -1]:
            for j in np.argsort(second)[-1 : -n_best - 1 : -1]:
                is_outside = results["starts"][number][i] < 0 or results["starts"][number][j] < 0
                if not is_outside and j >= i and j - i + 1 <= max_tokens:
                    text = context[results["starts"][number][i] : results["ends"][number][j]]
                    spans.append((first[i] + second[j], text.strip()))
    spans.sort(key=lambda each: each[0], reverse=True)
    score, text = next(each for each in spans if each[1])
    return "" if threshold is not None and min(nulls) - score > threshold else text


@pytest.mark.parametrize(("max_length", "doc_stride"), [(28, 0), (28, 8), (40, 12), (64, 24), (400, 100)], ids=str)
@pytest.mark.parametrize("threshold", [None, 0.0, 1.5], ids=str)
def test_answers_are_those_of_the_official_example(
    tokenizer: Any, max_length: int, doc_stride: int, threshold: float | None
) -> None:
    keys = {"version_2_with_negative": threshold is not None, "null_score_diff_threshold": threshold or 0.0}
    task = make_task(max_length=max_length, doc_stride=doc_stride, n_best_size=20, max_answer_length=9, **keys)
    contexts = [CONTEXT, CONTEXT[20:], CONTEXT[::-1], "short"] * 5
    rows = make_rows(contexts, [{"text": [], "answer_start": []}] * len(contexts))
    examples, generator = task.encode(rows, tokenizer), np.random.default_rng(1)
    results: dict[str, Any] = dict(examples)
    for name in ("start_logits", "end_logits"):
        results[name] = [generator.normal(size=len(tokens)).astype(np.float32) for tokens in examples["input_ids"]]
        for logits, starts, null in zip(results[name], examples["starts"], examples["null_place"], strict=True):
            logits[np.array(starts) < 0] -= 10  # The example would let the question take places of the best ones.
            logits[null] = generator.normal() + 2
    expected = []
    for row, context in enumerate(contexts):
        numbers = np.flatnonzero(examples["row"] == row).tolist()
        expected.append(answer_officially(numbers, results, context, 20, 9, threshold))
    assert [answer.text for answer in task.find_answers(results)] == expected
    if threshold is not None:
        assert 0 < expected.count("") < len(expected)
