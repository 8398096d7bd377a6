"""Processor and model: loaded, checked against the recipe, and given the task's head."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig

from onecurve.training.architectures import count_positions
from onecurve.training.config import Recipe
from onecurve.training.errors import BadInput
from onecurve.training.models.adapters import (
    Adapter,
    choose_trained,
    find_adapter,
    load_adapter,
    load_trained_weights,
    open_adapter,
)
from onecurve.training.models.base_digest import check_base
from onecurve.training.models.example_masks import checkpoint_contexts
from onecurve.training.models.quantization import count_values, dequantize, quantize
from onecurve.training.models.saving import MODEL_CONFIG
from onecurve.training.models.shares import Shares
from onecurve.training.run_directory import WEIGHTS_FILE
from onecurve.training.tasks import Task, build_task
from onecurve.training.tasks.processors import describe_load_error

# The names under which model configs keep dropout probabilities (BERT, DistilBERT, GPT-2, Llama, ModernBERT, ...).
_DROPOUT_KEYS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout", "attention_dropout",
    "activation_dropout", "seq_classif_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout",
    "hidden_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout_prob", "pooler_dropout", "resid_dropout",
    "embed_dropout", "dropout_rate",
)  # fmt: skip


def load_task(recipe: Recipe) -> tuple[Task, Any, Any]:
    """The recipe's task, the model's config and the task's processor, set up for each other; before anything large is read.

    Raises:
        BadInput: as `load_config` and the processor's `load`, or the task can't have such a model.
    """
    task, config = build_task(recipe), load_config(recipe)
    task.read_config(config)
    processor = task.processor_kind.load(recipe, config)
    task.configure_processor(processor)
    return task, config, processor


def load_config(recipe: Recipe) -> Any:
    """The model's config, before anything large is read.

    Raises:
        BadInput: the folder is no model, has no safetensors weights, or the name can't be found.
    """
    adapter = find_adapter(recipe)
    recipe = _name_base(recipe, adapter)
    _check_folder(recipe)
    try:
        config = _read_config(recipe, recipe.model_name_or_path, adapter.model_config if adapter else None)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its hub client's own.
        raise BadInput(describe_load_error("model_name_or_path", recipe.model_name_or_path, error)) from None
    positions = count_positions(config.to_dict())
    if positions is not None and recipe.max_length > positions:
        raise BadInput(
            f"max_length: {recipe.max_length} is more than the {positions} positions of {recipe.model_name_or_path}"
        )
    return config


def _name_base(recipe: Recipe, adapter: Adapter | None) -> Recipe:
    return recipe if adapter is None else recipe.model_copy(update={"model_name_or_path": adapter.base})


def _check_folder(recipe: Recipe) -> None:
    folder = Path(recipe.model_name_or_path)
    if not folder.exists():
        if recipe.model_name_or_path.startswith((".", "/", "~")) or recipe.model_name_or_path.count("/") > 1:
            raise BadInput(f"model_name_or_path: {recipe.model_name_or_path!r} does not exist")
        return
    if not folder.is_dir():
        raise BadInput(
            f"model_name_or_path: {recipe.model_name_or_path!r} is a file; give the folder that holds config.json"
        )
    if not (folder / "config.json").exists():
        raise BadInput(f"model_name_or_path: {recipe.model_name_or_path!r} has no config.json, so it is no model")
    if not list(folder.glob("*.safetensors")):
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
            raise BadInput(
                f"model_name_or_path: {recipe.model_name_or_path!r} has only pickled weights (.bin), which can run code when "
                "loaded; convert them once with save_pretrained(..., safe_serialization=True)"
            )
        raise BadInput(
            f"model_name_or_path: {recipe.model_name_or_path!r} has a config.json but no weights (*.safetensors)"
        )


def load_model_class(task: Task) -> Any:
    """The class of transformers that loads the task's models."""
    return getattr(transformers, task.auto_class)


