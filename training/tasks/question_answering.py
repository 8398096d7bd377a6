"""Extractive question answering: where in a context the answer to a question stands, as in SQuAD 1.1 and 2.0.

A context that is longer than `max_length` becomes several windows that overlap by `doc_stride` tokens. A window is an
example: it has its own loss, and counts once. Answers and their scores are put together from all windows of a row.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from onecurve.training.architectures import list_heads
from onecurve.training.errors import BadInput
from onecurve.training.recipe import Integer, Number, Recipe
from onecurve.training.tasks.answer_windows import (
    ENDS,
    STARTS,
    Candidate,
    find_answer_problem,
    find_candidates,
    label_window,
    read_answers,
    read_window,
)
from onecurve.training.tasks.base import NO_TARGET, Forward, Rows, Task, to_float32
from onecurve.training.tasks.metrics.squad import find_best_threshold, score_answer
from onecurve.training.tasks.texts import check_texts, find_text_problem, note_special_tokens

if TYPE_CHECKING:
    import torch

    from onecurve.training.survey import Survey
    from onecurve.training.tasks.base import TokenCounter
    from onecurve.training.tasks.fits.fit import Fit

_MAX_TOKENS_SHOWN = 400
_IN_NO_WINDOW = (
    "questions whose answer is whole in no window, and which are learned as if it were not there; raise doc_stride above the "
    "tokens of the longest answer"
)


class QuestionAnsweringRecipe(Recipe):
    """The keys of question answering beside those of every recipe. Their names are those of transformers' run_qa."""

    question_column: str = Field(default="question", min_length=1, description="column with the question")
    context_column: str = Field(
        default="context", min_length=1, description="column with the text that holds the answer"
    )
    answers_column: str = Field(
        default="answers",
        min_length=1,
        description="column with the answers: `text` and `answer_start`, two lists, as SQuAD has them",
    )
    doc_stride: Annotated[Integer, Field(ge=0)] = Field(
        default=128, description="tokens by which the windows of a context that is too long overlap"
    )
    version_2_with_negative: bool = Field(default=False, description="some questions have no answer, as in SQuAD 2.0")
    null_score_diff_threshold: Annotated[Number, Field()] = Field(
        default=0.0, description="no answer is given where its score is above the best answer's by more than this"
    )
    n_best_size: Annotated[Integer, Field(ge=1)] = Field(
        default=20, description="starts and ends that are combined to answers, and most answers that are reported"
    )
    max_answer_length: Annotated[Integer, Field(ge=1)] = Field(default=30, description="most tokens of an answer")


@dataclass(frozen=True)
class Answer:
    """What the windows of a row say.

    Attributes:
        text: the answer; empty for none.
        candidates: best first.
        shares: of each candidate its share of certainty among them, and last that of no answer if there may be none.
        null_diff: how far no answer's score is above that of the best candidate; None where there must be an answer.
    """

    row: int
    text: str
    candidates: list[Candidate]
    shares: list[float]
    null_diff: float | None
    references: list[str] | None


