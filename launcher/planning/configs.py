"""Accelerate YAMLs, those in accelerate_configs/ or others: find them by name, read them, and see which strategy they use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from onecurve.launcher.errors import UnknownTopology
from onecurve.launcher.planning.memory import Strategy
from onecurve.training.parallel_sizes import SIZES


def find_configs(root: Path) -> dict[str, Path]:
    """The YAMLs in accelerate_configs/, by name."""
    return {path.stem: path for path in sorted((root / "accelerate_configs").glob("*.yaml"))}


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of an accelerate YAML.

    Raises:
        UnknownTopology: it can't be read, or is not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UnknownTopology(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UnknownTopology(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UnknownTopology(f"{path}: must be a mapping of accelerate's keys to values")
    return content


def resolve_config(root: Path, name: str) -> Path:
    """The YAML that `--topology` names: one of the project's, or a path.

    Raises:
        UnknownTopology: there is no such YAML; the message lists the valid names.
    """
    configs = find_configs(root)
    if name in configs:
        return configs[name]
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    from onecurve.training.config import find_nearest

    nearest = find_nearest(name, list(configs))
    hint = f"did you mean {nearest}? " if nearest else ""
    raise UnknownTopology(f"--topology {name}: unknown; {hint}Valid: {', '.join(configs)}, or the path of a YAML")


def read_strategy(content: Mapping[str, Any], path: Path = Path("the YAML")) -> Strategy:
    """The strategy that an accelerate YAML makes accelerate use.

    Raises:
        UnknownTopology: a section or a stage is not valid.
    """
    kind = str(content.get("distributed_type", "NO")).upper()
    if kind == "DEEPSPEED":
        nested = _read_section(content, "deepspeed_config", path)
        if nested.get("deepspeed_config_file"):
            nested = _read_deepspeed_file(Path(str(nested["deepspeed_config_file"])), path)
        moved = {nested.get("offload_optimizer_device"), nested.get("offload_param_device")} & {"cpu", "nvme"}
        strategies: dict[str, tuple[Strategy, Strategy]] = {
            "0": ("DDP", "DDP"), "1": ("ZeRO-1", "ZeRO-1"), "2": ("ZeRO-2", "ZeRO-2 offload"),
            "3": ("ZeRO-3", "ZeRO-3 offload"),
        }  # fmt: skip
        stage = nested.get("zero_stage", 2)
        if str(stage) not in strategies:
            raise UnknownTopology(f"{path}: deepspeed_config: zero_stage must be 0, 1, 2 or 3, got {stage!r}")
        return strategies[str(stage)][bool(moved)]
    if kind == "FSDP":
        nested = _read_section(content, "fsdp_config", path)
        moved_to_host = nested.get("fsdp_offload_params", nested.get("offload_params"))
        if read_parallel_sizes(content, path).get("dp_replicate_size", 1) > 1:
            return "HSDP offload" if moved_to_host else "HSDP"
        return "FSDP2 offload" if moved_to_host else "FSDP2"
    return "one process" if kind == "NO" else "DDP"


def read_parallel_sizes(content: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The sizes that the YAML's parallelism_config gives, by their names in training/parallel_sizes.py; empty without one.

    Raises:
        UnknownTopology: one is not a whole number of 1 or more.
    """
    nested = _read_section(content, "parallelism_config", path)
    named = {name: nested[f"parallelism_config_{name}"] for name in SIZES if f"parallelism_config_{name}" in nested}
    return {name: _read_number(size, f"{path}: parallelism_config_{name}") for name, size in named.items()}


def _read_section(content: Mapping[str, Any], section: str, path: Path) -> dict[str, Any]:
    nested = content.get(section) or {}
    if not isinstance(nested, dict):
        raise UnknownTopology(f"{path}: {section} must be a mapping of keys to values")
    return nested


def _read_deepspeed_file(file: Path, path: Path) -> dict[str, Any]:
    """Stage and offload from DeepSpeed's own JSON, under the names of accelerate's keys."""
    try:
        zero = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {})
        devices = {key: (zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param")}
        return {"zero_stage": zero.get("stage", 0), **{f"{key}_device": device for key, device in devices.items()}}
    except (OSError, ValueError, AttributeError) as error:
        raise UnknownTopology(
            f"{path}: deepspeed_config_file {str(file)!r} can't be read as DeepSpeed's JSON: {error}"
        ) from None


def read_num_processes(content: Mapping[str, Any], path: Path) -> int:
    """The number of processes that the YAML asks for; 2 if it does not say.

    Raises:
        UnknownTopology: it is not a whole number of 1 or more.
    """
    return _read_number(content.get("num_processes", 2), f"{path}: num_processes")


def _read_number(number: object, what: str) -> int:
    if isinstance(number, bool) or not str(number).isdigit() or int(str(number)) < 1:
        raise UnknownTopology(f"{what} must be a whole number of 1 or more, got {number!r}")
    return int(str(number))
