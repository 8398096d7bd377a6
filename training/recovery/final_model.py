"""final/: the trained model as save_pretrained writes it, and read back. Of a large one, each process writes its share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.core_model_loading import WeightConverter, apply_converters, revert_weight_conversion

from onecurve.training.errors import Fault
from onecurve.training.models.adapters import has_adapter, save_adapter
from onecurve.training.models.saving import save_config
from onecurve.training.models.tensor_files import write_index
from onecurve.training.parallel.agreement import work_together
from onecurve.training.parallel.states import Tensors, count_weight_bytes
from onecurve.training.recovery.dealing import Dealing
from onecurve.training.recovery.parts import save_tensors
from onecurve.training.recovery.publishing import describe_failure, finish
from onecurve.training.run_directory import WEIGHTS_FILE, part_of

# A model of less than this is one file, as its users know it. It is what rank 0 may hold besides its share.
FILE_BYTES = 256 * 2**20


def choose_writers(model: torch.nn.Module, writers: Sequence[int]) -> Sequence[int]:
    """The ranks that write final/: so many that each has a file of FILE_BYTES. PEFT reads an adapter from one file only."""
    if has_adapter(model):
        return writers[:1]
    return writers[: max(1, -(-count_weight_bytes(model) // FILE_BYTES))]


def group_converted(model: Any) -> Callable[[str], str]:
    """A function from a weight's name to the weights that transformers converts together when it saves them.

    Files may have other names and shapes than parameters: those of single experts, for example.
    """
    converters = [each.reverse_transform() for each in reversed(_list_converters(model))]
    return lambda name: apply_converters(name, converters)[0]


def _list_converters(model: Any) -> list[WeightConverter]:
    return [each for each in getattr(model, "_weight_conversions", None) or () if isinstance(each, WeightConverter)]


def write_final(
    accelerator: Accelerator,
    model: Any,
    weights: Tensors,
    dealing: Dealing,
    staging: Path,
    target: Path,
    add_more: Callable[[Path], None],
) -> None:
    """Write final/ and compare it with what was trained. Every rank must call it.

    Args:
        model: not wrapped.
        weights: that this rank keeps, by `dealing`.
        staging: becomes `target`.
        add_more: writes tokenizer and model card, on rank 0.

    Raises:
        Fault: on every rank: a part could not be written, or differs when read back.
    """
    part, num_parts = dealing.find_part(accelerator.process_index), len(dealing.writers)
    file = part_of(WEIGHTS_FILE, part or 0, num_parts)

    def write() -> tuple[str, dict[str, int]]:
        if part is None:
            return file, {}
        if has_adapter(model):
            save_adapter(model, weights, staging)
            return file, {}
        return file, _write_share(model, weights, staging / file)

    def complete(shares: list[tuple[str, dict[str, int]]]) -> None:
        add_more(staging)
        if not has_adapter(model):
            save_config(model, staging, "config.json")
            if num_parts > 1:
                file_of = {name: file for file, sizes in shares for name in sizes}
                write_index(staging / WEIGHTS_FILE, file_of, sum(sum(sizes.values()) for _, sizes in shares))
            # Of several files it would copy the weights that it converts, instead of mapping them.
            if num_parts == 1 or not _list_converters(model):
                _compare_with_folder(model, weights, staging)
        finish(staging, target)

    shares = work_together(write, partial(describe_failure, target))
    work_together(lambda: complete(shares) if accelerator.is_main_process else None, partial(describe_failure, target))


def _write_share(model: Any, weights: Tensors, path: Path) -> dict[str, int]:
    """Write one process's weights under the names of files, and compare them with what is read back; returns their bytes."""
    ignored = set(model._keys_to_ignore_on_save or ())
    kept = {name: tensor for name, tensor in weights.items() if name not in ignored}
    converted = {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, kept).items()}
    if converted:
        save_tensors(converted, path)
    return {name: tensor.nbytes for name, tensor in converted.items()}


def _compare_with_folder(model: Any, weights: Tensors, folder: Path) -> None:
    """Compare weights with what `from_pretrained` reads.

    Raises:
        Fault: they differ.
    """
    dtype = next(each.dtype for each in weights.values() if each.is_floating_point())
    again = type(model).from_pretrained(folder, dtype=dtype).state_dict()
    for name, tensor in weights.items():
        if name not in again or not torch.equal(again[name], tensor):
            raise Fault(f"{name} differs from the trained weights when read back")
