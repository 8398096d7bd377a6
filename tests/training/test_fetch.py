"""What was fetched is what a training looks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecurve.training.fetch import main
from onecurve.training.outcome import report_outcome
from tests.conftest import Run, to_flags
from tests.training.tasks import templates


def test_a_training_finds_the_data_that_was_fetched(
    causal: dict[str, Any], train: Callable[[dict[str, Any]], Run], cache: Path, tmp_path: Path
) -> None:
    """With a template and an end-of-text token of the recipe's own, which decide what is prepared."""
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "yes"}]}
        for n in range(30)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "chat.jinja").write_text(templates.CHATML, encoding="utf-8")
    settings = {
        **causal,
        "train_file": str(tmp_path / "chats.jsonl"),
        "validation_file": str(tmp_path / "chats.jsonl"),
        "messages_column": "messages",
        "chat_template": str(tmp_path / "chat.jinja"),
        "eos_token": "<|im_end|>",
        "max_train_steps": 1,
    }
    assert report_outcome(main, to_flags(settings)) == 0
    fetched = {path for path in cache.iterdir() if path.is_dir()}
    run = train(settings)
    assert run.exit_code == 0, run.stderr
    assert {path for path in cache.iterdir() if path.is_dir()} == fetched
