"""`report_to` gives a tracker every number, once: Weights & Biases offline, and MLflow. (TensorBoard: test_family.)"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launch, Run
from tests.messages import names
from tools.jobs import cut_short

STEPS = {"max_train_steps": 5, "eval_steps": 4, "checkpointing_steps": 4}


def check(run: Run) -> None:
    assert run.exit_code == 0, run.stderr
    assert [line["step"] for line in run.steps] == [1, 2, 3, 4, 5]


def killed(run: Run, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same training, of which only the checkpoint of step 4 is left."""
    return {**settings, "output_dir": str(cut_short(run, 4, folder / "cut"))}


# A .wandb file is LevelDB's log of protocol buffers behind a header of its own.
HEADER, BLOCK, RECORD = 7, 32_768, struct.Struct("<IHB")


def read_log(content: bytes) -> Iterator[bytes]:
    """The records of a log: whole ones, and those that were cut at the end of a block put together."""
    position, parts = HEADER, b""
    while position + RECORD.size <= len(content):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < RECORD.size:
            position += left_in_block
            continue
        _, length, kind = RECORD.unpack_from(content, position)
        position += RECORD.size
        parts += content[position : position + length]
        position += length
        if kind in (1, 4):  # Whole, or the last part.
            yield parts
            parts = b""


def read_wandb(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and the settings that an offline run holds."""
    from wandb.proto import wandb_internal_pb2

    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for data in read_log(path.read_bytes()):
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            settings.update({item.key: json.loads(item.value_json) for item in updates if item.key})
    return rows, settings


@pytest.mark.slow
def test_wandb_holds_every_number_offline(recipe: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    settings = {**recipe, **STEPS, "report_to": "wandb"}
    run = launch(settings, topology="multi_cpu", num_processes=2, environment=environment)
    check(run)
    (written,) = tmp_path.rglob("run-*.wandb")  # Two processes, one run.
    rows, hyperparameters = read_wandb(written)
    again = launch(killed(run, settings, tmp_path), environment={**environment, "WANDB_DIR": str(tmp_path / "again")})
    check(again)
    (resumed,) = (tmp_path / "again").rglob("run-*.wandb")
    assert resumed.name == written.name, "the run that was begun, under its own id"
    assert [row["_step"] for row in read_wandb(resumed)[0] if "loss" in row] == [5]
    losses = {row["_step"]: row["loss"] for row in rows if "loss" in row}
    assert losses == {line["step"]: line["loss"] for line in run.steps}
    accuracies = {row["_step"]: row["eval_accuracy"] for row in rows if "eval_accuracy" in row}
    assert accuracies == {line["step"]: line["eval_accuracy"] for line in run.evaluations}
    assert hyperparameters["train_batch_size"] == 16
    assert hyperparameters["learning_rate"] == 1e-3


def read_mlflow(uri: str) -> tuple[Mapping[str, str], dict[str, dict[int, float]]]:
    """Parameters and metrics of the only run of a store."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "onecurve"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    names = run.data.metrics
    return run.data.params, {
        name: {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)} for name in names
    }


@pytest.mark.slow
def test_mlflow_holds_every_number(
    recipe: dict[str, Any], launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    # mlflow-skinny has no database of its own: it needs a server, or this folder.
    uri = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = {**recipe, **STEPS, "report_to": "mlflow"}
    run = launch(settings, topology="multi_cpu", num_processes=2, environment={"MLFLOW_TRACKING_URI": uri})
    check(run)
    again = launch(
        {**killed(run, settings, tmp_path), "per_device_batch_size": 4}, environment={"MLFLOW_TRACKING_URI": uri}
    )
    check(again)
    parameters, metrics = read_mlflow(uri)  # Two starts, one run.
    assert metrics["loss"] == {line["step"]: line["loss"] for line in again.steps}
    assert metrics["grad_norm"] == {line["step"]: line["grad_norm"] for line in again.steps}
    assert metrics["eval_accuracy"] == {line["step"]: line["eval_accuracy"] for line in again.evaluations}
    assert parameters["train_batch_size"] == "16"


def test_a_tracker_that_is_not_installed_is_told(
    recipe: dict[str, Any], train: Callable[[Mapping[str, Any]], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    run = train({**recipe, "max_train_steps": 1, "report_to": "wandb"})
    assert run.exit_code == 2
    assert names(run.stderr, "report_to", "wandb")


def test_a_tracker_that_cannot_start_is_told(
    recipe: dict[str, Any], train: Callable[[Mapping[str, Any]], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import TensorBoardTracker

    def fail(tracker: object) -> None:
        raise OSError("the store cannot be reached")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    run = train({**recipe, "max_train_steps": 1, "report_to": "tensorboard"})
    assert run.exit_code == 2
    assert names(run.stderr, "report_to", "tensorboard", "the store cannot be reached")
    assert "Traceback" not in run.stderr
