"""Text classification: one label, several labels, or a number for each text or pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from onecurve.training.tasks.base import Rows
from onecurve.training.tasks.classification import Classification, ClassificationRecipe
from onecurve.training.tasks.texts import check_texts, encode_texts, find_text_problem, note_special_tokens

if TYPE_CHECKING:
    from onecurve.training.survey import Survey
    from onecurve.training.tasks.fits.fit import Fit


class TextClassificationRecipe(ClassificationRecipe):
    """The keys of text classification beside those of every recipe."""

    text_column: str = Field(default="text", min_length=1, description="column with the text")
    text_pair_column: str | None = Field(default=None, description="column with the second text of a pair")


class TextClassification(Classification):
    """Texts -> classes or numbers."""

    recipe: TextClassificationRecipe
    recipe_class = TextClassificationRecipe
    pipeline_tag = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"

    def __init__(self, recipe: TextClassificationRecipe) -> None:
        super().__init__(recipe)
        self.text_columns = self.columns(recipe)["text_column"]

    @classmethod
    def find_contradictions(cls, recipe: TextClassificationRecipe) -> list[str]:
        """As for every label; and a pair of one text."""
        problems = super().find_contradictions(recipe)
        if recipe.text_pair_column == recipe.text_column:
            problems.append(
                f"text_pair_column: {recipe.text_pair_column!r} is the text_column as well; name another column"
            )
        return problems

    @classmethod
    def columns(cls, recipe: TextClassificationRecipe, with_targets: bool = True) -> dict[str, list[str]]:
        """The text or pair of texts, and the label or labels."""
        texts = [recipe.text_column] + ([recipe.text_pair_column] if recipe.text_pair_column else [])
        return {"text_column": texts, **(cls.name_labels(recipe) if with_targets else {})}

    @classmethod
    def find_fits(cls, table: Survey) -> list[Fit]:
        """As training/tasks/fits/text_classification.py sees it."""
        from onecurve.training.tasks.fits import text_classification

        return text_classification.find_fits(table)

    def find_row_problem(self, row: Mapping[str, Any], with_targets: bool = True) -> str | None:
        """An empty text, or a label that can't be one."""
        problems = [find_text_problem(row.get(name), name) for name in self.text_columns]
        if with_targets:
            problems.append(self.find_label_problem(row))
        return next((problem for problem in problems if problem is not None), None)

    def check(self, rows: Rows) -> None:
        """Texts and labels of every row."""
        check_texts(rows, self.text_columns)
        super().check(rows)

    def encode(self, rows: Rows, tokenizer: Any, with_targets: bool = True) -> dict[str, Any]:
        """Tokens, cut to `max_length`, and the label of each row."""
        note_special_tokens(self, rows, self.text_columns, tokenizer)
        examples: dict[str, Any] = encode_texts(
            [rows.values(name) for name in self.text_columns], tokenizer, self.recipe
        )
        if with_targets:
            examples["labels"] = self.encode_labels(rows)
        return examples
