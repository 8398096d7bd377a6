"""With metric_for_best_model a run ends with its best model, as load_best_model_at_end does; every checkpoint is a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.conftest import Launch, Run
from tests.messages import names
from tests.tensors import load_tensors
from tools.jobs import Job, write_script

Settings = dict[str, Any]
Train = Callable[[Mapping[str, Any]], Run]

# The learning rate rises until it is far too high: the loss is lowest early, and never after the last step.
OVERSHOOTS = {
    "learning_rate": 0.3, "lr_scheduler_type": "constant_with_warmup", "num_warmup_steps": 24, "max_train_steps": 24,
    "eval_steps": 4, "checkpointing_steps": 4,    "metric_for_best_model": "eval_loss",
}  # fmt: skip


def find_best(run: Run) -> dict[str, Any]:
    best = min(run.evaluations, key=lambda line: line["eval_loss"])
    assert best["step"] < run.steps[-1]["step"], "the settings have to overshoot"
    return best


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "model.safetensors")


def is_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def label(run: Run, source: str, folder: Path, *flags: str) -> str:
    """What `predict` writes for a file."""
    from onecurve.training.outcome import report_outcome
    from onecurve.training.parallel.accelerator import forget_state
    from onecurve.training.predict import main

    output = folder / "labelled.jsonl"
    words = ["--run", str(run.path), "--input", source, "--output", str(output), *flags, "--overwrite", "true"]
    try:
        assert report_outcome(main, words) == 0
    finally:
        forget_state()
    return output.read_text()


def assert_ends_with_best(run: Run) -> None:
    """final/ and all that is reported are of the best evaluation."""
    assert run.exit_code == 0, run.stderr
    best = find_best(run)
    assert is_same(weights(run.path / "final"), weights(run.path / "best"))
    assert (run.path / "best").resolve().name == f"step_{best['step']:08d}"
    metrics = {name: value for name, value in best.items() if name.startswith("eval_")}
    assert run.read("eval_report.json")["metrics"] == pytest.approx(metrics, rel=1e-5)
    rows = [json.loads(line) for line in (run.path / "eval_predictions.jsonl").read_text().splitlines()]
    assert sum(row["label"] == row["prediction"] for row in rows) / len(rows) == metrics["eval_accuracy"]
    assert f"{metrics['eval_loss']:.4f}" in (run.path / "final" / "README.md").read_text()
    assert names(run.stdout, f"step {best['step']}", f"{run.steps[-1]['step']}", "final")


def test_final_and_reports_are_of_the_best_model(recipe: Settings, train: Train) -> None:
    run = train({**recipe, **OVERSHOOTS})
    assert_ends_with_best(run)
    last = weights(run.path / "checkpoints" / f"step_{run.steps[-1]['step']:08d}")
    assert not is_same(weights(run.path / "final"), last)
    again = train({**recipe, **OVERSHOOTS})
    assert names(again.stdout, f"step {find_best(run)['step']}", f"{find_best(run)['eval_loss']:.4f}")


def test_an_adapter_ends_with_its_best_weights(recipe: Settings, train: Train, tmp_path: Path) -> None:
    run = train({**recipe, **OVERSHOOTS, "adapter": "lora", "learning_rate": 1.0})
    assert run.exit_code == 0, run.stderr
    best = find_best(run)
    assert run.read("eval_report.json")["metrics"]["eval_loss"] == best["eval_loss"]
    assert names(run.stdout, f"step {best['step']}", "final")
    final = label(run, recipe["validation_file"], tmp_path)
    assert final == label(run, recipe["validation_file"], tmp_path, "--checkpoint", "best")
    assert final != label(run, recipe["validation_file"], tmp_path, "--checkpoint", "24")


def test_every_checkpoint_is_a_model_to_load_and_to_predict_with(
    recipe: Settings, train: Train, tmp_path: Path
) -> None:
    run = train({**recipe, **OVERSHOOTS})
    for folder in (run.path / "checkpoints").iterdir():
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert is_same(model.state_dict(), weights(folder))
        assert model.config.id2label[0] == "business"
        assert AutoTokenizer.from_pretrained(folder)("a").input_ids == [101, 1037, 102]

    def predict(*flags: str) -> str:
        return label(run, recipe["validation_file"], tmp_path, *flags)

    final = predict()
    assert final == predict("--checkpoint", "best") == predict("--checkpoint", str(find_best(run)["step"]))
    assert final != predict("--checkpoint", "24")
    assert predict("--checkpoint", "24") == predict("--checkpoint", "step_00000024")


def test_a_best_model_that_is_missing_is_not_hidden(recipe: Settings, train: Train, tmp_path: Path) -> None:
    run = train({**recipe, **OVERSHOOTS, "output_dir": str(tmp_path / "first")})
    best = find_best(run)["step"]
    kept = run.path / "checkpoints" / "step_00000020"
    shutil.rmtree((run.path / "best").resolve())
    other = train({**recipe, **OVERSHOOTS, "resume": str(kept), "output_dir": str(tmp_path / "other")})
    assert other.exit_code == 0, other.stderr
    assert names(other.stdout, f"step_{best:08d}", "missing")
    assert is_same(weights(other.path / "final"), weights(other.path / "best"))
    assert (other.path / "best").resolve().name == "step_00000024"


def test_a_corrupt_best_model_is_told(recipe: Settings, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from onecurve.training.recovery.checkpoint_writer import CheckpointWriter

    hold = CheckpointWriter.hold

    def spoil_best(writer: CheckpointWriter, progress: Any) -> None:
        hold(writer, progress)
        if progress.step == 24 and progress.best_step != 24:
            (writer.run.best / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr(CheckpointWriter, "hold", spoil_best)
    run = train({**recipe, **OVERSHOOTS})
    assert run.exit_code == 0, run.stderr
    assert names(run.stdout, "step_00000004", "model.safetensors", "last")
    assert is_same(weights(run.path / "final"), weights(run.path / "checkpoints" / "step_00000024"))
    assert run.read("eval_report.json")["metrics"]["eval_loss"] == run.evaluations[-1]["eval_loss"]


@pytest.mark.slow
def test_the_best_model_of_the_run_that_a_checkpoint_comes_from_counts(
    recipe: Settings, train: Train, tmp_path: Path
) -> None:
    run = train({**recipe, **OVERSHOOTS, "output_dir": str(tmp_path / "first")})
    named = run.path / "checkpoints" / "step_00000020"
    other = train({**recipe, **OVERSHOOTS, "resume": str(named), "output_dir": str(tmp_path / "other")})
    assert other.exit_code == 0, other.stderr
    shutil.rmtree(run.path / "checkpoints")
    assert is_same(weights(other.path / "final"), weights(run.path / "final"))
    assert is_same(weights(other.path / "final"), weights(other.path / "best"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "precision"),
    [("fsdp", "no"), ("deepspeed_zero1", "bf16"), ("deepspeed_zero3", "bf16")],
)
def test_every_strategy_ends_with_the_best_model(
    recipe: Settings, launch: Launch, topology: str, precision: str
) -> None:
    settings = {**recipe, **OVERSHOOTS, "mixed_precision": precision}
    assert_ends_with_best(launch(settings, topology=topology, num_processes=2))


# Asks for a stop in the evaluation of the test data, once, when the best model is in the place of the last one.
STOPS = """
from pathlib import Path
from onecurve.training.recovery import checkpoint_writer
checkpoint_writer.PIECE_BYTES = 20_000
evaluate = run.evaluate

