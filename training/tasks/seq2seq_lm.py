"""Sequence to sequence: a text from another one, as summaries and translations, by a model with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from onecurve.training.architectures import count_positions
from onecurve.training.errors import BadInput
from onecurve.training.recipe import Integer, Recipe
from onecurve.training.tasks.base import NO_TARGET, Forward, Rows, Task, pick_example, to_float32
from onecurve.training.tasks.metrics.written import NAMES, score_texts
from onecurve.training.tasks.texts import check_texts, encode_texts, find_text_problem, note_special_tokens
from onecurve.training.tasks.token_results import describe_right, describe_tokens, measure_tokens

if TYPE_CHECKING:
    import torch

    from onecurve.training.survey import Survey
    from onecurve.training.tasks.base import Array, TokenCounter
    from onecurve.training.tasks.fits.fit import Fit

_MAX_TOKENS_SHOWN = 400


class Seq2SeqLMRecipe(Recipe):
    """The keys of this task beside those of every recipe."""

    source_column: str = Field(default="source", min_length=1, description="column with the text that is read")
    target_column: str = Field(default="target", min_length=1, description="column with the text that is written")
    translation_column: str | None = Field(
        default=None, description="instead of both: a column with an object that has a text for each language"
    )
    source_lang: str | None = Field(default=None, description="its key of the text that is read")
    target_lang: str | None = Field(default=None, description="its key of the text that is written")
    source_prefix: str = Field(default="", description="put in front of what is read, such as 'summarize: ' for T5")
    max_target_length: Annotated[Integer, Field(ge=2)] = Field(
        default=128, description="tokens a target is cut to, and most tokens that are written"
    )
    predict_with_generate: bool = Field(
        default=True, description="write texts at each evaluation, for ROUGE, BLEU and chrF"
    )
    num_beams: Annotated[Integer, Field(ge=1)] = Field(
        default=1, description="beams of the search for a text; 1 is greedy"
    )


class Seq2SeqLM(Task):
    """A text -> another text.

    The loss of an example is the sum over the tokens of its target, its end included, and its count is their number: a step's
    loss is the mean over all target tokens of its global batch. The decoder reads the target shifted by one place, as the
    model's own code shifts it.

    Facts: "full_sources" and "full_targets", how many have as many tokens as may be, and so may be cut.
    """

    recipe: Seq2SeqLMRecipe
    recipe_class = Seq2SeqLMRecipe
    main_metrics = ("loss", "rougeL", "bleu")
    pipeline_tag = "text2text-generation"
    auto_class = "AutoModelForSeq2SeqLM"
    peft_task_type = "SEQ_2_SEQ_LM"
    has_new_head = False
    model_kinds = frozenset({"encoder-decoder"})
    unbatched_features = frozenset({"row", "reference"})

    def __init__(self, recipe: Seq2SeqLMRecipe) -> None:
        super().__init__(recipe)
        self._tokenizer: Any = None

    # Declarations ---------------------------------------------------------------------------------------------------

    @classmethod
    def find_contradictions(cls, recipe: Seq2SeqLMRecipe) -> list[str]:
        """Two kinds of columns, or languages without a column."""
        languages, problems = (recipe.source_lang, recipe.target_lang), []
        if recipe.translation_column is None:
            if any(languages):
                problems.append("source_lang, target_lang: only translation_column reads them")
            if recipe.source_column == recipe.target_column:
                problems.append(
                    f"target_column: {recipe.target_column!r} is the source_column as well; name another column"
                )
            return problems
        problems += [
            f"{key}: translation_column holds both texts; leave it out"
            for key in ("source_column", "target_column")
            if getattr(recipe, key) != type(recipe).model_fields[key].default
        ]
        if not all(languages) or languages[0] == languages[1]:
            problems.append("source_lang, target_lang: name two keys of translation_column, such as en and de")
        return problems

    @classmethod
    def columns(cls, recipe: Seq2SeqLMRecipe, with_targets: bool = True) -> dict[str, list[str]]:
        """Source and target, or one column with both."""
        if recipe.translation_column is not None:
            return {"translation_column": [recipe.translation_column]}
        target = {"target_column": [recipe.target_column]} if with_targets else {}
        return {"source_column": [recipe.source_column], **target}

    @classmethod
    def find_fits(cls, table: Survey) -> list[Fit]:
        """As training/tasks/fits/seq2seq_lm.py sees it."""
        from onecurve.training.tasks.fits import seq2seq_lm

        return seq2seq_lm.find_fits(table)

    def metric_names(self) -> list[str]:
        """Perplexity, the accuracy of the next token, and what written texts are measured by."""
        return ["perplexity", "accuracy", *(NAMES if self.recipe.predict_with_generate else ())]

    def find_row_problem(self, row: Mapping[str, Any], with_targets: bool = True) -> str | None:
        """An empty text, or a translation without one of the languages."""
        recipe = self.recipe
        keys: list[str | None] = [recipe.source_lang, recipe.target_lang][: 1 + with_targets]
        if recipe.translation_column is None:
            texts = {name: row.get(name) for [name] in self.columns(recipe, with_targets).values()}
        else:
            value = row.get(recipe.translation_column)
            if not isinstance(value, Mapping):
                return (
                    f"translation column {recipe.translation_column!r} holds {value!r:.40}; give an object with the keys "
                    f"{' and '.join(map(str, keys))}"
                )
            if lacking := [str(key) for key in keys if value.get(key) is None]:
                return f"translation column {recipe.translation_column!r} has no text for {' and '.join(lacking)}"
            texts = {f"{recipe.translation_column}.{key}": value[key] for key in keys}
        problems = (find_text_problem(text, name) for name, text in texts.items())
        return next((problem for problem in problems if problem is not None), None)

    def estimate_examples(self, row: Mapping[str, Any], counter: TokenCounter) -> list[list[int]]:
        """One example: what the encoder reads and what the decoder reads, as `lengths` adds them up."""
        recipe, special = self.recipe, counter.count_special(1)
        if recipe.translation_column is None:
            source, target = row[recipe.source_column], row[recipe.target_column]
        else:
            source, target = (row[recipe.translation_column][key] for key in (recipe.source_lang, recipe.target_lang))
        of_source = min(counter.count(recipe.source_prefix + source) + special, recipe.max_length)
        return [[of_source + min(counter.count(target) + special, recipe.max_target_length)]]

    # Rows -> examples -----------------------------------------------------------------------------------------------

    def read_config(self, config: Any) -> None:
        """Refuse a model without encoder and decoder, and targets that are longer than it may write.

        Raises:
            BadInput: it is one.
        """
        if not getattr(config, "is_encoder_decoder", False):
            raise BadInput(
                f"model_name_or_path: a {config.model_type} model has no encoder and decoder; take one such as T5 or BART, or "
                "task: causal_lm with prompts and completions"
            )
        positions = count_positions(config.to_dict())
        if positions is not None and self.recipe.max_target_length > positions:
            raise BadInput(
                f"max_target_length: {self.recipe.max_target_length} is more than the model's {positions} positions"
            )

    def configure_processor(self, tokenizer: Any) -> None:
        """It must mark the end of a text, and write source and target with the same tokens.

        Raises:
            BadInput: it does not.
        """
        super().configure_processor(tokenizer)
        self._tokenizer = tokenizer
        if hasattr(tokenizer, "src_lang") or hasattr(tokenizer, "_switch_to_target_mode"):
            raise BadInput(
                f"tokenizer_name: {type(tokenizer).__name__} writes targets with other tokens than sources, which seq2seq_lm "
                "does not know yet; take a model with one kind of tokens, such as T5 or BART"
            )
        if tokenizer("a")["input_ids"][-1:] != [tokenizer.eos_token_id]:
            raise BadInput(
                f"tokenizer_name: {type(tokenizer).__name__} puts no end-of-text token behind a text: the model would not "
                "learn to stop; give the tokenizer of a sequence-to-sequence model"
            )

    def check(self, rows: Rows) -> None:
        """Texts of every row."""
        if self.recipe.translation_column is None:
            check_texts(rows, [self.recipe.source_column, self.recipe.target_column])
            return
        rows.refuse_first(self.find_row_problem)

    def encode(self, rows: Rows, tokenizer: Any, with_targets: bool = True) -> dict[str, Any]:
        """Tokens of each source, and those of its target with the text itself."""
        recipe = self.recipe
        self._tokenizer = tokenizer
        if recipe.translation_column is None:
            note_special_tokens(self, rows, [name for [name] in self.columns(recipe, with_targets).values()], tokenizer)
        sources = [recipe.source_prefix + text for text in self._read(rows, recipe.source_column, recipe.source_lang)]
        tokens = encode_texts([sources], tokenizer, recipe)["input_ids"]
        examples: dict[str, Any] = {"input_ids": tokens}
        self._count_full("full_sources", tokens, recipe.max_length)
        if with_targets:
            targets = self._read(rows, recipe.target_column, recipe.target_lang)
            of_targets = recipe.model_copy(update={"max_length": recipe.max_target_length})
            examples["labels"] = encode_texts([targets], tokenizer, of_targets)["input_ids"]
            examples["reference"] = [text.encode() for text in targets]
            self._count_full("full_targets", examples["labels"], recipe.max_target_length)
        return examples

    def _read(self, rows: Rows, column: str, language: str | None) -> list[str]:
        if self.recipe.translation_column is None:
            return rows.values(column)
        return [value[language] for value in rows.values(self.recipe.translation_column)]

    def _count_full(self, name: str, tokens: Sequence[Sequence[int]], most: int) -> None:
        self.facts[name] = self.facts.get(name, 0) + sum(len(each) == most for each in tokens)

    def lengths(self, examples: Mapping[str, Any]) -> Array:
        """Tokens of source and target: what the encoder and the decoder read."""
        both: Array = examples["input_ids"].lengths + examples["labels"].lengths
        return both

    def counts(self, examples: Mapping[str, Any]) -> Array:
        """The tokens of each target."""
        lengths: Array = examples["labels"].lengths
        return lengths

    def padding_side(self, tokenizer: Any) -> str:
        """Right: the decoder counts positions from the first place on."""
        return "right"

    # Model ----------------------------------------------------------------------------------------------------------

    def forward(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], wants_results: bool = False
    ) -> Forward:
        """Results are sums over each example's targets: "loss", "targets" (their number) and "right"."""
        import torch.nn.functional as F

        labels = batch["labels"]
        logits = to_float32(
            model(**self.model_inputs(batch), decoder_input_ids=_shift(model, labels), use_cache=False).logits
        )
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=NO_TARGET, reduction="none").sum(dim=1)
        if not wants_results:
            return Forward(losses)
        is_target = labels != NO_TARGET
        right = ((logits.argmax(-1) == labels) & is_target).sum(dim=1)
        return Forward(losses, {"loss": losses, "targets": is_target.sum(dim=1), "right": right})

    @property
    def generates(self) -> bool:
        """As the recipe says."""
        return self.recipe.predict_with_generate

    def generate(
        self, model: Any, batch: Mapping[str, torch.Tensor], is_sharded: bool = False
    ) -> Mapping[str, torch.Tensor]:
        """ "generated": [examples, max_target_length] the tokens of each text that is written, -1 behind its end.

        The encoder is run by the model's own forward: called alone, it would lack the weights that sharding keeps at the root.
        """
        import torch
        import torch.nn.functional as F
        from transformers.modeling_outputs import BaseModelOutput

        recipe, inputs, mask = self.recipe, batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(inputs) if mask is None else mask
        with torch.no_grad():
            first = _shift(model, inputs[:, :1])
            read = model(input_ids=inputs, attention_mask=mask, decoder_input_ids=first, use_cache=False)
            written = model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=read.encoder_last_hidden_state),
                attention_mask=mask,
                max_new_tokens=recipe.max_target_length,
                num_beams=recipe.num_beams,
                do_sample=False,
                synced_gpus=is_sharded,
            )[:, 1:]
        ends = torch.as_tensor(model.generation_config.eos_token_id, device=written.device).reshape(-1)
        is_end = torch.isin(written, ends)
        written = written.masked_fill(is_end.cumsum(dim=1) - is_end.long() > 0, -1)
        return {"generated": F.pad(written, (0, recipe.max_target_length - written.shape[1]), value=-1)}

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What the model writes."""
        return self.generate(model, batch)

    # Results --------------------------------------------------------------------------------------------------------

    def compute_metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Perplexity and accuracy over all target tokens; ROUGE, BLEU and chrF of the written texts, in percent."""
        found = measure_tokens(results)
        if not self.generates:
            return found
        references = [bytes(text).decode() for text in results["reference"]]
        return {**found, **score_texts([self._decode(tokens) for tokens in results["generated"]], references)}

    def _decode(self, tokens: Any) -> str:
        text: str = self._tokenizer.decode([int(token) for token in tokens if token >= 0], skip_special_tokens=True)
        return text.strip()

    def describe_predictions(self, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The text that was written; in an evaluation also the reference, and the mean loss, number and hits of its tokens."""
        for number in range(len(results.get("generated", results.get("targets", ())))):
            line: dict[str, Any] = {}
            if "generated" in results:
                line["prediction"] = self._decode(results["generated"][number])
            if "targets" in results:
                line["reference"] = bytes(results["reference"][number]).decode()
                line |= describe_tokens(results, number)
            yield line

    def show_example(
        self, examples: Mapping[str, Any], number: int, results: Mapping[str, Any], processor: Any
    ) -> dict[str, str]:
        """What is read, what the data has for it, and what the model writes."""
        [line] = self.describe_predictions(pick_example(results, number))
        named = {"label": line["reference"], "prediction": line.get("prediction", describe_right(results, number))}
        return {**super().show_example(examples, number, results, processor), **named}

    def prediction_example(self) -> dict[str, Any]:
        """A text."""
        return {"prediction": "a text"}

    def describe_left_out(self) -> str | None:
        """How many texts are cut."""
        kinds = {"full_sources": ("sources", "max_length"), "full_targets": ("targets", "max_target_length")}
        lines = [
            f"Noticed: {count:,} {kind} fill {key} and may be cut."
            for name, (kind, key) in kinds.items()
            if (count := self.facts.get(name, 0))
        ]
        return "\n".join(lines) or None

    def describe_example(self, examples: Mapping[str, Any], tokenizer: Any) -> Sequence[tuple[str, bool]]:
        """The first tokens of the first source, and behind them those of its target."""
        [source], [target] = examples["input_ids"][[0]], examples["labels"][[0]]
        return [
            (tokenizer.decode([int(token)]), is_target)
            for tokens, is_target in ((source, False), (target, True))
            for token in tokens[:_MAX_TOKENS_SHOWN]
        ]

    def describe_card(self) -> str:
        """What stands in front of what it reads."""
        prefix = self.recipe.source_prefix
        return f"It reads texts with {prefix!r} in front.\n\n" if prefix else ""


def _shift(model: torch.nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """What the decoder reads to predict the labels, as the model's own code makes it; also of a model that is wrapped."""
    name = "prepare_decoder_input_ids_from_labels"
    shift: Any = next(getattr(module, name) for module in model.modules() if hasattr(module, name))
    shifted: torch.Tensor = shift(labels=labels)
    return shifted
