"""Causal language models: the next token of plain texts, of completions of prompts, or of an assistant's messages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from onecurve.training.errors import BadInput
from onecurve.training.recipe import Recipe
from onecurve.training.tasks.base import NO_TARGET, Forward, Rows, Task
from onecurve.training.tasks.long_texts import cut_into_examples
from onecurve.training.tasks.texts import check_texts, find_text_problem

if TYPE_CHECKING:
    import torch

    from onecurve.training.tasks.base import Array

# e to the power of more than this is no float.
_MAX_LOSS_OF_PERPLEXITY = 700.0


class CausalLMRecipe(Recipe):
    """The keys of causal language models beside those of every recipe."""

    text_column: str | None = Field(
        None, min_length=1, description="column with plain text; `text` where no key names one"
    )
    eos_token: str | None = Field(None, description="token that ends a text; none takes the tokenizer's own")
    long_texts: Literal["cut", "split"] = Field(
        "cut",
        description="what happens to texts of more than max_length tokens: cut off, or split into several examples",
    )


class CausalLM(Task):
    """Tokens -> the next token.

    The loss of an example is the sum over its targets, and its count is their number: a step's loss is the mean over all
    targets of its global batch. The first token of an example is never a target, because nothing stands before it.

    A plain text ends with the tokenizer's end-of-text token, unless it was cut off.

    Facts: "left_out", how many rows or pieces gave no example, by reason.
    """

    recipe: CausalLMRecipe
    recipe_class = CausalLMRecipe
    main_metrics = ("loss", "perplexity", "accuracy")
    pipeline_tag = "text-generation"
    auto_class = "AutoModelForCausalLM"

    # Declarations ---------------------------------------------------------------------------------------------------

    @classmethod
    def columns(cls, recipe: CausalLMRecipe, with_targets: bool = True) -> dict[str, list[str]]:
        """The text."""
        return {"text_column": [recipe.text_column or "text"]}

    def metric_names(self) -> list[str]:
        """Perplexity, and the accuracy of the next token."""
        return ["perplexity", "accuracy"]

    def find_row_problem(self, row: Mapping[str, Any], with_targets: bool = True) -> str | None:
        """An empty text."""
        [name] = self.columns(self.recipe)["text_column"]
        return find_text_problem(row.get(name), name)

    # Rows -> examples -----------------------------------------------------------------------------------------------

    def read_config(self, config: Any) -> None:
        """Refuse a model that looks at the tokens that it should predict.

        Raises:
            BadInput: it is one.
        """
        if getattr(config, "is_decoder", True) is False:
            raise BadInput(
                f"model_name_or_path: a {config.model_type} model that is no decoder reads the tokens that it should predict; "
                "take a causal language model"
            )

    def configure_tokenizer(self, tokenizer: Any) -> None:
        """The recipe's end-of-text token."""
        wanted = self.recipe.eos_token
        if wanted is not None:
            if wanted not in tokenizer.get_vocab():
                raise BadInput(f"eos_token: the tokenizer has no token {wanted!r}")
            tokenizer.eos_token = wanted
        if tokenizer.eos_token is None:
            raise BadInput("eos_token: the tokenizer has no end-of-text token of its own; name one of its tokens")

    def check(self, rows: Rows) -> None:
        """Texts of every row."""
        check_texts(rows, self.columns(self.recipe)["text_column"])

    def encode(self, rows: Rows, tokenizer: Any, with_targets: bool = True) -> dict[str, Any]:
        """Tokens of each text or of its pieces, and the same as labels."""
        import numpy as np

        [name] = self.columns(self.recipe)["text_column"]
        examples: dict[str, Any] = {"input_ids": [], "labels": []}
        of_row = []
        for row, tokens in enumerate(tokenizer(rows.values(name), padding=False, truncation=False)["input_ids"]):
            if tokens[-1:] != [tokenizer.eos_token_id]:
                tokens = [*tokens, tokenizer.eos_token_id]
            for piece in cut_into_examples(len(tokens), self.recipe.max_length, self.recipe.long_texts):
                labels = tokens[piece]
                if not any(label != NO_TARGET for label in labels[1:]):
                    self._leave_out("no target")
                    continue
                examples["input_ids"].append(tokens[piece])
                examples["labels"].append(labels)
                of_row.append(row)
        return {**examples, "row": np.array(of_row, dtype=np.int64)}

    def _leave_out(self, reason: str) -> None:
        left_out = self.facts.setdefault("left_out", {})
        left_out[reason] = left_out.get(reason, 0) + 1

    def counts(self, examples: Mapping[str, Any]) -> Array:
        """The targets of each example."""
        return count_targets(examples["labels"])

    def padding_side(self, tokenizer: Any) -> str:
        """Right: models count positions from the first place on."""
        return "right"

    # Model ----------------------------------------------------------------------------------------------------------

    def describe_head(self, config: Any) -> str | None:
        """A head that is new, because the model was saved without one."""
        return (
            None if _has_head(config) else "The model was saved without a head: unless its weights are tied, it is new."
        )

    def check_head(self, config: Any) -> None:
        """A head of a language model."""
        if not _has_head(config):
            raise BadInput("--eval_only: the model has no language modeling head; train it first")

    def forward(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], wants_results: bool = False
    ) -> Forward:
        """Results are sums over each example's targets: "loss", "targets" (their number) and "right"."""
        from onecurve.training.tasks.token_losses import token_losses

        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        labels = batch["labels"]
        found = token_losses(model, inputs, labels)
        losses = found.losses.sum(-1)
        if not wants_results:
            return Forward(losses)
        targets = (labels[:, 1:] != NO_TARGET).sum(-1)
        return Forward(losses, {"loss": losses, "targets": targets, "right": found.is_right.sum(-1)})

    # Results --------------------------------------------------------------------------------------------------------

    def compute_metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Over all targets: e to the power of the mean loss, and the share of them that is most likely."""
        import numpy as np

        num_targets = np.sum(results["targets"])
        loss = float(np.sum(results["loss"], dtype=np.float64) / num_targets)
        return {
            "perplexity": math.exp(min(loss, _MAX_LOSS_OF_PERPLEXITY)),
            "accuracy": float(np.sum(results["right"]) / num_targets),
        }

    def describe_predictions(self, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """In an evaluation the row, its mean loss, the number of its targets, and how many of them are the most likely."""
        for number, targets in enumerate(results["targets"]):
            yield {
                "row": int(results["row"][number]),
                "loss": float(results["loss"][number] / targets),
                "targets": int(targets),
                "right": int(results["right"][number]),
            }

    def prediction_example(self) -> dict[str, Any]:
        """A text."""
        return {"prediction": "a text"}

    def describe_left_out(self) -> str | None:
        """How many rows or pieces gave no example, and why."""
        left_out = self.facts.get("left_out", {})
        return "; ".join(f"{count:,} left out: {reason}" for reason, count in left_out.items()) or None


def count_targets(labels: Any) -> Array:
    """[examples] how many tokens of each example are targets: those behind its first token that have a label.

    Args:
        labels: a ragged feature (data/columns.py) with a label for each token, NO_TARGET where it is not learned.
    """
    import numpy as np

    counts = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(labels), 65_536):
        counts.append(np.array([np.count_nonzero(row[1:] != NO_TARGET) for row in labels[start : start + 65_536]]))
    return np.concatenate(counts)


def _has_head(config: Any) -> bool:
    return any("CausalLM" in name or "LMHead" in name for name in config.architectures or [])
