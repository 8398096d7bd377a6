"""Causal language models: the next token of plain texts, of completions of prompts, or of an assistant's messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecurve.training.architectures import count_positions, list_heads
from onecurve.training.errors import BadInput
from onecurve.training.tasks.base import NO_TARGET, Forward, Rows, sum_by_example
from onecurve.training.tasks.causal_lm_recipe import CausalLMRecipe, find_contradictions
from onecurve.training.tasks.row_reader import RowReader, estimate_pieces, find_row_problem
from onecurve.training.tasks.sequences import INSIDE_A_TOKEN, TokenSequence
from onecurve.training.tasks.special_tokens import read_special_tokens
from onecurve.training.tasks.texts import note_special_tokens
from onecurve.training.tasks.token_results import describe_counts, measure_tokens
from onecurve.training.tasks.token_spans import cut_into_examples
from onecurve.training.tasks.token_task import TokenTask

if TYPE_CHECKING:
    import torch

    from onecurve.training.survey import Survey
    from onecurve.training.tasks.base import Array, TokenCounter
    from onecurve.training.tasks.fits.fit import Fit
    from onecurve.training.tasks.token_losses import TokenLosses

_MAX_TOKENS_SHOWN = 400


class CausalLM(TokenTask):
    """Tokens -> the next token.

    The loss of an example is the sum over its targets, and its count is their number: a step's loss is the mean over all
    targets of its global batch. The first token of an example is never a target, because nothing stands before it: its label
    is NO_TARGET.

    A plain text and a completion end with the tokenizer's end-of-text token, unless they are cut off. What ends a message is
    the chat template's to write.

    Facts: "left_out", how many rows or pieces gave no example, and "noticed", how many have something odd, by reason.
    """

    recipe: CausalLMRecipe
    recipe_class = CausalLMRecipe
    unread_keys = frozenset[str]()
    main_metrics = ("loss", "perplexity", "accuracy")
    pipeline_tag = "text-generation"
    auto_class = "AutoModelForCausalLM"
    one_example_a_row = False
    peft_task_type = "CAUSAL_LM"
    has_new_head = False
    model_kinds = frozenset({"decoder"})
    unbatched_features = frozenset({"row", "prompt_length"})
    converses = True
    packs = True
    predicts_tokens = True

    def __init__(self, recipe: CausalLMRecipe) -> None:
        super().__init__(recipe)
        self._positions: int | None = None
        self._tokenizer: Any = None

    # Declarations ---------------------------------------------------------------------------------------------------

    @classmethod
    def find_contradictions(cls, recipe: CausalLMRecipe) -> list[str]:
        """Keys of two kinds of columns, and keys that the kind of columns does not read."""
        return find_contradictions(recipe)

    @classmethod
    def columns(cls, recipe: CausalLMRecipe, with_targets: bool = True) -> dict[str, list[str]]:
        """The text, the conversation, or the prompt and its completion; the tools."""
        if recipe.prompt_column is not None:
            keys = ["prompt_column", *(["completion_column"] if with_targets else []), "tools_column"]
        elif recipe.messages_column is not None:
            keys = ["messages_column", "tools_column"]
        else:
            return {"text_column": [recipe.text_column or "text"]}
        return {key: [name] for key in keys if (name := getattr(recipe, key)) is not None}

    @classmethod
    def find_fits(cls, table: Survey) -> list[Fit]:
        """As training/tasks/fits/causal_lm.py sees it."""
        from onecurve.training.tasks.fits import causal_lm

        return causal_lm.find_fits(table)

    def metric_names(self) -> list[str]:
        """Perplexity, and the accuracy of the next token."""
        return ["perplexity", "accuracy"]

    def find_row_problem(self, row: Mapping[str, Any], with_targets: bool = True) -> str | None:
        """An empty text, or a conversation that is none."""
        return find_row_problem(row, self.columns(self.recipe, with_targets))

    def estimate_examples(self, row: Mapping[str, Any], counter: TokenCounter) -> list[list[int]]:
        """The pieces of a row; of a conversation without what its template writes, but for about four tokens a message."""
        return estimate_pieces(row, self.columns(self.recipe), counter, self.recipe)

    # Rows -> examples -----------------------------------------------------------------------------------------------

    def read_config(self, config: Any) -> None:
        """Refuse a model that reads the tokens that it should predict, or has no room for a generation.

        Raises:
            BadInput: it is one.
        """
        if getattr(config, "is_decoder", True) is False:
            raise BadInput(
                f"model_name_or_path: a {config.model_type} model that is no decoder reads the tokens that it should predict; "
                "take a causal language model"
            )
        self._positions = count_positions(config.to_dict())
        if self._positions is not None and self.recipe.max_new_tokens >= self._positions:
            raise BadInput(
                f"max_new_tokens: {self.recipe.max_new_tokens} leaves no room for a prompt in the model's {self._positions} "
                "positions"
            )

    @property
    def _max_prompt_tokens(self) -> int | None:
        return None if self._positions is None else self._positions - self.recipe.max_new_tokens

    def configure_processor(self, tokenizer: Any) -> None:
        """The recipe's end-of-text token and chat template, whose special tokens are read as such."""
        read_special_tokens(tokenizer)
        wanted = self.recipe.eos_token
        if wanted is not None:
            if wanted not in tokenizer.get_vocab():
                raise BadInput(f"eos_token: the tokenizer has no token {wanted!r}")
            tokenizer.eos_token = wanted
        if tokenizer.eos_token is None:
            raise BadInput("eos_token: the tokenizer has no end-of-text token of its own; name one of its tokens")
        if self.recipe.chat_template is not None:
            try:
                tokenizer.chat_template = Path(self.recipe.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise BadInput(f"chat_template: {self.recipe.chat_template!r} can't be read: {error}") from None

    def check(self, rows: Rows) -> None:
        """Texts or messages of every row."""
        RowReader(self.recipe, self.columns(self.recipe), rows).check()

    def encode(self, rows: Rows, tokenizer: Any, with_targets: bool = True) -> dict[str, Any]:
        """Tokens and labels of each row or of its pieces; without targets, the tokens of each row's prompt."""
        import numpy as np

        self._tokenizer = tokenizer
        reader = RowReader(self.recipe, self.columns(self.recipe, with_targets), rows)
        if not reader.is_chat and self.recipe.split_special_tokens:
            columns = chain.from_iterable(self.columns(self.recipe, with_targets).values())
            note_special_tokens(self, rows, list(columns), tokenizer, "split_special_tokens: false reads them as such")
        if not with_targets:
            return {"input_ids": reader.encode_prompts(tokenizer, self._max_prompt_tokens)}
        sequences, starts = reader.encode(tokenizer), tokenizer.bos_token_id
        examples: dict[str, list[Any]] = {"input_ids": [], "labels": [], "row": [], "prompt_length": []}
        for row, sequence in enumerate(sequences):
            if sequence is None:
                self._note("left_out", INSIDE_A_TOKEN)
                continue
            if starts is not None and sequence.tokens[:2] == [starts, starts]:
                rows.refuse(
                    row, f"begins with {tokenizer.bos_token!r} twice; remove it from the text, as the tokenizer adds it"
                )
            for oddity in sequence.oddities:
                self._note("noticed", oddity)
            for tokens, labels, prompt_length in self._cut(sequence):
                for name, value in zip(examples, (tokens, labels, row, prompt_length), strict=True):
                    examples[name].append(value)
        dense = {name: np.array(examples.pop(name), dtype=np.int64) for name in ("row", "prompt_length")}
        return {**examples, **dense}

    def _cut(self, sequence: TokenSequence) -> Iterator[tuple[list[int], list[int], int]]:
        """Tokens, labels and length of the prompt of each example of a row."""
        all_labels, num_tokens = sequence.labels, len(sequence.tokens)
        has_target = any(label != NO_TARGET for label in all_labels[1:])
        for piece in cut_into_examples(num_tokens, self.recipe.max_length, self.recipe.long_texts):
            labels = [NO_TARGET, *all_labels[piece][1:]]
            if all(label == NO_TARGET for label in labels):
                reason = "nothing to be learned behind the first token"
                if has_target:
                    is_split = self.recipe.long_texts == "split"
                    reason = "pieces without a target" if is_split else "cut off at max_length before the first target"
                self._note("left_out", reason)
                continue
            prompt_length = sequence.prompt_length if piece.start == 0 else 0
            yield sequence.tokens[piece], labels, prompt_length if prompt_length < len(labels) else 0

    def _note(self, kind: str, reason: str) -> None:
        counts = self.facts.setdefault(kind, {})
        counts[reason] = counts.get(reason, 0) + 1

    def counts(self, examples: Mapping[str, Any]) -> Array:
        """The targets of each example."""
        return count_targets(examples["labels"])

    def add_to_batch(self, batch: dict[str, Any]) -> None:
        """Where targets are."""
        from onecurve.training.tasks.chunked_losses import find_target_places

        if "labels" in batch:
            batch["target_places"] = find_target_places(batch["labels"])

    def padding_side(self, tokenizer: Any) -> str:
        """Right: models count positions from the first place on."""
        return "right"

    # Model ----------------------------------------------------------------------------------------------------------

    def configure(self, config: Any) -> None:
        """Without the outputs of a router: nothing is computed from them."""
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False

    def configure_model(self, model: Any, tokenizer: Any) -> None:
        """What ends a generation: the end-of-text token, and what the chat template ends a turn with."""
        from onecurve.training.tasks.generation import set_ends

        set_ends(model, tokenizer)

    def describe_head(self, config: Any) -> str | None:
        """A head that is new, because the model was saved without one; a router's loss that is not computed."""
        notes = []
        if not _has_head(config):
            notes.append(
                "The model was saved without a language modeling head: unless its weights are tied, it is new."
            )
        if getattr(config, "router_aux_loss_coef", None):
            notes.append("The router's balancing loss is not part of the loss: router_aux_loss_coef counts as 0.")
        return "\n".join(notes) or None

    def check_head(self, config: Any) -> None:
        """A head of a language model."""
        if not _has_head(config):
            raise BadInput("--eval_only: the model has no language modeling head; train it first")

    def forward(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], wants_results: bool = False
    ) -> Forward:
        """Results are sums over each example's targets: "loss", "targets" (their number) and "right"."""
        labels, found = batch["labels"], self._compute(model, batch)
        losses = sum_by_example(found.losses, batch)
        if not wants_results:
            return Forward(losses)
        targets = sum_by_example((labels[:, 1:] != NO_TARGET).double(), batch).long()
        right = sum_by_example(found.is_right.double(), batch).long()
        return Forward(losses, {"loss": losses, "targets": targets, "right": right})

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sum over all targets: each has the same gradient, and nobody needs to look whether that is so."""
        return self._compute(model, batch).losses.sum()

    def _compute(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> TokenLosses:
        from onecurve.training.tasks.token_losses import token_losses

        size, places = self.recipe.loss_chunk_tokens, batch.get("target_places")
        return token_losses(model, self.model_inputs(batch), batch["labels"], size, places)

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """ "generated": the tokens that the model writes behind each prompt, -1 behind their end."""
        from onecurve.training.tasks.generation import generate

        return {"generated": generate(model, batch["input_ids"], batch["attention_mask"], self.recipe.max_new_tokens)}

    @property
    def num_samples(self) -> int:
        """As the recipe says."""
        return self.recipe.num_samples

    def sample(
        self, model: Any, examples: Mapping[str, Any], tokenizer: Any, is_sharded: bool = False
    ) -> list[dict[str, Any]]:
        """What the model writes behind the prompts of the first validation examples that have one."""
        from onecurve.training.tasks.generation import continue_examples

        most, limit = self.num_samples, self._max_prompt_tokens
        return continue_examples(model, examples, tokenizer, most, self.recipe.max_new_tokens, limit, is_sharded)

    def answer(
        self,
        model: Any,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int | None,
        write: Callable[[str], None],
    ) -> str:
        """With a chat template the assistant's next message, without one what follows the last message's text."""
        from onecurve.training.tasks.generation import answer

        return answer(model, tokenizer, messages, max_new_tokens or self.recipe.max_new_tokens, write)

    # Results --------------------------------------------------------------------------------------------------------

    def compute_metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Over all targets: e to the power of the mean loss, and the share of them that is most likely."""
        return measure_tokens(results)

    def describe_predictions(self, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """In an evaluation row, mean loss, number of targets, and how many of them are the most likely; else the text."""
        for tokens in results.get("generated", ()):
            written = [int(token) for token in tokens if token >= 0]
            yield {"prediction": self._tokenizer.decode(written, skip_special_tokens=True)}
        yield from self.describe_evaluated(results)

    def prediction_example(self) -> dict[str, Any]:
        """A text."""
        return {"prediction": "a text"}

    def describe_left_out(self) -> str | None:
        """How many rows or pieces gave no example, and how many have something odd."""
        lines = describe_counts("Left out", self.facts.get("left_out", {}))
        lines += describe_counts("Noticed", self.facts.get("noticed", {}))
        return "\n".join(lines) or None

    def describe_example(self, examples: Mapping[str, Any], tokenizer: Any) -> Sequence[tuple[str, bool]]:
        """The first tokens of the first example, and which of them are targets."""
        [tokens], [labels] = examples["input_ids"][[0]], examples["labels"][[0]]
        return [
            (tokenizer.decode([int(token)]), bool(label != NO_TARGET))
            for token, label in zip(tokens[:_MAX_TOKENS_SHOWN], labels, strict=False)
        ]


def count_targets(labels: Any) -> Array:
    """[examples] how many tokens of each example are targets.

    Args:
        labels: a ragged feature (data/columns.py) with a label for each token, NO_TARGET where it is not learned.
    """
    import numpy as np

    return np.array([np.count_nonzero(labels[[row]][0] != NO_TARGET) for row in range(len(labels))], dtype=np.int64)


def _has_head(config: Any) -> bool:
    return any("CausalLM" in name or "LMHead" in name for name in list_heads(config))
