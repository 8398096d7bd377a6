"""Memory and time of a language model's loss: all logits at once, and in chunks of tokens (training/tasks/chunked_losses.py).

    python -m benchmarks.loss_memory             about five minutes and 5 GiB; writes benchmarks/loss_memory.md
    python -m benchmarks.loss_memory --quick     a few seconds with small shapes; writes nothing

A model that is only an output layer, forward and backward, in float32. Each way runs in a process of its own, which holds
weights, hidden states and their gradients before it is measured: what is counted is logits, their softmax and gradient, and
copies of the weights' gradient. All logits of 8,192 tokens would need 15 GiB, so that way is measured on fewer tokens, and
what each token adds is extrapolated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.processor import GLIBC_ALLOCATOR, describe_machine
from benchmarks.speed_data import ROOT

PAGE = ROOT / "benchmarks" / "loss_memory.md"
MIB = 2**20

# Vocabulary, hidden size, tokens of both ways, tokens of the chunked way alone.
FULL_SIZE = (150_000, 1024, (512, 1024), 8192)
QUICK_SIZE = (20_000, 64, (256, 512), 1024)
# Vocabularies and hidden sizes whose time is compared, and tokens.
TIMED = ((150_000, 1024, 512), (32_000, 2048, 512))


def build_model(vocab_size: int, hidden_size: int) -> Any:
    """An output layer that looks like a model of transformers."""
    import torch

    class OutputLayer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Linear(hidden_size, vocab_size, bias=False)
            config = SimpleNamespace(vocab_size=vocab_size)
            self.config = SimpleNamespace(get_text_config=lambda: config)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.lm_head

        def forward(self, input_ids: Any = None, hidden: Any = None, use_cache: bool = False) -> Any:
            if hidden is None:
                hidden = torch.nn.functional.one_hot(input_ids, hidden_size).float()
            return SimpleNamespace(logits=self.lm_head(hidden))

    return OutputLayer()


def read_peak() -> int:
    """The largest memory that this process has had, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run(way: str, vocab_size: int, hidden_size: int, num_tokens: int, num_steps: int) -> dict[str, Any]:
    """Forward and backward of some steps: seconds of the processor in each, and bytes at the peak beside what was there."""
    import torch

    from onecurve.training.tasks.chunked_head import find_tried_head
    from onecurve.training.tasks.token_losses import token_losses

    torch.manual_seed(0)
    model = build_model(vocab_size, hidden_size)
    hidden = torch.randn(1, num_tokens + 1, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocab_size, (1, num_tokens + 1))
    for tensor in (model.lm_head.weight, hidden):
        tensor.grad = torch.zeros_like(tensor)
    if way == "chunks":
        assert find_tried_head(model) is not None
    before, seconds = read_peak(), []
    for _ in range(num_steps):
        started = time.process_time()
        losses = token_losses(model, {"hidden": hidden}, labels, "auto" if way == "chunks" else None).losses
        (losses.sum() / num_tokens).backward()  # type: ignore[no-untyped-call]
        seconds.append(time.process_time() - started)
    return {"bytes": read_peak() - before, "seconds": seconds}


def measure(*words: str | int) -> dict[str, Any]:
    """`run` in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.loss_memory", "--child", *map(str, words)],
        cwd=ROOT,
        env={**GLIBC_ALLOCATOR, "OMP_NUM_THREADS": "1", **os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise SystemExit(f"{words} failed:\n{result.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    print(words, f"{found['bytes'] / MIB:,.0f} MiB", [round(each, 2) for each in found["seconds"]], file=sys.stderr)
    return found


def compare_memory(vocab_size: int, hidden_size: int, tokens: Sequence[int], most: int) -> list[str]:
    """Rows: tokens, MiB of all logits, MiB in chunks, share."""
    whole = {number: measure("whole", vocab_size, hidden_size, number, 1)["bytes"] for number in tokens}
    few, many = tokens
    # Logits, their softmax and its gradient; the allocator may add to that, so a steeper rise is not believed.
    each = min((whole[many] - whole[few]) / (many - few), 3 * 4 * vocab_size)
    lines = []
    for number in (*tokens, most):
        chunked = measure("chunks", vocab_size, hidden_size, number, 1)["bytes"]
        expected = whole.get(number, whole[many] + each * (number - many))
        note = "" if number in whole else ", extrapolated"
        lines.append(
            f"| {number:,} x {vocab_size:,} | {expected / MIB:,.0f}{note} | {chunked / MIB:,.0f} | {chunked / expected:.1%} |"
        )
    return lines


def compare_time(vocab_size: int, hidden_size: int, num_tokens: int, num_rounds: int) -> str:
    """A row: seconds of the processor in each way, and the ratio, of rounds in turns; the first step of each is left out."""
    found: dict[str, list[float]] = {"whole": [], "chunks": []}
    for _ in range(num_rounds):
        for way, seconds in found.items():
            seconds.append(min(measure(way, vocab_size, hidden_size, num_tokens, 2)["seconds"][1:]))
    whole, chunks = (statistics.median(seconds) for seconds in found.values())
    ratios = [mine / theirs for mine, theirs in zip(found["chunks"], found["whole"], strict=True)]
    return (
        f"| {num_tokens:,} x {hidden_size:,} x {vocab_size:,} | {whole:.2f} | {chunks:.2f} | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) |"
    )


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes; writes nothing")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        way, *numbers = options.child
        print(json.dumps(run(way, *map(int, numbers))))
        return
    machine = describe_machine()
    lines = [
        "# Memory and time of a language model's loss",
        "",
        "<!-- Written by benchmarks/loss_memory.py. -->",
        "",
        f"{machine['date']}: {machine['processor']}, one thread; torch {machine['versions']['torch']}. Forward and backward of",
        "an output layer in float32, beside weights, hidden states and their gradients. Chunks are those of",
        "`loss_chunk_tokens: auto`. Extrapolated: each further token adds three rows of logits, or what was measured if that",
        "is less.",
        "",
        "| tokens x vocabulary | all logits, MiB | in chunks, MiB | share |",
        "|---|---|---|---|",
        *compare_memory(*(QUICK_SIZE if options.quick else FULL_SIZE)),
        "",
        "| tokens x hidden size x vocabulary | all logits, s | in chunks, s | ratio |",
        "|---|---|---|---|",
    ]
    for shape in ((20_000, 64, 512),) if options.quick else TIMED:
        lines.append(compare_time(*shape, num_rounds=1 if options.quick else 2))
    text = "\n".join([*lines, "", "Times are of the processor."]) + "\n"
    print(text)
    if not options.quick:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
