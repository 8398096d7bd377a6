"""The main job, for real: the same recipe on one process, on two, and under DeepSpeed, with the real model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import messages
from tests.conftest import Launch, Run

STRATEGIES = {"cpu": (None, "one process"), "multi_cpu": (2, "DDP"), "deepspeed_zero2": (2, "ZeRO-2")}


@pytest.fixture(scope="module")
def runs(demo: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """16 steps of the demo on each of the three."""
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, Any] = {
        "config": "training/recipes/demo.yaml",
        "max_length": 32,
        "learning_rate": 3e-4,
        "max_train_steps": 16,
        "max_eval_samples": 80,
        "dropout": 0.0,
        "checkpointing_steps": 12,
        "metric_for_best_model": "accuracy",
        "eval_steps": 16,
    }
    return {
        name: launch({**settings, "output_dir": str(folder / name)}, topology=name, num_processes=processes)
        for name, (processes, _) in STRATEGIES.items()
    }


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_topology_trains(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert run.exit_code == 0, run.stderr
    topology = run.read("environment.json")["topology"]
    assert (topology["num_processes"], topology["strategy"]) == (STRATEGIES[name][0] or 1, STRATEGIES[name][1])
    assert [line["step"] for line in run.steps] == list(range(1, 17))
    assert sum(run.losses[-4:]) < 0.8 * sum(run.losses[:4])
    assert run.evaluations[-1]["eval_accuracy"] > 0.6


@pytest.mark.parametrize("name", ["multi_cpu", "deepspeed_zero2"])
def test_two_processes_learn_what_one_learns(runs: dict[str, Run], name: str) -> None:
    assert runs[name].losses == pytest.approx(runs["cpu"].losses, rel=1e-5)
    for key in ("eval_accuracy", "eval_f1_macro", "eval_matthews_correlation"):
        assert runs[name].evaluations[-1][key] == runs["cpu"].evaluations[-1][key]


def test_the_first_lines_print_the_arithmetic(runs: dict[str, Run]) -> None:
    assert re.search(r"\b8 \D+ x 1 \D+ x 2 processes \(DDP, cpu\) = 16 \D+ step", runs["multi_cpu"].stdout)
    assert messages.names(runs["cpu"].stdout, "16 steps", "22.7 M")


def test_other_packages_keep_quiet(runs: dict[str, Run]) -> None:
    for run in runs.values():
        assert "Warning" not in run.stdout + run.stderr
        assert "[INFO]" not in run.stdout + run.stderr


def test_the_run_directory_keeps_the_contract(runs: dict[str, Run]) -> None:
    run = runs["cpu"]
    assert {path.name for path in run.path.iterdir()} == {
        "config.yaml", "environment.json", "status.json", "metrics.jsonl", "checkpoints", "best", "final",
        "eval_predictions.jsonl", "eval_report.json", ".lock",
    }  # fmt: skip
    assert run.read("status.json") == {"state": "finished", "exit_code": 0, "step": 16, "message": ""}
    assert "max_train_steps: 16  # flag" in (run.path / "config.yaml").read_text()
    assert "weight_decay: 0.01  # recipe" in (run.path / "config.yaml").read_text()
    assert "adam_beta1: 0.9  # default" in (run.path / "config.yaml").read_text()
    environment = run.read("environment.json")
    assert environment["packages"]["torch"].startswith("2.")
    assert len(environment["git_revision"]) == 40
    assert environment["start_step"] == 0
    train, validation = (environment["data"][name] for name in ("train", "validation"))
    assert train["examples"] == sum(train["histogram"]) == 1703
    assert validation["examples"] == (run.path / "eval_predictions.jsonl").read_text(encoding="utf-8").count("\n")
    assert 0 < train["mean_tokens"] <= train["longest"] <= 128
    assert environment["trained_parameters"] == environment["parameters"] > 500_000
    assert set(run.steps[0]) == {
        "event", "step", "epoch", "loss", "learning_rate", "grad_norm", "examples", "tokens", "tokens_per_second", "padding",
        "peak_memory_bytes", "examples_digest",
    }  # fmt: skip
    assert {"event", "step", "eval_loss", "eval_accuracy", "eval_f1_macro"} <= set(run.evaluations[0])
    names = {path.name for path in (run.path / "best").resolve().iterdir()}
    assert names >= {"progress.json", "manifest.json", "config.json"}
    assert names >= {f"{kind}-00001-of-00002.safetensors" for kind in ("model", "optimizer")} or (
        names >= {"model.safetensors", "optimizer.safetensors"}
    )
    assert not list(run.path.rglob("*.bin")) + list(run.path.rglob("*.pt")) + list(run.path.rglob("*.pkl"))


def test_predictions_have_a_line_for_every_validation_example(runs: dict[str, Run]) -> None:
    rows = [json.loads(line) for line in (runs["cpu"].path / "eval_predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(80))
    assert set(rows[0]) == {"index", "label", "prediction", "score"}
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert right / len(rows) == runs["cpu"].evaluations[-1]["eval_accuracy"]


def test_the_final_model_loads_and_knows_its_labels(runs: dict[str, Run]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    final = runs["deepspeed_zero2"].path / "final"
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    logits = model(**tokenizer("The striker scored twice as United won the cup final", return_tensors="pt")).logits
    assert model.config.id2label[int(logits.argmax())] == "sports"
    assert set(model.config.label2id) == {"business", "entertainment", "politics", "sports", "tech"}


def test_a_launch_that_lost_its_processes_is_refused(recipe: dict[str, Any], launch: Launch) -> None:
    run = launch(recipe, topology="cpu", num_processes=2)
    assert run.exit_code != 0
    assert run.stderr.count("onecurve: ") == 1
    assert messages.names(run.stderr, "processes", "one")
    assert not run.path.exists()


def test_a_launch_smaller_than_asked_for_is_refused(recipe: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    environment = {"ONECURVE_NUM_PROCESSES": "4", "ONECURVE_STATUS_FILE": str(status)}
    run = launch(recipe, topology="multi_cpu", num_processes=2, environment=environment)
    assert run.exit_code != 0
    assert run.stderr.count("onecurve: ") == 1
    assert messages.names(run.stderr, "4", "2")
    assert json.loads(status.read_text())["exit_code"] == 2
    assert not run.path.exists()
