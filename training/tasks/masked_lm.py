"""Masked language models: the tokens that are hidden in plain texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from onecurve.training.architectures import list_heads
from onecurve.training.errors import BadInput
from onecurve.training.recipe import Number, Recipe
from onecurve.training.tasks.base import (
    EVALUATION_EPOCH,
    NO_TARGET,
    Forward,
    Rows,
    build_generator,
    sum_by_example,
)
from onecurve.training.tasks.special_tokens import find_leaks, find_special_tokens, read_special_tokens
from onecurve.training.tasks.texts import check_texts, find_text_problem, note_special_tokens
from onecurve.training.tasks.token_results import describe_counts, measure_tokens
from onecurve.training.tasks.token_task import TokenTask

if TYPE_CHECKING:
    import torch

    from onecurve.training.survey import Survey
    from onecurve.training.tasks.base import Array, TokenCounter
    from onecurve.training.tasks.fits.fit import Fit
    from onecurve.training.tasks.token_losses import TokenLosses

# What becomes of a token that is to be predicted (Devlin et al. 2019, "BERT", section 3.1): the mask token, another token, or
# itself in the share that is left.
SHARE_MASKED, SHARE_REPLACED = 0.8, 0.1

_MAX_TOKENS_SHOWN = 400
_NO_UNIT = -1


class MaskedLMRecipe(Recipe):
    """The keys of masked language models beside those of every recipe."""

    text_column: str = Field(default="text", min_length=1, description="column with the text")
    mlm_probability: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=0.15,
        description="share of the tokens (or words) of each example that are hidden and predicted, at least one",
    )
    whole_word_mask: bool = Field(default=False, description="hide whole words instead of single tokens")
    long_texts: Literal["cut", "split"] = Field(
        default="cut",
        description="what happens to more than max_length tokens: cut off, or split into several examples",
    )


class MaskedLM(TokenTask):
    """Texts with hidden tokens -> these tokens.

    A unit is what is hidden together: a token, or all tokens of a word; special tokens belong to none. Of an example's n units
    max(1, round(mlm_probability x n)) are hidden, drawn anew in each epoch from the seed, the epoch and the example's number.
    The loss of an example is the sum over its hidden tokens, and its count is their number.

    Facts: "tokens" and "masked", how many tokens the training examples have and how many of them an epoch hides; "left_out",
    how many texts or pieces gave no example, by reason.
    """

    recipe: MaskedLMRecipe
    recipe_class = MaskedLMRecipe
    unread_keys = frozenset[str]()
    main_metrics = ("loss", "pseudo_perplexity", "accuracy")
    pipeline_tag = "fill-mask"
    auto_class = "AutoModelForMaskedLM"
    one_example_a_row = False
    has_new_head = False
    model_kinds = frozenset({"encoder"})
    ragged_results = frozenset({"filled", "score"})
    predicts_tokens = True

    def __init__(self, recipe: MaskedLMRecipe) -> None:
        super().__init__(recipe)
        self._tokenizer: Any = None
        self._special: Any = None
        self._ordinary: Any = None

    # Declarations ---------------------------------------------------------------------------------------------------

    @classmethod
    def columns(cls, recipe: MaskedLMRecipe, with_targets: bool = True) -> dict[str, list[str]]:
        """The text."""
        return {"text_column": [recipe.text_column]}

    @classmethod
    def find_fits(cls, table: Survey) -> list[Fit]:
        """As training/tasks/fits/masked_lm.py sees it."""
        from onecurve.training.tasks.fits import masked_lm

        return masked_lm.find_fits(table)

    def metric_names(self) -> list[str]:
        """Pseudo-perplexity, and the accuracy of the hidden tokens."""
        return ["pseudo_perplexity", "accuracy"]

    def find_row_problem(self, row: Mapping[str, Any], with_targets: bool = True) -> str | None:
        """An empty text."""
        return find_text_problem(row.get(self.recipe.text_column), self.recipe.text_column)

    def estimate_examples(self, row: Mapping[str, Any], counter: TokenCounter) -> list[list[int]]:
        """The pieces of a text."""
        special = counter.count_special(1)
        size, room = counter.count(row[self.recipe.text_column]), max(1, self.recipe.max_length - special)
        starts = range(0, max(1, size), room) if self.recipe.long_texts == "split" else range(1)
        return [[min(size - start, room) + special] for start in starts]

    # Rows -> examples -----------------------------------------------------------------------------------------------

    def read_config(self, config: Any) -> None:
        """Refuse a model that can't predict hidden tokens.

        Raises:
            BadInput: transformers has no such class for it, or it reads texts in one direction.
        """
        from transformers import MODEL_FOR_MASKED_LM_MAPPING

        knows = type(config) in MODEL_FOR_MASKED_LM_MAPPING or self.auto_class in getattr(config, "auto_map", {})
        if not knows or getattr(config, "is_decoder", False) or config.is_encoder_decoder:
            raise BadInput(
                f"model_name_or_path: a {config.model_type} model like this one predicts no masked tokens; take an encoder such "
                "as BERT, or task: causal_lm for a decoder"
            )

    def configure_processor(self, tokenizer: Any) -> None:
        """Nothing is changed: `encode` reads special tokens in texts as plain text, and who fills masks writes them in texts.

        Raises:
            BadInput: the tokenizer has no mask token, or finds no words where whole ones are asked for.
        """
        read_special_tokens(tokenizer)
        if tokenizer.mask_token is None:
            raise BadInput("model_name_or_path: its tokenizer has no mask token; masked_lm needs a model with one")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise BadInput("model_name_or_path: its tokenizer has no tokenizer.json, which masked_lm needs")
        room = self.recipe.max_length - tokenizer.num_special_tokens_to_add(pair=False)
        if room < 1:
            raise BadInput(
                f"max_length: {self.recipe.max_length} tokens leave no room for a text beside special tokens"
            )
        probe = tokenizer.backend_tokenizer.encode("one two three", add_special_tokens=False)
        if self.recipe.whole_word_mask and len(set(probe.word_ids)) < 3:
            raise BadInput("whole_word_mask: this model's tokenizer does not part texts into words; remove the key")
        self._use(tokenizer)

    def _use(self, tokenizer: Any) -> None:
        import numpy as np

        self._tokenizer = tokenizer
        self._special = np.array(tokenizer.all_special_ids)
        self._ordinary = np.setdiff1d(np.arange(len(tokenizer)), self._special)

    def check(self, rows: Rows) -> None:
        """The text of every row."""
        check_texts(rows, [self.recipe.text_column])

    def encode(self, rows: Rows, tokenizer: Any, with_targets: bool = True) -> dict[str, Any]:
        """Tokens and units of each text or of its pieces; without targets, the tokens of texts that write mask tokens."""
        import numpy as np

        self._use(tokenizer)
        texts = rows.values(self.recipe.text_column)
        if not with_targets:
            return {"input_ids": self._encode_masked(rows, texts)}
        note_special_tokens(self, rows, [self.recipe.text_column], tokenizer)
        examples: dict[str, list[Any]] = {"input_ids": [], "units": [], "row": []}
        for row, encoding in enumerate(self._tokenize(texts)):
            for piece in (encoding, *(encoding.overflowing if self.recipe.long_texts == "split" else ())):
                tokens, units = self._find_units(piece)
                if not (units != _NO_UNIT).any():
                    left_out = self.facts.setdefault("left_out", {})
                    reason = "no token that the tokenizer knows"
                    left_out[reason] = left_out.get(reason, 0) + 1
                    continue
                for name, value in zip(examples, (tokens, units, row), strict=True):
                    examples[name].append(value)
        return {**examples, "row": np.array(examples["row"], dtype=np.int64)}

    def _tokenize(self, texts: Sequence[str]) -> list[Any]:
        """Encodings of the tokenizers package, with what is longer than max_length in their `overflowing`."""
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        is_split = self.recipe.long_texts == "split"
        direction = "right" if is_split else self._tokenizer.truncation_side
        backend.enable_truncation(self.recipe.max_length, direction=direction)
        backend.encode_special_tokens = True
        encodings: list[Any] = backend.encode_batch(texts)
        backend.no_truncation()
        backend.encode_special_tokens = False
        return encodings

    def _find_units(self, piece: Any) -> tuple[Array, Array]:
        """[tokens] of a piece, and [tokens] the number of each one's unit, _NO_UNIT for special ones."""
        import numpy as np

        leaks = find_leaks(self._tokenizer)
        read = zip(piece.ids, piece.special_tokens_mask, piece.word_ids, strict=True)
        kept = [(token if is_own else leaks.get(token, token), word) for token, is_own, word in read]
        tokens = np.array([token for token, _ in kept if token is not None], dtype=np.int64)
        words = [word for token, word in kept if token is not None]
        units = np.full(len(tokens), _NO_UNIT)
        places = np.flatnonzero(~np.isin(tokens, self._special))
        if self.recipe.whole_word_mask:
            units[places] = np.unique([words[place] for place in places], return_inverse=True)[1]
        else:
            units[places] = np.arange(len(places))
        return tokens, units

    def _encode_masked(self, rows: Rows, texts: Sequence[str]) -> list[list[int]]:
        """Texts with mask tokens to fill.

        Raises:
            BadInput: naming the first that has none, writes another special token, or is too long.
        """
        tokenizer, mask = self._tokenizer, self._tokenizer.mask_token
        others = [token for token in find_special_tokens(tokenizer) if token != mask]
        encoded = tokenizer(list(texts), padding=False, truncation=False, split_special_tokens=False)
        found: list[list[int]] = encoded["input_ids"]
        for position, (text, tokens) in enumerate(zip(texts, found, strict=True)):
            if tokenizer.mask_token_id not in tokens:
                rows.refuse(position, f"has no {mask}; write it where a token is to be predicted")
            if written := next((token for token in others if token in text), None):
                rows.refuse(position, f"writes the special token {written}; only {mask} may stand in a text to fill")
            if len(tokens) > self.recipe.max_length:
                rows.refuse(position, f"has {len(tokens)} tokens, max_length is {self.recipe.max_length}; shorten it")
        return found

    def conclude(self, examples: Mapping[str, Any]) -> None:
        """How many tokens an epoch hides."""
        self.facts["tokens"] = int(examples["input_ids"].lengths.sum())
        self.facts["masked"] = int(self.counts(examples).sum())

    def counts(self, examples: Mapping[str, Any]) -> Array:
        """How many tokens of each example are hidden in an evaluation."""
        import numpy as np

        return self._count(examples, np.arange(len(examples["units"])), EVALUATION_EPOCH)

    def draw_counts(self, examples: Mapping[str, Any], numbers: Array, epoch: int) -> Array | None:
        """Words have one token or several, so that their number is another in each epoch."""
        return self._count(examples, numbers, epoch) if self.recipe.whole_word_mask else None

    def _count(self, examples: Mapping[str, Any], numbers: Array, epoch: int) -> Array:
        import numpy as np

        each = (examples["units"][[number]][0] for number in numbers)
        if not self.recipe.whole_word_mask:
            return np.array([count_hidden(int(units.max()) + 1, self.recipe.mlm_probability) for units in each])
        return np.array(
            [len(self._choose(units, number, epoch)[0]) for units, number in zip(each, numbers, strict=True)]
        )

    def _choose(self, units: Array, number: int, epoch: int) -> tuple[Array, Any]:
        """Which places of an example are hidden in an epoch, and the generator for what becomes of them."""
        import numpy as np

        generator = build_generator(self.recipe.seed, epoch, int(number))
        num_units = int(units.max()) + 1
        chosen = np.argsort(generator.random(num_units))[: count_hidden(num_units, self.recipe.mlm_probability)]
        is_chosen = np.zeros(num_units + 1, dtype=bool)
        is_chosen[chosen] = True
        return np.flatnonzero(is_chosen[units]), generator  # _NO_UNIT is the last place, which is never chosen.

    # Examples -> batches --------------------------------------------------------------------------------------------

    def draw(self, features: Mapping[str, Any], numbers: Array, epoch: int) -> Mapping[str, Any]:
        """Hide tokens: "input_ids" as the model sees them, and "labels", the tokens that were there, where some were hidden."""
        import numpy as np

        drawn: dict[str, list[Array]] = {"input_ids": [], "labels": []}
        for tokens, units, number in zip(features["input_ids"], features["units"], numbers, strict=True):
            places, generator = self._choose(units, number, epoch)
            fates, others = generator.random(len(places)), generator.integers(len(self._ordinary), size=len(places))
            shown, labels = np.array(tokens), np.full(len(tokens), NO_TARGET)
            labels[places] = tokens[places]
            kept_or_replaced = np.where(fates < SHARE_MASKED + SHARE_REPLACED, self._ordinary[others], tokens[places])
            shown[places] = np.where(fates < SHARE_MASKED, self._tokenizer.mask_token_id, kept_or_replaced)
            drawn["input_ids"].append(shown)
            drawn["labels"].append(labels)
        return {**{name: values for name, values in features.items() if name != "units"}, **drawn}

    def add_to_batch(self, batch: dict[str, Any]) -> None:
        """Where targets are."""
        from onecurve.training.tasks.chunked_losses import find_target_places

        if "labels" in batch:
            batch["target_places"] = find_target_places(batch["labels"], ahead=0)

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Without units as well."""
        return {name: each for name, each in super().model_inputs(batch).items() if name != "units"}

    def padding_side(self, tokenizer: Any) -> str:
        """Right: models count positions from the first place on."""
        return "right"

    # Model ----------------------------------------------------------------------------------------------------------

    def describe_head(self, config: Any) -> str | None:
        """A head that is new, because the model was saved without one."""
        if _has_head(config):
            return None
        note = "The model was saved without a head for masked tokens: what lies between it and its embeddings is new."
        if self.recipe.adapter != "none" and not self.recipe.modules_to_save:
            note += " An adapter trains only a part of it; modules_to_save can name its layers (BERT's: transform)."
        return note

    def check_head(self, config: Any) -> None:
        """A head for masked tokens."""
        if not _has_head(config):
            raise BadInput("--eval_only: the model has no head for masked tokens; train it first")

    def forward(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], wants_results: bool = False
    ) -> Forward:
        """Results are sums over each example's hidden tokens: "loss", "targets" (their number) and "right"."""
        found = self._compute(model, batch)
        losses = sum_by_example(found.losses, batch)
        if not wants_results:
            return Forward(losses)
        targets = (batch["labels"] != NO_TARGET).sum(-1)
        return Forward(losses, {"loss": losses, "targets": targets, "right": found.is_right.sum(-1)})

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sum over all hidden tokens: each has the same gradient, and nobody needs to look whether that is so."""
        return self._compute(model, batch).losses.sum()

    def _compute(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> TokenLosses:
        from onecurve.training.tasks.token_losses import token_losses

        size, places = self.recipe.loss_chunk_tokens, batch.get("target_places")
        return token_losses(model, self.model_inputs(batch), batch["labels"], size, places, ahead=0)

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """ "filled": the tokens, the most likely ones where a mask stood; "score": their probabilities there, -1 elsewhere."""
        import torch

        tokens = batch["input_ids"]
        scores, best = torch.softmax(model(**batch).logits.float(), dim=-1).max(dim=-1)
        is_mask = tokens == self._tokenizer.mask_token_id
        return {"filled": torch.where(is_mask, best, tokens), "score": torch.where(is_mask, scores, -1.0)}

    # Results --------------------------------------------------------------------------------------------------------

    def compute_metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Over all hidden tokens: e to the power of the mean loss, and the share of them that is most likely."""
        return measure_tokens(results, "pseudo_perplexity")

    def describe_predictions(self, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """In an evaluation row, mean loss, number of hidden tokens, and how many the model finds; else the filled text."""
        for filled, scores in zip(results.get("filled", ()), results.get("score", ()), strict=True):
            words = [self._tokenizer.decode([token]).strip() for token in filled[scores >= 0]]
            text = self._tokenizer.decode(filled, skip_special_tokens=True)
            yield {"prediction": text, "tokens": words, "score": scores[scores >= 0].astype(float).tolist()}
        yield from self.describe_evaluated(results)

    def prediction_example(self) -> dict[str, Any]:
        """A text, the tokens that fill its masks, and their probabilities."""
        return {"prediction": "a text", "tokens": ["a"], "score": [0.5]}

    def report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """How many tokens were hidden, and how many of them the model finds."""
        return {name: int(results[name].sum()) for name in ("targets", "right")}

    def describe_left_out(self) -> str | None:
        """How many texts or pieces gave no example."""
        return "\n".join(describe_counts("Left out", self.facts.get("left_out", {}))) or None

    def describe_facts(self) -> list[str]:
        """How many tokens are hidden."""
        unit = "words" if self.recipe.whole_word_mask else "tokens"
        return [
            f"masks     {self.recipe.mlm_probability:.0%} of the {unit} of each example: {self.facts['masked']:,} of "
            f"{self.facts['tokens']:,} tokens an epoch"
        ]

    def describe_example(self, examples: Mapping[str, Any], tokenizer: Any) -> Sequence[tuple[str, bool]]:
        """The first example as the first epoch shows it, and which of its tokens are to be found."""
        import numpy as np

        features = {name: examples[name][[0]] for name in ("input_ids", "units")}
        drawn = self.draw(features, np.zeros(1, dtype=np.int64), epoch=0)
        pairs = zip(drawn["input_ids"][0][:_MAX_TOKENS_SHOWN], drawn["labels"][0], strict=False)
        return [(f" {tokenizer.decode([int(token)])}", bool(label != NO_TARGET)) for token, label in pairs]

    def describe_card(self) -> str:
        """How tokens were hidden."""
        unit = "words" if self.recipe.whole_word_mask else "tokens"
        return f"Trained to predict {self.recipe.mlm_probability:.0%} of the {unit} of each text.\n\n"


def count_hidden(num_units: int, probability: float) -> int:
    """How many of an example's units are hidden."""
    return max(1, round(probability * num_units))


def _has_head(config: Any) -> bool:
    names = [name for name in list_heads(config) if "MaskedLM" in name or "ForPreTraining" in name]
    return (bool(names) and config.model_type != "electra") or any("MaskedLM" in name for name in names)
