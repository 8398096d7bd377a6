"""Token classification: a label for each word of a text, such as its part of speech or the entity that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from onecurve.training.architectures import list_heads
from onecurve.training.errors import BadInput
from onecurve.training.recipe import Integer, Names, Recipe
from onecurve.training.tasks.base import NO_TARGET, Forward, Rows, Task, sum_by_example, to_float32
from onecurve.training.tasks.labels import describe_near_duplicates
from onecurve.training.tasks.tag_schemes import (
    PLAIN,
    SCHEMES,
    are_entities,
    find_inner,
    find_odd_names,
    find_scheme,
)
from onecurve.training.tasks.texts import note_special_tokens
from onecurve.training.tasks.word_labels import WordLabels, find_word_problem
from onecurve.training.tasks.word_results import WordResults, join_words, measured_names, show_words
from onecurve.training.tasks.word_windows import NO_WORD, WordTokenizer, build_features, cut_into_windows

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from onecurve.training.survey import Survey
    from onecurve.training.tasks.base import Array, TokenCounter
    from onecurve.training.tasks.fits.fit import Fit

_MAX_TOKENS_SHOWN = 200
_MAX_ROWS_SHOWN = 50
_SHARE_OF_OVERLAP = 4


class TokenClassificationRecipe(Recipe):
    """The keys of token classification beside those of every recipe."""

    tokens_column: str = Field(default="tokens", min_length=1, description="column with the list of words of each row")
    label_column: str = Field(default="ner_tags", min_length=1, description="column with the list of their labels")
    label_names: Names = Field(
        default=(),
        description="names of the labels, in the order of the outputs; where the data has numbers, what each means",
    )
    tag_scheme: Literal["auto", "entities", "plain"] = Field(
        default="auto",
        description="whether labels mark entities (B-PER, I-PER, O) or are each word's own; auto sees it in them",
    )
    label_all_tokens: bool = Field(
        default=False,
        description="learn a label at every token of a word; else, and always in predictions, at its first",
    )
    doc_stride: Annotated[Integer, Field(ge=0)] | None = Field(
        default=None,
        description="tokens that two windows of a row longer than max_length share; none is a quarter of max_length",
    )


class TokenClassification(Task):
    """Words -> their labels.

    A row that is longer than the model can read makes several examples: windows that overlap. Each word is learned,
    predicted and counted in one of them. The feature and result "word" says which word a token begins, in its own window.

    Facts: "label_names", in the order of the model's outputs; "tag_scheme", one of `SCHEMES`.
    """

    recipe: TokenClassificationRecipe
    recipe_class = TokenClassificationRecipe
    main_metrics = ("loss", "f1", "precision", "recall", "accuracy", "f1_macro")
    pipeline_tag = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    one_example_a_row = False
    peft_task_type = "TOKEN_CLS"
    ragged_results = frozenset({"word", "label", "prediction", "score"})

    def __init__(self, recipe: TokenClassificationRecipe) -> None:
        super().__init__(recipe)
        self._words: WordTokenizer | None = None

    @property
    def label_names(self) -> list[str]:
        """Name of each label."""
        names: list[str] = self.facts["label_names"]
        return names

    # Declarations ---------------------------------------------------------------------------------------------------

    @classmethod
    def find_contradictions(cls, recipe: TokenClassificationRecipe) -> list[str]:
        """One column for both, names that stand twice, windows that do not advance."""
        problems = []
        if recipe.label_column == recipe.tokens_column:
            problems.append(f"label_column: {recipe.label_column!r} is the tokens_column as well; name another column")
        if len(set(recipe.label_names)) < len(recipe.label_names):
            problems.append("label_names: a name stands twice; each label has its own")
        if recipe.doc_stride is not None and recipe.doc_stride >= recipe.max_length:
            problems.append(
                f"doc_stride: {recipe.doc_stride} tokens can't be shared by windows of max_length {recipe.max_length}"
            )
        return problems

    @classmethod
    def columns(cls, recipe: TokenClassificationRecipe, with_targets: bool = True) -> dict[str, list[str]]:
        """The words, and their labels."""
        return {
            "tokens_column": [recipe.tokens_column],
            **({"label_column": [recipe.label_column]} if with_targets else {}),
        }

    @classmethod
    def find_fits(cls, table: Survey) -> list[Fit]:
        """As training/tasks/fits/token_classification.py sees it."""
        from onecurve.training.tasks.fits import token_classification

        return token_classification.find_fits(table)

    def metric_names(self) -> list[str]:
        """Those of entities, and those of plain labels: which of them there are is seen in the data."""
        return list(dict.fromkeys([*measured_names("BIO"), *measured_names(PLAIN)]))

    def find_row_problem(self, row: Mapping[str, Any], with_targets: bool = True) -> str | None:
        """Words that are none, labels that are none, or another number of them."""
        recipe = self.recipe
        labels = (recipe.label_column, row.get(recipe.label_column)) if with_targets else None
        return find_word_problem(recipe.tokens_column, row.get(recipe.tokens_column), labels)

    def estimate_examples(self, row: Mapping[str, Any], counter: TokenCounter) -> list[list[int]]:
        """The windows of a row's words."""
        import numpy as np

        special = counter.count_special(1)
        room = max(1, self.recipe.max_length - special)
        sizes = np.array([min(max(1, counter.count(word)), room) for word in row[self.recipe.tokens_column]])
        windows = cut_into_windows(sizes, room, self._find_overlap(room))
        return [[int(sizes[each.words.start : each.words.stop].sum()) + special] for each in windows]

    def _find_overlap(self, room: int) -> int:
        """Most tokens that a window shares with the one before it."""
        wanted, share = self.recipe.doc_stride, self.recipe.max_length // _SHARE_OF_OVERLAP
        return min(share if wanted is None else wanted, room - 1)

    # Rows -> examples -----------------------------------------------------------------------------------------------

    def read_config(self, config: Any) -> None:
        """The labels that the model's head already has, if it has one."""
        if _has_head(config) and config.id2label:
            self.model_facts = {"label_names": [config.id2label[number] for number in range(config.num_labels)]}

    def learn(self, rows: Rows) -> dict[str, Any]:
        """Names of the labels, in the model's order where its head has just these; how they mark entities."""
        rows.refuse_first(self.find_row_problem)
        labels = WordLabels(rows, self.recipe.label_column, self.recipe.label_names)
        names = labels.find_names()
        self._check_scheme(names, rows.origin)
        scheme = PLAIN if self.recipe.tag_scheme == "plain" else find_scheme(names, labels.iterate_names())
        self.notes["tags"] = f"{rows.origin}: labels are {SCHEMES[scheme]}"
        if labels.are_numbers:
            self.notes["tags"] += ". They are numbers without names; label_names gives them some"
        if (line := describe_near_duplicates(names)) is not None:
            self.notes["labels"] = f"{rows.origin}: {line}"
        known = self.model_facts.get("label_names", [])
        is_known = set(known) == set(names) and len(known) == len(names)
        return {"label_names": known if is_known else names, "tag_scheme": scheme}

    def _check_scheme(self, names: Sequence[str], origin: str) -> None:
        wanted = self.recipe.tag_scheme
        odd = [] if wanted == "plain" else find_odd_names(names)
        if odd or (wanted == "entities" and not are_entities(names)):
            shown = ", ".join(repr(name) for name in (odd or names)[:5])
            raise BadInput(
                f"{origin}: column {self.recipe.label_column!r} has labels that mark entities (B-, I-, O, ...), but not {shown}; "
                "correct these, or set tag_scheme: plain to count each word by itself"
            )

    def check(self, rows: Rows) -> None:
        """Words and labels of every row."""
        rows.refuse_first(self.find_row_problem)
        labels = WordLabels(rows, self.recipe.label_column, self.recipe.label_names)
        for _ in labels.iterate_numbers(self.label_names):
            pass

    def encode(self, rows: Rows, tokenizer: Any, with_targets: bool = True) -> dict[str, Any]:
        """Tokens of each row or of its windows; the word that each token begins; its label."""
        import numpy as np

        if self._words is None:
            self._words = WordTokenizer(tokenizer)
        texts: list[list[str]] = rows.values(self.recipe.tokens_column)
        note_special_tokens(self, rows, [self.recipe.tokens_column], tokenizer)
        numbers: Iterator[list[int]] | None = None
        if with_targets:
            labels = WordLabels(rows, self.recipe.label_column, self.recipe.label_names)
            numbers = labels.iterate_numbers(self.label_names)
        examples: dict[str, list[Any]] = {}
        of_row: list[int] = []
        for row, words in enumerate(self._words.tokenize(texts)):
            pieces = self._complete(words, texts[row], rows, row, tokenizer)
            for example in self._cut(pieces, next(numbers) if numbers is not None else None, self._words, rows, row):
                for name, values in example.items():
                    examples.setdefault(name, []).append(values)
                of_row.append(row)
        return {**examples, "row": np.array(of_row, dtype=np.int64)}

    def _complete(
        self, words: list[list[int]], texts: list[str], rows: Rows, row: int, tokenizer: Any
    ) -> list[list[int]]:
        """The tokens of each word; the unknown token for one that the tokenizer removes, so that it has a label as well."""
        if all(words):
            return words
        word, unknown = texts[[bool(tokens) for tokens in words].index(False)], tokenizer.unk_token_id
        if unknown is None:
            rows.refuse(row, f"the tokenizer has no token for the word {word!a}; remove it, with its label")
        self.notes.setdefault(
            "words without tokens",
            f"{rows.origin}, row {rows.numbers[row] + 1}: the tokenizer has no token for the word {word!a}; such words are "
            f"read as {tokenizer.unk_token!r}",
        )
        return [tokens or [unknown] for tokens in words]

    def _cut(
        self, pieces: list[list[int]], labels: list[int] | None, template: WordTokenizer, rows: Rows, row: int
    ) -> Iterator[dict[str, list[int]]]:
        """The features of each window of a row.

        Args:
            pieces: [words] tokens of each.
            labels: [words] the label of each; None without targets.
        """
        import numpy as np

        room = self.recipe.max_length - len(template.before) - len(template.after)
        if room < 1:
            raise BadInput(f"max_length: {self.recipe.max_length} has no room for a word beside the special tokens")
        if any(len(tokens) > room for tokens in pieces):
            self._note_row("long words", rows, row, f"has a word of more than {room} tokens; the first {room} are read")
            pieces = [tokens[:room] for tokens in pieces]
        overlap = self._find_overlap(room)
        inner = find_inner(self.label_names) if labels is not None and self.recipe.label_all_tokens else None
        sizes = np.array([len(tokens) for tokens in pieces])
        if sizes.sum() > room:
            self._note_row(
                "long rows",
                rows,
                row,
                f"has more than max_length {self.recipe.max_length} tokens; such rows are read in parts",
            )
        for window in cut_into_windows(sizes, room, overlap):
            yield build_features(window, pieces, template, labels, inner)

    def _note_row(self, kind: str, rows: Rows, row: int, line: str) -> None:
        self.notes.setdefault(kind, f"{rows.origin}, row {rows.numbers[row] + 1}: {line}")

    def counts(self, examples: Mapping[str, Any]) -> Array:
        """The targets of each example."""
        import numpy as np

        labels = examples["labels"]
        before = np.concatenate([[0], np.cumsum(labels.values != NO_TARGET)])
        counts: Array = np.diff(before[labels.ends], prepend=0)
        return counts

    def pad_values(self, tokenizer: Any) -> dict[str, int]:
        """No word begins in padding."""
        return {**super().pad_values(tokenizer), "word": NO_WORD}

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Without what says where words begin."""
        return {name: values for name, values in super().model_inputs(batch).items() if name != "word"}

    # Model ----------------------------------------------------------------------------------------------------------

    def configure(self, config: Any) -> None:
        """A head with an output for each label.

        Raises:
            BadInput: the metric that chooses the best model is none of these labels.
        """
        wanted = (self.recipe.metric_for_best_model or "loss").removeprefix("eval_")
        if wanted != "loss" and wanted not in (names := measured_names(self.facts["tag_scheme"])):
            raise BadInput(
                f"metric_for_best_model: {wanted} is not measured for labels that are {SCHEMES[self.facts['tag_scheme']]}; take "
                f"{', '.join(f'eval_{name}' for name in ('loss', *names))}"
            )
        config.num_labels = len(self.label_names)
        config.id2label = dict(enumerate(self.label_names))
        config.label2id = {name: number for number, name in enumerate(self.label_names)}

    def describe_head(self, config: Any) -> str | None:
        """A head that is replaced, or whose labels have other names."""
        known = self.model_facts.get("label_names")
        if known is None or known == self.label_names:
            return None
        if len(known) != len(self.label_names):
            count = len(self.label_names)
            return f"The model's head has {len(known)} outputs, this task needs {count}: a new head is trained."
        return f"The model's head had the labels {known}; its outputs are trained on as {self.label_names}."

    def check_head(self, config: Any) -> None:
        """A head with just these labels, in this order."""
        if not _has_head(config):
            raise BadInput("--eval_only: the model has no head for token classification; train it first")
        names = [config.id2label[number] for number in range(config.num_labels)]
        if names != self.label_names:
            raise BadInput(f"--eval_only: the model's labels are {names}, the data's are {self.label_names}")

    def forward(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], wants_results: bool = False
    ) -> Forward:
        """Results are "word", "prediction" and "score" of each token, and in an evaluation its "label"."""
        import torch.nn.functional as F

        logits = to_float32(model(**self.model_inputs(batch)).logits)
        labels = batch.get("labels")
        results: dict[str, torch.Tensor] = {}
        if wants_results:
            score, prediction = logits.softmax(dim=-1).max(dim=-1)
            results = {"word": batch["word"], "prediction": prediction, "score": score}
        if labels is None:
            return Forward(None, results)
        # [examples, tokens]; 0 where the label is NO_TARGET.
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=NO_TARGET, reduction="none")
        if wants_results:
            results["label"] = labels
        return Forward(sum_by_example(losses, batch), results)

    # Results --------------------------------------------------------------------------------------------------------

    def _read(self, results: Mapping[str, Any]) -> WordResults:
        return WordResults(results, self.label_names, self.facts["tag_scheme"])

    def compute_metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Of entities precision, recall and F1, and accuracy over words; of plain labels accuracy, F1 and kin over words."""
        return self._read(results).compute_metrics()

    def describe_predictions(self, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Of each row the predictions of its words and their probabilities; in an evaluation also row and labels."""
        names = self.label_names
        for row, words in join_words(results):
            line = {"prediction": [names[number] for number in words["prediction"]], "score": words["score"].tolist()}
            yield (
                {"row": row, "label": [names[number] for number in words["label"]], **line}
                if "label" in words
                else line
            )

    def prediction_example(self) -> dict[str, Any]:
        """A row of one word."""
        return {"prediction": self.label_names[:1], "score": [0.5]}

    def report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Precision, recall, F1 and support of each kind of entity; of plain labels that of each, and the confusion matrix."""
        return self._read(results).report()

    def show_example(
        self, examples: Mapping[str, Any], number: int, results: Mapping[str, Any], processor: Any
    ) -> dict[str, str]:
        """The text, and of the words whose prediction is wrong label and prediction."""
        return show_words(results, number, examples["input_ids"][[number]][0], self.label_names, processor)

    def build_table(self, results: Mapping[str, Any]) -> Table:
        """Precision, recall and F1 of each kind of entity, or of each label."""
        from rich.table import Table
        from rich.text import Text

        table = Table("label", min_width=60)
        for heading in ("count", "precision", "recall", "F1"):
            table.add_column(heading, justify="right")
        for name, row in list(self.report(results)["per_class"].items())[:_MAX_ROWS_SHOWN]:
            figures = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1-score"))
            table.add_row(Text(name), f"{row['support']:,.0f}", *figures)
        return table

    def describe_facts(self) -> list[str]:
        """The labels."""
        shown = self.label_names[:12]
        more = " ..." if len(self.label_names) > len(shown) else ""
        return [f"labels    {', '.join(shown)}{more} ({len(self.label_names)} outputs)"]

    def describe_example(self, examples: Mapping[str, Any], tokenizer: Any) -> Sequence[tuple[str, bool]]:
        """The first tokens of the first example, those that are learned with their labels."""
        [tokens], [labels] = examples["input_ids"][[0]], examples["labels"][[0]]
        return [
            (f"{token}/{self.label_names[label]} ", True) if label != NO_TARGET else (f"{token} ", False)
            for token, label in zip(
                tokenizer.convert_ids_to_tokens(tokens[:_MAX_TOKENS_SHOWN].tolist()), labels, strict=False
            )
        ]

    def describe_card(self) -> str:
        """The labels, and how they mark entities."""
        return f"Labels: {', '.join(self.label_names)}; {SCHEMES[self.facts['tag_scheme']]}.\n\n"


def _has_head(config: Any) -> bool:
    return any("TokenClassification" in name for name in list_heads(config))
