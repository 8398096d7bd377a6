"""A problem that a check finds, and how severe it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """A problem or a likely one; the message says how to fix it."""

    severity: Literal["error", "warning"]
    message: str


def error(message: str) -> Finding:
    """A problem that would end the training."""
    return Finding("error", message)


def warning(message: str) -> Finding:
    """A likely problem, which may be intended."""
    return Finding("warning", message)
