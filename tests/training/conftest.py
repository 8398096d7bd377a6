"""Recipes, run directories, and a tiny decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecurve.training.config import ResolvedRecipe, load_recipe
from onecurve.training.recovery.run_creation import create_run
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.run_directory import RunDirectory
from tests.conftest import TINY, Run
from tests.messages import names
from tools.decoders import build_decoder


def resolve(folder: Path, **flags: str) -> ResolvedRecipe:
    return load_recipe(None, {"model_name_or_path": "m", "train_file": "t.csv", "output_dir": str(folder), **flags})


def make_run(folder: Path) -> RunDirectory:
    """A run directory that a training has been in."""
    resolved = resolve(folder)
    run = RunDirectory.of(resolved.recipe)
    with RunLock(run) as lock:
        create_run(run, lock, resolved, {})
    return run


def stop_and_resume(train: Callable[[dict[str, Any]], Run], settings: dict[str, Any], folder: Path) -> Run:
    """Train until a stop that was asked for before the start, and then to the end."""
    (folder / "stop").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONECURVE_STOP_FILE", str(folder / "stop"))
        stopped = train(settings)
    assert stopped.exit_code == 75
    step = stopped.read("status.json")["step"]
    resumed = train(settings)
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.read("environment.json")["start_step"] == step > 0
    return resumed


def assert_refused(run: Run, *needed: str) -> None:
    """Bad input is told in a message that names all that is needed, and nothing is written."""
    assert run.exit_code == 2, run.stderr
    assert names(run.stderr, *needed), run.stderr
    assert "Traceback" not in run.stderr
    assert not run.path.exists()


@pytest.fixture(scope="session")
def decoder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with two layers of random weights, tied, whose tokenizer adds no token of its own."""
    return build_decoder(tmp_path_factory.mktemp("decoder") / "llama")


@pytest.fixture
def causal(decoder: Path, news: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a training of a causal language model on plain texts that takes a second."""
    settings = {key: value for key, value in TINY.items() if key != "dropout"}
    return {
        "task": "causal_lm",
        "model_name_or_path": str(decoder),
        "train_file": str(news / "train.jsonl"),
        "validation_file": str(news / "validation.jsonl"),
        "output_dir": str(tmp_path / "run"),
        **settings,
    }


Predict = Callable[..., tuple[int, str]]


@pytest.fixture
def predict(capsys: pytest.CaptureFixture[str]) -> Predict:
    """Label in this process: predict(run, source, target, *flags) -> exit code and all that was said."""
    from onecurve.training.outcome import report_outcome
    from onecurve.training.parallel.accelerator import forget_state
    from onecurve.training.predict import main

    def label(run: Path, source: Path, target: Path, *flags: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = report_outcome(main, ["--run", str(run), "--input", str(source), "--output", str(target), *flags])
        finally:
            forget_state()
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return label
