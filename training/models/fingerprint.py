"""Which model a training began with: digests of its files, the same on every topology, for environment.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from onecurve.training.models.adapters import find_adapter
from onecurve.training.recipe import Recipe

_CONFIG = "config.json"

# Of a config, what says who wrote it and not what the model is.
_UNRELATED = ("_name_or_path", "transformers_version")

# Weights up to this size are digested whole; of larger ones as many bytes are, in blocks that lie evenly.
MOST_BYTES = 256 * 2**20
_BLOCK = 2**20


def fingerprint_model(recipe: Recipe) -> dict[str, Any]:
    """Digests of the model that the recipe names: "config", "weights", "weights_read" (all, or a sample of large ones).

    With an adapter to go on with: "adapter" as well. What can't be found (a model of the hub without a cache) is left out.
    """
    adapter = find_adapter(recipe)
    folder = _find_folder(recipe.model_name_or_path if adapter is None else adapter.base, recipe.model_revision)
    found: dict[str, Any] = {}
    if folder is not None:
        found = _fingerprint_folder(folder)
    if adapter is not None:
        found["adapter"] = digest_files(sorted(adapter.folder.glob("*.safetensors")))
    return found


def _fingerprint_folder(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    content = json.dumps({key: config[key] for key in sorted(config.keys() - set(_UNRELATED))}, sort_keys=True)
    files = sorted(folder.glob("*.safetensors"))
    is_whole = _count_bytes(files) <= MOST_BYTES
    return {
        "config": hashlib.sha256(content.encode()).hexdigest()[:16],
        "weights": digest_files(files),
        "weights_read": "all" if is_whole else "a sample",
    }


def _find_folder(name: str, revision: str) -> Path | None:
    """A local folder, or where the hub's client keeps the model that was just loaded."""
    if (Path(name) / _CONFIG).is_file():
        return Path(name)
    try:
        found = cached_file(name, _CONFIG, revision=revision, local_files_only=True)
    except OSError:  # Of a hub's model that no cache keeps. It was loaded: nothing fails for want of its digest.
        return None
    return None if found is None else Path(found).parent


def digest_files(paths: Sequence[Path], most_bytes: int = MOST_BYTES) -> str:
    """16 hex digits of the contents of files, one behind the other; of about `most_bytes` where they are larger."""
    digest = hashlib.sha256()
    total = _count_bytes(paths)
    stride = _BLOCK if total <= most_bytes else _BLOCK * -(-total // most_bytes)
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for position in _list_positions(size, stride):
                file.seek(position)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def _list_positions(size: int, stride: int) -> Iterable[int]:
    """Where blocks begin; the last one of a file is among them."""
    yield from range(0, size, stride)
    if stride > _BLOCK and size > _BLOCK:
        yield size - _BLOCK


def _count_bytes(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
