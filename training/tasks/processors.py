"""What makes of a row what a model reads: the model's tokenizer, or its image processor. All that differs between them is here.

A task names its kind (`Task.processor_kind`), and nothing else asks which one it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from onecurve.training.errors import BadInput
from onecurve.training.recipe import Recipe


class ProcessorKind(ABC):
    """How a kind of processor is loaded, told from others, and what a model takes from it.

    Attributes:
        name: for messages.
        files: a model's folder has one of these.
        advice: what to do where it has none.
        counts_texts: whether examples are as long as their texts; else all have the model's own number of tokens.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    advice: ClassVar[str]
    counts_texts: ClassVar[bool]

    @abstractmethod
    def load(self, recipe: Recipe, config: Any) -> Any:
        """The processor of the recipe's model.

        Raises:
            BadInput: there is none, or none that fits the model.
        """

    @abstractmethod
    def fingerprint(self, processor: Any) -> bytes:
        """Changes whenever the processor would make something else of a row. Prepared data is kept by it."""

    def configure(self, config: Any, processor: Any) -> None:  # noqa: B027
        """Give the model's config what it needs to know of the processor."""

    def describe(self, processor: Any) -> str | None:
        """What the user should know of it; None for nothing."""
        return None


class TokenizerKind(ProcessorKind):
    """A tokenizer: texts -> tokens."""

    name = "tokenizer"
    files = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
    advice = "set tokenizer_name"
    counts_texts = True

    def load(self, recipe: Recipe, config: Any) -> Any:
        """The tokenizer; one without a padding token is given its end-of-text token for it."""
        from transformers import AutoTokenizer

        name = recipe.tokenizer_name or recipe.model_name_or_path
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=find_revision(name, recipe), trust_remote_code=recipe.trust_remote_code, config=config
            )
        except Exception as error:  # transformers raises OSError, ValueError, KeyError and its hub client's own.
            key = "tokenizer_name" if recipe.tokenizer_name else "model_name_or_path (its tokenizer)"
            raise BadInput(describe_load_error(key, name, error)) from None
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise BadInput(f"{name!r} has no tokenizer files; give tokenizer_name")
        num_embeddings = getattr(config, "vocab_size", None)
        if num_embeddings is not None and len(tokenizer) > num_embeddings:
            raise BadInput(
                f"{name!r}: the tokenizer has {len(tokenizer)} tokens, the model knows {num_embeddings}; they do not belong "
                "together"
            )
        # A tokenizer.json may embed truncation and padding of its own; the recipe owns both.
        if getattr(tokenizer, "backend_tokenizer", None) is not None:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise BadInput(f"{name!r}: the tokenizer has neither a padding nor an end-of-text token")
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def fingerprint(self, processor: Any) -> bytes:
        """Its vocabulary and rules, which side it cuts, its special tokens and its chat template."""
        backend = getattr(processor, "backend_tokenizer", None)
        if backend is not None:  # What an earlier call left set is not the tokenizer's own.
            backend.no_truncation()
            backend.no_padding()
        parts = (
            backend.to_str() if backend is not None else repr(sorted(processor.get_vocab().items())),
            repr((processor.truncation_side, sorted(processor.special_tokens_map.items()))),
            repr(getattr(processor, "chat_template", None)),
        )
        return "".join(parts).encode()

    def configure(self, config: Any, processor: Any) -> None:
        """The padding token: a decoder's head looks for the last token that is not this one."""
        # Of a model of several modalities the text's config says.
        config.pad_token_id = config.get_text_config().pad_token_id = processor.pad_token_id

    def describe(self, processor: Any) -> str | None:
        """A padding token that is another one's."""
        if processor.pad_token != processor.eos_token:
            return None
        return f"The tokenizer has no padding token of its own: it pads with its end-of-text token {processor.eos_token!r}."


class ImageProcessorKind(ProcessorKind):
    """An image processor: images -> numbers of pixels."""

    name = "image processor"
    files = ("preprocessor_config.json", "processor_config.json")
    advice = "download its preprocessor_config.json"
    counts_texts = False

    def load(self, recipe: Recipe, config: Any) -> Any:
        """The image processor as Pillow and NumPy compute it: with torchvision, pixels would differ from machine to machine."""
        from transformers import AutoImageProcessor

        name = recipe.model_name_or_path
        if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in self.files):
            raise BadInput(f"model_name_or_path: {name!r} has no {self.name} files; {self.advice}")
        try:
            return AutoImageProcessor.from_pretrained(
                name, revision=recipe.model_revision, trust_remote_code=recipe.trust_remote_code, backend="pil"
            )
        except Exception as error:  # As a tokenizer.
            raise BadInput(describe_load_error("model_name_or_path (its image processor)", name, error)) from None

    def fingerprint(self, processor: Any) -> bytes:
        """All of its settings."""
        content: str = processor.to_json_string()
        return content.encode()


TOKENIZER = TokenizerKind()
IMAGE_PROCESSOR = ImageProcessorKind()
KINDS: dict[str, ProcessorKind] = {kind.name: kind for kind in (TOKENIZER, IMAGE_PROCESSOR)}


def find_revision(name: str, recipe: Recipe) -> str:
    """The recipe's revision is the model's; a tokenizer of another repository has its own history."""
    return recipe.model_revision if name == recipe.model_name_or_path else "main"


def describe_load_error(key: str, name: str, error: Exception) -> str:
    """What transformers says of a folder or hub name that it can't load, in a message for a recipe's key."""
    reason = " ".join(str(error).split())
    if len(reason) > 300:
        reason = reason[:297] + "..."
    advice = "" if Path(name).exists() else ". Without a network, give a local folder"
    return f"{key}: {name!r} could not be loaded: {reason}{advice}"
