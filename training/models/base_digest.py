"""The digest of the weights that an adapter was put beside: it fits no others."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from onecurve.training.errors import BadInput
from onecurve.training.models.adapters import has_adapter, list_adapter
from onecurve.training.models.injection import NAME
from onecurve.training.models.quantization import read_values
from onecurve.training.models.shares import Shares


def hash_base(model: torch.nn.Module, shares: Shares | None = None) -> str:
    """A digest of the weights that an adapter was put beside, in float32. Before the model is sharded.

    What the adapter trains instead of them, such as a new head, is not among them.

    Args:
        shares: has the weights that the model does not hold, in the memory maps of their files.
    """
    digest, own = hashlib.sha256(), list_adapter(model)
    for name, parameter in sorted(model.named_parameters()):
        if name not in own and ".original_module." not in name:
            digest.update(name.encode())
            weight = parameter if shares is None else shares.find_whole(name, parameter)
            values = read_values(weight).cpu().contiguous()
            digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def record_base(model: Any, shares: Shares | None = None) -> str:
    """Note the digest of an adapter's base in the model's config, which is saved beside the adapter; returns it."""
    model.config.base_digest = hash_base(model, shares)
    return str(model.config.base_digest)


def check_base(model: Any, folder: Path, shares: Shares | None = None) -> None:
    """Refuse an adapter beside other weights than it was trained with: its outputs would be wrong. Whole models pass.

    Raises:
        BadInput: the base has changed. An adapter that another program wrote says nothing of its base.
    """
    expected = getattr(model.config, "base_digest", None)
    if has_adapter(model) and expected is not None and hash_base(model, shares) != expected:
        base = model.peft_config[NAME].base_model_name_or_path
        raise BadInput(
            f"{folder}: its adapter was trained beside other weights than {base!r} has now; restore them, or train anew"
        )
