"""What a check finds, and how bad it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Something wrong, or likely to be; the message holds the fix."""

    severity: Literal["error", "warning"]
    message: str


def error(message: str) -> Finding:
    """What a training would end on."""
    return Finding("error", message)


def warning(message: str) -> Finding:
    """What may be meant so."""
    return Finding("warning", message)
