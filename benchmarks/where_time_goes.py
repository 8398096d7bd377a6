"""The operations that a step spends its time in, before and after: torch's own dropout and attention, and ours.

    python -m benchmarks.where_time_goes --workload base_long

Times every operation of the real model's steps (benchmarks/operation_clock.py), after two steps that don't count. Prints a table,
and writes it to build/benchmarks for benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.operation_clock import MATRIX_PRODUCTS, OperationClock
from benchmarks.processor import GLIBC_ALLOCATOR, choose_precision
from benchmarks.speed import Lock
from benchmarks.speed_data import FOLDER, ROOT, WORKLOADS, build_workload

# What a reader thinks of, and the operations that it is made of.
KINDS = {
    "matrix products": MATRIX_PRODUCTS,
    "dropout masks drawn": (
        "philox.fill",
        "bernoulli_",
        "random_",
        "clamp",
        "bitwise_left_shift_",
        "bitwise_left_shift",
        "sub_",
        "div_",
    ),
    "dropout masks applied": ("bitwise_and",),
    "softmax": ("_softmax", "_softmax_backward_data", "_safe_softmax"),
    "GELU": ("gelu", "gelu_backward"),
    "layer norms": ("native_layer_norm", "native_layer_norm_backward"),
    "copies and casts": ("copy_", "_to_copy", "clone"),
    "products and sums by element": ("mul", "mul_", "add", "add_", "sum", "where", "masked_fill", "eq", "logical_not"),
    "optimizer and clipping": ("_fused_adamw_", "linalg_vector_norm", "_foreach_norm", "_foreach_mul_"),
}


_NUM_STEPS = 3


def profile(name: str, masks: str) -> dict[str, float]:
    """Milliseconds of each kind of operation in one step; runs in a process of its own."""
    import torch
    from transformers import AutoModelForSequenceClassification, logging

    from onecurve.training.config import Recipe
    from onecurve.training.data.plan import Placement
    from onecurve.training.models import example_dropout, example_masks, last_layer, philox

    kinds = {operation: kind for kind, operations in KINDS.items() for operation in operations}
    clock = OperationClock()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    workload = WORKLOADS[name]
    settings = build_workload(workload)
    torch.manual_seed(0)
    path, precision = settings["model_name_or_path"], choose_precision()
    attention = "eager" if masks == "eager" else None
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=5, attn_implementation=attention)
    keys: dict[str, Any] = {"model_name_or_path": path, "train_file": ("none",), "mixed_precision": precision}
    recipe = Recipe(**keys)
    is_ours = masks == "by_example"
    if is_ours:
        example_dropout.install(model, recipe, torch.device("cpu"))
        last_layer.install(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    num_examples, length = (workload.micro_batch_size, 512 if workload.texts == "long" else 24)
    batch = {"input_ids": torch.randint(1000, 30000, (num_examples, length))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][: num_examples // 2, -1:] = 0

    lengths = batch["attention_mask"].sum(dim=1).numpy()
    placement = Placement(lengths, frozenset({length}))

    def step() -> None:
        if is_ours:
            example_masks.begin(example_masks.ExampleMasks(0, 0, range(num_examples), placement))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(**batch).logits
        logits.float().logsumexp(dim=-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    draw = philox.fill

    def draw_on_the_clock(*arguments: Any) -> None:
        """NumPy's generator is no operation of torch."""
        started = time.perf_counter()
        draw(*arguments)
        clock.seconds["philox.fill"] += time.perf_counter() - started

    model.train()
    step()
    step()
    philox.fill = draw_on_the_clock  # type: ignore[assignment]
    started = time.perf_counter()
    with clock:
        for _ in range(_NUM_STEPS):
            step()
    philox.fill = draw
    example_masks.begin(None)
    step_milliseconds = 1e3 * (time.perf_counter() - started) / _NUM_STEPS
    found: defaultdict[str, float] = defaultdict(float)
    for operation, seconds in clock.seconds.items():
        found[kinds.get(operation, "all else")] += 1e3 * seconds / _NUM_STEPS
    return {**found, "between operations": step_milliseconds - sum(found.values())}


def to_markdown(name: str, profiles: dict[str, dict[str, float]]) -> str:
    """The table for RESULTS.md."""
    title = f"## Where the time of a step goes ({WORKLOADS[name].title})"
    lines = [title, "", f"| ms of one micro-batch | {' | '.join(profiles)} |", "|---" * (len(profiles) + 1) + "|"]
    kinds = sorted(
        {kind for found in profiles.values() for kind in found},
        key=lambda kind: -max(p.get(kind, 0) for p in profiles.values()),
    )
    lines += [
        f"| {kind} | {' | '.join(f'{found.get(kind, 0):,.0f}' for found in profiles.values())} |" for kind in kinds
    ]
    lines.append(f"| **all** | {' | '.join(f'**{sum(found.values()):,.0f}**' for found in profiles.values())} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str]) -> None:
    """Profile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="base_long")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help="a file whose lock is held meanwhile")
    options: Any = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(profile(options.workload, options.child)))
        return
    environment = {
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "OMP_WAIT_POLICY": "PASSIVE",
        **GLIBC_ALLOCATOR,
        **os.environ,
    }
    profiles = {}
    names = {"torch": "before: SDPA", "eager": "before: eager attention", "by_example": "after"}
    for masks, title in names.items():
        command = [sys.executable, "-m", "benchmarks.where_time_goes", "--workload", options.workload, "--child", masks]
        lock = Lock(options.lock)
        with lock.round():
            result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        lock.release()
        profiles[title] = json.loads(result.stdout.splitlines()[-1])
    text = to_markdown(options.workload, profiles)
    print(text)
    (FOLDER / "results").mkdir(parents=True, exist_ok=True)
    (FOLDER / "results" / f"part_0_profile_{options.workload}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
