"""Every problem that can be found before a device is held: all of them at once, errors first, each with its fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.accelerate_keys import SECTIONS, TOP_LEVEL
from launcher.command import DEFAULT_PORT, is_port_free
from launcher.data_files import FORMATS, UnreadableData, expand, read_head
from launcher.errors import LauncherError
from launcher.machine import GIB, Machine
from launcher.memory import CPU_OVERHEAD_BYTES, GPU_OVERHEAD_BYTES, USABLE_SHARE, fits, largest_batch, plan_memory
from launcher.plan import build_work
from launcher.shape import ModelShape, find_config, load_shape
from launcher.topology import Topology, find_configs, read_yaml

if TYPE_CHECKING:
    from training.config import Recipe

_ROWS_READ = 200
# Prefixes that accelerate accepts in front of a section's keys, or adds where they are missing.
_PREFIXES = {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_"}


@dataclass(frozen=True)
class Finding:
    """Something wrong, or likely to be; the message holds the fix."""

    severity: Literal["error", "warning"]
    message: str


def _error(message: str) -> Finding:
    return Finding("error", message)


def _warning(message: str) -> Finding:
    return Finding("warning", message)


def check_recipe(recipe: Recipe, topology: Topology, machine: Machine) -> list[Finding]:
    """Problems of a recipe on a topology on this machine, errors first."""
    shape, findings = _check_model(recipe)
    findings += check_yaml(topology.path)
    findings += _check_data(recipe)
    findings += _check_output(recipe)
    findings += _check_packages(recipe, topology, machine)
    findings += _check_processes(recipe, topology, machine)
    if shape is not None:
        findings += _check_memory(recipe, topology, machine, shape)
        findings += _check_disk(recipe, shape)
    return sorted(findings, key=lambda finding: finding.severity)


def check_inputs(recipe: Recipe) -> list[Finding]:
    """Problems that no other machine would cure: the model, the data, the run directory. Errors first."""
    findings = [*_check_model(recipe)[1], *_check_data(recipe), *_check_output(recipe)]
    return sorted(findings, key=lambda finding: finding.severity)


def check_machine(root: Path, machine: Machine) -> list[Finding]:
    """Problems of this machine and this installation, whatever the recipe."""
    findings = _check_versions()
    for path in find_configs(root).values():
        findings += check_yaml(path)
    for device in machine.devices:
        findings += _check_device(device.index, device.used_bytes, device.memory_bytes)
    findings += _check_affinity(machine)
    if not is_port_free(DEFAULT_PORT):
        findings.append(_warning(f"port {DEFAULT_PORT} is taken; onecurve run takes another, a plain launch may not"))
    cache = Path(os.environ.get("ONECURVE_CACHE", Path.home() / ".cache" / "onecurve"))
    findings += _check_writable("$ONECURVE_CACHE, the cache of prepared data,", cache)
    for name in ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION"):
        if name in os.environ:
            findings.append(_warning(f"${name} is set and overrules what a training sets itself: unset {name}"))
    return sorted(findings, key=lambda finding: finding.severity)


# The model ---------------------------------------------------------------------------------------------------


def _check_model(recipe: Recipe) -> tuple[ModelShape | None, list[Finding]]:
    name, findings = recipe.model_name_or_path, []
    folder = Path(name)
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return None, [_error(f"model_name_or_path: {name!r} does not exist; give a model folder or a hub name")]
    if folder.is_file():
        return None, [_error(f"model_name_or_path: {name!r} is a file; give the folder that holds config.json")]
    if folder.is_dir():
        findings += _check_model_folder(folder, recipe)
    elif find_config(name) is None:
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            return None, [
                _error(
                    f"model_name_or_path: {name!r} is not in the hub's cache and HF_HUB_OFFLINE is set; `onecurve fetch` the "
                    "recipe where there is a network, or give a folder"
                )
            ]
        return None, [
            _warning(
                f"model_name_or_path: {name!r} is not on this machine and will be fetched from the hub at the start"
            )
        ]
    try:
        shape = load_shape(name, num_labels=2)
    except LauncherError as error:
        known = any(finding.severity == "error" for finding in findings)
        return None, findings if known else [*findings, _error(str(error))]
    if shape.num_positions and recipe.max_length > shape.num_positions:
        findings.append(
            _error(
                f"max_length: {recipe.max_length} is more than the model's {shape.num_positions} positions; lower it"
            )
        )
    return shape, findings


def _check_model_folder(folder: Path, recipe: Recipe) -> list[Finding]:
    if not (folder / "config.json").is_file():
        return [_error(f"model_name_or_path: {str(folder)!r} has no config.json, so it is no model")]
    findings = []
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [path.name for pattern in ("*.bin", "*.pt") for path in folder.glob(pattern)]
        findings.append(
            _error(
                f"model_name_or_path: {str(folder)!r} has "
                + (
                    "only pickled weights, which can run code when loaded; convert them once with save_pretrained"
                    if pickled
                    else "a config.json but no weights (*.safetensors); fetch them"
                )
            )
        )
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            findings.append(_error(f"{index} can't be read; fetch the model again"))
            continue
        missing = sorted(named - {path.name for path in weights})
        if missing:
            findings.append(
                _error(f"{folder}: {len(missing)} weight files are missing, {missing[0]} first; fetch again")
            )
    findings += [_error(problem) for problem in map(find_truncation, weights) if problem is not None]
    tokenizer = Path(recipe.tokenizer_name) if recipe.tokenizer_name else folder
    names = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
    if tokenizer.is_dir() and not any((tokenizer / name).is_file() for name in names):
        findings.append(_error(f"{str(tokenizer)!r} has no tokenizer files; give tokenizer_name"))
    return findings


def find_truncation(path: Path) -> str | None:
    """What is wrong with a safetensors file's size, judged by its header; None if it is whole."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                return f"{path} is no safetensors file or is cut off; fetch it again"
            header = json.loads(file.read(size))
        expected = 8 + size + max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
        )  # fmt: skip
    except (OSError, ValueError, KeyError, struct.error, TypeError):
        return f"{path} is no safetensors file or is cut off; fetch it again"
    actual = path.stat().st_size
    return None if actual == expected else f"{path} has {actual:,} bytes instead of {expected:,}; fetch it again"


