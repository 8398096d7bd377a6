"""The arithmetic of a training before it runs: batches, steps, memory, compute, communication, time, files.

Nothing is measured here and no device is needed. Formulas and their sources stand at the functions.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onecurve.launcher.errors import UsageError
from onecurve.launcher.facts.data_files import UnreadableData, count_rows, expand, read_head
from onecurve.launcher.facts.machine import GIB, Machine
from onecurve.launcher.facts.shape import ModelShape
from onecurve.launcher.planning.memory import (
    CPU_OVERHEAD_BYTES,
    GPU_OVERHEAD_BYTES,
    STRATEGIES,
    MemoryPlan,
    Strategy,
    Work,
    count_checkpoint_bytes,
    count_final_bytes,
    fits,
    fits_host,
    largest_batch,
    plan_memory,
)
from onecurve.launcher.planning.topology import list_candidates
from onecurve.training.schedule import count_steps, count_steps_per_epoch

if TYPE_CHECKING:
    from onecurve.training.config import Recipe

# Dense peak in 10^12 operations a second: (float32 as PyTorch runs it by default, bfloat16), and memory in GiB. From the
# makers' data sheets (NVIDIA: H200, H100 SXM, A100, L40S, L4, A10, V100, T4; AMD: MI300X, MI250X per die).
_KNOWN_DEVICES: dict[str, tuple[float, float, float]] = {
    "B200": (75, 2250, 180),
    "H200": (67, 989, 141),
    "H100": (67, 989, 80),
    "A100": (19.5, 312, 80),
    "L40S": (91.6, 362, 48),
    "L4": (30.3, 121, 24),
    "A10": (31.2, 125, 24),
    "V100": (15.7, 125, 32),
    "T4": (8.1, 65, 16),
    "MI300X": (163.4, 1307, 192),
    "MI250X": (23.9, 191, 64),
}

_ROWS_SAMPLED = 500
_CHARACTERS_PER_TOKEN = 4.2
_SPECIAL_TOKENS = 2


@dataclass(frozen=True)
class DeviceKind:
    """Devices to plan for.

    Attributes:
        teraflops: dense peak at the recipe's precision; None where it is not known, and time with it.
    """

    name: str
    count: int
    memory_bytes: int
    kind: Literal["cuda", "mps", "cpu"]
    peak_float32: float | None = None
    peak_half: float | None = None

    def teraflops(self, mixed_precision: str) -> float | None:
        """Dense peak at a precision, in 10^12 operations a second."""
        return self.peak_float32 if mixed_precision == "no" else self.peak_half


@dataclass(frozen=True)
class DataEstimate:
    """The training data in numbers: rows counted, which reads a CSV whole; lengths from the first rows of some files.

    Attributes:
        num_examples: None where the data is not on this machine.
        mean_length: tokens of an example, cut to max_length.
        longest: tokens of the longest example seen.
        padding: share of the padded tokens that are padding, in batches by length as the training plans them.
        source: where the lengths come from, for people.
    """

    num_examples: int | None
    mean_length: float
    longest: int
    padding: float
    source: str


@dataclass(frozen=True)
class StrategyPlan:
    """One strategy on the devices that were asked about.

    Attributes:
        fits: on the device, and on the host where something moves there.
        largest_batch: the largest per_device_batch_size that fits.
        communication_bytes: sent by each device in one step.
    """

    memory: MemoryPlan
    fits: bool
    largest_batch: int
    communication_bytes: int


@dataclass(frozen=True)
class Plan:
    """All the arithmetic of one recipe on one set of devices."""

    shape: ModelShape
    data: DataEstimate
    devices: DeviceKind
    num_nodes: int
    num_processes: int
    micro_batch: int
    num_micro_batches: int
    train_batch_size: int
    num_steps: int | None
    steps_per_epoch: int | None
    tokens: int | None
    flops_per_step: float
    flops: float | None
    mfu: float
    seconds: float | None
    checkpoint_bytes: int
    final_bytes: int
    strategies: tuple[StrategyPlan, ...]
    recommended: str | None

    @property
    def device_hours(self) -> float | None:
        """Time times devices."""
        return None if self.seconds is None else self.seconds * self.num_processes / 3600


def parse_devices(text: str) -> DeviceKind:
    """Devices written as "8xH100-80GB", "A100-40GB", "2xL4" or "cpu-16GB".

    Raises:
        UsageError: it has another form, or an unknown device without its memory.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([A-Za-z][A-Za-z0-9 ]*?)(?:-(\d+(?:\.\d+)?)GB)?", text)
    if match is None or match[1] == "0":
        raise UsageError(f"--devices {text}: expected COUNTxNAME-MEMORYGB, such as 8xH100-80GB")
    name, count = match[2], int(match[1] or 1)
    known = _KNOWN_DEVICES.get(name.upper())
    if known is None and match[3] is None:
        raise UsageError(
            f"--devices {text}: {name} is not known here; add its memory, such as {count}x{name}-24GB. "
            f"Known: {', '.join(_KNOWN_DEVICES)}"
        )
    memory = float(match[3]) if match[3] else known[2] if known else 0.0
    return DeviceKind(
        name=name,
        count=count,
        memory_bytes=int(memory * GIB),
        kind="cpu" if name.lower() == "cpu" else "cuda",
        peak_float32=known[0] if known else None,
        peak_half=known[1] if known else None,
    )


