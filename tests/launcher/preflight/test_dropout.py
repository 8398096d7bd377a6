"""What `check` says of dropout by example on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BertConfig

from onecurve.launcher.facts.shape import build_shape
from onecurve.launcher.planning.topology import build_topology
from onecurve.launcher.planning.work import build_work
from onecurve.launcher.preflight.dropout import check_dropout
from onecurve.launcher.preflight.findings import Finding
from onecurve.training.config import build_recipe
from tests.launcher.conftest import ROOT, machine
from tests.messages import names

BERT = build_shape(BertConfig().to_dict())


def check(num_gpus: int = 1, **keys: Any) -> list[Finding]:
    recipe = build_recipe({"model_name_or_path": "m", "train_file": "t.csv", "mixed_precision": "bf16", **keys})
    return check_dropout(
        recipe, build_topology(ROOT, machine(num_gpus), "single_gpu" if num_gpus else "cpu", None), BERT
    )


def test_attention_that_loses_its_kernel_has_its_price_named() -> None:
    (finding,) = check(per_device_batch_size=8, max_length=512)
    assert finding.severity == "warning"
    # 12 layers x 8 examples x 12 heads x 512^2 weights: before and after dropout of two bytes each, and a mask of one.
    assert names(finding.message, "dropout_masks", "0.1", "1,440 MiB", "torch")


@pytest.mark.parametrize("keys", [{"num_gpus": 0}, {"dropout": 0}, {"dropout_masks": "torch"}], ids=str)
def test_nothing_is_said_where_nothing_is_lost(keys: dict[str, Any]) -> None:
    assert check(**keys) == []
    assert check(attn_implementation="eager") == []


def test_a_kernel_with_masks_of_its_own_is_named() -> None:
    (finding,) = check(attn_implementation="flash_attention_2")
    assert names(finding.message, "dropout_masks", "flash_attention_2", "attn_implementation")


@pytest.mark.parametrize(
    ("masks", "kind", "keeps_attention", "mask_bytes"),
    [
        ("by_example", "cuda", True, 1),
        ("torch", "cuda", False, 1),
        ("by_example", "cpu", True, 1),
        ("torch", "cpu", True, 4),
    ],
)
def test_the_memory_of_attention_and_masks_is_counted(
    masks: str, kind: Any, keeps_attention: bool, mask_bytes: int
) -> None:
    recipe = build_recipe({"model_name_or_path": "m", "train_file": "t.csv", "dropout_masks": masks})
    work = build_work(recipe, BERT, kind, 128, 1)
    assert (work.keeps_attention, work.mask_bytes) == (keeps_attention, mask_bytes)
