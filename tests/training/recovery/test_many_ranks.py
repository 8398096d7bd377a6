"""Checkpoints of a model of 405B parameters on 512 processes, under a fake process group and without any numbers."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from onecurve.training.models.shares import Cut
from onecurve.training.models.tensor_files import TensorFiles
from onecurve.training.parallel.launch import Launch
from onecurve.training.parallel.states import MOMENTS
from onecurve.training.recovery.dealing import Dealing
from onecurve.training.recovery.manifest import find_fault, write_manifest
from onecurve.training.recovery.parts import collect_receipts, write_indexes
from onecurve.training.run_directory import MOMENTS_FILE, WEIGHTS_FILE, part_of
from tests.messages import names

NUM_RANKS, RANK = 512, 317


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Llama 3.1 405B on the meta device."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=NUM_RANKS)
    yield
    torch.distributed.destroy_process_group()


def deal(model: LlamaForCausalLM) -> Dealing:
    """The state in float32, dealt in the order of a save."""
    dealing = Dealing(range(NUM_RANKS))
    for name, parameter in model.named_parameters():
        dealing.deal(WEIGHTS_FILE, name, 4 * parameter.numel())
    for name, parameter in model.named_parameters():
        for key in MOMENTS:
            dealing.deal(MOMENTS_FILE, f"{name}.{key}", 4 * parameter.numel())
    return dealing


def test_each_process_writes_a_512th_and_at_most_one_tensor_more(model: LlamaForCausalLM) -> None:
    dealing = deal(model)
    sizes = {name: 4 * parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(dealing.num_bytes.values())
    assert total == 12 * 405_853_388_800
    held: Counter[int] = Counter()
    for owners in dealing.owners.values():
        for name, rank in owners.items():
            held[rank] += sizes[name] if name in sizes else sizes[name.rpartition(".")[0]]
    assert max(held.values()) <= total / NUM_RANKS + max(sizes.values())


def test_the_parts_that_are_read_are_those_that_fsdp2_holds(group: None, model: LlamaForCausalLM) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for shape in set(shapes.values()):
        for is_flat in (False, True):
            parts = [Cut(rank, NUM_RANKS, is_flat).find_part(shape) for rank in range(NUM_RANKS)]
            assert parts[0][0] == 0
            assert parts[-1][1] == (math.prod(shape) if is_flat else shape[0])
            assert all(one[1] == other[0] for one, other in pairwise(parts))
    check_parts(model, shapes, init_device_mesh("cpu", (NUM_RANKS,)), Cut(RANK, NUM_RANKS, is_flat=False))


def test_the_parts_that_are_read_are_those_that_hybrid_sharding_holds(
    group: None, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 machines of eight processes; the eight of each hold all weights."""
    sizes = {"RANK": RANK, "WORLD_SIZE": NUM_RANKS, "LOCAL_RANK": RANK % 8, "LOCAL_WORLD_SIZE": 8, "FSDP_VERSION": 2,
             "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": NUM_RANKS // 8, "PARALLELISM_CONFIG_DP_SHARD_SIZE": 8}  # fmt: skip
    switches = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    for name, value in {**sizes, **switches}.items():
        monkeypatch.setenv(name, str(value))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    mesh = init_device_mesh("cpu", (NUM_RANKS // 8, 8), mesh_dim_names=("dp_replicate", "dp_shard"))
    cut = Launch.from_environment().find_cut()
    assert cut == Cut(RANK % 8, 8, is_flat=False)
    check_parts(model, shapes, mesh, cut)


def check_parts(model: LlamaForCausalLM, shapes: dict[str, tuple[int, ...]], mesh: DeviceMesh, cut: Cut) -> None:
    """What FSDP2 leaves a process of each weight is what the cut finds."""
    divided = copy.deepcopy(model)
    for layer in (*divided.model.layers, divided):
        fully_shard(layer, mesh=mesh)
    for name, parameter in divided.named_parameters():
        assert isinstance(parameter, DTensor)
        begin, end = cut.find_part(shapes[name])
        whole, offset = compute_local_shape_and_global_offset(shapes[name], mesh, parameter.placements)
        assert (whole[0], offset[0] if end > begin else begin) == (end - begin, begin)
        assert parameter.to_local().shape == (end - begin, *shapes[name][1:])


def test_a_checkpoint_of_512_parts_is_whole_or_its_fault_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Files are holes of the size that they would have."""
    dealing = deal(model)
    for rank in range(NUM_RANKS):
        files = {}
        for kind in (WEIGHTS_FILE, MOMENTS_FILE):
            path = tmp_path / part_of(kind, rank, NUM_RANKS)
            with path.open("wb") as file:
                file.truncate(10**9 + rank)
            files[path.name] = {"bytes": 10**9 + rank, "sha256": "0"}
        (tmp_path / f".part_{rank}").write_text(json.dumps(files))
    facts = collect_receipts(tmp_path, NUM_RANKS, threading.Event())
    assert facts is not None
    assert len(facts) == 2 * NUM_RANKS
    write_indexes(tmp_path, dealing)
    (tmp_path / "progress.json").write_text("{}")
    write_manifest(tmp_path, facts)
    assert not list(tmp_path.glob(".*"))
    assert find_fault(tmp_path, reads_content=False) is None
    assert TensorFiles(tmp_path / WEIGHTS_FILE).names() == {name for name, _ in model.named_parameters()}
    last = tmp_path / part_of(MOMENTS_FILE, 500, NUM_RANKS)
    last.unlink()
    assert names(find_fault(tmp_path, reads_content=False), last.name)


def test_a_part_that_never_comes_is_not_waited_for_when_the_training_ends(tmp_path: Path) -> None:
    give_up = threading.Event()
    give_up.set()
    (tmp_path / ".part_0").write_text("{}")
    assert collect_receipts(tmp_path, 2, give_up) is None