# The accelerate YAML -----------------------------------------------------------------------------------------


def check_yaml(path: Path) -> list[Finding]:
    """Keys that accelerate would ignore without a word, and settings that would not do what they say."""
    try:
        content = read_yaml(path)
    except LauncherError as error:
        return [_error(str(error))]
    findings = [_error(f"{path}: {_unknown(key, TOP_LEVEL)}") for key in content if key not in TOP_LEVEL]
    for section, valid in SECTIONS.items():
        nested = content.get(section)
        if nested is None:
            continue
        if not isinstance(nested, dict):
            findings.append(_error(f"{path}: {section} must be a mapping of keys to values"))
            continue
        prefix = _PREFIXES.get(section, "")
        findings += [
            _error(f"{path}: {section}: {_unknown(key, valid)}")
            for key in nested
            if str(key) not in valid and f"{prefix}{key}" not in valid
        ]
    kind = str(content.get("distributed_type", "NO")).upper()
    findings += _check_meaning(path, kind, content)
    return findings


def _check_meaning(path: Path, kind: str, content: dict[str, Any]) -> Iterable[Finding]:
    if kind == "MULTI_CPU":
        yield _error(
            f"{path}: MULTI_CPU starts one process without a word; use MULTI_GPU with use_cpu: true (multi_cpu.yaml)"
        )
    for section, needed in (("fsdp_config", "FSDP"), ("deepspeed_config", "DEEPSPEED")):
        if content.get(section) and kind != needed:
            yield _error(f"{path}: {section} is ignored with distributed_type {kind}; set distributed_type: {needed}")
    fsdp = content.get("fsdp_config")
    if isinstance(fsdp, dict) and str(fsdp.get("fsdp_version", 1)) != "2":
        yield _error(f"{path}: fsdp_config: without fsdp_version: 2 accelerate takes FSDP1; set fsdp_version: 2")
    deepspeed = content.get("deepspeed_config")
    if isinstance(deepspeed, dict):
        for key in ("gradient_accumulation_steps", "gradient_clipping"):
            if key in deepspeed:
                yield _error(
                    f"{path}: deepspeed_config: {key} belongs to the recipe (train_batch_size, max_grad_norm); remove"
                )
    if str(content.get("mixed_precision", "no")).lower() not in ("no", "false"):
        yield _error(f"{path}: mixed_precision is mathematics and belongs to the recipe; set it to 'no' here")


