"""Printing for people: lines on stderr, and lines that wrap to the width of a terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# The width of "found", "chosen" and other labels in front of a fact.
LABEL_WIDTH = 10


def print_note(line: str) -> None:
    """Print a line of the launcher's own to stderr: stdout is for the training, a dry run's command or a program's JSON."""
    print(line, file=sys.stderr, flush=True)


def wrap_fact(fact: str) -> str:
    """A fact as many lines as the terminal needs, indented behind its label; in a file it stays one line."""
    if not sys.stderr.isatty():
        return fact
    return textwrap.fill(fact, shutil.get_terminal_size().columns - 1, subsequent_indent=" " * LABEL_WIDTH)


def print_hanging(console: Console, label: str, text: str, style: str = "") -> None:
    """Print a line that wraps behind its label; in a file it stays one line."""
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:
        console.print(label + text, markup=False, highlight=False, soft_wrap=True)
        return
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(label, style), Text(text))
    console.print(grid)
