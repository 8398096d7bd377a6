"""An adapter is put into a model by PEFT, also where each process holds only its share of the model's weights.

PEFT gives the model's own parameters other names and copies the modules that are trained whole. What a process has read of
the weights (models/shares.py) follows the one and gives values to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from onecurve.training.models.shares import Shares

if TYPE_CHECKING:
    from peft.utils import ModulesToSaveWrapper

NAME = "default"
"""PEFT's name for an adapter that has none."""

# Keys of PEFT's LoraConfig that do not let it read or change the model's weights, whatever their values.
_HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "modules_to_save",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
}  # fmt: skip


def reads_base(config: Any) -> bool:
    """Whether putting an adapter into a model may read or change the model's weights, as DoRA and PiSSA do.

    Args:
        config: PEFT's.
    """
    from peft import LoraConfig

    plain: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    ours = config.to_dict()
    draws = ours.get("init_lora_weights", True) in (True, False, "gaussian")
    return not draws or any(ours.get(key) != plain[key] for key in plain.keys() - _HARMLESS - {"init_lora_weights"})


def inject(config: Any, model: torch.nn.Module, shares: Shares | None) -> None:
    """Put an adapter with new weights into a model.

    Args:
        config: PEFT's; not one that `reads_base`, where there are shares.
        shares: has the weights that the model does not hold; gets their new names.
    """
    from peft import inject_adapter_in_model

    parameters = dict(model.named_parameters())
    inject_adapter_in_model(config, model, NAME)
    if shares is None:
        return
    shares.rename(parameters, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for original, copy in _list_copies(model):
        copy.data.copy_(shares.find_whole(names[original], original))


def divide_copies(model: torch.nn.Module, shares: Shares) -> None:
    """Take the own part of what is trained instead of weights that are divided; like them it leaves the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for original, copy in _list_copies(model):
        if names[original] in shares.parts and names[copy] not in shares.parts:
            shares.divide(names[copy], copy)


def _list_copies(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Each parameter of a module of which PEFT trains a copy, and the parameter of the copy."""
    from peft.utils import ModulesToSaveWrapper

    wrappers: list[ModulesToSaveWrapper] = [each for each in model.modules() if isinstance(each, ModulesToSaveWrapper)]
    for wrapper in wrappers:
        copies = wrapper.modules_to_save[NAME].parameters()
        yield from zip(wrapper.original_module.parameters(), copies, strict=True)
