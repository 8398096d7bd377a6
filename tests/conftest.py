"""Real text, a tiny model with random weights, and ways to run a training: as processes, or in this one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from onecurve.training.launch_protocol import STOP_SIGNALS
from tools.launches import (
    LaunchServer,
    adapt_environment,
    build_arguments,
    build_environment,
    launch_for_real,
    share_operators,
)
from tools.trainings import DEMO, ROOT, TINY, Run, build_news, build_tiny_model, to_flags

if TYPE_CHECKING:
    from tools.jobs import Job

__all__ = ["DEMO", "ROOT", "TINY", "Launch", "Run", "build_news", "build_tiny_model", "to_flags"]

# On a machine with GPUs the tests rehearse as on any other; what GPUs do is for `make gpu`. Read when CUDA is first used.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Threads that sleep while they wait: on busy cores, spinning ones take ten times as long. For all processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read when the hub's client is imported, which some test modules do at once.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of prepared data that is this session's own; compiled operators are the machine's."""
    share_operators()
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ONECURVE_CACHE"] = str(folder)
    # Two threads that wait for each other on busy cores take ten times as long as one.
    torch.set_num_threads(1)
    return folder


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Handlers that a test installs in this process end with it: one that stays would take the signals of later tests."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo's data and real model, which `make test` has built."""
    if not (DEMO / "complete").exists():
        pytest.fail("build/demo is missing: run `make test`, which builds it")
    return DEMO


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
def launch_server() -> Iterator[LaunchServer]:
    """Forks launches from a process that has imported torch."""
    with LaunchServer() as server:
        yield server


@pytest.fixture(autouse=True, scope="session")
def jobs_are_forked(launch_server: LaunchServer) -> Iterator[None]:
    """Jobs are forked too. New processes are what Slurm's tests, those of `onecurve run` and those of each topology start."""
    from tools.jobs import Job

    Job.server = launch_server
    yield
    Job.server = None


@pytest.fixture(autouse=True, scope="session")
def programs_are_forked(launch_server: LaunchServer) -> Iterator[None]:
    """The programs that the launcher asks about a recipe, a model or data, each of which imports torch, are forked too."""
    from onecurve.launcher.facts import model_files, recipes
    from onecurve.launcher.preflight import preparation
    from onecurve.launcher.starting import data

    def run(words: list[str], env: Mapping[str, str] = os.environ, **others: Any) -> subprocess.CompletedProcess[str]:
        assert others == {"capture_output": True, "text": True, "check": False}
        return launch_server.run_script(words[1:], adapt_environment(env), folder=Path.cwd())

    with pytest.MonkeyPatch.context() as patch:
        for module in (model_files, recipes, preparation, data):
            patch.setattr(module, "subprocess", SimpleNamespace(run=run))
        yield


@pytest.fixture(autouse=True)
def variables(launch_server: LaunchServer) -> Iterator[None]:
    """What packages set in this process ends with a test: it would keep all later launches from being forked."""
    yield
    launch_server.restore_variables()


@pytest.fixture(scope="session")
def launch(launch_server: LaunchServer) -> Launch:
    """Run `accelerate launch`: launch(settings, topology="multi_cpu", num_processes=2).

    From the launch server, which saves the imports; with is_real=True as new processes.
    """

    def run(
        settings: Mapping[str, Any],
        topology: str = "cpu",
        num_processes: int | None = None,
        environment: Mapping[str, str] | None = None,
        launcher_options: tuple[str, ...] = (),
        timeout_seconds: float = 300,
        is_real: bool = False,
    ) -> Run:
        words = build_arguments(topology, num_processes, launcher_options, "training/run.py", to_flags(settings))
        run_launcher = launch_for_real if is_real else launch_server.launch
        result = run_launcher(words, build_environment(environment), timeout_seconds)
        return Run(result.returncode, result.stdout, result.stderr, Path(str(settings.get("output_dir", "unused"))))

    return run


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Callable[[Mapping[str, Any]], Run]:
    """Train in this process, which saves the seconds of a start."""
    from onecurve.training.models.example_masks import begin
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
            begin(None)  # Dropout is torch's again.
        captured = capsys.readouterr()
        return Run(exit_code, captured.out, captured.err, Path(str(settings.get("output_dir", "unused"))))

    return run
