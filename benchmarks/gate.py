"""Holds a training loop until it is its turn, and says what it did in it: how ways to train take turns in `make bench`.

A way is a process that reads a wish from its standard input, {"do": "train", "steps": 4}, and answers with a line.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.speed_data import PREFIX


class TurnGate:
    """Stands between the steps of a loop. Who uses it says what is counted (`forget`, `describe`).

    Attributes:
        answers: what else can be asked for.
        extra: adds to the answer of a turn.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._steps_left = 0
        self._is_cold = False
        self.answers: dict[str, Callable[[], dict[str, Any]]] = {}
        self.extra: Callable[[], dict[str, Any]] = dict

    def forget(self) -> None:
        """A turn begins: count anew."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What was counted in a turn."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called by the loop when a step is made, and once before the first."""
        self._steps_left -= 1
        if self._is_cold:
            self._is_cold = False
            self._begin()
        if self._steps_left > 0:
            return
        if self._steps_left == 0:
            synchronize(self._device)
            seconds = time.perf_counter() - self._started
            cpu_seconds = time.process_time() - self._cpu_started
            turn = {"seconds": seconds, "cpu_seconds": cpu_seconds, **self.describe(), **self.extra()}
            answer({**turn, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})
        self._wait()

    def _wait(self) -> None:
        for line in sys.stdin:
            wanted = json.loads(line)
            if wanted["do"] == "train":
                # While others had their turn, caches and memory were theirs: the first step gets them back, if wanted.
                self._is_cold = wanted.get("warms_up", True)
                self._steps_left = wanted["steps"] + self._is_cold
                self._begin()
                return
            answer(self.answers[wanted["do"]]())
        sys.stdout.flush()
        os._exit(0)

    def _begin(self) -> None:
        synchronize(self._device)
        self.forget()
        self.extra()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()


def answer(found: Mapping[str, Any]) -> None:
    """Tell the program that lets ways take their turns."""
    print(PREFIX + json.dumps(found), flush=True)


def synchronize(device: str) -> None:
    """Wait for an accelerator."""
    if device != "cpu":
        torch.accelerator.synchronize()
