"""What a model's files say of its size: its config.json, the headers of its weights, or the model itself without weights."""

from __future__ import annotations

import functools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

_DESCRIBE = Path(__file__).resolve().parents[2] / "training" / "describe_model.py"

# Largest header of a safetensors file (the format's own limit).
_MAX_HEADER_BYTES = 100_000_000


def find_config(model: str) -> Path | None:
    """The model's config.json: in its folder, the file itself, or the newest snapshot in the hub's cache."""
    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir():
        return path / "config.json" if (path / "config.json").is_file() else None
    from huggingface_hub import constants

    found = Path(constants.HF_HUB_CACHE).glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def count_stored_parameters(folder: Path) -> int:
    """Parameters of a model's folder, from the headers of its safetensors files; 0 if there are none, or one can't be read.

    Other files beside the model's are not counted: the moments of a checkpoint, or the same weights in another format.
    """
    total = 0
    for path in sorted(folder.glob("model*.safetensors")) or folder.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(size, _MAX_HEADER_BYTES)))
            for name, entry in header.items():
                if name != "__metadata__":
                    product = 1
                    for length in entry["shape"]:
                        product *= length
                    total += product
        except (OSError, ValueError, KeyError, struct.error):
            return 0
    return total


def describe_without_weights(config: Path) -> dict[str, Any]:
    """The answer of training/describe_model.py: numbers of the model, or "problem". It takes seconds, once a process."""
    return _describe(config.absolute(), config.stat().st_mtime_ns)


@functools.cache
def _describe(config: Path, version: int) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, str(_DESCRIBE), str(config)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(result.stdout.strip().rpartition("\n")[2])
    except ValueError:
        return {"problem": result.stderr.strip().rpartition("\n")[2] or f"exit code {result.returncode}"}
    return answer
