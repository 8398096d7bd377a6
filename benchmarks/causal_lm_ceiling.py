"""How much of a step is arithmetic that every way has to do: what a ratio of benchmarks.causal_lm could be at most.

    python -m benchmarks.causal_lm_ceiling documents     # about five minutes on two idle cores; prints a table

Matrix products and attention are the same for all who train the same tokens and targets in the same precision, and torch's own
code computes them on either side. All the rest (norms, activations, softmax over the vocabulary, optimizer, loop) can be made
cheaper, in the end free: a rival's whole step over its products and attention is the ratio that no program can pass without fewer
or faster products.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.causal_lm import prepare_environment
from benchmarks.causal_lm_data import WORKLOADS, Workload
from benchmarks.operation_clock import MATRIX_PRODUCTS, OperationClock
from benchmarks.speed import Worker

ARITHMETIC = {
    "matrix products": MATRIX_PRODUCTS,
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}
NUM_STEPS = 4


def serve(way: str, workload: Workload) -> None:
    """Train in one way as benchmarks.causal_lm_ways does, and answer also how long the arithmetic took."""
    from benchmarks import causal_lm_ways

    clock = OperationClock()

    class ClockedGate(causal_lm_ways.Gate):
        def forget(self) -> None:
            super().forget()
            clock.seconds.clear()

        def describe(self) -> dict[str, Any]:
            return super().describe() | {
                kind: sum(clock.seconds[name] for name in names) for kind, names in ARITHMETIC.items()
            }

    program: Any = causal_lm_ways
    program.Gate = ClockedGate
    with clock:
        program.main(way, workload, ())


def measure(way: str, workload: Workload) -> dict[str, Any]:
    """One turn, after one step that doesn't count."""
    worker = Worker(way, workload.name, (), "benchmarks.causal_lm_ceiling")
    worker.read()
    worker.ask(do="train", steps=1, warms_up=False)
    turn = worker.ask(do="train", steps=NUM_STEPS, warms_up=False)
    worker.stop()
    return turn


def to_table(turns: dict[str, dict[str, Any]]) -> list[str]:
    """Milliseconds for each token of each way, and its whole step over the arithmetic in it."""
    lines = [
        f"| way | {' | '.join(ARITHMETIC)} | all else | step over arithmetic |",
        "|---" * (len(ARITHMETIC) + 3) + "|",
    ]
    for way, turn in turns.items():
        parts = [turn[kind] for kind in ARITHMETIC]
        parts.append(turn["seconds"] - sum(parts))
        cells = [f"{1e3 * seconds / turn['tokens']:.3g} ms" for seconds in parts]
        lines.append(f"| {way} | {' | '.join(cells)} | {turn['seconds'] / sum(parts[:-1]):.2f} |")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Measure the workload that is named, TRL's padded rows and Onecurve's; or be one of them."""
    if len(arguments) == 2:
        serve(arguments[0], WORKLOADS[arguments[1]])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    workload = WORKLOADS[parser.parse_args(arguments).workload]
    prepare_environment()
    turns = {way: measure(way, workload) for way in "te"}
    print("\n".join(to_table(turns)))


if __name__ == "__main__":
    main(sys.argv[1:])
