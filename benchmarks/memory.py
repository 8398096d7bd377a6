"""Predicted against measured memory of training steps: `onecurve plan`'s arithmetic on trial.

    python benchmarks/memory.py            a table for each model and batch shape; writes benchmarks/memory.md
    python benchmarks/memory.py --measure '["MiniLM", "one process", 8, 64, {}]'    one measurement

On a CPU the peak is that of the process's resident set while steps 3 and 4 run, over what it held before the model was
built, with the allocator told to return every large block, and dropout and attention exchanged as in a training. The other
strategies are measured by PyTorch's own memory tracker under a fake process group of 8 ranks.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecurve.launcher.facts.shape import build_shape
from onecurve.launcher.planning.memory import STRATEGIES, MemoryEstimate, Strategy, estimate_memory
from onecurve.launcher.planning.work import build_work
from onecurve.launcher.units import MIB
from onecurve.training.config import Recipe
from onecurve.training.zero_buffers import SUB_GROUP, count_bucket, count_live_parameters, count_prefetched_parameters

MODELS: dict[str, dict[str, Any]] = {
    "MiniLM": {"vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
    "BERT-base": {"vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
}
TRACKED_SHAPES = ((8, 64), (16, 128))
SHAPES = ((8, 64), (8, 256), (16, 128), (32, 64), (4, 512), (16, 256))
CHANGED: tuple[dict[str, Any], ...] = (
    {"dropout": 0.0}, {"num_micro_batches": 2}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"},
    {"mixed_precision": "bf16", "dropout": 0.0}, {"dropout_masks": "torch"},
)  # fmt: skip
NUM_LABELS = 5
NUM_RANKS = 8


def build_config(name: str) -> dict[str, Any]:
    """A BERT with twelve heads and the published sizes."""
    return {"model_type": "bert", "num_attention_heads": 12, "max_position_embeddings": 512, **MODELS[name]}


Case = tuple[str, Strategy, int, int, dict[str, Any]]


def list_cases() -> list[Case]:
    """Model, strategy, examples, tokens of each and changed settings of every row, in the table's order."""
    cases: list[Case] = []
    for model in MODELS:
        cases += [(model, "one process", *shape, {}) for shape in SHAPES]
        cases += [(model, "one process", 16, 128, options) for options in CHANGED]
        cases += [(model, strategy, *shape, {}) for strategy in STRATEGIES[1:] for shape in TRACKED_SHAPES]
    return cases


def describe_case(case: Case) -> str:
    """The cells of a row that say what was measured."""
    model, strategy, num_examples, length, options = case
    shown = ", ".join(f"{key} {value}" for key, value in options.items()) or "-"
    place = strategy if strategy == "one process" else f"{strategy}, 1 of {NUM_RANKS}"
    return f"| {model} | {place} | {num_examples} x {length} | {shown} |"


def build_recipe(case: Case) -> Recipe:
    """A recipe whose steps are those that are measured. The tracker sees torch's own dropout."""
    _, strategy, num_examples, length, options = case
    num_processes = 1 if strategy == "one process" else NUM_RANKS
    settings = {key: value for key, value in options.items() if key != "num_micro_batches"}
    if strategy != "one process":
        settings["dropout_masks"] = "torch"
    return Recipe(
        model_name_or_path="none",
        max_length=length,
        per_device_batch_size=num_examples,
        train_batch_size=num_examples * num_processes * options.get("num_micro_batches", 1),
        **settings,
    )


def predict(case: Case) -> MemoryEstimate:
    """The launcher's arithmetic for one case."""
    model, strategy, _, length, options = case
    num_processes = 1 if strategy == "one process" else NUM_RANKS
    config = {**build_config(model), "attention_probs_dropout_prob": options.get("dropout", 0.1)}
    shape = build_shape(config, NUM_LABELS)
    return estimate_memory(
        shape, strategy, build_work(build_recipe(case), shape, "cpu", length, num_processes), num_processes
    )


def warm_up(num_threads: int) -> int:
    """Load what the first step loads for good (kernels, thread pools), which is not the model's; returns the resident bytes."""
    import torch

    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    warm = torch.nn.Linear(8, 8)
    warm(torch.randn(4, 8)).sum().backward()
    torch.optim.AdamW(warm.parameters(), fused=True).step()
    gc.collect()
    return read_resident("VmRSS")


