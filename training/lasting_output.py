"""Standard output that never ends a run: `onecurve run RECIPE | head` goes on without a reader."""

from __future__ import annotations

import os
import sys
from typing import Any, cast


def protect_output() -> None:
    """Let this process outlive its standard output and error; for scripts, before they print."""
    sys.stdout = cast(Any, LastingStream(sys.stdout))
    sys.stderr = cast(Any, LastingStream(sys.stderr))


class LastingStream:
    """A text stream that never ends a run: closed, unread or without a character, it loses text and nothing else."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115 - for the whole run
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # A pipe without a reader, a full disk, a closed file.
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        self._stream = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
