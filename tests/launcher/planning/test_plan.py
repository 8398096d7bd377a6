"""The arithmetic of a training."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onecurve.launcher.facts.shape import build_shape, load_shape
from onecurve.launcher.planning.compute import count_communication, count_flops
from onecurve.launcher.planning.data_estimate import estimate_data
from onecurve.launcher.planning.devices import parse_devices
from onecurve.launcher.planning.plan import build_plan
from onecurve.launcher.units import GIB, format_seconds
from onecurve.launcher.views.plan_table import describe_plan, plan_to_json, print_plan
from onecurve.training.config import Recipe, build_recipe
from tests.launcher.conftest import cluster
from tests.launcher.planning.test_topology import BERT, LLAMA, LLAMA_70B
from tests.messages import names


def test_devices() -> None:
    devices = parse_devices("8xH100-80GB")
    assert (devices.count, devices.memory_bytes, devices.teraflops("bf16")) == (8, int(79.6 * GIB), 989)
    assert parse_devices("A100-40GB").memory_bytes == 40 * GIB
    # What nvidia-smi shows of "24 GB": 23,034 MiB.
    assert parse_devices("L4-24GB").memory_bytes == parse_devices("L4").memory_bytes == int(22.5 * GIB)
    assert parse_devices("T4").memory_bytes == 15 * GIB
    assert parse_devices("4xNew Chip-96GB").teraflops("bf16") is None
    assert parse_devices("l4").memory_bytes == int(22.5 * GIB)


def test_numbers_of_a_small_recipe(recipe: dict[str, Any]) -> None:
    settings = build_recipe({**recipe, "max_train_steps": None, "num_train_epochs": 2})
    data = estimate_data(settings)
    assert data.num_examples == 203
    assert data.source == "tokenizer, 203 rows"
    assert 0 < data.padding < 0.1
    plan = build_plan(settings, load_shape(settings.model_name_or_path), data, cluster("2xT4", 2, 1))
    assert (plan.num_processes, plan.micro_batch, plan.num_micro_batches) == (4, 4, 1)
    assert (plan.steps_per_epoch, plan.num_steps) == (13, 26)
    assert plan.recommended == "DDP"
    assert plan_to_json(plan)["num_steps"] == 26


def test_70b_on_512_gpus() -> None:
    settings = Recipe.model_validate(
        {
            "model_name_or_path": "x", "dataset_name": "x", "train_batch_size": 1024, "per_device_batch_size": 2,
            "max_length": 4096, "mixed_precision": "bf16", "max_train_samples": 100_000, "gradient_checkpointing": True,
            "num_train_epochs": 1,
        }
    )  # fmt: skip
    shape = build_shape(LLAMA_70B)
    plan = build_plan(settings, shape, estimate_data(settings), cluster("8xH100-80GB", 64, 2000))
    by_name = {row.memory.strategy: row for row in plan.strategies}
    assert not by_name["DDP"].fits
    assert by_name["FSDP2"].fits
    assert plan.recommended == "FSDP2"
    # 6 x 69 B x 4 M tokens a step, a third more for recomputing, on 512 devices at 40 % of 989 TFLOPS.
    expected = 98 * 6 * 69.5e9 * 1024 * 4096 * 4 / 3 / (512 * 989e12 * 0.4)
    assert plan.seconds == pytest.approx(expected, rel=0.15)
    text = io.StringIO()
    print_plan(Console(file=text, width=80), plan, settings)
    rows = [line for line in text.getvalue().splitlines() if line.startswith((" ZeRO", " FSDP", " HSDP", " DDP"))]
    assert len(rows) == len(plan.strategies)
    assert max(map(len, rows)) <= 80
    assert "recommended" in text.getvalue()
    assert names(text.getvalue(), "loading", "share of the model")


@pytest.mark.parametrize(
    ("precision", "devices", "is_told"), [("no", "A100", True), ("bf16", "A100", False), ("no", "cpu-16GB", False)]
)
def test_what_float32_gives_away_is_told(recipe: dict[str, Any], precision: str, devices: str, is_told: bool) -> None:
    settings = build_recipe({**recipe, "mixed_precision": precision})
    plan = build_plan(settings, build_shape(BERT), estimate_data(settings), cluster(devices))
    text = io.StringIO()
    print_plan(Console(file=text, width=100), plan, settings)
    assert names(text.getvalue(), "float32", "16 times", "bf16") == is_told
    assert names(text.getvalue(), "loading", "whole model")


def test_flops_are_six_for_each_parameter_and_token() -> None:
    shape = build_shape(BERT)
    assert count_flops(shape, 1000, 0) == 6 * 12 * shape.layer_parameters * 1000
    assert count_flops(shape, 1, 128, gradient_checkpointing=True) == pytest.approx(count_flops(shape, 1, 128) * 4 / 3)


def test_communication_of_sharding_is_one_and_a_half_times_that_of_ddp() -> None:
    shape = build_shape(LLAMA)
    ddp = count_communication("DDP", shape, 8, 1, "no")
    assert ddp == pytest.approx(2 * 7 / 8 * 4 * shape.num_parameters)
    assert count_communication("ZeRO-2", shape, 8, 1, "no") == ddp
    assert count_communication("FSDP2", shape, 8, 1, "no") == pytest.approx(1.5 * ddp)
    assert count_communication("DDP", shape, 1, 1, "no") == 0
    # Inside a machine of eight the same, and between two of them each process's eighth of the gradients.
    between = 2 * 1 / 2 * 4 * shape.num_parameters / 8
    assert count_communication("HSDP", shape, 16, 1, "no", 2) == pytest.approx(1.5 * ddp + between)


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12 s"), (250, "4 min 10 s"), (7500, "2 h 05 min"), (273600, "3 d 04 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.07, "under a minute"), (59.0, "under a minute"), (250.0, "4 min 10 s")]
)
def test_the_time_of_a_training_is_never_a_few_seconds(seconds: float, shown: str) -> None:
    """Its start alone takes longer; what is left out is named."""
    settings = Recipe.model_validate(
        {"model_name_or_path": "x", "dataset_name": "x", "max_train_samples": 100, "num_train_epochs": 1}
    )
    plan = build_plan(settings, build_shape(BERT), estimate_data(settings), cluster("1xL4"))
    time = dict(describe_plan(dataclasses.replace(plan, seconds=seconds), settings))["time"]
    assert time.startswith(shown)
    assert names(time, "start-up", "evaluations", "checkpoints", "communication")
    assert plan_to_json(dataclasses.replace(plan, seconds=seconds))["seconds"] == seconds


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "json"])
def test_every_format_is_counted(suffix: str, tmp_path: Path) -> None:
    import csv
    import json

    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"some, text\n{number}", "label": number % 2} for number in range(7)]
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    data = estimate_data(
        build_recipe({"model_name_or_path": "x", "train_file": str(path), "validation_file": str(path)})
    )
    assert data.num_examples == 7
    assert data.source == "characters, 7 rows"
