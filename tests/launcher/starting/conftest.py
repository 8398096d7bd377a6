"""Tiny models, one of each kind, and `onecurve` in this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from onecurve.launcher.cli import run_command_line
from tests.conftest import Run
from tests.training.tasks.templates import CHATML
from tools.decoders import build_decoder
from tools.images import build_vit
from tools.seq2seq import build_seq2seq

Command = Callable[..., Run]

# What kind of transformer a test gives to a task; an encoder to all others.
KINDS = {"image_classification": "images", "causal_lm": "decoder", "seq2seq_lm": "encoder-decoder"}


@pytest.fixture(scope="session")
def build_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of a kind, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("models")
    builders: dict[str, Callable[[], Path]] = {
        "encoder": lambda: tiny_model,
        "decoder": lambda: build_decoder(folder / "decoder", chat_template=CHATML),
        "images": lambda: build_vit(folder / "vit"),
        "encoder-decoder": lambda: build_seq2seq(folder / "t5"),
    }
    return cache(lambda kind: builders[kind]())


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `onecurve` in this process, in an empty folder: command("init", "reviews.csv")."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Run:
        capsys.readouterr()
        code = run_command_line([str(word) for word in words])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err, tmp_path)

    return run
