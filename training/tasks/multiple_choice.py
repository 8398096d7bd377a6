"""Multiple choice: which of a row's texts goes on from its context, answers its question, ...; any number of them in each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice, takewhile
from typing import TYPE_CHECKING, Any

from pydantic import Field

from onecurve.training.architectures import list_heads
from onecurve.training.errors import BadInput
from onecurve.training.recipe import Names, Recipe
from onecurve.training.tasks.base import Forward, Rows, Task, to_float32
from onecurve.training.tasks.texts import encode_texts, find_text_problem, note_special_tokens

if TYPE_CHECKING:
    import torch

    from onecurve.training.survey import Survey
    from onecurve.training.tasks.base import TokenCounter
    from onecurve.training.tasks.fits.fit import Fit

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class MultipleChoiceRecipe(Recipe):
    """The keys of multiple choice beside those of every recipe."""

    context_column: str = Field(
        default="context", min_length=1, description="column with the text that every choice is read with"
    )
    question_column: str | None = Field(
        default=None,
        description="column with a text that stands before every choice, such as a question or a sentence's beginning",
    )
    choice_columns: Names = Field(
        default=("choices",),
        min_length=1,
        description="column with the list of choices, or several columns with one each, of which a row may leave out the last",
    )
    label_column: str = Field(
        default="label",
        min_length=1,
        description="column with the right choice: its number from 0, or a capital letter from A",
    )


class MultipleChoice(Task):
    """A context and some choices -> the right one.

    An example is a row: the tokens of all its choices, one behind the other; "sizes" says how many each has. In a batch each
    choice becomes a sequence of its own, and the loss is the cross-entropy over the choices of a row.
    """

    recipe: MultipleChoiceRecipe
    recipe_class = MultipleChoiceRecipe
    main_metrics = ("loss", "accuracy")
    pipeline_tag = "multiple-choice"
    auto_class = "AutoModelForMultipleChoice"

    def __init__(self, recipe: MultipleChoiceRecipe) -> None:
        super().__init__(recipe)
        self._pad_values: dict[str, int] = {}
        self._pads_left = False

    # Declarations ---------------------------------------------------------------------------------------------------

    @classmethod
    def find_contradictions(cls, recipe: MultipleChoiceRecipe) -> list[str]:
        """A column that is read as two things."""
        problems = []
        named = [name for names in cls.columns(recipe).values() for name in names]
        for key, names in cls.columns(recipe).items():
            twice = [name for name in names if named.count(name) > 1]
            if twice:
                problems.append(f"{key}: {twice[0]!r} is named for something else as well; each column is one thing")
        return problems

    @classmethod
    def columns(cls, recipe: MultipleChoiceRecipe, with_targets: bool = True) -> dict[str, list[str]]:
        """The context, the question, the choices, and the right one."""
        return {
            "context_column": [recipe.context_column],
            **({"question_column": [recipe.question_column]} if recipe.question_column is not None else {}),
            "choice_columns": list(recipe.choice_columns),
            **({"label_column": [recipe.label_column]} if with_targets else {}),
        }

    @classmethod
    def find_fits(cls, table: Survey) -> list[Fit]:
        """As training/tasks/fits/multiple_choice.py sees it."""
        from onecurve.training.tasks.fits import multiple_choice

        return multiple_choice.find_fits(table)

    def metric_names(self) -> list[str]:
        """Accuracy."""
        return ["accuracy"]

    def find_row_problem(self, row: Mapping[str, Any], with_targets: bool = True) -> str | None:
        """An empty text, fewer than two choices, or a label that is none of them."""
        recipe = self.recipe
        for name in (recipe.context_column, recipe.question_column):
            if name is not None and (problem := find_text_problem(row.get(name), name)) is not None:
                return problem
        problem = self._find_choice_problem(row)
        if problem is None and with_targets:
            problem = _find_label_problem(recipe.label_column, row.get(recipe.label_column), len(self._choices(row)))
        return problem

    def _find_choice_problem(self, row: Mapping[str, Any]) -> str | None:
        names = self.recipe.choice_columns
        if len(names) == 1:
            values = row.get(names[0])
            if not isinstance(values, list):
                return (
                    f"column {names[0]!r} must hold a list of choices in each row, it holds {values!r:.40}; or let "
                    "choice_columns name a column for each choice"
                )
            where = [f"choice {number} of column {names[0]!r}" for number in range(len(values))]
        else:
            values, where = self._choices(row), [f"column {name!r}" for name in names]
        for value, place in zip(values, where, strict=False):
            if not isinstance(value, str) or not value.strip():
                return f"{place} is {value!r:.40}; a choice is a text that is not empty"
        if len(values) < 2:
            return f"has {'one choice' if values else 'no choices'}; two are needed"
        return None

    def _choices(self, row: Mapping[str, Any]) -> list[Any]:
        """The choices of a row; of several columns without the empty ones at the end."""
        names = self.recipe.choice_columns
        values = list(row[names[0]]) if len(names) == 1 else [row.get(name) for name in names]
        while len(names) > 1 and values and values[-1] in (None, ""):
            values.pop()
        return values

    def estimate_examples(self, row: Mapping[str, Any], counter: TokenCounter) -> list[list[int]]:
        """One example, with a sequence for each choice."""
        recipe = self.recipe
        before = [row[name] for name in (recipe.context_column, recipe.question_column) if name is not None]
        taken = sum(map(counter.count, before)) + counter.count_special(2)
        return [[min(taken + counter.count(choice), recipe.max_length) for choice in self._choices(row)]]

    # Rows -> examples -----------------------------------------------------------------------------------------------

    def learn(self, rows: Rows) -> dict[str, Any]:
        """Nothing; a line where labels seem to be counted from 1."""
        self.check(rows)
        labels = {_to_number(row[self.recipe.label_column]) for _, row in rows.iterate()}
        if 0 not in labels:
            self.notes["labels"] = (
                f"{rows.origin}: column {self.recipe.label_column!r} never names choice 0. Are choices counted from 0?"
            )
        return {}

    def check(self, rows: Rows) -> None:
        """Texts and labels of every row."""
        rows.refuse_first(self.find_row_problem)

    def encode(self, rows: Rows, tokenizer: Any, with_targets: bool = True) -> dict[str, Any]:
        """Tokens of all choices of each row, each cut to `max_length`, and the number of the right one."""
        import numpy as np

        recipe = self.recipe
        texts = list(chain.from_iterable(self.columns(recipe, with_targets=False).values()))
        note_special_tokens(self, rows, texts, tokenizer)
        contexts: list[str] = []
        seconds: list[str] = []
        num_choices: list[int] = []
        labels: list[int] = []
        for _, row in rows.iterate():
            choices = self._choices(row)
            before = f"{row[recipe.question_column]} " if recipe.question_column else ""
            contexts += [row[recipe.context_column]] * len(choices)
            seconds += [before + choice for choice in choices]
            num_choices.append(len(choices))
            if with_targets:
                label = _to_number(row[recipe.label_column])
                assert label is not None, "every row was checked"
                labels.append(label)
        encoded = encode_texts([contexts, seconds], tokenizer, recipe)
        examples: dict[str, Any] = {
            name: [list(chain.from_iterable(parts)) for parts in _group(sequences, num_choices)]
            for name, sequences in encoded.items()
        }
        of_rows = list(_group(encoded["input_ids"], num_choices))
        examples["sizes"] = [[len(tokens) for tokens in sequences] for sequences in of_rows]
        self._note_alike(of_rows, rows)
        if with_targets:
            examples["labels"] = np.array(labels, dtype=np.int64)
        return examples

    def _note_alike(self, of_rows: Sequence[Sequence[list[int]]], rows: Rows) -> None:
        for position, sequences in enumerate(of_rows):
            if len({tuple(tokens) for tokens in sequences}) < len(sequences):
                self.notes.setdefault(
                    "choices that are alike",
                    f"{rows.origin}, row {rows.numbers[position] + 1}: has two choices of the same tokens, as written or "
                    f"because max_length {self.recipe.max_length} cuts off where they differ; the model can't tell them apart",
                )
                return

    # Examples -> batches --------------------------------------------------------------------------------------------

    def padding_side(self, tokenizer: Any) -> str:
        """Right, until the choices are sequences of their own, which are padded where the tokenizer says."""
        self._pads_left = tokenizer.padding_side == "left"
        return "right"

    def pad_values(self, tokenizer: Any) -> dict[str, int]:
        """Those of the tokenizer; remembered for the choices."""
        self._pads_left = tokenizer.padding_side == "left"
        self._pad_values = super().pad_values(tokenizer)
        return self._pad_values

    def add_to_batch(self, batch: dict[str, Any]) -> None:
        """Make a sequence of each choice [sequences, longest]; say which sequences are each example's choices.

        "places" [examples, most choices] are their numbers, and "is_choice" tells those that there are.
        """
        import torch

        sizes = batch.pop("sizes")
        is_choice = sizes > 0
        lengths = sizes[is_choice]
        places = torch.arange(int(lengths.max()))
        first = lengths.max() - lengths if self._pads_left else torch.zeros_like(lengths)
        is_token = (places >= first[:, None]) & (places < (first + lengths)[:, None])
        totals = sizes.sum(dim=1)
        for name in [name for name in ("input_ids", "token_type_ids") if name in batch]:
            flat = batch[name][torch.arange(batch[name].shape[1]) < totals[:, None]]
            padded = torch.full(is_token.shape, self._pad_values.get(name, 0), dtype=flat.dtype)
            padded[is_token] = flat
            batch[name] = padded
        given = batch["attention_mask"]
        batch["attention_mask"] = None if given is None and bool(is_token.all()) else is_token.long()
        batch["is_choice"] = is_choice
        batch["places"] = (torch.cumsum(is_choice.flatten(), 0).reshape(is_choice.shape) - 1).clamp(min=0)

    def sequence_lengths(self, features: Mapping[str, Any]) -> Sequence[Sequence[int]]:
        """Those of the choices."""
        sizes: Sequence[Sequence[int]] = features["sizes"]
        return sizes

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Each sequence as one choice of its own [sequences, 1, longest]: the model scores one by one."""
        names = ("input_ids", "token_type_ids", "attention_mask")
        return {name: batch[name] if batch[name] is None else batch[name][:, None] for name in names if name in batch}

    # Model ----------------------------------------------------------------------------------------------------------

    def configure_model(self, model: Any, tokenizer: Any) -> None:
        """Leave the bias of the scores as it is: added to all choices of a row, it changes nothing.

        Its gradient is 0 but for rounding, which AdamW would scale up to steps that differ from topology to topology.
        """
        import torch

        for name, module in model.named_children():
            is_head = name != model.base_model_prefix and isinstance(module, torch.nn.Linear)
            if is_head and module.out_features == 1 and module.bias is not None:
                module.bias.requires_grad_(False)

    def describe_head(self, config: Any) -> str | None:
        """Nothing: a head has one output, whatever it was trained on."""
        return None

    def check_head(self, config: Any) -> None:
        """A head of this task."""
        if not any("MultipleChoice" in name for name in list_heads(config)):
            raise BadInput("--eval_only: the model has no head for multiple choice; train it first")

    def forward(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], wants_results: bool = False
    ) -> Forward:
        """Results are "prediction", "score", and "label" in an evaluation or else "probabilities", -1 behind the last choice."""
        import torch.nn.functional as F

        logits = to_float32(model(**self.model_inputs(batch)).logits.flatten())
        scores = logits[batch["places"]].masked_fill(~batch["is_choice"], float("-inf"))  # [examples, most choices]
        labels = batch.get("labels")
        results: dict[str, torch.Tensor] = {}
        if wants_results:
            probabilities = scores.softmax(dim=-1)
            score, prediction = probabilities.max(dim=-1)
            results = {"prediction": prediction, "score": score}
            if labels is None:
                results["probabilities"] = probabilities.masked_fill(~batch["is_choice"], -1.0)
            else:
                results["label"] = labels
        if labels is None:
            return Forward(None, results)
        return Forward(F.cross_entropy(scores, labels, reduction="none"), results)

    # Results --------------------------------------------------------------------------------------------------------

    def compute_metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """The share of rows whose right choice is the most likely one."""
        from onecurve.training.tasks.metrics import build_accuracy

        found: dict[str, float] = build_accuracy().compute(
            predictions=results["prediction"], references=results["label"]
        )
        return found

    def describe_predictions(self, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The number of the most likely choice and its probability; the label in an evaluation, else all probabilities."""
        for number, prediction in enumerate(results["prediction"]):
            line = {"prediction": int(prediction), "score": float(results["score"][number])}
            if "label" in results:
                yield {"label": int(results["label"][number]), **line}
            else:
                of_choices = results["probabilities"][number]
                yield {**line, "probabilities": [float(value) for value in of_choices if value >= 0]}

    def report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The calibration of the probability of the most likely choice."""
        from onecurve.training.tasks.metrics.calibration import build_calibration

        is_right = results["prediction"] == results["label"]
        return {"calibration": build_calibration(results["score"], is_right, "the predicted choice")}

    def show_example(
        self, examples: Mapping[str, Any], number: int, results: Mapping[str, Any], processor: Any
    ) -> dict[str, str]:
        """What the choices have in common, each choice, and the right and the predicted one."""
        tokens, sizes = (examples[name][[number]][0].tolist() for name in ("input_ids", "sizes"))
        sequences = [tokens[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
        columns = zip(*sequences, strict=False)  # As far as the shortest goes.
        common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        parts = [sequences[0][:common], *(sequence[common:] for sequence in sequences)]
        context, *texts = (processor.decode(part, skip_special_tokens=True) for part in parts)
        lines = [context, *(f"{place}: {text}" for place, text in enumerate(texts))]
        named = {name: f"choice {int(results[name][number])}" for name in ("label", "prediction")}
        return {"text": "\n".join(lines), **named}

    def prediction_example(self) -> dict[str, Any]:
        """A row of two choices."""
        return {"prediction": 0, "score": 0.5, "probabilities": [0.5, 0.5]}


def _to_number(label: Any) -> int | None:
    """The number of the choice that a label names; None for what is no label."""
    if isinstance(label, str):
        if len(label) == 1 and label in _LETTERS:
            return _LETTERS.index(label)
        return int(label) if label.isascii() and label.isdigit() else None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _find_label_problem(name: str, label: Any, num_choices: int) -> str | None:
    if label is None or label == "":
        return f"column {name!r} is empty; every row needs the number of its right choice"
    number = _to_number(label)
    if number is None:
        return f"column {name!r} holds {label!r:.40}; it must be the number of the right choice, from 0, or a letter from A"
    if not 0 <= number < num_choices:
        return f"column {name!r} names choice {label}, but the row has {num_choices}, counted from 0"
    return None


def _group(sequences: Sequence[list[int]], sizes: Sequence[int]) -> Iterator[list[list[int]]]:
    """The sequences of each row."""
    remaining = iter(sequences)
    for size in sizes:
        yield list(islice(remaining, size))
