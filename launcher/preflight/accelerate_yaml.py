"""The accelerate YAML, key by key: keys that accelerate silently ignores, and settings that do not do what they say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from onecurve.launcher.errors import LauncherError
from onecurve.launcher.facts.accelerate_keys import SECTIONS, TOP_LEVEL
from onecurve.launcher.planning.configs import read_num_processes, read_parallel_sizes, read_yaml
from onecurve.launcher.preflight.findings import Finding, error
from onecurve.training.parallel_sizes import find_problem

# Prefixes of a section's keys, which accelerate adds if they are missing.
_PREFIXES = {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_"}


def check_yaml(path: Path) -> list[Finding]:
    """Keys that accelerate would silently ignore, and settings that would not do what they say."""
    try:
        content = read_yaml(path)
    except LauncherError as problem:
        return [error(str(problem))]
    findings = [error(f"{path}: {_unknown(key, TOP_LEVEL)}") for key in content if key not in TOP_LEVEL]
    for section, valid in SECTIONS.items():
        nested = content.get(section)
        if nested is None:
            continue
        if not isinstance(nested, dict):
            findings.append(error(f"{path}: {section} must be a mapping of keys to values"))
            continue
        prefix = _PREFIXES.get(section, "")
        findings += [
            error(f"{path}: {section}: {_unknown(key, valid)}")
            for key in nested
            if str(key) not in valid and f"{prefix}{key}" not in valid
        ]
    kind = str(content.get("distributed_type", "NO")).upper()
    findings += _check_meaning(path, kind, content)
    return findings


def _check_meaning(path: Path, kind: str, content: dict[str, Any]) -> Iterable[Finding]:
    if kind == "MULTI_CPU":
        yield error(
            f"{path}: with MULTI_CPU accelerate silently starts only one process; use MULTI_GPU with use_cpu: true"
        )
    for section, needed in (("fsdp_config", "FSDP"), ("deepspeed_config", "DEEPSPEED")):
        if content.get(section) and kind != needed:
            yield error(f"{path}: {section} is ignored with distributed_type {kind}; set distributed_type: {needed}")
    if content.get("parallelism_config"):
        yield from _check_parallelism(path, kind, content)
    fsdp = content.get("fsdp_config")
    if isinstance(fsdp, dict) and str(fsdp.get("fsdp_version", 1)) != "2":
        yield error(f"{path}: fsdp_config: without fsdp_version: 2 accelerate uses FSDP1; set fsdp_version: 2")
    deepspeed = content.get("deepspeed_config")
    if isinstance(deepspeed, dict):
        for key in ("gradient_accumulation_steps", "gradient_clipping"):
            if key in deepspeed:
                yield error(
                    f"{path}: deepspeed_config: {key} is set by the recipe (train_batch_size, max_grad_norm); remove it"
                )
    if str(content.get("mixed_precision", "no")).lower() not in ("no", "false"):
        yield error(f"{path}: mixed_precision is set by the recipe, because it changes results; set it to 'no' here")
    dynamo = content.get("dynamo_config")
    backend = dynamo.get("dynamo_backend") if isinstance(dynamo, dict) else content.get("dynamo_backend")
    if str(backend or "no").lower() not in ("no", "false"):
        yield error(f"{path}: dynamo_backend is not used; set torch_compile: true in the recipe, and remove it here")


def _check_parallelism(path: Path, kind: str, content: dict[str, Any]) -> Iterable[Finding]:
    if kind != "FSDP":
        yield error(f"{path}: parallelism_config needs distributed_type: FSDP and fsdp_version: 2, not {kind}")
    try:
        problem = find_problem(read_parallel_sizes(content, path), read_num_processes(content, path))
    except LauncherError as wrong:
        problem = str(wrong)
    if problem is not None:
        yield error(f"{path}: {problem}")


def _unknown(key: object, valid: Sequence[str]) -> str:
    from onecurve.training.config import find_nearest

    nearest = find_nearest(str(key), list(valid))
    return f"{key}: unknown key, accelerate would ignore it" + (
        f"; did you mean {nearest}?" if nearest else "; remove it"
    )
