"""LoRA and DoRA by PEFT: small matrices beside the model's own weights, which are not trained.

The matrices are put into the model itself, which stays a model of transformers. final/ holds them in PEFT's format, beside
the config that the model had: `PeftModel.from_pretrained` and `load_adapter` read it.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from onecurve.training.config import Recipe
from onecurve.training.errors import BadInput, Fault
from onecurve.training.models.injection import NAME, divide_copies, inject, reads_base
from onecurve.training.models.quantization import is_quantized
from onecurve.training.models.saving import MODEL_CONFIG, save_config
from onecurve.training.models.shares import Shares
from onecurve.training.models.tensor_files import TensorFiles
from onecurve.training.tasks.base import Task

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# What PEFT puts before each parameter's name.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A folder with an adapter.

    Attributes:
        base: folder or hub name of the model that it belongs to.
    """

    folder: Path
    base: str

    @property
    def model_config(self) -> Path | None:
        """The config of the model that was trained; None where another program wrote the adapter."""
        path = self.folder / MODEL_CONFIG
        return path if path.is_file() else None


def find_adapter(recipe: Recipe) -> Adapter | None:
    """The adapter that the recipe goes on with, by adapter_name_or_path or because model_name_or_path is one.

    Raises:
        BadInput: the folder holds none, or one of another kind or model.
    """
    key, name = "adapter_name_or_path", recipe.adapter_name_or_path
    if name is None:
        key, name = "model_name_or_path", recipe.model_name_or_path
    adapter = open_adapter(Path(name), key)
    if adapter is None and key == "model_name_or_path":
        return None
    if adapter is None:
        raise BadInput(f"{key}: {name!r} is no adapter: it has no {CONFIG_FILE}")
    if recipe.adapter == "none":
        raise BadInput(
            f"{key}: {name!r} is an adapter of {adapter.base}; set adapter: lora to go on with it, or put it into its model "
            "with `onecurve merge` first"
        )
    return adapter if key == "model_name_or_path" else Adapter(adapter.folder, recipe.model_name_or_path)


def open_adapter(folder: Path, key: str = "model_name_or_path") -> Adapter | None:
    """The adapter in a folder; None if there is none.

    Args:
        key: of the recipe that names the folder.

    Raises:
        BadInput: there is one of another kind, or its weights are missing.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind, base = content["peft_type"], content["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{key}: {str(folder)!r} can't be read: its {CONFIG_FILE} is damaged") from None
    if kind != "LORA" or not base:
        raise BadInput(
            f"{key}: {str(folder)!r} is an adapter of kind {kind} of {base!r}; only LORA of a named model is known"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise BadInput(f"{key}: {str(folder)!r} has no {WEIGHTS_FILE}")
    return Adapter(folder, str(base))


def needs_base(recipe: Recipe) -> bool:
    """Whether each process needs all of the model's weights, because an adapter is made of them or they are converted."""
    if recipe.adapter == "none":
        return False
    if recipe.use_dora or recipe.quantization != "none" or recipe.base_dtype != "float32":
        return True
    adapter = find_adapter(recipe)
    if adapter is None:
        return False
    from peft import PeftConfig

    return reads_base(PeftConfig.from_pretrained(str(adapter.folder)))


def choose_trained(
    model: torch.nn.Module, recipe: Recipe, task: Task, adapter: Adapter | None, shares: Shares | None = None
) -> None:
    """Let only those weights be trained that the recipe names: an adapter's, or all but the frozen ones.

    Args:
        model: with the task's head, not prepared; an adapter is put into it.
        shares: has the weights that the model does not hold.

    Raises:
        BadInput: a name fits nothing, or nothing would be left to train.
    """
    if recipe.adapter == "none":
        _freeze(model, recipe.freeze)
        return
    if adapter is not None:
        load_adapter(model, adapter, is_trained=True, shares=shares)
    else:
        _add_adapter(model, recipe, task, shares)
    if shares is not None:
        divide_copies(model, shares)
    if recipe.base_dtype == "bfloat16":
        for parameter in model.parameters():
            if not parameter.requires_grad and not is_quantized(parameter):
                parameter.data = parameter.data.bfloat16()


def _freeze(model: torch.nn.Module, patterns: tuple[str, ...]) -> None:
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise BadInput(
                f"freeze: {pattern!r} fits no parameter; the first ones are {', '.join(list(parameters)[:3])}"
            )
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise BadInput("freeze: nothing is left to train; remove a pattern")


