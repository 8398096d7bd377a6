"""Real text, a tiny model with random weights, and ways to run a training: as processes, or in this one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.jobs import Job

# Read when the hub's client is imported, which some test modules do at once.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "build" / "demo"

# A training is a pure function of its recipe; these make it small.
TINY = {
    "max_length": 64,
    "train_batch_size": 16,
    "per_device_batch_size": 8,
    "learning_rate": 1e-3,
    "max_train_steps": 8,
    "dropout": 0.0,
}


@dataclass(frozen=True)
class Run:
    """What a training left behind."""

    exit_code: int
    stdout: str
    stderr: str
    path: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == "train"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == "eval"]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.steps]

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def to_flags(settings: Mapping[str, Any]) -> list[str]:
    """Recipe keys as command line flags."""
    switches = ["--eval_only"] if settings.get("eval_only") else []
    return switches + [
        word
        for key, value in settings.items()
        if key != "eval_only"
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of prepared data that is this session's own; compiled operators are the machine's."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "onecurve" / "torch_extensions"))
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ONECURVE_CACHE"] = str(folder)
    # Two threads that wait for each other on busy cores take ten times as long as one.
    torch.set_num_threads(1)
    return folder


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo's data and real model, which `make test` has built."""
    if not (DEMO / "complete").exists():
        pytest.fail("build/demo is missing: run `make test`, which builds it")
    return DEMO


def build_tiny_model(folder: Path) -> Path:
    """Write a BERT with the real tokenizer and two layers of random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(DEMO / "model" / name, folder / name)
    return folder


def build_news(folder: Path) -> Path:
    """Write train.jsonl (203 articles) and validation.jsonl (61), of all five classes and very different lengths."""
    for split, count in (("train", 203), ("validation", 61)):
        rows = (DEMO / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = [json.loads(row) for row in rows[:: len(rows) // count][:count]]
        for number, row in enumerate(chosen):  # From one word to all of them.
            words = row["text"].split()
            row["text"] = " ".join(words[: 3 + number * 7 % 60])
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_model(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with the real tokenizer and two layers of random weights."""
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def news(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few and short articles, as `build_news` writes them."""
    return build_news(tmp_path_factory.mktemp("news"))


@pytest.fixture
def recipe(tiny_model: Path, news: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a training that takes a second."""
    return {
        "model_name_or_path": str(tiny_model),
        "train_file": str(news / "train.jsonl"),
        "validation_file": str(news / "validation.jsonl"),
        "output_dir": str(tmp_path / "run"),
        **TINY,
    }


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Jobs of a test, of which none outlives it."""
    started: list[Job] = []
    yield started
    for job in started:
        job.kill()


Launch = Callable[..., Run]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Run `accelerate launch` for real: launch(settings, topology="multi_cpu", num_processes=2)."""

    def run(
        settings: Mapping[str, Any],
        topology: str = "cpu",
        num_processes: int | None = None,
        environment: Mapping[str, str] | None = None,
        launcher_options: tuple[str, ...] = (),
        timeout_seconds: float = 300,
    ) -> Run:
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            f"accelerate_configs/{topology}.yaml",
        ]
        if num_processes is not None:
            command += ["--num_processes", str(num_processes)]
        # Port 0: any that is free, as other trainings may run beside the tests.
        command += [
            "--main_process_port",
            "0",
            "--mixed_precision",
            "no",
            *launcher_options,
            "training/run.py",
            *to_flags(settings),
        ]
        # One thread each: two processes with two threads on two cores wait for each other.
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(environment or {})}
        result = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
        return Run(result.returncode, result.stdout, result.stderr, Path(str(settings.get("output_dir", "unused"))))

    return run


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Callable[[Mapping[str, Any]], Run]:
    """Train in this process, which saves the seconds of a start."""
    from onecurve.training.outcome import report_outcome
    from onecurve.training.parallel.accelerator import forget_state
    from onecurve.training.run import _KEPT, main

    def run(settings: Mapping[str, Any]) -> Run:
        capsys.readouterr()
        try:
            exit_code = report_outcome(main, to_flags(settings))
        finally:
            for training in _KEPT:
                training.stop_flag.close()
            _KEPT.clear()
            forget_state()
        captured = capsys.readouterr()
        return Run(exit_code, captured.out, captured.err, Path(str(settings.get("output_dir", "unused"))))

    return run
