"""A model's linear layers in 4 bits (NF4: Dettmers et al. 2023, "QLoRA"), beside which an adapter is trained; by bitsandbytes.

Layers are quantized on the host, on every machine with the same result, and move to the device with the model.
"""

from __future__ import annotations

from typing import Any

import torch

from onecurve.training.config import Recipe
from onecurve.training.errors import BadInput

_COMPUTE_TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quantize(model: Any, recipe: Recipe) -> None:
    """Exchange the pretrained linear layers, as the recipe says; the output layer and a new head stay as they are.

    Args:
        model: whole, on the host, without an adapter.

    Raises:
        BadInput: bitsandbytes is not installed or does not load, or the model has no such layers.
    """
    if recipe.quantization == "none":
        return
    layers = _import_layers()
    output = model.get_output_embeddings()
    pretrained = f"{model.base_model_prefix}."
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not output and name.startswith(pretrained)
    ]
    if not names:
        raise BadInput("quantization: nf4 is for linear layers, and this model has others; remove the key")
    for name in names:
        model.set_submodule(name, _quantize(layers, model.get_submodule(name), _COMPUTE_TYPES[recipe.mixed_precision]))
    model.is_loaded_in_4bit = True  # PEFT asks for it before it looks at a layer.


def _import_layers() -> Any:
    try:
        from bitsandbytes import nn
    except (ImportError, OSError, RuntimeError) as error:
        raise BadInput(
            "quantization: nf4 needs bitsandbytes (pip install 'onecurve[quantization]'), which does not load: "
            f"{' '.join(str(error).split())}"
        ) from None
    return nn


def _quantize(layers: Any, linear: torch.nn.Linear, compute_dtype: torch.dtype) -> torch.nn.Module:
    with torch.device("meta"):
        layer: torch.nn.Module = layers.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype, quant_type="nf4"
        )
    weight = linear.weight.detach().float()
    layer.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to("cpu")
    if linear.bias is not None:
        layer.bias = torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
    # In an evaluation it would reorder the weights for a kernel that a training does not read.
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return layer


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether it holds two weights a byte."""
    return getattr(parameter, "quant_state", None) is not None


def read_values(parameter: torch.Tensor) -> torch.Tensor:
    """The weights that a parameter stands for, in float32."""
    if not is_quantized(parameter):
        return parameter.detach().float()
    from bitsandbytes.functional import dequantize_4bit

    values: torch.Tensor = dequantize_4bit(parameter.data, parameter.quant_state)  # type: ignore[attr-defined]
    return values.float()


def count_values(parameter: torch.nn.Parameter) -> int:
    """How many weights a parameter stands for."""
    return int(parameter.quant_state.shape.numel()) if is_quantized(parameter) else parameter.numel()  # type: ignore[attr-defined]


def dequantize(model: Any) -> None:
    """Give a model without an adapter ordinary layers again, with the weights that its quantized ones stand for."""
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if weight is not None and is_quantized(weight):
            linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight = torch.nn.Parameter(read_values(weight), requires_grad=False)
            if module.bias is not None:
                linear.bias = torch.nn.Parameter(module.bias.detach().float(), requires_grad=False)
            model.set_submodule(name, linear)
    model.is_loaded_in_4bit = False
