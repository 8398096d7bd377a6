"""The page benchmarks/causal_lm.md: a section for each kind of processor, with a table for each workload."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.causal_lm_data import WORKLOADS
from benchmarks.processor import describe_measurement
from benchmarks.speed_data import ROOT
from benchmarks.speed_page import describe_spread, read_sections

PAGE = ROOT / "benchmarks" / "causal_lm.md"
TABLES = ("dialogues", "documents")

WAYS = {
    "t": "TRL, padded, {precision}, sampling by length, fused AdamW",
    "q": "TRL, padding-free, {precision}, fused AdamW",
    "p": "TRL, packing, {precision}, fused AdamW",
    "o": "Onecurve, padded, {precision}",
    "f": "floor: bare PyTorch on e's batches",
}
INTRODUCTION = """# Causal language models, measured

<!-- Written by benchmarks/causal_lm.py. -->

SmolLM2-135M-Instruct, all weights trained, by Onecurve with packed micro-batches (e) and by others, on the same tokens and
targets. TRL is `SFTTrainer` at its best here: no checkpointing of activations, and the precision that the processor is
fastest in. Its micro-batches have the size that was fastest of those tried, which is not the largest: without a kernel for
sequences of different lengths, TRL's padding-free and packed rows go through attention whole, under a mask.

Onecurve and one other take turns, and ratios are taken within a round: medians, with the lowest and highest. "Tokens" are
those of the examples, without padding; a target is a token that is learned. The ratio in processor time is less sensitive to
what else the machine does. Memory is the whole process's peak. The floor runs Onecurve's own forward and loss in a bare
loop, so it says what the loop around them costs."""


def name_way(way: str, precision: str) -> str:
    """What a way is, with the mixed_precision that it was measured in."""
    return WAYS[way].format(precision="float32" if precision == "no" else precision)


def find_ratios(pair: Mapping[str, Any], amount: str, seconds: str) -> list[float]:
    """How many times as much Onecurve did in a second, in each round."""
    return [
        (mine[amount] / mine[seconds]) / (other[amount] / other[seconds])
        for mine, other in zip(pair["ours"], pair["theirs"], strict=True)
    ]


def to_table(result: Mapping[str, Any]) -> list[str]:
    """The lines of one workload's table."""
    lines = [
        f"## {WORKLOADS[result['workload']].title}",
        "",
        "| way | tokens/s | targets/s | padding | memory | e is times as fast | in processor time | by targets |",
        "|---|---|---|---|---|---|---|---|",
    ]
    mine = [turn for pair in result["pairs"].values() for turn in pair["ours"]]
    name = f"e Onecurve, packed, {name_way('o', result['precision']).rpartition(' ')[2]}"
    lines.append(f"| {name} {_describe_turns(mine)} | | | |")
    for way, pair in result["pairs"].items():
        ratios = describe_spread(find_ratios(pair, "tokens", "seconds"), 2)
        lean = describe_spread(find_ratios(pair, "tokens", "cpu_seconds"), 2)
        by_targets = describe_spread(find_ratios(pair, "targets", "seconds"), 2)
        name = f"{way} {name_way(way, result['precision'])}"
        lines.append(f"| {name} {_describe_turns(pair['theirs'])} | {ratios} | {lean} | {by_targets} |")
    return [*lines, ""]


def _describe_turns(turns: Sequence[Mapping[str, Any]]) -> str:
    peak = max(turn["peak_bytes"] for turn in turns)
    rates = [statistics.median(turn[name] / turn["seconds"] for turn in turns) for name in ("tokens", "targets")]
    padding = 1 - sum(turn["tokens"] for turn in turns) / sum(turn["places"] for turn in turns)
    memory = f"{peak / 2**30:.1f} GiB" if peak else ""
    return f"| {rates[0]:,.0f} | {rates[1]:,.0f} | {padding:.1%} | {memory}"


def update_page(folder: Path) -> None:
    """Write what was measured into its processor's section, and leave the others as they are."""
    results = [
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in TABLES
        if (folder / f"{name}.json").exists()
    ]
    lines = [describe_measurement(results[0]["machine"], "python -m benchmarks.causal_lm", ("trl",)), ""]
    for result in results:
        lines += [line.replace("## ", "### ", 1) if line.startswith("## ") else line for line in to_table(result)]
    old = read_sections(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    PAGE.write_text(
        build_page(INTRODUCTION, {**old, results[0]["machine"]["kind"]: "\n".join(lines).strip()}), encoding="utf-8"
    )


def build_page(introduction: str, sections: Mapping[str, str]) -> str:
    """The introduction and the sections that were measured."""
    return "\n\n".join([introduction, *(f"## {kind}\n\n{text}" for kind, text in sections.items())]) + "\n"
