"""The page of `make bench`, benchmarks/RESULTS.md: a section for each kind of processor, each with the tables measured on it."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processor import KINDS, OTHER
from benchmarks.speed_data import ROOT, WORKLOADS, describe_short_texts

PAGE = ROOT / "benchmarks" / "RESULTS.md"

NOT_MEASURED = "Not measured: `make bench` on such a processor writes this section."

WAYS = {
    "a": "the tutorial's native loop, padded to 512, float32",
    "b": "Trainer as it comes",
    "c": "Trainer at its best: {precision}, length sampling, fused AdamW, eager attention",
    "d": "accelerate's example: padded to the batch's longest",
    "e": "Onecurve, {precision}",
    "f": "floor: bare PyTorch on e's batches",
    "h": "Onecurve, {precision}, compiled",
    "i": "Trainer at its best, compiled",
    "j": "Onecurve, {precision}, torch's dropout masks",
}
TABLES = ("minilm_long", "minilm_short", "base_long", "base_short", "loop_long", "loop_short", "loop_base")
TARGET_ACCURACY = 0.9
STEPS_PER_LOOK = 5


def name_way(way: str, precision: str = "bf16") -> str:
    """What a way is, with the mixed_precision that it was measured in."""
    return WAYS[way].format(precision="float32" if precision == "no" else precision)


def describe_spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and the lowest and highest."""
    if len(values) < 2:
        return f"{values[0]:,.{digits}f}"
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def to_table(result: dict[str, Any]) -> list[str]:
    """The lines of one workload's table."""
    workload, ways = WORKLOADS[result["workload"]], result["ways"]
    mixed = result.get("precision", "bf16")
    peak = {name: statistics.median(peak[name] for peak in result["peaks"]) for name in result["peaks"][0]}
    lines = [
        f"## {workload.title}",
        "",
        "| way | examples/s | e is times as fast | in processor time | real tokens/s | padding | of the peak | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, turns in ways.items():
        rates, ours = turns["examples_per_second"], ways["e"]["examples_per_second"]
        ratios = [mine / rate for mine, rate in zip(ours, rates, strict=True)]
        lean = [
            mine / rate
            for mine, rate in zip(ways["e"]["examples_per_cpu_second"], turns["examples_per_cpu_second"], strict=True)
        ]
        precision = "bfloat16" if way in "cefghij" and mixed == "bf16" else "float32"
        share = statistics.median(turns["flops_per_second"]) / peak[precision]
        memory = f"{turns['peak_bytes'] / 2**30:.1f} GiB" if turns["peak_bytes"] else ""
        lines.append(
            f"| {way} {name_way(way, mixed)} | {describe_spread(rates)} | {describe_spread(ratios, 2) if way != 'e' else ''} "
            f"| {f'{statistics.median(lean):.2f}' if way != 'e' else ''} "
            f"| {statistics.median(turns['tokens_per_second']):,.0f} | {statistics.median(turns['padding']):.1%} "
            f"| {share:.0%} of {precision} | {memory} |"
        )
    overheads = (
        [
            floor / ours - 1
            for ours, floor in zip(ways["e"]["examples_per_second"], ways["f"]["examples_per_second"], strict=True)
        ]
        if "f" in ways
        else []
    )
    lines.append("")
    if overheads:
        lines.append(
            f"e against the floor: {statistics.median(overheads):+.1%} ({min(overheads):+.1%} to {max(overheads):+.1%}); "
            f"of its time the loop waited {statistics.median(ways['e']['waited']):.2%} for data."
        )
    in_bf16 = f"{peak['bfloat16'] / 1e9:,.0f} GFLOP/s in bf16, " if "bfloat16" in peak else ""
    lines.append(f"The matrix product reached {in_bf16}{peak['float32'] / 1e9:,.0f} GFLOP/s in float32.")
    return [*lines, ""]


def to_accuracy_table(result: dict[str, Any]) -> list[str]:
    """Seconds of training until the target, and what the same number of steps had taught each."""
    curves = result["curves"]
    fewest = min(len(curve) for curve in curves.values())
    lines = [
        f"## Time to an accuracy of {TARGET_ACCURACY:.0%} ({WORKLOADS['accuracy'].title})",
        "",
        f"| way | seconds of training | steps | accuracy after {fewest * STEPS_PER_LOOK} steps |",
        "|---|---|---|---|",
    ]
    precision = result.get("precision", "bf16")
    for way, curve in curves.items():
        seconds = f"{curve[-1][0]:.0f}" if curve[-1][1] >= TARGET_ACCURACY else f"not within {curve[-1][0]:.0f}"
        lines.append(
            f"| {way} {name_way(way, precision)} | {seconds} | {len(curve) * STEPS_PER_LOOK} | {curve[fewest - 1][1]:.0%} |"
        )
    return [*lines, "", f"Looked at every {STEPS_PER_LOOK} steps, on the same 100 texts.", ""]


def build_section(folder: Path) -> tuple[str, str]:
    """The kind of processor of what was last measured, and the text of its section.

    Args:
        folder: has a JSON file of each table, and part_*.md with the tables of other programs.
    """
    results = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in (*TABLES, "accuracy")
        if (folder / f"{name}.json").exists()
    }
    machine = next(iter(results.values()))["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    limit = f", limited by `ONEDNN_MAX_CPU_ISA={machine['isa']}`" if machine["isa"] else ""
    lines = [
        f"`make bench` on {machine['date']}: {machine['processor']}{limit}, {machine['cores']} cores, load average "
        f"{machine['load_average']:.1f} before; {versions}.",
        f"Short texts are {describe_short_texts()}. All ways have `OMP_NUM_THREADS={machine['threads']}`.",
        "",
    ]
    for name, result in results.items():
        lines += to_accuracy_table(result) if name == "accuracy" else to_table(result)
    for part in sorted(folder.glob("part_*.md")):
        lines += [part.read_text(encoding="utf-8").rstrip("\n"), ""]
    return machine["kind"], "\n".join(re.sub("^## ", "### ", line, flags=re.MULTILINE) for line in lines).strip()


def read_sections(page: str) -> dict[str, str]:
    """The sections of a page, by kind of processor."""
    parts = re.split(rf"^## ({'|'.join(map(re.escape, KINDS))})$", page, flags=re.MULTILINE)[1:]
    return {kind: text.strip() for kind, text in zip(parts[::2], parts[1::2], strict=True)}


def build_page(sections: Mapping[str, str]) -> str:
    """The whole page; a kind without measurements is said to have none."""
    lines = [
        "# Speed, measured",
        "",
        "<!-- Written by benchmarks/speed.py. What was tried, and what did not help: NOTES.md. -->",
        "",
        "On processors. On GPUs: [gpu.md](gpu.md).",
        "",
        "A figure holds for the kind of processor that its section names: bf16 gains most with AMX, and nothing at all on",
        "processors without bf16 arithmetic, where `make bench` measures in float32. Ratios are taken within a round of one",
        "run. Medians, with the lowest and highest round. All ways have `OMP_WAIT_POLICY=PASSIVE` and the allocator settings",
        "that Onecurve sets (`MALLOC_MMAP_THRESHOLD_` and two more), unless the row says so. The ratio of processor",
        "time is less sensitive to what else the machine does. FLOP/s count real tokens only, so padding lowers the share,",
        "and of e only what it computes: its last layer is cut (docs/speed.md), but where a section says otherwise. Of",
        "examples/s, an example has the mean length of the data.",
    ]
    for kind in KINDS if OTHER in sections else KINDS[:-1]:
        lines += ["", f"## {kind}", "", sections.get(kind, NOT_MEASURED)]
    return "\n".join(lines) + "\n"


def update_page(folder: Path) -> None:
    """Write what was last measured into its section, and leave the others as they are."""
    kind, text = build_section(folder)
    PAGE.write_text(build_page({**read_sections(PAGE.read_text(encoding="utf-8")), kind: text}), encoding="utf-8")
