"""Training causal language models beside TRL's SFTTrainer and beside bare PyTorch: part of `make bench`.

    python -m benchmarks.causal_lm                       about ten minutes on two idle cores; writes benchmarks/causal_lm.md
    python -m benchmarks.causal_lm --only dialogues      one table
    python -m benchmarks.causal_lm --quick               a tiny model; writes nothing
    python -m benchmarks.causal_lm --adapter             LoRA beside all weights, TRL and PEFT; writes benchmarks/adapters.md

How far a ratio could go at all: benchmarks/causal_lm_ceiling.py.

Onecurve is measured against one rival (benchmarks/causal_lm_ways.py) after the other, in turns a, b, a, b, ..., so that two
models are in memory at once, and a ratio is taken within a round. `make demo-chat` builds the model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.causal_lm_data import CHAT, WORKLOADS, Workload
from benchmarks.causal_lm_page import ADAPTERS, TABLES, to_adapter_table, to_table, update_page
from benchmarks.processor import PRECISION, choose_precision, describe_machine
from benchmarks.speed import Worker
from benchmarks.speed_data import FOLDER

RIVALS = "ftqpo"
ADAPTER_RIVALS = "xtp"
SAME_BATCHES = "xt"
"""Rivals of adapters that have e's examples in each step."""

RESULTS = FOLDER / "results" / "causal_lm"


def compare(workload: Workload, rival: str, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Let Onecurve and a rival take their turns, after one that doesn't count.

    Returns:
        "ours" and "theirs", what each answered in its turns; "ready", what each said of itself at its start; with flags
        "held", bytes of its gradients, moments and checkpoint.
    """
    ways = "benchmarks.causal_lm_ways"
    workers = {"e": Worker("e", workload.name, flags, ways)}
    ready = {"e": workers["e"].read()}
    if rival != "f":
        workers[rival] = Worker(rival, workload.name, flags, ways)
        ready[rival] = workers[rival].read()
    ours, theirs = [], []
    for number in range(workload.rounds + 1):
        steps = workload.steps if number else 1
        # A step takes seconds: what is in caches when it begins makes no difference.
        mine = workers["e"].ask(do="train", steps=steps, warms_up=False)
        other = (
            workers["e"].ask(do="floor")
            if rival == "f"
            else workers[rival].ask(do="train", steps=steps, warms_up=False)
        )
        if flags and rival in SAME_BATCHES and mine["tokens"] != other["tokens"]:
            raise SystemExit(
                f"e and {rival} did not see the same batches: {mine['tokens']} and {other['tokens']} tokens"
            )
        if number:
            ours.append(mine)
            theirs.append(other)
    held = (
        {way: worker.ask(do="held") | worker.ask(do="checkpoint") for way, worker in workers.items()} if flags else {}
    )
    for worker in workers.values():
        worker.stop()
    print(f"{workload.name}: e and {rival} measured", file=sys.stderr, flush=True)
    return {"ours": ours, "theirs": theirs, "ready": ready, "held": held}


def main(arguments: Sequence[str]) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default=",".join(TABLES), help="tables, with commas between; none writes the page anew"
    )
    parser.add_argument("--adapter", action="store_true", help="train LoRA adapters, on the dialogues")
    parser.add_argument("--rivals", help="letters of the ways beside Onecurve's; all by default")
    parser.add_argument("--rounds", type=int, help="turns of each way; the table's own by default")
    parser.add_argument("--quick", action="store_true", help="a tiny model; writes nothing")
    parser.add_argument("--print", action="store_true", help="print the tables and write nothing")
    options = parser.parse_args(arguments)
    prepare_environment()
    names = "quick" if options.quick else "dialogues" if options.adapter else options.only
    for name in () if names == "none" else names.split(","):
        workload = replace(WORKLOADS[name], rounds=options.rounds or WORKLOADS[name].rounds)
        flags = ("--adapter", "lora") if options.adapter else ()
        rivals = options.rivals or (ADAPTER_RIVALS if options.adapter else RIVALS)
        result = {
            "workload": name,
            "pairs": {rival: compare(workload, rival, flags) for rival in rivals},
            "precision": choose_precision(),
            "machine": describe_machine(),
        }
        if options.quick or options.print:
            print("\n".join((to_adapter_table if options.adapter else to_table)(result)))
        else:
            save_result(result, ADAPTERS if options.adapter else name)
    if not (options.quick or options.print):
        update_page(RESULTS, (ADAPTERS,) if options.adapter else TABLES)


def save_result(result: dict[str, Any], name: str) -> None:
    """Keep it: the page is written from all that was measured."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")


def prepare_environment() -> None:
    """Threads and precision, the same for all ways.

    Raises:
        SystemExit: the model is not there.
    """
    if not (CHAT / "complete").exists():
        raise SystemExit("build/demo-chat is not there; `make demo-chat` builds it")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    # Threads that wait sleep: spinning on a busy machine, they would measure its other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ[PRECISION] = choose_precision()
    Path(FOLDER).mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    main(sys.argv[1:])
