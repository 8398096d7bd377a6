"""Where a training starts. Whole resumes: tests/test_stops.py."""

from __future__ import annotations

import json
from pathlib import Path

from onecurve.training.recovery.resumption import describe_evaluation
from onecurve.training.run_directory import RunDirectory
from tests.messages import names


def test_the_last_evaluation_is_described_in_a_line(tmp_path: Path) -> None:
    lines = [
        {"event": "eval", "step": 5, "eval_loss": 1.0, "eval_accuracy": 0.5, "eval_f1_macro": 0.1},
        {"event": "eval", "step": 10, "eval_loss": 0.25, "eval_accuracy": 0.9, "eval_f1_macro": 0.2},
        {"event": "train", "step": 11, "loss": 0.3},
    ]
    run = RunDirectory(tmp_path)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert names(describe_evaluation(run), "step 10", "eval_loss 0.2500", "eval_accuracy 0.9000")
    run.metrics.write_text(json.dumps(lines[2]) + "\n")
    assert describe_evaluation(run) == "not evaluated"
