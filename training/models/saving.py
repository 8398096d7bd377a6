"""What makes a folder of weights a model: its config and its processor."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule
from transformers.dynamic_module_utils import custom_object_save

MODEL_CONFIG = "model_config.json"
"""The config of an adapter's model. Under its usual name, transformers would look for the model's weights beside it."""


def save_config_and_processor(model: Any, processor: Any, folder: Path) -> None:
    """Write what `from_pretrained` needs beside the weights, as `save_pretrained` of the model and the tokenizer does.

    Args:
        model: of transformers, not prepared.
    """
    save_config(model, folder, "config.json" if not hasattr(model, "peft_config") else MODEL_CONFIG)
    processor.save_pretrained(folder)


def save_config(model: Any, folder: Path, name: str) -> None:
    """Write the model's config under a name, how it generates, and the Python files of a model that brings its own code."""
    # FSDP2 has given the model a class of its own, in a file of torch.
    own_class = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    config = copy.deepcopy(model.config)
    config.architectures = [own_class.__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if name != MODEL_CONFIG:  # The model of an adapter is where it was, and its code with it.
        customs: tuple[Any, ...] = (own_class.__new__(own_class), config)
        for custom in customs:
            if (
                custom._auto_class is not None
            ):  # Its code lies beside its weights, where `trust_remote_code` looks for it.
                custom_object_save(custom, folder, config)
    config.to_json_file(folder / name)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
