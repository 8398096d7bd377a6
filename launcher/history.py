"""What a run directory says of its training, read without the training's own code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import NotARun


@dataclass(frozen=True)
class History:
    """A run directory's files, parsed. A training that is still going on may be in any of them half-way."""

    path: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def check_run(path: Path) -> Path:
    """The same path, if a training has written there.

    Raises:
        NotARun: it has not.
    """
    if not path.is_dir():
        raise NotARun(f"{str(path)!r} is no folder; give the output_dir of a training")
    if not (path / "config.yaml").is_file():
        raise NotARun(f"{str(path)!r} holds no config.yaml, so no training has been there; give its output_dir")
    return path


def load_history(path: Path) -> History:
    """Read a run directory.

    Raises:
        NotARun: no training has written there.
    """
    import yaml

    check_run(path)
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise NotARun(f"{path / 'config.yaml'} can't be read: {error}") from None
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    for line in read_metrics(path / "metrics.jsonl"):
        (steps if line["event"] == "train" else evaluations)[line["step"]] = line
    return History(
        path,
        settings if isinstance(settings, dict) else {},
        _read_json(path / "environment.json"),
        _read_json(path / "status.json"),
        list(steps.values()),
        list(evaluations.values()),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl; the last may be half written."""
    lines = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for row in text.splitlines():
        try:
            line = json.loads(row)
        except ValueError:
            continue
        if isinstance(line, dict) and line.get("event") in ("train", "eval") and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