def _unknown(key: object, valid: Sequence[str]) -> str:
    from training.config import find_nearest

    nearest = find_nearest(str(key), list(valid))
    return f"{key}: unknown key, accelerate would ignore it" + (
        f"; did you mean {nearest}?" if nearest else "; remove it"
    )


# Data --------------------------------------------------------------------------------------------------------


def _check_data(recipe: Recipe) -> list[Finding]:
    findings: list[Finding] = []
    for key in ("train_file", "validation_file", "test_file"):
        for pattern in getattr(recipe, key) or ():
            paths = expand(pattern)
            if not paths:
                findings.append(_error(f"{key}: no file matches {pattern!r}"))
            for path in paths:
                findings += [_error(message) for message in _check_data_file(key, path, recipe)]
    name = recipe.dataset_name
    if name is not None and not Path(name).is_dir():
        if name.startswith((".", "/", "~")):
            findings.append(_error(f"dataset_name: {name!r} does not exist"))
        elif os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") and not _is_dataset_cached(name):
            findings.append(
                _error(
                    f"dataset_name: {name!r} is not in the cache and HF_HUB_OFFLINE is set; `onecurve fetch` the recipe where "
                    "there is a network, or give train_file"
                )
            )
    return findings


def _is_dataset_cached(name: str) -> bool:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    stem = name.replace("/", "___")
    return (home / "datasets" / stem).exists() or any((home / "hub").glob(f"datasets--{name.replace('/', '--')}"))


def _check_data_file(key: str, path: Path, recipe: Recipe) -> list[str]:
    from training.config import find_nearest

    if not path.exists():
        folder = path.parent if path.parent.is_dir() else Path()
        nearest = find_nearest(path.name, [other.name for other in folder.iterdir() if other.is_file()])
        return [f"{key}: {str(path)!r} does not exist" + (f"; did you mean {nearest!r}?" if nearest else "")]
    if path.is_dir():
        return [f"{key}: {str(path)!r} is a folder; for a save_to_disk folder use dataset_name"]
    if path.suffix.lower() not in FORMATS:
        return [f"{key}: {str(path)!r} is none of {', '.join(FORMATS)}; rename or convert it"]
    if path.stat().st_size == 0:
        return [f"{key}: {str(path)!r} is empty"]
    try:
        head = read_head(path, _ROWS_READ)
    except UnreadableData as error:
        return [f"{key}: {error}"]
    if not head.rows:
        return [f"{key}: {str(path)!r} has no rows"]
    labels = [recipe.label_column] if isinstance(recipe.label_column, str) else list(recipe.label_column)
    texts = [recipe.text_column] + ([recipe.text_pair_column] if recipe.text_pair_column else [])
    problems = []
    for setting, names in (("text_column", texts), ("label_column", labels)):
        for name in names:
            if name not in head.columns:
                nearest = find_nearest(name, head.columns)
                problems.append(
                    f"{path}: {setting} {name!r} is not a column; it has {', '.join(head.columns)}"
                    + (f"; did you mean {nearest}?" if nearest else "")
                )
    if problems:
        return problems
    for number, row in enumerate(head.rows, start=1):
        for name in texts:
            text = row.get(name)
            if not isinstance(text, str) or not text.strip():
                what = "is empty" if text is None or isinstance(text, str) else f"holds {type(text).__name__}, not text"
                return [f"{path}, row {number}: text column {name!r} {what}; fill or remove the row"]
        for name in labels:
            problem = _check_label(row.get(name), recipe.problem_type)
            if problem is not None:
                return [f"{path}, row {number}: label column {name!r} {problem}"]
    return []


def _check_label(label: object, problem_type: str) -> str | None:
    if label is None or label == "":
        return "is empty; fill or remove the row"
    if problem_type == "regression":
        try:
            float(str(label))
        except ValueError:
            return f"holds {label!r}, which is no number"
    if problem_type == "single_label_classification" and isinstance(label, (float, list, dict)):
        return f"holds {type(label).__name__} {label!r}; classes are integers or strings (see problem_type)"
    return None


