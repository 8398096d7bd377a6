"""A data set is never held in memory: a hundred times the rows start in nearly the same space, and only once slowly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, to_flags

# Linux counts what a process held before it became another program: this one is small, where pytest is not.
MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    json.dump({"exit_code": os.waitstatus_to_exitcode(status), "peak": usage.ru_maxrss}, file)
"""

WORDS = ["market", "rose", "while", "players", "of", "both", "teams", "left", "their", "old", "film", "at", "noon"]

Snapshot = dict[str, int]


@dataclass(frozen=True)
class Start:
    """A training of one step: its largest resident memory, in the system's unit, and the cache it left."""

    peak: int
    prepared: Snapshot


def write_rows(path: Path, num_rows: int) -> None:
    """Rows of ten words, each with its number, so that no two are the same."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            text = " ".join([str(number), *(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(9))])
            file.write(json.dumps({"text": text, "label": "abc"[number % 3]}) + "\n")


def look_at(cache: Path) -> Snapshot:
    return {
        str(path.relative_to(cache)): path.stat().st_mtime_ns for path in cache.rglob("*") if path.suffix != ".lock"
    }


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Start]:
    folder = tmp_path_factory.mktemp("large")

    def run(num_rows: int, name: str) -> Start:
        data, cache = folder / f"{num_rows}.jsonl", folder / f"cache_{num_rows}"
        if not data.exists():
            write_rows(data, num_rows)
        settings = {
            "model_name_or_path": str(tiny_model),
            "train_file": str(data),
            "output_dir": str(folder / f"{num_rows}_{name}"),
            "max_length": 32,
            "train_batch_size": 32,
            "max_train_steps": 1,
            "max_eval_samples": 64,
            "validation_fraction": 0.05,
        }
        measured = folder / "measured.json"
        command = [sys.executable, "-c", MEASURE, str(measured), sys.executable, "training/run.py", *to_flags(settings)]
        variables = {**os.environ, "ONECURVE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
        found = json.loads(measured.read_text())
        assert found["exit_code"] == 0, result.stderr
        print(f"{num_rows} rows, {name}: peak {found['peak']}")
        return Start(found["peak"], look_at(cache))

    return run


@pytest.mark.slow
def test_a_million_rows_need_little_more_memory_than_ten_thousand(start: Callable[[int, str], Start]) -> None:
    small, large = start(10_000, "first"), start(1_000_000, "first")
    assert large.peak <= 1.3 * small.peak, f"{large.peak / small.peak:.2f} times the memory of ten thousand rows"
    again = start(1_000_000, "second")
    assert again.prepared == large.prepared, "the second start finds the cache and writes nothing there"
    assert len([name for name in again.prepared if Path(name).name == "meta.json"]) == 1
    assert again.peak <= 1.3 * small.peak