def _add_adapter(model: Any, recipe: Recipe, task: Task, shares: Shares | None) -> None:
    from peft import LoraConfig

    targets = recipe.lora_target_modules
    config = LoraConfig(
        task_type=task.peft_task_type,
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]  # Any number scales.
        lora_dropout=recipe.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=recipe.use_dora,
        use_rslora=recipe.use_rslora,
        modules_to_save=[*recipe.modules_to_save, *(_list_head(model) if task.has_new_head else ())] or None,
        base_model_name_or_path=recipe.model_name_or_path,
        revision=recipe.model_revision,
    )
    for key, wanted in (("modules_to_save", recipe.modules_to_save), ("lora_target_modules", config.target_modules)):
        for name in () if isinstance(wanted, str) else wanted or ():
            if not any(each == name or each.endswith(f".{name}") for each, _ in model.named_modules()):
                raise BadInput(f"{key}: the model has no module {name!r}; {_list_linear(model)}")
    try:
        inject(config, model, shares)
    except ValueError as error:  # A layer of a kind that PEFT does not know.
        raise BadInput(f"lora_target_modules: {' '.join(str(error).split())}; {_list_linear(model)}") from None


def _list_head(model: Any) -> list[str]:
    """The parts of the model that are not in the pretrained one."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def _list_linear(model: torch.nn.Module) -> str:
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return f"its linear layers are called {', '.join(sorted(linear))}"


def load_adapter(
    model: torch.nn.Module, adapter: Adapter, is_trained: bool = False, shares: Shares | None = None
) -> None:
    """Put a saved adapter into its model.

    Args:
        shares: has the weights that the model does not hold.

    Raises:
        BadInput: its weights are not those that its config asks of this model.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(adapter.folder))
    config.inference_mode = not is_trained
    config.base_model_name_or_path = adapter.base
    inject(config, model, shares)
    own = dict(list_trained(model)) if is_trained else list_adapter(model)
    with safe_open(adapter.folder / WEIGHTS_FILE, "pt") as file:
        saved = set(file.keys())
        if wrong := saved ^ {to_peft_name(name) for name in own}:
            raise BadInput(
                f"{adapter.folder} is no adapter of {adapter.base}: only one of them has {', '.join(sorted(wrong)[:3])}"
            )
        for name, parameter in own.items():
            value = file.get_tensor(to_peft_name(name))
            if value.shape != parameter.shape:
                raise BadInput(
                    f"{adapter.folder} is no adapter of {adapter.base}: {name} has shape {list(value.shape)} there, "
                    f"{list(parameter.shape)} here"
                )
            parameter.data.copy_(value)


def merge_adapter(model: torch.nn.Module) -> None:
    """Add a loaded adapter to the model's weights, in their own type; what is left is a plain model of transformers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[NAME])
    del model.peft_config
    if hasattr(model.config, "base_digest"):
        del model.config.base_digest


def load_trained_weights(model: torch.nn.Module, path: Path) -> None:
    """Load a checkpoint's weights into the parameters that are trained, under the same names."""
    with TensorFiles(path) as file:
        for name, parameter in list_trained(model):
            parameter.data.copy_(file.read(name))


def list_trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that are trained."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def list_adapter(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """An adapter's parameters by name, trained or not."""
    return {name: parameter for name, parameter in model.named_parameters() if f".{NAME}" in name}


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether an adapter was put into the model."""
    return hasattr(model, "peft_config")


def to_peft_name(name: str) -> str:
    """PEFT's name of an adapter's parameter in a file."""
    name = name.replace(f".modules_to_save.{NAME}", "").replace(
        f".lora_magnitude_vector.{NAME}.weight", ".lora_magnitude_vector"
    )
    return _PREFIX + name.replace(f".{NAME}", "")


def save_adapter(model: Any, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter in PEFT's format, and compare what is read back with what was trained.

    Args:
        model: not sharded or the module that was; only its configs and its parameters' names and shapes are read.
        tensors: the trained parameters, whole, by their names in the model; others are left out.

    Raises:
        Fault: a tensor is missing, empty, of another shape or differs when read back.
    """
    trained = {name for name, _ in list_trained(model)}
    found = {to_peft_name(name): tensor for name, tensor in tensors.items() if name in trained}
    if len(found) != len(trained) or any(not tensor.numel() for tensor in found.values()):
        raise Fault(f"the adapter is not whole: {len(found)} of {len(trained)} tensors")
    config = model.peft_config[NAME]
    was_training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = was_training
    save_config(model, folder, MODEL_CONFIG)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        for name, tensor in found.items():
            if not torch.equal(file.get_tensor(name), tensor):
                raise Fault(f"{name} differs from the trained weights when read back")