def measure_steps(model: Any, compute_loss: Callable[[], Any], num_micro_batches: int) -> int:
    """Most resident bytes of this process while steps 3 and 4 run.

    Args:
        compute_loss: the loss of a micro-batch; what it holds besides is freed before the backward pass.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for step in range(4):
        if step == 2:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        for _ in range(num_micro_batches):
            compute_loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return read_resident("VmHWM")


def measure(case: Case) -> int:
    """Peak bytes of one case, in this process."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from onecurve.training.data.plan import Placement
    from onecurve.training.models import example_dropout, example_masks, last_layer

    model_name, _, num_examples, length, options = case
    base = warm_up(num_threads=2)
    settings = {key: value for key, value in build_config(model_name).items() if key != "model_type"}
    dropout = options.get("dropout", 0.1)
    config = BertConfig(
        **settings, num_labels=NUM_LABELS, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    model = BertForSequenceClassification(config).train()
    if options.get("gradient_checkpointing"):
        keywords = {"use_reentrant": False, "context_fn": example_masks.checkpoint_contexts}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    example_dropout.install(model, build_recipe(case), torch.device("cpu"))
    last_layer.install(model)
    batch = {
        "input_ids": torch.randint(1000, 2000, (num_examples, length)),
        "attention_mask": torch.ones(num_examples, length, dtype=torch.long),
        "token_type_ids": torch.zeros(num_examples, length, dtype=torch.long),
    }
    batch["attention_mask"][0, -3:] = 0
    labels = torch.zeros(num_examples, dtype=torch.long)
    mixed = options.get("mixed_precision", "no") == "bf16"
    placement = Placement(batch["attention_mask"].sum(dim=1).numpy(), frozenset({length}))
    is_by_example = build_recipe(case).dropout_masks == "by_example"

    def compute_loss() -> torch.Tensor:
        if is_by_example:
            example_masks.begin(example_masks.ExampleMasks(0, 0, range(num_examples), placement))
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = model(**batch).logits
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    return measure_steps(model, compute_loss, options.get("num_micro_batches", 1)) - base


def measure_tracked(case: Case) -> int:
    """Peak bytes of a strategy on one of 8 ranks, by PyTorch's own tracker; nothing is sent, so one process is enough."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import BertConfig, BertForSequenceClassification

    from onecurve.training.models import last_layer

    model_name, strategy, num_examples, length, _ = case
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(NUM_RANKS), DS_ACCELERATOR="cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
    settings = {key: value for key, value in build_config(model_name).items() if key != "model_type"}
    model = BertForSequenceClassification(BertConfig(**settings, num_labels=NUM_LABELS)).train()
    last_layer.install(model)
    tokens = torch.randint(1000, 2000, (num_examples, length))
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    track = _track_fsdp if strategy.startswith("FSDP2") else _track_ddp if strategy == "DDP" else _track_zero
    peak = track(model, batch, strategy)
    return int(sum(sizes["Total"] for device, sizes in peak.items() if device.type != "meta"))


def _track_fsdp(model: Any, batch: dict[str, Any], strategy: Strategy) -> dict[Any, Any]:
    import torch
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    policy = CPUOffloadPolicy(pin_memory=False) if "offload" in strategy else OffloadPolicy()
    for layer in (*model.bert.encoder.layer, model):
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tracker = FSDPMemTracker(model, optimizer)
    tracker.track_inputs(())
    with tracker:
        for _ in range(2):
            model(**batch).logits.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_mod_stats()
    return dict(tracker.get_tracker_snapshot("peak"))


def _track_ddp(model: Any, batch: dict[str, Any], strategy: Strategy) -> dict[Any, Any]:
    import torch
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.nn.parallel import DistributedDataParallel

    def answer(bucket: Any) -> Any:
        # The fake group's answer has no value, which the reducer's own way of sending does not take.
        sent: Any = torch.futures.Future()
        sent.set_result(bucket.buffer())
        return sent

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, lambda state, bucket: answer(bucket))
        for _ in range(2):
            wrapped(**batch).logits.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_mod_stats()
    return dict(tracker.get_tracker_snapshot("peak"))


def _track_zero(model: Any, batch: dict[str, Any], strategy: Strategy) -> dict[Any, Any]:
    import deepspeed
    import torch
    from torch.distributed._tools.mem_tracker import MemTracker

    from onecurve.training.parallel.deepspeed_states import share_weights

    stage = int(strategy.removeprefix("ZeRO-")[0])
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # As training/parallel/accelerator.py sets it.
        number = sum(parameter.numel() for parameter in model.parameters())
        live = count_live_parameters(number)
        zero |= {"reduce_bucket_size": count_bucket(3, number), "stage3_max_live_parameters": live}
        zero |= {"stage3_prefetch_bucket_size": count_prefetched_parameters(number), "sub_group_size": SUB_GROUP}
        zero["stage3_max_reuse_distance"] = live
    if "offload" in strategy:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": len(batch["input_ids"]),
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        share_weights(engine.optimizer)
        for _ in range(2):
            engine.backward(engine(**batch).logits.sum())
            engine.step()
            tracker.reset_mod_stats()
    return dict(tracker.get_tracker_snapshot("peak"))


def read_resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status; this measurement needs Linux")


def measure_apart(case: Case) -> int:
    """The same in a fresh process whose allocator returns every block above 64 KiB."""
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    words = [sys.executable, __file__, "--measure", json.dumps(case)]
    result = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    return int(result.stdout.strip().splitlines()[-1])


def compare(case: Case) -> str:
    """A row of the table: measured in a process of its own."""
    plan = predict(case)
    predicted = plan.peak + plan.host  # On a CPU the tracker can't tell the device's memory from the host's.
    measured = measure_apart(case)
    return f"{describe_case(case)} {predicted / MIB:,.0f} | {measured / MIB:,.0f} | {predicted / measured - 1:+.1%} |"


def main() -> None:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", help="one case as JSON; prints its bytes")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("memory.md"))
    arguments = parser.parse_args()
    if arguments.measure:
        case: Case = tuple(json.loads(arguments.measure))
        print(measure(case) if case[1] == "one process" else measure_tracked(case))
        return
    rows = []
    for each in list_cases():
        rows.append(compare(each))
        print(rows[-1], flush=True)
    head = (
        "# Memory: predicted and measured\n\nWritten by `python benchmarks/memory.py`. MiB on one process, AdamW, float32 and "
        "dropout 0.1 unless the fourth column\nsays otherwise. One process: growth of the resident set on a CPU, with the "
        "dropout and attention of a training there. The\nothers: PyTorch's memory tracker under a fake process group of 8 "
        "ranks, with torch's own dropout; with offload, device and\nhost together, which it can't tell apart on a CPU. "
        "The bucket of ZeRO-1 and 2 alone takes 1,907 MiB in float32.\n\n"
        "| model | strategy | examples x tokens | changed | predicted | measured | off by |\n|---|---|---|---|---|---|---|\n"
    )
    arguments.output.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
