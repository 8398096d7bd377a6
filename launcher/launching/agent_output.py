"""Filters what torch's elastic agent and accelerate print after a process has failed and printed its own message."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# torch names its file from the first folder of the modules' path that holds it: an environment inside a checkout, perhaps.
_AGENT_LOG = re.compile(r"[WEI]\d{4} [\d:.]+ +\d+ (\S+/)?torch/distributed/")


def drop_agent_noise(lines: Iterable[str]) -> Iterator[str]:
    """Drop what torch's elastic agent and accelerate print about a process that has already printed why it failed.

    Dropped are the agent's log lines, and a traceback that ends in ChildFailedError (with the banner after it), in
    CalledProcessError, or in the agent's own SignalException. Every other traceback is kept whole.
    """
    held: list[str] = []
    in_banner = False
    for line in lines:
        if in_banner:
            # The banner lies between two lines of "=", and holds lines of "-" and indented text.
            if line.startswith("=====") and len(held) > 1:
                held, in_banner = [], False
            else:
                held.append(line)
            continue
        if held:
            held.append(line)
            if line[:1].isspace():
                continue
            if "ChildFailedError" in line:
                held, in_banner = [line], True
            elif "CalledProcessError" in line or "elastic.multiprocessing.api.SignalException" in line:
                held = []
            else:
                yield from held
                held = []
        elif line.startswith("Traceback (most recent call last)"):
            held = [line]
        elif not _AGENT_LOG.match(line):
            yield line
    if not in_banner:
        yield from held
