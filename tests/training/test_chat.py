"""Talking to a final model: a line is a message, and the conversation goes on until it is cleared."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onecurve.training import chat
from onecurve.training.outcome import report_outcome
from tests.conftest import Run
from tests.messages import names
from tests.training.tasks.templates import CHATML
from tools.decoders import build_decoder

Settings = dict[str, Any]
Train = Callable[[Settings], Run]


@pytest.fixture
def talker(news: Path, train: Train, tmp_path: Path) -> Run:
    """A run on plain texts of a model whose tokenizer has a chat template, which is what a conversation needs."""
    model = build_decoder(tmp_path / "model", chat_template=CHATML)
    settings = {
        "task": "causal_lm",
        "model_name_or_path": str(model),
        "train_file": str(news / "train.jsonl"),
        "validation_file": str(news / "validation.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 1,
        "max_length": 32,
        "max_new_tokens": 5,
    }
    run = train(settings)
    assert run.exit_code == 0, run.stderr
    return run


def test_a_conversation_goes_on_until_it_is_cleared(
    talker: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = ["Hello", "And then?", "x" * 250, "/clear", "And then?", "/exit", "Never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    capsys.readouterr()
    assert report_outcome(chat.main, ["--run", str(talker.path)]) == 0
    printed = capsys.readouterr()
    assert names(printed.err, "256", "/clear")
    model = AutoModelForCausalLM.from_pretrained(talker.path / "final", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(talker.path / "final")
    expected = ""
    for asked in (["Hello", "And then?"], ["And then?"]):
        messages: list[dict[str, str]] = []
        for content in asked:
            messages.append({"role": "user", "content": content})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
                "input_ids"
            ]
            written = model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
            messages.append({"role": "assistant", "content": tokenizer.decode(written, skip_special_tokens=True)})
            expected += messages[-1]["content"] + "\n"
    assert printed.out == expected


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--run", "nowhere"], ("nowhere", "final")),
        (["--run", "{run}", "--max_new_tokens", "none"], ("max_new_tokens", "'none'")),
        (["--run", "{run}", "--what", "1"], ("what",)),
        ([], ("--run",)),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "config.yaml").write_text("task: causal_lm\nmodel_name_or_path: m\ntrain_file: t.jsonl\n", encoding="utf-8")
    assert report_outcome(chat.main, [word.format(run=run) for word in words]) == 2
    assert names(capsys.readouterr().err, *named)


def test_a_classifier_does_not_talk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "config.yaml").write_text("model_name_or_path: m\ntrain_file: t.jsonl\n", encoding="utf-8")
    assert report_outcome(chat.main, ["--run", str(tmp_path)]) == 2
    assert names(capsys.readouterr().err, "text_classification")