# Where the results go ----------------------------------------------------------------------------------------


def _check_output(recipe: Recipe) -> list[Finding]:
    path = Path(recipe.output_dir)
    findings = _check_writable("output_dir", path)
    if recipe.resume not in ("auto", "never") and not (Path(recipe.resume) / "manifest.json").is_file():
        findings.append(
            _error(f"resume: {recipe.resume!r} is no checkpoint; it is auto, never or a checkpoint's folder")
        )
    if (path / "config.yaml").is_file() and not findings:
        findings += _compare_with_run(recipe, path)
    return findings


def _compare_with_run(recipe: Recipe, path: Path) -> list[Finding]:
    from training.config import FREE_KEYS, RecipeError, load_recipe

    if recipe.resume == "never":
        return [_error(f"output_dir {str(path)!r} holds a run already, and resume is never; choose another output_dir")]
    try:
        here = load_recipe(str(path / "config.yaml")).recipe
    except RecipeError as error:
        return [_error(f"output_dir {str(path)!r} holds a run whose config.yaml is not valid: {error}")]
    differing = [
        f"{key} ({getattr(here, key)!r} there, {getattr(recipe, key)!r} here)"
        for key in type(here).model_fields
        if key not in FREE_KEYS and getattr(here, key) != getattr(recipe, key)
    ]
    if differing and recipe.resume == "auto":
        return [
            _error(
                f"output_dir {str(path)!r} holds a run of another recipe: {'; '.join(differing)}. Choose another output_dir"
            )
        ]
    return []


def _check_writable(name: str, path: Path) -> list[Finding]:
    nearest = _nearest_existing(path)
    if not nearest.is_dir():
        return [_error(f"{name} {str(path)!r}: {str(nearest)!r} is a file; choose another folder")]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [_error(f"{name} {str(path)!r}: {str(nearest)!r} is not writable; choose another folder")]
    return []


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _check_disk(recipe: Recipe, shape: ModelShape) -> list[Finding]:
    """A checkpoint holds weights and two moments in float32; a new one is written before an old one goes."""
    folder = _nearest_existing(Path(recipe.output_dir))
    free = shutil.disk_usage(folder).free
    kept = (recipe.save_total_limit or 1) + 1 + (recipe.metric_for_best_model is not None)
    needed = 12 * shape.num_parameters * kept + 4 * shape.num_parameters
    if free < needed:
        return [
            _error(
                f"output_dir: {kept} checkpoints and final/ take {needed / GIB:.1f} GiB, {folder} has {free / GIB:.1f} free; "
                "lower save_total_limit or choose another output_dir"
            )
        ]
    if recipe.checkpointing_steps is not None and recipe.save_total_limit is None and free < 20 * needed:
        return [_warning("save_total_limit is not set: every checkpoint is kept, "
                         f"{12 * shape.num_parameters / GIB:.2f} GiB each, {free / GIB:.0f} GiB are free")]  # fmt: skip
    return []


# Devices and processes ---------------------------------------------------------------------------------------


