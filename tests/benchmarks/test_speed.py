"""The benchmark of speed runs from end to end, and its arithmetic is right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import scale
from benchmarks.processor import find_kind
from benchmarks.speed import Turns, count_flops, read_shape
from benchmarks.speed_page import NOT_MEASURED, WAYS, build_page, read_sections, to_table
from benchmarks.where_time_goes import profile
from onecurve.training.models import last_layer
from tests.conftest import ROOT
from tests.messages import names


def run_benchmark(module: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.parametrize("cuts_last_layer", [False, True])
def test_flops_are_those_of_the_matrix_products(demo: Path, cuts_last_layer: bool) -> None:
    """Against PyTorch's own counter, on the real model; the head's few and the embeddings are not counted by us."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(demo / "model", attn_implementation="eager")
    if cuts_last_layer:
        assert last_layer.install(model)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(3, 40, dtype=torch.long)).logits.sum().backward()
    ours = count_flops([40, 40, 40], read_shape(str(demo / "model")), cuts_last_layer)
    # The first layer's input needs no gradient in our model either, but the counter's embeddings do.
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("masks", ["by_example", "eager", "torch"])
def test_every_kind_of_operation_is_timed(demo: Path, masks: str) -> None:
    found = profile("tiny", masks)
    own = ("softmax",) if masks != "torch" else ()  # SDPA's is inside of its kernel, or is named otherwise.
    for kind in ("matrix products", "dropout masks drawn", "GELU", "layer norms", "optimizer and clipping", *own):
        assert found[kind] > 0, kind


def test_a_turn_becomes_rates_and_ratios() -> None:
    turns = {way: Turns() for way in "aef"}
    for seconds, way in ((4.0, "a"), (1.0, "e"), (0.9, "f")):
        for factor in (1, 2):
            turn = {
                "seconds": seconds * factor,
                "cpu_seconds": seconds,
                "lengths": [30, 10],
                "padded": 50,
                "waited": 0.01,
            }
            turns[way].add(turn, (1000, 1, 10), 20.0, cuts_last_layer=False)
    peaks = [{"bfloat16": 4e6, "float32": 1e6}] * 2
    table = to_table({"workload": "quick", "ways": {way: vars(found) for way, found in turns.items()}, "peaks": peaks})
    row = next(line for line in table if line.startswith("| a "))
    assert "| 4.00 (4.00 to 4.00) |" in row, "e is four times as fast in every round"
    assert "| 20.0% |" in row, "ten of fifty tokens are padding"
    assert any(line.startswith("e ") and names(line, "+11.1%") for line in table)


@pytest.mark.slow
def test_every_way_takes_its_turn() -> None:
    result = run_benchmark("speed", ["--quick", "--ways", "abcdefj"])
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^\| ([a-j]) ", result.stdout, re.MULTILINE)
    assert rows == list("abcdefj")
    assert set(rows) < set(WAYS)


@pytest.mark.slow
def test_utilization_is_measured_on_a_tiny_model() -> None:
    result = run_benchmark("mfu", ["--model", "tiny", "--device", "cpu"])
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"MFU \d+\.\d .*tokens/s", result.stdout)) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures")
def test_without_a_gpu_it_says_so() -> None:
    result = run_benchmark("mfu", ["--model", "bert-large", "--device", "cuda"])
    assert result.returncode == 2
    assert names(result.stderr.splitlines()[-1], "benchmarks.mfu", "GPU")


def test_the_plan_is_measured_on_lengths_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "FOLDER", tmp_path)
    rows = dict(scale.measure(200_000, 64))
    assert rows["examples in a step"] == "1,024"
    assert rows["micro-batches of a process in a step"] == "1"
    assert float(rows["padding"].rstrip("%")) < 3
    lengths = scale.write_lengths(tmp_path / "lengths.npy", 1000)
    assert isinstance(lengths, np.memmap)
    assert (lengths.min(), lengths.max()) >= (1, 500)


@pytest.mark.parametrize(
    ("flags", "limit", "kind"),
    [
        ("avx2 avx512f avx512_bf16 amx_bf16", "", "AMX"),
        ("avx2 avx512f avx512_bf16", "", "AVX-512 bf16"),
        ("avx2 avx512f", "", "AVX-512"),
        ("avx2", "", "AVX2"),
        ("asimd bf16", "", "Other processors"),
        ("avx2 avx512f avx512_bf16 amx_bf16", "AVX2", "AVX2"),
        ("avx2", "AVX512_CORE", "AVX2"),
    ],
)
def test_a_processor_belongs_to_one_section(flags: str, limit: str, kind: str) -> None:
    assert find_kind(flags.split(), limit) == kind


def test_a_section_is_written_and_the_others_stay() -> None:
    page = build_page({"AMX": "one\n\n### a table", "AVX2": "two"})
    sections = read_sections(page)
    assert sections["AMX"] == "one\n\n### a table"
    assert sections["AVX-512"] == NOT_MEASURED
    assert read_sections(build_page({**sections, "AVX2": "three"})) == {**sections, "AVX2": "three"}


def test_the_page_has_kept_its_sections() -> None:
    sections = read_sections((ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"))
    for kind in ("AMX", "AVX-512 bf16"):
        assert sections[kind].count("| e Onecurve") >= 5
