"""Where the parts of the benchmark train, and what a line of its table is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onecurve.training.launch_protocol import choose_allocator
from tools.launches import build_arguments
from tools.trainings import ROOT, to_flags


@dataclass
class Row:
    """A line of the table."""

    what: str
    figure: str
    verdict: str = ""

    @classmethod
    def of_failure(cls, what: str, answer: Mapping[str, Any]) -> Row:
        """A training that ended with another exit code than 0, and what was said last."""
        return cls(what, f"exit code {answer['exit_code']}: {' '.join(answer['told'].split())[-300:]}", "FAILED")


@dataclass
class Scene:
    """Where everything is measured.

    Attributes:
        is_tiny: sizes for a CPU and a test; nothing they say is a result.
        num_gpus: 0 on a CPU, where two processes stand for GPUs.
    """

    folder: Path
    is_tiny: bool
    num_gpus: int
    seconds_left: Any
    figures: dict[str, Any] = field(default_factory=dict)

    def train_here(self, name: str, recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Train on one device, one recipe after the other in one new process; see child.py.

        Raises:
            RuntimeError: one of them failed.
        """
        answers = self.try_here(name, recipes)
        for recipe, found in zip(recipes, answers, strict=True):
            if found["exit_code"]:
                name = Path(recipe["output_dir"]).name
                raise RuntimeError(f"{name}: exit code {found['exit_code']}: {found['told']}")
        return answers

    def try_here(self, name: str, recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """As `train_here`, and an answer may have another exit code than 0; it then has what its process `told` last."""
        request, answer = self.folder / f"{name}.request.json", self.folder / f"{name}.answer.json"
        request.write_text(json.dumps(list(recipes)), encoding="utf-8")
        told = self._run([sys.executable, "-m", "benchmarks.gpu.child", str(request), str(answer)])
        answers: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
        return [{**found, "told": told[-1500:]} if found["exit_code"] else found for found in answers]

    def train_with_trainer(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Train a recipe of a causal LM with transformers.Trainer in a new process; see trainer.py."""
        request, answer = self.folder / "trainer.request.json", self.folder / "trainer.answer.json"
        request.write_text(json.dumps(recipe), encoding="utf-8")
        self._run([sys.executable, "-m", "benchmarks.gpu.trainer", str(request), str(answer)])
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found

    def launch(self, topology: str, num_processes: int, recipe: Mapping[str, Any]) -> None:
        """Train with `accelerate launch`."""
        words = build_arguments(topology, num_processes, (), "training/run.py", to_flags(recipe))
        self._run([sys.executable, "-m", "accelerate.commands.launch", *words])

    def _run(self, words: Sequence[str]) -> str:
        search_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {"PYTHONPATH": search_path, "ONECURVE_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        variables |= choose_allocator(os.environ)  # As `onecurve run` does; Trainer has it too.
        if not self.num_gpus:
            variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            list(words), cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
            timeout=max(1.0, self.seconds_left()),
        )  # fmt: skip
        if result.returncode:
            raise RuntimeError(f"exit code {result.returncode}: {(result.stderr or result.stdout)[-1500:]}")
        return result.stderr