def stop_in_test(accelerator, model, task, data, prefix, flag):
    marker = Path(os.environ["ONECURVE_STOPPED"])
    if prefix == "test" and os.environ["RANK"] == "0" and not marker.exists():
        marker.touch()
        flag.reason = "the test"
    return evaluate(accelerator, model, task, data, prefix, flag)

run.evaluate = stop_in_test
"""


@pytest.mark.slow
def test_a_stop_in_the_last_evaluation_saves_the_last_state_from_its_pieces(recipe: Settings, tmp_path: Path) -> None:
    settings = {**recipe, **OVERSHOOTS, "checkpointing_steps": 1000, "test_file": recipe["validation_file"]}
    whole = Job({**settings, "checkpointing_steps": 24, "output_dir": str(tmp_path / "whole")}, "fsdp", 2).finish()
    assert whole.exit_code == 0, whole.stderr
    script = write_script(tmp_path / "stops.py", STOPS)
    environment = {"ONECURVE_STOPPED": str(tmp_path / "stopped")}
    stopped = Job(settings, "fsdp", 2, script=script, environment=environment).finish()
    assert stopped.read("status.json")["exit_code"] == 75, stopped.stderr  # torch's launcher makes it 1.
    last = stopped.path / "checkpoints" / "step_00000024"
    assert len(list(last.glob("model-*.safetensors"))) > 2
    assert is_same(weights(last), weights(whole.path / "checkpoints" / "step_00000024"))
    resumed = Job(settings, "fsdp", 2, script=script, environment=environment).finish()
    assert_ends_with_best(resumed)
    assert is_same(weights(resumed.path / "final"), weights(whole.path / "final"))
    assert not list((resumed.path / "checkpoints").glob(".*")), "what was held and not needed is gone"
