"""A small task that packs, outside the project: predict each next token of a text."""

from typing import Any

from pydantic import Field

from onecurve.training.recipe import Recipe
from onecurve.training.tasks.base import NO_TARGET, Forward, Task, sum_by_example


class NextTokenRecipe(Recipe):
    text_column: str = Field(default="text", description="column with the text")


class NextToken(Task):
    recipe_class = NextTokenRecipe
    auto_class = "AutoModelForCausalLM"
    packs = True

    @classmethod
    def columns(cls, recipe: Any, with_targets: bool = True) -> dict[str, list[str]]:
        return {"text_column": [recipe.text_column]}

    def metric_names(self) -> list[str]:
        return []

    def encode(self, rows: Any, tokenizer: Any, with_targets: bool = True) -> dict[str, Any]:
        texts = rows.values(self.columns(self.recipe)["text_column"][0])
        ids = tokenizer(texts, truncation=True, max_length=self.recipe.max_length)["input_ids"]
        return {"input_ids": ids, "labels": [[NO_TARGET, *row[1:]] for row in ids]}

    def counts(self, examples: Any) -> Any:
        return [len(row) - 1 for row in examples["labels"][:]]

    def forward(self, model: Any, batch: Any, wants_results: bool = False) -> Forward:
        import torch.nn.functional as F

        inputs = {name: each for name, each in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), batch["labels"][:, 1:], reduction="none")
        return Forward(sum_by_example(losses, batch))

    def compute_metrics(self, results: Any) -> dict[str, float]:
        return {}

    def describe_predictions(self, results: Any) -> Any:
        return [{} for _ in results.get("row", ())]

    def prediction_example(self) -> dict[str, Any]:
        return {}