def _check_memory(recipe: Recipe, topology: Topology, machine: Machine, shape: ModelShape) -> list[Finding]:
    work = build_work(recipe, shape, machine.kind, recipe.max_length, topology.num_processes)
    plan = plan_memory(shape, topology.strategy, work, topology.num_processes)
    here = max(1, topology.num_processes // topology.num_machines)
    if machine.kind == "cuda" and not topology.uses_cpu:
        device, overhead = min(device.memory_bytes for device in machine.devices), GPU_OVERHEAD_BYTES
    else:
        device, overhead = machine.memory_bytes // here, CPU_OVERHEAD_BYTES
    if fits(plan, device, overhead):
        return []
    best = largest_batch(shape, topology.strategy, work, topology.num_processes, device, overhead)
    advice = (
        f"lower per_device_batch_size to {best} (nothing else changes), or"
        if best
        else "not even one example fits: take a sharded --topology (fsdp, deepspeed_zero3), more devices, or"
    )
    need = (plan.peak + overhead) / GIB
    room = device * USABLE_SHARE / GIB
    return [
        _warning(
            f"memory: {topology.strategy} with {work.num_examples} examples of {work.length} tokens needs about {need:.1f} GiB "
            f"of {room:.1f} usable on each device; {advice} set gradient_checkpointing: true"
        )
    ]


def _check_processes(recipe: Recipe, topology: Topology, machine: Machine) -> list[Finding]:
    findings = []
    if topology.num_processes > recipe.train_batch_size:
        findings.append(
            _warning(
                f"train_batch_size {recipe.train_batch_size} is less than {topology.num_processes} processes: "
                "some have nothing to do in each step; use fewer processes"
            )
        )
    here = topology.num_processes // topology.num_machines
    if topology.uses_cpu and here > machine.num_cores:
        findings.append(_warning(f"{here} processes share {machine.num_cores} cores and will wait for each other"))
    if machine.kind == "cuda" and not topology.uses_cpu:
        for device in machine.devices[:here]:
            findings += _check_device(device.index, device.used_bytes, device.memory_bytes)
        oldest = min(device.compute_capability for device in machine.devices)
        if recipe.mixed_precision == "bf16" and 0 < oldest < 8:
            findings.append(
                _error(f"mixed_precision: compute capability {oldest} has no bf16 (8.0 and newer have); use fp16 or no")
            )
    if recipe.mixed_precision == "fp16" and (topology.uses_cpu or machine.kind == "cpu"):
        findings.append(_error("mixed_precision: fp16 needs a GPU; use bf16 or no"))
    findings += _check_affinity(machine)
    return findings


def _check_device(index: int, used: int, total: int) -> list[Finding]:
    if used < total * 0.1:
        return []
    return [
        _warning(
            f"GPU {index}: {used / GIB:.1f} of {total / GIB:.0f} GiB are taken by somebody else (nvidia-smi shows who)"
        )
    ]


def _check_affinity(machine: Machine) -> list[Finding]:
    physical = os.cpu_count() or 1
    if machine.num_cores * 4 <= physical:
        return [
            _warning(
                f"this process may use {machine.num_cores} of {physical} cores: look at its CPU affinity or its limits"
            )
        ]
    return []


# Packages ----------------------------------------------------------------------------------------------------


def _check_packages(recipe: Recipe, topology: Topology, machine: Machine) -> list[Finding]:
    findings = _check_versions()
    if topology.strategy.startswith("ZeRO"):
        if importlib.util.find_spec("deepspeed") is None:
            findings.append(_error(f"{topology.name} needs DeepSpeed: pip install 'onecurve[deepspeed]'"))
        elif topology.uses_cpu and shutil.which("g++") is None:
            findings.append(
                _error(f"{topology.name} compiles an operator on a CPU and finds no g++; install a C++ compiler")
            )
    if recipe.report_to != "none" and importlib.util.find_spec(recipe.report_to) is None:
        findings.append(_error(f"report_to: {recipe.report_to} is not installed: pip install {recipe.report_to}"))
    flash = recipe.attn_implementation or ""
    if flash.startswith("flash_attention"):
        if machine.kind != "cuda" or topology.uses_cpu:
            findings.append(_error(f"attn_implementation: {flash} needs an NVIDIA GPU; use sdpa"))
        elif flash == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            findings.append(_error("attn_implementation: flash_attention_2 needs the package flash-attn; use sdpa"))
    return findings


def _check_versions() -> list[Finding]:
    """Requirements of the packages that a training stands on, against what is installed."""
    from packaging.requirements import InvalidRequirement, Requirement

    findings = []
    for package in ("onecurve", "accelerate", "transformers", "datasets"):
        try:
            lines = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            findings.append(_error(f"{package} is not installed in this environment: pip install {package}"))
            continue
        for line in lines:
            try:
                requirement = Requirement(line)
                if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                    continue
                version = importlib.metadata.version(requirement.name)
            except InvalidRequirement:
                continue
            except importlib.metadata.PackageNotFoundError:
                findings.append(
                    _error(f"{package} needs {requirement.name}, which is not installed: pip install '{requirement}'")
                )
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                findings.append(
                    _error(f"{package} needs {requirement}, but {version} is installed: pip install '{requirement}'")
                )
    return findings