def describe_devices(machine: Machine) -> DeviceKind:
    """This machine's devices, the smallest standing for all."""
    if not machine.devices:
        return DeviceKind("CPU", 1, machine.memory_bytes, "cpu")
    smallest = min(machine.devices, key=lambda device: device.memory_bytes)
    words = re.split(r"[\s-]+", smallest.name.upper())
    known = next((peaks for name, peaks in _KNOWN_DEVICES.items() if name in words), (None, None, 0.0))
    return DeviceKind(
        smallest.name, len(machine.devices), smallest.memory_bytes, machine.kind, known[0], known[1]
    )  # fmt: skip


def build_work(
    recipe: Recipe, shape: ModelShape | None, kind: Literal["cuda", "mps", "cpu"], length: int, num_processes: int
) -> Work:
    """A micro-batch of the recipe at `length` padded tokens, on one process of `num_processes`."""
    share = math.ceil(recipe.train_batch_size / num_processes)
    micro_batch = min(share, recipe.per_device_batch_size)
    if recipe.per_device_batch_tokens is not None:
        micro_batch = max(1, min(micro_batch, recipe.per_device_batch_tokens // length))
    dropout = recipe.dropout if recipe.dropout is not None else (shape.dropout if shape is not None else 0.0)
    # What training/models/cpu_dropout.py exchanges on a CPU: masks of two bytes, and attention that bf16 makes the faster one.
    exchanges = kind == "cpu" and recipe.dropout_masks == "bytes" and not recipe.torch_compile
    keeps_attention = recipe.attn_implementation == "eager" or (kind == "cpu" and dropout > 0)
    if exchanges and recipe.mixed_precision == "bf16" and recipe.attn_implementation is None:
        keeps_attention = True
    return Work(
        num_examples=micro_batch,
        length=length,
        num_micro_batches=math.ceil(share / micro_batch),
        mixed_precision=recipe.mixed_precision,
        gradient_checkpointing=recipe.gradient_checkpointing,
        keeps_attention=keeps_attention,
        mask_bytes=0 if dropout == 0 else 2 if exchanges else 4 if kind == "cpu" else 1,
        cuts_last_layer=shape is not None
        and shape.reads_first_token
        and recipe.attn_implementation in (None, "eager", "sdpa"),
    )


def count_flops(shape: ModelShape, num_tokens: float, length: float, gradient_checkpointing: bool = False) -> float:
    """Operations of forward and backward over `num_tokens` tokens in sequences of `length`.

    6 for each parameter in a matrix product that a token meets, and 12 x layers x hidden x length for each token's attention
    (Chowdhery et al. 2022, "PaLM", appendix B; half of the latter for a decoder's triangle). Recomputing the forward
    costs a third more (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """
    in_products = shape.num_layers * (shape.layer_parameters - shape.idle_parameters)
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_size * length * (0.5 if shape.is_decoder else 1)
    return (6 * in_products + attention) * num_tokens * (4 / 3 if gradient_checkpointing else 1)


def count_communication(
    strategy: Strategy, shape: ModelShape, num_processes: int, num_micro_batches: int, mixed_precision: str
) -> int:
    """Bytes that each device sends in one step.

    A ring moves (P-1)/P of the data for a gather or a reduce-scatter and twice that for an all-reduce (Patarasuk and
    Yuan 2009). DDP all-reduces the gradients once a step. ZeRO-1 and 2 reduce-scatter gradients and gather weights: the
    same volume. ZeRO-3 and FSDP gather the weights twice for each micro-batch and scatter gradients: 1.5 times the volume
    (Rajbhandari et al. 2020, section 7).
    """
    if num_processes == 1:
        return 0
    ring = (num_processes - 1) / num_processes
    base = strategy.removesuffix(" offload")
    size = 4 if mixed_precision == "no" or base == "DDP" else 2
    if base in ("one process", "DDP", "ZeRO-1", "ZeRO-2"):
        return int(2 * ring * size * shape.num_parameters)
    # FSDP reduces gradients in float32 and only at the step's last micro-batch; ZeRO-3 reduces each time.
    reduces = 4 if base == "FSDP2" else size * num_micro_batches
    return int(ring * shape.num_parameters * (2 * size * num_micro_batches + reduces))


def count_examples(recipe: Recipe) -> int | None:
    """Examples that are trained on; None where the data is not in files.

    Raises:
        UnreadableData, OSError: a file can't be read.
    """
    if recipe.train_file is None:
        return None
    num_examples = sum(count_rows(path) for pattern in recipe.train_file for path in expand(pattern))
    if recipe.validation_file is None:
        num_examples -= round(num_examples * recipe.validation_fraction)
    return min(num_examples, recipe.max_train_samples or num_examples)


def count_planned_steps(recipe: Recipe, num_examples: int | None) -> tuple[int | None, int | None]:
    """Steps of an epoch and of the whole training, as far as they are known."""
    if not num_examples:
        return None, recipe.max_train_steps
    steps_per_epoch = count_steps_per_epoch(recipe, num_examples)
    return steps_per_epoch, count_steps(recipe, steps_per_epoch)


def estimate_data(recipe: Recipe) -> DataEstimate:
    """Rows and lengths of the training data, as far as this machine has it."""
    if recipe.train_file is None:
        return DataEstimate(recipe.max_train_samples, recipe.max_length, recipe.max_length, 0.0, "not on this machine")
    try:
        paths = [path for pattern in recipe.train_file for path in expand(pattern)]
        num_examples = count_examples(recipe)
        texts = []
        for path in paths[:4]:
            for row in read_head(path, _ROWS_SAMPLED // min(4, len(paths))).rows:
                pair = [row.get(recipe.text_column), row.get(recipe.text_pair_column or "")]
                texts.append(" ".join(text for text in pair if isinstance(text, str)))
    except (UnreadableData, OSError):
        return DataEstimate(recipe.max_train_samples, recipe.max_length, recipe.max_length, 0.0, "not readable here")
    if not texts or not num_examples:
        return DataEstimate(num_examples or None, recipe.max_length, recipe.max_length, 0.0, "no rows")
    lengths, source = count_tokens(texts, recipe)
    return DataEstimate(
        num_examples, sum(lengths) / len(lengths), max(lengths), estimate_padding(lengths, recipe), source
    )


def count_tokens(texts: Sequence[str], recipe: Recipe) -> tuple[list[int], str]:
    """Tokens of each text, cut to max_length: by the model's own tokenizer.json, or from the number of characters."""
    path = Path(recipe.tokenizer_name or recipe.model_name_or_path) / "tokenizer.json"
    if path.is_file():
        try:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
        except Exception:  # The tokenizers package raises bare Exceptions.
            pass
        else:
            return [min(length, recipe.max_length) for length in lengths], f"tokenizer, {len(texts)} rows"
    lengths = [
        min(recipe.max_length, round(len(text) / _CHARACTERS_PER_TOKEN) + _SPECIAL_TOKENS) for text in texts
    ]  # fmt: skip
    return lengths, f"characters, {len(texts)} rows"


def estimate_padding(lengths: Sequence[int], recipe: Recipe) -> float:
    """Share of padding when the lengths are batched as training/data/plan.py does: windows sorted by length, then cut."""
    shuffled = list(lengths)
    random.Random(recipe.seed).shuffle(shuffled)
    window = recipe.length_window * recipe.train_batch_size
    size = min(recipe.per_device_batch_size, recipe.train_batch_size)
    real = padded = 0
    for start in range(0, len(shuffled), window):
        part = sorted(shuffled[start : start + window])
        for piece in (part[number : number + size] for number in range(0, len(part), size)):
            real += sum(piece)
            padded += len(piece) * piece[-1]
    return 1 - real / padded if padded else 0.0


def build_plan(
    recipe: Recipe,
    shape: ModelShape,
    devices: DeviceKind,
    num_nodes: int,
    data: DataEstimate,
    mfu: float,
    host_bytes: int,
) -> Plan:
    """All the arithmetic of a recipe.

    Args:
        devices: of one node.
        host_bytes: memory of one node, for what offloading moves there.
    """
    num_processes = devices.count * num_nodes
    work = build_work(recipe, shape, devices.kind, recipe.max_length, num_processes)
    overhead = CPU_OVERHEAD_BYTES if devices.kind == "cpu" else GPU_OVERHEAD_BYTES
    steps_per_epoch, num_steps = count_planned_steps(recipe, data.num_examples)
    padded_length = data.mean_length / (1 - data.padding)
    flops_per_step = count_flops(
        shape, recipe.train_batch_size * padded_length, padded_length, recipe.gradient_checkpointing
    )
    flops = None if num_steps is None else flops_per_step * num_steps
    peak = devices.teraflops(recipe.mixed_precision)
    seconds = None if flops is None or peak is None else flops / (peak * 1e12 * mfu * num_processes)
    strategies = []
    for strategy in STRATEGIES:
        if (strategy == "one process") != (num_processes == 1) and not (num_processes == 1 and "offload" in strategy):
            continue
        memory = plan_memory(shape, strategy, work, num_processes)
        on_host = fits_host(memory, devices.count, host_bytes)
        strategies.append(
            StrategyPlan(
                memory,
                fits(memory, devices.memory_bytes, overhead) and on_host,
                largest_batch(shape, strategy, work, num_processes, devices.memory_bytes, overhead) if on_host else 0,
                count_communication(strategy, shape, num_processes, work.num_micro_batches, recipe.mixed_precision),
            )
        )
    return Plan(
        shape=shape,
        data=data,
        devices=devices,
        num_nodes=num_nodes,
        num_processes=num_processes,
        micro_batch=work.num_examples,
        num_micro_batches=work.num_micro_batches,
        train_batch_size=recipe.train_batch_size,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        tokens=None if num_steps is None else int(num_steps * recipe.train_batch_size * data.mean_length),
        flops_per_step=flops_per_step,
        flops=flops,
        mfu=mfu,
        seconds=seconds,
        checkpoint_bytes=count_checkpoint_bytes(shape),
        final_bytes=count_final_bytes(shape),
        strategies=tuple(strategies),
        recommended=_recommend(strategies, list_candidates(devices.kind, num_processes, num_nodes)),
    )


def _recommend(strategies: Sequence[StrategyPlan], candidates: Sequence[tuple[Strategy, str]]) -> str | None:
    """The first candidate of `run` that fits."""
    fitting = {plan.memory.strategy for plan in strategies if plan.fits}
    return next((strategy for strategy, _ in candidates if strategy in fitting), None)