def build_model(
    recipe: Recipe, config: Any, task: Task, processor: Any, shares: Shares | None = None
) -> torch.nn.Module:
    """The pretrained model with the task's head; a new head's weights depend on the seed alone.

    Args:
        shares: takes this process's parts of the weights, of which the model holds none then.

    Raises:
        BadInput: the weights can't be loaded, the attention implementation is not there, or names of what is trained fit
            nothing.
    """
    adapter = find_adapter(recipe)
    name = _name_base(recipe, adapter).model_name_or_path
    task.configure(config)
    task.processor_kind.configure(config, processor)
    if _switches_attention(config):
        config.attention_type = "original_full"
    if recipe.dropout is not None:
        for key in _DROPOUT_KEYS:
            if getattr(config, key, None) is not None:
                setattr(config, key, recipe.dropout)
    set_seed(recipe.seed)  # A new head's weights are the same on every process.
    load = partial(
        load_model_class(task).from_pretrained,
        name,
        config=config,
        revision=recipe.model_revision,
        trust_remote_code=recipe.trust_remote_code,
        attn_implementation=recipe.attn_implementation,
        use_safetensors=True,
        # A head of another size is replaced by a new one; the task's `describe_head` says so.
        ignore_mismatched_sizes=True,
        dtype=_master_dtype(),
    )
    try:
        model: torch.nn.Module = load() if shares is None else shares.load(load)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise BadInput(describe_load_error("model_name_or_path", name, error)) from None
    task.configure_model(model, processor)
    set_seed(recipe.seed)  # So are an adapter's, whatever was drawn while the model was loaded.
    quantize(model, recipe)
    choose_trained(model, recipe, task, adapter, shares)
    if recipe.gradient_checkpointing:
        keywords = {"use_reentrant": False, "context_fn": checkpoint_contexts}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)  # type: ignore[operator]
    return model


def _read_config(recipe: Recipe, model: str, saved: Path | None) -> Any:
    """The config of a model, or what an adapter saved of it: where the model brings its own code, its class is there."""
    more = {"revision": recipe.model_revision, "trust_remote_code": recipe.trust_remote_code}
    if saved is None:
        return AutoConfig.from_pretrained(model, **more)
    if not recipe.trust_remote_code:
        return AutoConfig.from_pretrained(saved)
    return type(AutoConfig.from_pretrained(model, **more)).from_json_file(saved)


def load_trained(folder: Path, recipe: Recipe, task: Task, is_dequantized: bool = False) -> tuple[Any, Any]:
    """Model, as `load_trained_model` gives it, and processor of final/ or of a checkpoint; the task knows its config."""
    model = load_trained_model(folder, recipe, task, is_dequantized)
    task.read_config(model.config)
    saved = recipe.model_copy(update={"model_name_or_path": str(folder), "tokenizer_name": None})
    return model, task.processor_kind.load(saved, model.config)


def load_trained_model(folder: Path, recipe: Recipe, task: Task, is_dequantized: bool = False) -> Any:
    """The model of final/ or of a checkpoint in float32, with its adapter if it has one.

    Args:
        recipe: of the run.
        is_dequantized: whether its quantized layers become ordinary ones, with the same weights in float32.
    """
    more: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code, "use_safetensors": True}
    if recipe.adapter == "none":
        return load_model_class(task).from_pretrained(folder, dtype=torch.float32, **more)
    adapter, started_from = open_adapter(folder), find_adapter(recipe)
    base = _name_base(recipe, adapter or started_from).model_name_or_path
    more["revision"] = recipe.model_revision
    try:
        more["config"] = _read_config(recipe, base, folder / MODEL_CONFIG)
        model = load_model_class(task).from_pretrained(base, dtype=torch.float32, ignore_mismatched_sizes=True, **more)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(describe_load_error(f"{folder}: the model of its adapter", base, error)) from None
    if recipe.base_dtype == "bfloat16":  # The adapter was trained beside rounded weights.
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    quantize(model, recipe)
    if is_dequantized:
        dequantize(model)
    if adapter is not None:
        load_adapter(model, adapter)
    else:
        choose_trained(model, recipe.model_copy(update={"base_dtype": "float32"}), task, started_from)
        load_trained_weights(model, folder / WEIGHTS_FILE)
    check_base(model, folder)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _master_dtype() -> torch.dtype:
    """float32 master weights: mixed precision is autocast's business.

    `ONECURVE_FLOAT64=1` is the referee of `make invariance`: it separates float noise from a fault, and is not for training.
    """
    return torch.float64 if os.environ.get("ONECURVE_FLOAT64") == "1" else torch.float32


def _switches_attention(config: Any) -> bool:
    """Whether the model (BigBird) exchanges its attention in the first forward whose batch is short."""
    return getattr(config, "attention_type", None) == "block_sparse"


def describe_model(config: Any, task: Task, processor: Any) -> str | None:
    """What the user should know of the model before it is trained, if anything.

    Args:
        config: as `load_config` returned it, before `build_model` gives it the task's head.
    """
    notes = [task.describe_head(config)]
    if _switches_attention(config):
        notes.append(
            "This model's sparse attention would turn into full attention for good at the first short batch, whichever process "
            "has it: full attention is used from the start."
        )
    notes.append(task.processor_kind.describe(processor))
    return "\n".join(note for note in notes if note) or None


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trained and all parameters; correct under sharding when called before `prepare`."""
    sizes = [(count_values(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
