"""A pretrained model of which each process reads only its share, where the strategy divides all weights (FSDP2, ZeRO-3).

transformers' own loading runs as always, with its names and conversions, but each weight stays in the memory map of its file,
in the file's type. A weight that transformers has to convert (it merges the experts of a mixture into one tensor) is cut as
soon as it is made, so a process holds one such tensor at a time. In the model's place of each weight that was read lies memory
that is never written: it takes none. New weights, such as a task's head, and buffers are whole on every process, as always.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import core_model_loading

from onecurve.training.errors import Fault
from onecurve.training.models.tensor_files import TensorFiles

# Attributes of a weight: the type that it is to have, if it still lies in a file's memory map; its own part, if it was made
# of several and cut.
_FILE_TYPE, _OWN_PART = "_onecurve_file_type", "_onecurve_own_part"

# Where memory lies that `reserve` gave.
_RESERVED: dict[int, weakref.ref[mmap.mmap]] = {}


@dataclass(frozen=True)
class Cut:
    """Which part of each weight a process holds.

    Attributes:
        rank: among `num_parts` processes that divide the weights.
        is_flat: ZeRO-3 divides a weight's numbers as they lie in memory; FSDP2 divides its rows.
    """

    rank: int
    num_parts: int
    is_flat: bool

    def find_part(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Begin and end of the own part, in numbers or in rows."""
        size = math.prod(shape) if self.is_flat else shape[0]
        share = -(-size // self.num_parts)
        return min(self.rank * share, size), min((self.rank + 1) * share, size)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The own part, as a view."""
        begin, end = self.find_part(tuple(whole.shape))
        return (whole.flatten() if self.is_flat else whole)[begin:end]

    def read(self, file: TensorFiles, name: str) -> torch.Tensor:
        """The own part of a saved tensor."""
        shape = file.shape(name)
        begin, end = self.find_part(shape)
        if self.is_flat:
            return file.read_flat(name, begin, end)
        return file.read_part(name, (begin, *[0] * (len(shape) - 1)), (end - begin, *shape[1:]))


@dataclass
class Shares:
    """This process's parts of the weights that were read, by parameter name; new weights are not among them.

    Attributes:
        keeps_maps: whether the weights stay readable whole, for an adapter; what transformers converts is not cut then.
        maps: these weights, in the memory maps of their files and in the files' types, by parameter name.
    """

    cut: Cut
    keeps_maps: bool = False
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    maps: dict[str, torch.Tensor] = field(default_factory=dict)

    def load(self, load: Callable[[], Any]) -> Any:
        """Let transformers load a model on the CPU, and take this process's part of each weight that it reads from files."""
        with self._lazy_reading():
            model = load()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if hasattr(parameter, _OWN_PART):
                    self.parts[name] = getattr(parameter, _OWN_PART)
                    delattr(parameter, _OWN_PART)
                elif hasattr(parameter, _FILE_TYPE):
                    if self.keeps_maps:
                        self.maps[name] = parameter.detach()
                    self.parts[name] = self.cut.cut(parameter.detach())
                    parameter.data = reserve(parameter.shape, getattr(parameter, _FILE_TYPE))
                    delattr(parameter, _FILE_TYPE)
        return model

    def find_whole(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        """A weight of the model, whole, also if the model does not hold it."""
        if not is_reserved(parameter):
            return parameter.detach()
        if name not in self.maps:
            raise Fault(f"{name} is needed whole, and this process has only its part of it")
        return self.maps[name]

    def rename(self, parameters: Mapping[str, torch.nn.Parameter], model: torch.nn.Module) -> None:
        """Take the names that parameters have in a model now.

        Args:
            parameters: by their names before.
        """
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.parts = {names[parameters[name]]: part for name, part in self.parts.items()}
        self.maps = {names[parameters[name]]: whole for name, whole in self.maps.items()}

    def divide(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Take the own part of a weight that the model holds whole, out of the model."""
        self.parts[name] = self.cut.cut(parameter.detach()).clone()
        parameter.data = reserve(parameter.shape, parameter.dtype)

    def check(self, model: torch.nn.Module) -> None:
        """Check that each weight that the model does not hold has a part, and each part such a weight: it would stay zero.

        Raises:
            Fault: one has none.
        """
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.numel()}
        wrong = [name for name, each in parameters.items() if is_reserved(each) != (name in self.parts)]
        wrong += [name for name, part in self.parts.items() if part.numel() and name not in parameters]
        if wrong:
            raise Fault(f"of these weights only a part or only the place is there: {', '.join(sorted(wrong)[:3])}")

    @contextlib.contextmanager
    def _lazy_reading(self) -> Iterator[None]:
        """transformers would read each tensor in threads, ahead of its needs, and turn it into float32 whole."""
        replaced = {name: getattr(core_model_loading, name) for name in ("spawn_materialize", "set_param_for_module")}
        put = partial(self._put, replaced["set_param_for_module"])
        try:
            core_model_loading.spawn_materialize, core_model_loading.set_param_for_module = _read_later, put
            yield
        finally:
            for name, function in replaced.items():
                setattr(core_model_loading, name, function)

    def _put(self, put: Callable[..., None], model: Any, name: str, value: torch.Tensor, *others: Any) -> None:
        """Put what was read, or made of it, into the model."""
        parent, _, own_name = name.rpartition(".")
        module = model.get_submodule(parent)
        before = getattr(module, own_name)
        if before is None or own_name in module._buffers:  # Buffers are whole on every process, and may be written.
            put(model, name, value if before is None else value.to(before.dtype, copy=True), *others)
            return
        part = None
        is_converted = not hasattr(value, _FILE_TYPE)
        if is_converted and not self.keeps_maps:
            part = self.cut.cut(value).clone()
            value = reserve(value.shape, before.dtype)
        put(model, name, value, *others)
        parameter = getattr(module, own_name)
        if parameter is before or (is_converted and self.keeps_maps):
            return  # Of another shape, so it stays a new weight; or it is held whole.
        setattr(parameter, _OWN_PART if part is not None else _FILE_TYPE, before.dtype if part is None else part)


def _read_later(
    thread_pool: Any,
    tensor: Any,
    device: Any = None,
    dtype: Any = None,
    sharding_op: Any = None,
    tensor_idx: Any = None,
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        value: torch.Tensor = tensor[...]
        if tensor_idx is not None:  # One of those that are converted into others.
            return value.to(dtype)
        setattr(value, _FILE_TYPE, dtype)
        return value

    return read


def reserve(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no memory until they are written."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    # Of the pages of the system, because an allocator may give memory that was used before.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
    _RESERVED[tensor.untyped_storage().data_ptr()] = weakref.ref(pages)
    return tensor


def is_reserved(tensor: torch.Tensor) -> bool:
    """Whether a tensor was made by `reserve`, or is a view of such a one."""
    pages = _RESERVED.get(tensor.untyped_storage().data_ptr())
    return pages is not None and pages() is not None