class QuestionAnswering(Task):
    """A question and a context -> the first and the last token of the answer.

    The loss of a window is the mean of two cross entropies, over the places where the answer may begin and end: all tokens of
    the window. Where the answer is not whole in a window, both are the first special token (CLS), as in Devlin et al. 2019.

    Facts: "questions", "windows" and "unanswerable", how many there are in all splits, and "in_no_window".
    """

    recipe: QuestionAnsweringRecipe
    recipe_class = QuestionAnsweringRecipe
    main_metrics = ("loss", "exact_match", "f1")
    pipeline_tag = "question-answering"
    auto_class = "AutoModelForQuestionAnswering"
    one_example_a_row = False
    peft_task_type = "QUESTION_ANS"
    ragged_results = frozenset({"start_logits", "end_logits"})
    unbatched_features = frozenset({"row", "starts", "ends", "null_place", "text", "answers"})

    def __init__(self, recipe: QuestionAnsweringRecipe) -> None:
        super().__init__(recipe)
        self._found: tuple[Mapping[str, Any], list[Answer]] | None = None

    # Declarations ---------------------------------------------------------------------------------------------------

    @classmethod
    def find_contradictions(cls, recipe: QuestionAnsweringRecipe) -> list[str]:
        """A column of two meanings, windows without room, and a threshold that nothing reads."""
        names = [name for [name] in cls.columns(recipe).values()]
        problems = []
        if len(set(names)) < len(names):
            problems.append(
                f"question_column, context_column, answers_column: {', '.join(names)} must be three columns"
            )
        if recipe.doc_stride >= recipe.max_length:
            problems.append(
                f"doc_stride: {recipe.doc_stride} tokens of overlap need a larger max_length than {recipe.max_length}"
            )
        if recipe.null_score_diff_threshold and not recipe.version_2_with_negative:
            problems.append("null_score_diff_threshold: only version_2_with_negative: true reads it")
        return problems

    @classmethod
    def columns(cls, recipe: QuestionAnsweringRecipe, with_targets: bool = True) -> dict[str, list[str]]:
        """Question, context and answers."""
        keys = ["question_column", "context_column", *(["answers_column"] if with_targets else [])]
        return {key: [getattr(recipe, key)] for key in keys}

    @classmethod
    def find_fits(cls, table: Survey) -> list[Fit]:
        """As training/tasks/fits/question_answering.py sees it."""
        from onecurve.training.tasks.fits import question_answering

        return question_answering.find_fits(table)

    def metric_names(self) -> list[str]:
        """Exact match and F1, in percent."""
        return ["exact_match", "f1"]

    def find_row_problem(self, row: Mapping[str, Any], with_targets: bool = True) -> str | None:
        """An empty text, or answers that do not stand in the context where they say."""
        recipe = self.recipe
        for name in (recipe.question_column, recipe.context_column):
            if problem := find_text_problem(row.get(name), name):
                return problem
        if not with_targets:
            return None
        try:
            answers = read_answers(row.get(recipe.answers_column))
        except ValueError as error:
            return f"answers column {recipe.answers_column!r} {error}"
        if not answers and not recipe.version_2_with_negative:
            return f"answers column {recipe.answers_column!r} has no answer; remove the row, or set version_2_with_negative: true"
        context = row[recipe.context_column]
        problems = (find_answer_problem(text, start, context) for text, start in answers)
        found = next((problem for problem in problems if problem), None)
        return found and f"answers column {recipe.answers_column!r}: {found}"

    def estimate_examples(self, row: Mapping[str, Any], counter: TokenCounter) -> list[list[int]]:
        """The windows of a context."""
        recipe = self.recipe
        taken = counter.count(row[recipe.question_column].strip()) + counter.count_special(2)
        of_context, room = counter.count(row[recipe.context_column]), max(1, recipe.max_length - taken)
        step = max(1, room - recipe.doc_stride)
        starts = range(0, max(1, of_context - room + step), step)
        return [[taken + min(room, of_context - start)] for start in starts]

    # Rows -> examples -----------------------------------------------------------------------------------------------

    def check(self, rows: Rows) -> None:
        """Texts and answers of every row."""
        check_texts(rows, [self.recipe.question_column, self.recipe.context_column])
        rows.refuse_first(self.find_row_problem)

    def configure_processor(self, tokenizer: Any) -> None:
        """It must know where in the text each token stands.

        Raises:
            BadInput: it does not.
        """
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise BadInput(
                f"tokenizer_name: {type(tokenizer).__name__} does not say where in a text its tokens stand, which "
                "question_answering needs; take a model with a fast tokenizer (a tokenizer.json)"
            )
        super().configure_processor(tokenizer)

    def encode(self, rows: Rows, tokenizer: Any, with_targets: bool = True) -> dict[str, Any]:
        """The windows of each row, those of a row behind each other; what joins them again stands beside their tokens."""
        import numpy as np

        recipe = self.recipe
        note_special_tokens(self, rows, [recipe.question_column, recipe.context_column], tokenizer)
        contexts = rows.values(recipe.context_column)
        answers = [read_answers(each) for each in rows.values(recipe.answers_column)] if with_targets else None
        encodings = self._tokenize(
            rows, [each.strip() for each in rows.values(recipe.question_column)], contexts, tokenizer
        )
        examples: dict[str, list[Any]] = {}
        for row, whole in enumerate(encodings):
            windows = [read_window(each, tokenizer) for each in (whole, *whole.overflowing)]
            if answers is not None:
                labels = [label_window(window, contexts[row], answers[row]) for window in windows]
                self._count(len(windows), bool(answers[row]), any(label is not None for label in labels))
                self._note_long_answer(labels, rows, row)
            for number, window in enumerate(windows):
                first, last = window.extent
                found: dict[str, Any] = {"row": row, **window.features, "text": contexts[row][first:last].encode()}
                if "token_type_ids" not in tokenizer.model_input_names:
                    del found["token_type_ids"]
                if answers is not None:
                    found["labels"] = labels[number] or window.label(window.null_place, window.null_place)
                    # Once for each row: the text of all right answers.
                    found["answers"] = b"" if number else json.dumps([text for text, _ in answers[row]]).encode()
                for name, value in found.items():
                    examples.setdefault(name, []).append(value)
        dense = {name: np.array(examples.pop(name), dtype=np.int64) for name in ("row", "null_place")}
        return {**examples, **dense}

    def _tokenize(self, rows: Rows, questions: list[str], contexts: list[str], tokenizer: Any) -> list[Any]:
        """The first window of each row; the others are its `overflowing`.

        Raises:
            BadInput: naming the first row whose question leaves no room for windows.
        """
        recipe, backend = self.recipe, tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        most = recipe.max_length - recipe.doc_stride - 1 - backend.num_special_tokens_to_add(True)
        for position, question in enumerate(backend.encode_batch_fast(questions, add_special_tokens=False)):
            if len(question) > most:
                rows.refuse(
                    position,
                    f"its question has {len(question)} tokens; max_length: {recipe.max_length} and doc_stride: "
                    f"{recipe.doc_stride} leave room for {max(most, 0)}",
                )
        backend.enable_truncation(
            recipe.max_length, stride=recipe.doc_stride, strategy="only_second", direction="right"
        )
        encodings: list[Any] = backend.encode_batch(list(zip(questions, contexts, strict=True)))
        backend.no_truncation()
        return encodings

    def _note_long_answer(self, labels: Sequence[list[int] | None], rows: Rows, row: int) -> None:
        """A line on the first answer that is learned, and that no prediction can be."""
        of_answer = next((label for label in labels if label is not None), None)
        if of_answer is None:
            return
        places = [place for place, label in enumerate(of_answer) if label]
        size, most = places[-1] - places[0] + 1, self.recipe.max_answer_length
        if size > most:
            self.notes.setdefault(
                "long answers",
                f"{rows.origin}, row {rows.numbers[row] + 1}: its answer has {size} tokens; answers of more than "
                f"max_answer_length: {most} are learned but never given",
            )

    def _count(self, num_windows: int, has_answer: bool, is_in_a_window: bool) -> None:
        for name, number in (
            ("questions", 1),
            ("windows", num_windows),
            ("unanswerable", int(not has_answer)),
            ("in_no_window", int(has_answer and not is_in_a_window)),
        ):
            self.facts[name] = self.facts.get(name, 0) + number

    # Model ----------------------------------------------------------------------------------------------------------

    def configure(self, config: Any) -> None:
        """A head with two outputs for each token: the answer's start, and its end."""
        config.num_labels = 2

    def check_head(self, config: Any) -> None:
        """A head that answers questions."""
        if not any("QuestionAnswering" in name for name in list_heads(config)):
            raise BadInput("--eval_only: the model has no head for question answering; train it first")

    def forward(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], wants_results: bool = False
    ) -> Forward:
        """Results are "start_logits" and "end_logits" of each token."""
        import torch.nn.functional as F

        output = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        starts, ends = to_float32(output.start_logits), to_float32(output.end_logits)
        results = {"start_logits": starts, "end_logits": ends} if wants_results else {}
        labels = batch.get("labels")
        if labels is None:
            return Forward(None, results)
        is_padding = labels == NO_TARGET  # Transformers' own loss would depend on how much of it there is.
        losses = [
            F.cross_entropy(
                logits.masked_fill(is_padding, float("-inf")), (labels & which).argmax(dim=1), reduction="none"
            )
            for logits, which in ((starts, STARTS), (ends, ENDS))
        ]
        return Forward((losses[0] + losses[1]) / 2, results)

    # Results --------------------------------------------------------------------------------------------------------

    def find_answers(self, results: Mapping[str, Any]) -> list[Answer]:
        """The answer of each row, from all its windows."""
        if self._found is None or self._found[0] is not results:
            by_row = itertools.groupby(range(len(results["row"])), key=lambda number: int(results["row"][number]))
            self._found = (results, [self._answer(row, list(numbers), results) for row, numbers in by_row])
        return self._found[1]

    def _answer(self, row: int, windows: Sequence[int], results: Mapping[str, Any]) -> Answer:
        import numpy as np

        recipe, spans = self.recipe, dict[tuple[int, int], Candidate]()
        for number in windows:
            for found in find_candidates(number, results, recipe.n_best_size, recipe.max_answer_length):
                kept = spans.get((found.start, found.end))  # Windows overlap: the better of the two.
                if kept is None or found.score > kept.score:
                    spans[found.start, found.end] = found
        candidates = sorted(spans.values(), key=lambda each: (-each.score, each.start, each.end))[: recipe.n_best_size]
        scores, null_diff = [each.score for each in candidates], None
        if recipe.version_2_with_negative:
            places = [(number, int(results["null_place"][number])) for number in windows]
            null = min(float(results["start_logits"][n][p] + results["end_logits"][n][p]) for n, p in places)
            null_diff = null - (scores[0] if scores else float("-inf"))
            scores.append(null)
        odds = np.exp(np.array(scores) - max(scores, default=0.0))
        has_answer = bool(candidates) and (null_diff is None or null_diff <= recipe.null_score_diff_threshold)
        references = json.loads(bytes(results["answers"][windows[0]])) if "answers" in results else None
        text = candidates[0].text if has_answer else ""
        return Answer(row, text, candidates, (odds / odds.sum()).tolist(), null_diff, references)

    def compute_metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Exact match and F1 of the official script, in percent of the questions."""
        scores = [self._score(answer, answer.text) for answer in self.find_answers(results)]
        return _average(scores)

    def _score(self, answer: Answer, text: str) -> tuple[int, float]:
        assert answer.references is not None, "an evaluation has answers"
        return score_answer(text, answer.references, self.recipe.version_2_with_negative)

    def describe_predictions(self, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """For each row the answer, its share of certainty, where it stands and the best candidates; its scores, if known."""
        for answer in self.find_answers(results):
            shares = answer.shares
            best = [
                {"text": each.text, "score": share, "answer_start": each.start}
                for each, share in zip(answer.candidates, shares, strict=False)
            ]
            share = best[0]["score"] if answer.text else (shares[-1] if answer.null_diff is not None else 0.0)
            line = {
                "prediction": answer.text,
                "score": share,
                "answer_start": answer.candidates[0].start if answer.text else None,
                "n_best": best,
            }
            if answer.null_diff is not None:
                line["null_score_diff"] = answer.null_diff
            if answer.references is not None:
                exact, f1 = self._score(answer, answer.text)
                line = {"row": answer.row, **line, "answers": answer.references, "exact_match": exact, "f1": f1}
            yield line

    def show_example(
        self, examples: Mapping[str, Any], number: int, results: Mapping[str, Any], processor: Any
    ) -> dict[str, str]:
        """Question and context of one window, the answers of the data, and the one that is found in all windows of the row."""
        answer = next(each for each in self.find_answers(results) if each.row == int(results["row"][number]))
        named = {"label": " / ".join(answer.references or []) or "no answer", "prediction": answer.text or "no answer"}
        return {**super().show_example(examples, number, results, processor), **named}

    def prediction_example(self) -> dict[str, Any]:
        """An answer at the beginning of a context."""
        best = [{"text": "an answer", "score": 1.0, "answer_start": 0}]
        line = {"prediction": "an answer", "score": 1.0, "answer_start": 0, "n_best": best}
        return {**line, "null_score_diff": 0.0} if self.recipe.version_2_with_negative else line

    def report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """How many questions and windows; of version 2.0 what its script says of both kinds of questions and of thresholds."""
        answers = self.find_answers(results)
        found: dict[str, Any] = {"questions": len(answers), "windows": len(results["row"])}
        if not self.recipe.version_2_with_negative:
            return found
        scores = [self._score(answer, answer.text) for answer in answers]
        has_answer = [bool(answer.references) for answer in answers]
        for name, wanted in (("HasAns", True), ("NoAns", False)):
            chosen = [score for score, has in zip(scores, has_answer, strict=True) if has == wanted]
            if chosen:
                found |= {f"{name}_{key}": value for key, value in _average(chosen).items()}
                found[f"{name}_total"] = len(chosen)
        best = [self._score(each, each.candidates[0].text if each.candidates else "") for each in answers]
        null_diffs = [each.null_diff or 0.0 for each in answers]
        for number, name in enumerate(("exact_match", "f1")):
            gains = [
                score[number] if has else -bool(each.candidates)
                for score, has, each in zip(best, has_answer, answers, strict=True)
            ]
            score, threshold = find_best_threshold(gains, null_diffs, len(answers) - sum(has_answer))
            found |= {f"best_{name}": score, f"best_{name}_threshold": threshold}
        return found

    def describe_left_out(self) -> str | None:
        """Questions whose answer no window holds whole."""
        count = self.facts.get("in_no_window", 0)
        return f"Noticed: {count:,} {_IN_NO_WINDOW}." if count else None

    def describe_facts(self) -> list[str]:
        """Questions and windows."""
        questions, windows, unanswerable = (self.facts[name] for name in ("questions", "windows", "unanswerable"))
        return [f"questions {questions:,} in {windows:,} windows; {unanswerable:,} questions have no answer"]

    def describe_example(self, examples: Mapping[str, Any], tokenizer: Any) -> Sequence[tuple[str, bool]]:
        """The first tokens of the first window, and which of them are the answer."""
        [tokens], [labels] = examples["input_ids"][[0]], examples["labels"][[0]]
        first, last = (int((labels & which).argmax()) for which in (STARTS, ENDS))
        return [
            (tokenizer.decode([int(token)]), first <= place <= last)
            for place, token in enumerate(tokens[:_MAX_TOKENS_SHOWN])
        ]

    def describe_card(self) -> str:
        """What it answers with."""
        none = ", or with nothing where it finds no answer" if self.recipe.version_2_with_negative else ""
        return (
            f"Answers a question with a part of the context that is given with it{none}. Metrics are percentages.\n\n"
        )


def _average(scores: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Percentages, added up one by one as the official script does: `sum` may be more exact, and so another number."""
    exact, f1 = 0, 0.0
    for one_exact, one_f1 in scores:
        exact, f1 = exact + one_exact, f1 + one_f1
    return {"exact_match": 100.0 * exact / len(scores), "f1": 100.0 * f1 / len(scores)}
