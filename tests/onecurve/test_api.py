"""The Python API does what the command line does: same numbers, same errors, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

import onecurve
from tests.conftest import ROOT, TINY
from tools.jobs import write_held_task

Recipe = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, news: Path, tmp_path_factory: pytest.TempPathFactory) -> onecurve.Run:
    """A training on one process, without a recipe file."""
    return onecurve.train(
        model_name_or_path=tiny_model,
        train_file=[news / "train.jsonl"],
        validation_file=news / "validation.jsonl",
        output_dir=tmp_path_factory.mktemp("run") / "run",
        **dict[str, Any](TINY),
    )


def test_a_run_gives_what_its_directory_holds(trained: onecurve.Run) -> None:
    assert trained.status["state"] == "finished"
    assert trained.config["learning_rate"] == TINY["learning_rate"]
    table = pandas.DataFrame(trained.metrics)
    assert list(table["step"]) == list(range(1, 9))
    assert table["loss"].between(1.0, 2.0).all()
    assert [row["step"] for row in trained.evaluations] == [8]
    assert onecurve.load_run(str(trained.path)) == trained


@pytest.mark.slow
def test_a_second_training_on_two_processes_makes_the_same_curve(
    trained: onecurve.Run, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "learning_rate": 0.5}), encoding="utf-8")
    run = onecurve.train(path, learning_rate=TINY["learning_rate"], topology="multi_cpu", num_processes=2)
    assert run.path == Path(recipe["output_dir"])
    losses = [row["loss"] for row in run.metrics]
    assert losses == pytest.approx([row["loss"] for row in trained.metrics], rel=1e-5)
    environment = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    assert environment["topology"]["num_processes"] == 2
    assert "step 8/8" in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_of_a_file_gives_every_metric_in_full(trained: onecurve.Run, news: Path) -> None:
    metrics = onecurve.evaluate(str(trained.path), news / "validation.jsonl", per_device_batch_size=16)
    last = trained.evaluations[-1]
    assert metrics.keys() == {name.replace("eval_", "test_") for name in last if name.startswith("eval_")}
    assert metrics == pytest.approx({name: last[name.replace("test_", "eval_")] for name in metrics}, rel=1e-6)
    assert len((trained.path / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 61


@pytest.mark.slow
def test_a_prediction_of_a_file_is_that_of_the_evaluation(trained: onecurve.Run, news: Path) -> None:
    rows = trained.predict(news / "validation.jsonl")
    lines = (trained.path / "eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    evaluated = [json.loads(line) for line in lines]
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in evaluated]
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in evaluated], rel=1e-5)


def test_texts_and_rows_are_predicted_in_their_order(trained: onecurve.Run) -> None:
    texts = ["Shares fell\u2028again", "The match was won"]
    rows = onecurve.predict(trained, [texts[0], {"text": texts[1], "id": 7}])
    assert [row["text"] for row in rows] == texts
    assert rows[1]["id"] == 7
    for row in rows:
        shares = [value for name, value in row.items() if name.startswith("probability_")]
        assert len(shares) == 5
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert row["score"] == max(shares) == row[f"probability_{row['prediction']}"]
    assert trained.predict([]) == []


def test_a_plan_is_that_of_the_command_line(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    words = ["plan", str(path), "--devices", "8xH100-80GB", "--nodes", "2", "--max_train_steps", "50", "--json"]
    told = subprocess.run([sys.executable, "-m", "onecurve", *words], cwd=ROOT, capture_output=True, check=True)
    plan = onecurve.plan(path, devices="8xH100-80GB", nodes=2, max_train_steps=50)
    assert plan == json.loads(told.stdout)
    assert (plan["num_processes"], plan["num_steps"]) == (16, 50)


# Errors ------------------------------------------------------------------------------------------------------------


def test_a_wrong_recipe_is_refused_at_once_with_all_its_problems(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: m\ntrain_file: t.csv\nlearning_rat: 1\n", encoding="utf-8")
    for call in (onecurve.train, onecurve.plan):
        with pytest.raises(onecurve.RecipeError) as caught:
            call(path, seed="x")
        assert caught.value.origin == str(path)
        assert {problem.partition(":")[0] for problem in caught.value.problems} == {"learning_rat", "seed"}
    with pytest.raises(onecurve.RecipeError) as caught:
        onecurve.train(train_file="t.csv")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["model_name_or_path"]


def test_what_the_launcher_refuses_is_raised_by_its_kind(recipe: Recipe) -> None:
    with pytest.raises(onecurve.UnknownTopology, match="nowhere"):
        onecurve.train(**recipe, topology="nowhere")
    with pytest.raises(onecurve.PreflightFailed) as caught:
        onecurve.train(**{**recipe, "train_file": "missing.jsonl", "validation_file": "gone.jsonl"})
    assert [name for name in ("missing.jsonl", "gone.jsonl") if name in str(caught.value.problems)]
    with pytest.raises(onecurve.UnreadableModel):
        onecurve.plan(**{**recipe, "model_name_or_path": "nowhere/no-model"})
    assert not Path(recipe["output_dir"]).exists()


@pytest.mark.slow
def test_bad_data_has_the_message_of_the_command_line(recipe: Recipe, tmp_path: Path) -> None:
    rows = Path(recipe["train_file"]).read_text(encoding="utf-8").splitlines()
    rows[201] = json.dumps({"text": "", "label": "business"})  # Beyond what is checked before the start.
    recipe["train_file"] = str(tmp_path / "train.jsonl")
    Path(recipe["train_file"]).write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    words = ["run", str(tmp_path / "recipe.yaml")]
    told = subprocess.run(
        [sys.executable, "-m", "onecurve", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert told.returncode == onecurve.BadInput.exit_code
    with pytest.raises(onecurve.BadInput) as caught:
        onecurve.train(tmp_path / "recipe.yaml")
    assert f"onecurve: {caught.value}\n" in told.stderr
    assert "row 202" in str(caught.value)


@pytest.mark.slow
def test_a_divergence_is_raised(recipe: Recipe) -> None:
    with pytest.raises(onecurve.Diverged, match="step"):
        onecurve.train(**{**recipe, "learning_rate": 1e30, "max_train_steps": 40})
    assert onecurve.load_run(recipe["output_dir"]).status["exit_code"] == 3


def test_a_run_must_be_there_and_finished(trained: onecurve.Run, tmp_path: Path) -> None:
    with pytest.raises(onecurve.NotARun):
        onecurve.load_run(tmp_path)
    with pytest.raises(onecurve.NotARun):
        onecurve.predict(tmp_path, ["a text"])
    (tmp_path / "config.yaml").write_bytes((trained.path / "config.yaml").read_bytes())
    for call in (onecurve.load_run(tmp_path).evaluate, lambda: onecurve.predict(tmp_path, ["a text"])):
        with pytest.raises(onecurve.UsageError, match="final/"):
            call()


def test_rows_that_cannot_be_predicted_are_refused(trained: onecurve.Run) -> None:
    with pytest.raises(onecurve.UsageError, match="a text"):
        trained.predict("a text")  # One text alone is taken for a file's name.
    with pytest.raises(onecurve.BadInput, match="row 2"):
        trained.predict(pandas.DataFrame({"id": [3, 4], "text": ["a text", " "]}), batch_size=1)


# Interrupts and processes ------------------------------------------------------------------------------------------


def wait_for_steps(run: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.exists() and path.read_text(encoding="utf-8").count('"train"') >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{run} never made {count} steps")


def in_background(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


@pytest.mark.slow
def test_an_interrupt_asks_for_a_checkpoint_and_the_next_call_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    held = write_held_task(tmp_path, step=3)
    recipe |= {"task": held.task, "max_train_steps": 20}
    run = Path(recipe["output_dir"])

    def interrupt() -> None:
        held.wait_until_reached()
        os.kill(os.getpid(), signal.SIGINT)

    thread = in_background(interrupt)
    with pytest.raises(onecurve.Preempted):
        onecurve.train(**recipe)
    thread.join()
    stopped = onecurve.load_run(run)
    assert stopped.status["state"] == "preempted"
    step = stopped.status["step"]
    assert 3 < step < 20
    assert (run / "checkpoints" / f"step_{step:08d}").is_dir()
    finished = onecurve.train(**recipe)
    assert [row["step"] for row in finished.metrics] == list(range(1, 21))


CALLER = "import json, sys, onecurve; onecurve.train(**json.loads(sys.argv[1]))"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_a_training_whose_caller_dies_writes_a_checkpoint(recipe: Recipe) -> None:
    """A notebook's kernel that is killed leaves no training behind that holds the device unseen."""
    recipe |= {"max_train_steps": 100_000, "num_train_epochs": 100_000}
    run = Path(recipe["output_dir"])
    with subprocess.Popen([sys.executable, "-c", CALLER, json.dumps(recipe)], cwd=ROOT, stdout=-3) as caller:
        wait_for_steps(run, 3)
        caller.kill()
    deadline = time.monotonic() + 60
    while onecurve.load_run(run).status["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    status = onecurve.load_run(run).status
    assert status["state"] == "preempted"
    assert (run / "checkpoints" / f"step_{status['step']:08d}").is_dir()


def test_the_child_runs_the_code_that_was_imported(recipe: Recipe, tmp_path: Path) -> None:
    """Whatever the working directory holds; there may be another checkout."""
    other = tmp_path / "other" / "onecurve"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit('the other version runs')\n", encoding="utf-8")
    code = (
        f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); import onecurve\n"
        "print(onecurve.plan(**json.loads(sys.argv[1]))['num_steps'])"
    )
    told = subprocess.run(
        [sys.executable, "-P", "-c", code, json.dumps(recipe)],
        cwd=other.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["8"]


@pytest.mark.parametrize(
    ("keys", "column"),
    [
        ("text_column: body", "body"),
        ("task: causal_lm", "text"),
        ("task: causal_lm\nprompt_column: p\ncompletion_column: c\ntools_column: t", "p"),
    ],
)
def test_a_text_alone_stands_in_the_first_column_that_the_task_reads(tmp_path: Path, keys: str, column: str) -> None:
    from onecurve.api import _find_input_column

    (tmp_path / "config.yaml").write_text(f"model_name_or_path: m\ntrain_file: t.jsonl\n{keys}\n", encoding="utf-8")
    assert _find_input_column(onecurve.Run(tmp_path)) == column
