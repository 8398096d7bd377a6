"""What the Accelerator of a training is set to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend

from onecurve.training.config import build_recipe
from onecurve.training.errors import WrongTopology
from onecurve.training.parallel.accelerator import build_accelerator, build_offload_optimizer, forget_state, set_engine
from onecurve.training.parallel.launch import Launch
from onecurve.training.zero_buffers import count_bucket
from tests.conftest import ROOT

RECIPE = build_recipe({"model_name_or_path": "m", "train_file": "t"})


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    forget_state()


def build(**settings: Any) -> Accelerator:
    recipe = build_recipe({"model_name_or_path": "m", "train_file": "t", **settings})
    return build_accelerator(recipe, torch.nn.Linear(1, 1), timedelta(seconds=10))


def test_a_group_of_another_size_than_was_launched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if accelerate had not joined the others: each process would train the same model alone."""
    launched = dataclasses.replace(Launch.from_environment(), num_processes=2)
    monkeypatch.setattr(Launch, "from_environment", classmethod(lambda _: launched))
    with pytest.raises(WrongTopology):
        build()


def test_gradients_of_ddp_are_views_into_its_buckets() -> None:
    handler = build().ddp_handler
    assert handler is not None
    assert handler.gradient_as_bucket_view
    assert not handler.broadcast_buffers


@pytest.mark.parametrize("asked", ["NO", "INDUCTOR"])
def test_accelerate_compiles_nothing(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would turn float32 products on a GPU into TF32 as well; models/compilation.py compiles the layers."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", asked)  # As `accelerate launch` does for a YAML's dynamo_config.
    assert build(torch_compile=True).state.dynamo_plugin.backend == DynamoBackend.NO


def test_float32_is_never_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = (
        True  # As accelerate would, or a user's code.
    )
    build()
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (False, False)


@pytest.mark.parametrize(("stage", "overlaps"), [(1, True), (2, True), (3, None)])
def test_zero_reduces_gradients_while_others_are_computed(stage: int, overlaps: bool | None) -> None:
    """ZeRO-3 does by default. Buckets take what the plan counts."""
    config: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    set_engine(config, RECIPE, 100_000_000)
    zero = config["zero_optimization"]
    assert zero.get("overlap_comm") is overlaps
    assert zero["reduce_bucket_size"] * (2 if overlaps else 1) == count_bucket(stage, 100_000_000)


@pytest.mark.parametrize(
    ("num_parameters", "bucket", "live", "ahead"),
    [
        (22_000_000, 1 << 24, 1 << 25, 1 << 22), (10**9, 62_500_000, 125_000_000, 31_250_000),
        (70_000_000_000, 500_000_000, 10**9, 50_000_000),
    ],
)  # fmt: skip
def test_zero_3_has_buffers_of_the_models_size(num_parameters: int, bucket: int, live: int, ahead: int) -> None:
    """At most DeepSpeed's own."""
    config: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    set_engine(config, RECIPE, num_parameters)
    zero = config["zero_optimization"]
    assert zero == {
        "stage": 3, "reduce_bucket_size": bucket, "stage3_max_live_parameters": live, "stage3_max_reuse_distance": live,
        "stage3_prefetch_bucket_size": ahead, "sub_group_size": 1 << 25,
    }  # fmt: skip


def test_what_a_file_of_deepspeeds_sets_stays() -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 7}}
    set_engine(config, RECIPE, 100)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 7}


def test_no_topology_needs_a_second_process_group() -> None:
    """accelerate adds one over gloo for whole states of FSDP; it needs a network interface that NCCL does not."""
    kinds = {path.stem: read_state_dict_type(path) for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert kinds["fsdp"] == "SHARDED_STATE_DICT"
    assert "FULL_STATE_DICT" not in kinds.values()


def read_state_dict_type(path: Path) -> str | None:
    kind: str | None = yaml.safe_load(path.read_text()).get("fsdp_config", {}).get("fsdp_state_dict_type")
    return kind


def test_no_attention_is_built_anew_for_each_length() -> None:
    """cuDNN's is, and torch would prefer it on a GPU."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    build()
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_a_deterministic_training_allows_no_other_algorithms(
    monkeypatch: pytest.MonkeyPatch, is_deterministic: bool
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        build(deterministic=is_deterministic)
        assert torch.are_deterministic_algorithms_enabled() is is_deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention has other algorithms then"
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if is_deterministic else None)
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(("device", "is_offloaded"), [("cpu", True), ("none", False), (None, False)])
def test_the_optimizer_for_the_host_is_compiled_under_our_lock(
    monkeypatch: pytest.MonkeyPatch, device: str | None, is_offloaded: bool
) -> None:
    built: list[bool] = []
    monkeypatch.setattr("onecurve.training.parallel.accelerator.build_host_adam", lambda: built.append(True))
    zero = {} if device is None else {"offload_optimizer": {"device": device}}
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        deepspeed_plugin=SimpleNamespace(deepspeed_config={"zero_optimization": zero}),
    )
    build_offload_optimizer(accelerator)
    assert built == [True] * is_offloaded
    accelerator.distributed_type = DistributedType.FSDP
    build_offload_optimizer(accelerator)
    assert len(built) <= 1
