"""Count the parameters of a model that is described by a config.json, without its weights, and print them as JSON.

    python training/describe_model.py CONFIG_JSON

The launcher runs this for families that its own arithmetic does not know. The model is built on torch's meta device, which
holds no numbers, so any size takes seconds. Code that comes with a model is not run.
"""

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

import torch
from transformers import AutoConfig, AutoModel

from onecurve.training.record.console import quiet_third_parties


def describe_model(path: Path) -> dict[str, int]:
    """Parameters of the model without a head, and the numbers that memory and compute depend on.

    "layer_parameters" is the mean of all repeated layers, and "num_layers" how often a token goes through one: layers that
    share their parameters, as ALBERT's do, count each time.
    """
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    lists = {name: list(module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    outer = [layers for name, layers in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    layers = [layer for each in outer for layer in each]
    in_layers = sum(_count(layer) for layer in layers)
    text = config.get_text_config()
    try:
        vocab_size, hidden_size = model.get_input_embeddings().weight.shape
    except (NotImplementedError, AttributeError):  # Characters or patches have no table.
        vocab_size, hidden_size = 0, int(getattr(text, "hidden_size", 0))
    return {
        "num_parameters": _count(model),
        "num_layers": max(len(layers), int(getattr(text, "num_hidden_layers", 0) or 0), 1),
        "layer_parameters": in_layers // len(layers) if layers else 0,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
    }


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def describe_or_explain(path: Path) -> dict[str, Any]:
    """As `describe_model`, or "problem": why transformers can't build it."""
    try:
        return {**describe_model(path)}
    except Exception as error:  # transformers and the models raise whatever they find.
        return {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}


if __name__ == "__main__":
    quiet_third_parties()
    print(json.dumps(describe_or_explain(Path(sys.argv[1]))))
