"""The model's folder: complete, with a tokenizer or an image processor, and with enough positions for the recipe's texts."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from onecurve.launcher.errors import LauncherError, UncountableModel
from onecurve.launcher.facts.model_files import find_config
from onecurve.launcher.facts.recipes import find_processor_kind, predicts_tokens
from onecurve.launcher.facts.shape import ModelShape, load_shape
from onecurve.launcher.preflight.findings import Finding, error, warning
from onecurve.launcher.preflight.hub import looks_like_path
from onecurve.launcher.units import MIB

if TYPE_CHECKING:
    from onecurve.training.config import Recipe


def check_model(recipe: Recipe) -> tuple[ModelShape | None, list[Finding]]:
    """The model's shape, if its config.json is on this machine, and the problems of its folder."""
    name, findings = recipe.model_name_or_path, []
    folder = Path(name)
    if not folder.exists() and looks_like_path(name):
        return None, [error(f"model_name_or_path: {name!r} does not exist; give a model folder or a hub name")]
    if folder.is_file():
        return None, [error(f"model_name_or_path: {name!r} is a file; give the folder that holds config.json")]
    if folder.is_dir():
        findings += _check_model_folder(folder, recipe)
    elif find_config(name) is None:
        return None, []  # A name on the hub: hub.py checks it.
    try:
        shape = load_shape(name, predicts_tokens(recipe))
    except UncountableModel as problem:
        return None, [*findings, warning(f"memory and disk are not checked: {problem}")]
    except LauncherError as problem:
        return None, findings or [error(str(problem))]
    if shape.num_positions and recipe.max_length > shape.num_positions:
        findings.append(
            error(f"max_length: {recipe.max_length} is more than the {shape.num_positions} positions of {name}")
        )
    return shape, findings


def describe_model(recipe: Recipe) -> list[str]:
    """A line about the model's size, if its config.json is on this machine."""
    config = find_config(recipe.model_name_or_path)
    try:
        shape = load_shape(recipe.model_name_or_path, predicts_tokens(recipe))
    except LauncherError:
        return []
    weights = sum(path.stat().st_size for path in config.parent.glob("*.safetensors")) if config is not None else 0
    about = "" if shape.is_exact else "about "
    files = f", {weights / MIB:,.0f} MiB of weights" if weights else ""
    unknown = "" if shape.knows_activations else "; memory of its activations is unknown"
    return [f"model     {shape.model_type}, {about}{shape.num_parameters / 1e6:,.1f} M parameters{files}{unknown}"]


def _check_model_folder(folder: Path, recipe: Recipe) -> list[Finding]:
    if not (folder / "config.json").is_file():
        return [
            error(
                f"model_name_or_path: {str(folder)!r} has no config.json, so it is not a model; give a folder that has one"
            )
        ]
    findings = []
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [path.name for pattern in ("*.bin", "*.pt") for path in folder.glob(pattern)]
        findings.append(
            error(
                f"model_name_or_path: {str(folder)!r} has "
                + (
                    "only pickled weights, which can run code when loaded; convert them with save_pretrained"
                    if pickled
                    else "a config.json but no weights (*.safetensors); download them"
                )
            )
        )
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            findings.append(error(f"{index} can't be read; download the model again"))
            continue
        missing = sorted(named - {path.name for path in weights})
        if missing:
            findings.append(
                error(
                    f"{folder}: {len(missing)} weight files are missing, the first is {missing[0]}; download them again"
                )
            )
    findings += [error(problem) for problem in map(find_truncation, weights) if problem is not None]
    kind, owner = find_processor_kind(recipe), Path(recipe.tokenizer_name) if recipe.tokenizer_name else folder
    if owner.is_dir() and not any((owner / name).is_file() for name in kind.files):
        findings.append(error(f"{str(owner)!r} has no {kind.name} files; {kind.advice}"))
    return findings


def find_truncation(path: Path) -> str | None:
    """Compare a safetensors file's size with its header; returns the problem, or None if the file is complete."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                return f"{path} is not a safetensors file or is truncated; download it again"
            header = json.loads(file.read(size))
        expected = 8 + size + max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
        )  # fmt: skip
    except (OSError, ValueError, KeyError, struct.error, TypeError):
        return f"{path} is not a safetensors file or is truncated; download it again"
    actual = path.stat().st_size
    return None if actual == expected else f"{path} has {actual:,} bytes instead of {expected:,}; download it again"
