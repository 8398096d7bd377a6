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
from onecurve.launcher.facts.shape import build_shape
from onecurve.launcher.planning.memory import count_checkpoint_bytes, estimate_memory
from onecurve.launcher.planning.work import build_work
from onecurve.launcher.units import MIB
from onecurve.training.tasks.causal_lm_recipe import CausalLMRecipe

PAGE = ROOT / "benchmarks" / "causal_lm.md"
TABLES = ("dialogues", "documents")
ADAPTERS_PAGE, ADAPTERS = ROOT / "benchmarks" / "adapters.md", "adapters"
_SECONDS = ("seconds", "cpu_seconds")

WAYS = {
    "t": "TRL, padded, {precision}, sampling by length, fused AdamW",
    "q": "TRL, padding-free, {precision}, fused AdamW",
    "p": "TRL, packing, {precision}, fused AdamW",
    "o": "Onecurve, padded, {precision}",
    "f": "floor: bare PyTorch on e's batches",
}
ADAPTER_WAYS = {
    "e": "Onecurve, LoRA, packed",
    "x": "Onecurve, all weights, packed",
    "t": "TRL and PEFT, LoRA, e's batches, padded",
    "p": "TRL and PEFT, LoRA, packing",
}
ADAPTERS_INTRODUCTION = """# Adapters, measured

<!-- Written by `python -m benchmarks.causal_lm --adapter`. -->

SmolLM2-135M-Instruct with LoRA of rank 8 in every linear layer but the head, beside the same model with all weights trained
and beside TRL with PEFT, in turns as in [causal_lm.md](causal_lm.md). x and t have the very batches that e has, in its order;
t pads each to its longest example (their tokens are compared turn by turn). Processor time is that of the process, all its
threads: what else the machine does hardly changes it. Gradients and moments
are predicted by the arithmetic of `onecurve plan`, and measured as the bytes of the tensors that the optimizer has. Of a
checkpoint the files with tensors are counted, weights and moments; tokenizer and configs lie beside them."""
INTRODUCTION = """# Causal language models, measured

<!-- Written by benchmarks/causal_lm.py. -->

SmolLM2-135M-Instruct, all weights trained, by Onecurve with packed micro-batches (e) and by others, on the same tokens and
targets. TRL is `SFTTrainer` at its best here: no checkpointing of activations, and the precision that the processor is
fastest in. Its micro-batches have the size that was fastest of those tried, which is not the largest: without a kernel for
sequences of different lengths, TRL's padding-free and packed rows go through attention whole, under a mask.

Onecurve and one other take turns, and ratios are taken within a round: medians, with the lowest and highest. "Tokens" are
those of the examples, without padding; a target is a token that is learned. The batches of a few steps hold more targets or
fewer by chance, so targets/s are tokens/s times the share of targets in the
data, the same for all. The ratio in processor time is less sensitive to what else the machine does. Memory is the whole
process's peak. The floor runs Onecurve's own forward and loss in a bare loop, so it says what the loop around them costs."""


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
        "| way | tokens/s | targets/s | padding | memory | e is times as fast | in processor time |",
        "|---|---|---|---|---|---|---|",
    ]
    share = next(iter(result["pairs"].values()))["ready"]["e"]["target_share"]
    mine = [turn for pair in result["pairs"].values() for turn in pair["ours"]]
    name = f"e Onecurve, packed, {name_way('o', result['precision']).rpartition(' ')[2]}"
    lines.append(f"| {name} {_describe_turns(mine, share)} | | |")
    for way, pair in result["pairs"].items():
        ratios = describe_spread(find_ratios(pair, "tokens", "seconds"), 2)
        lean = describe_spread(find_ratios(pair, "tokens", "cpu_seconds"), 2)
        name = f"{way} {name_way(way, result['precision'])}"
        lines.append(f"| {name} {_describe_turns(pair['theirs'], share)} | {ratios} | {lean} |")
    return [*lines, ""]


def _describe_turns(turns: Sequence[Mapping[str, Any]], target_share: float) -> str:
    peak = max(turn["peak_bytes"] for turn in turns)
    rate = statistics.median(turn["tokens"] / turn["seconds"] for turn in turns)
    padding = 1 - sum(turn["tokens"] for turn in turns) / sum(turn["places"] for turn in turns)
    memory = f"{peak / 2**30:.1f} GiB" if peak else ""
    return f"| {rate:,.0f} | {rate * target_share:,.0f} | {padding:.1%} | {memory}"


def predict(recipe_keys: Mapping[str, str], precision: str, has_adapter: bool) -> dict[str, int]:
    """Bytes of gradients, moments and a checkpoint, by the arithmetic of `onecurve plan`."""
    adapter = {"adapter": "lora"} if has_adapter else {}
    recipe = CausalLMRecipe(**recipe_keys, **adapter, mixed_precision=precision)  # type: ignore[arg-type]
    config = json.loads((Path(recipe.model_name_or_path) / "config.json").read_text(encoding="utf-8"))
    shape = build_shape(config, predicts_tokens=True)
    work = build_work(recipe, shape, "cpu", recipe.max_length, 1)
    memory = estimate_memory(shape, "one process", work, 1)
    checkpoint = count_checkpoint_bytes(shape, work.trained_parameters)
    return {"held": memory.gradients + memory.optimizer, "checkpoint": checkpoint}


def to_adapter_table(result: Mapping[str, Any]) -> list[str]:
    """The lines of the table of adapters."""
    workload, pairs = WORKLOADS[result["workload"]], result["pairs"]
    lines = [
        f"## {workload.title}",
        "",
        "| way | trained | gradients and moments: predicted | measured | checkpoint | of 12 bytes x trained | seconds a step "
        "| tokens/s | e is times as fast | in processor time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(pairs.values()))
    ways = {"e": (first["ours"], first["ready"]["e"], first["held"]["e"])}
    ways |= {way: (pair["theirs"], pair["ready"][way], pair["held"][way]) for way, pair in pairs.items()}
    for way, (turns, ready, held) in ways.items():
        of_plan = predict(workload.recipe, result["precision"], way != "x") if way in "ex" else None
        cells = [
            f"{way} {ADAPTER_WAYS[way]}",
            f"{ready['trained']:,} of {ready['all']:,}",
            "" if of_plan is None else f"{of_plan['held'] / MIB:,.1f} MiB",
            f"{(held['gradients'] + held['moments']) / MIB:,.1f} MiB",
            f"{held['bytes'] / MIB:,.1f} MiB",
            f"{held['bytes'] / (12 * ready['trained']):.3f}",
            f"{statistics.median(turn['seconds'] / workload.steps for turn in turns):.1f}",
            f"{statistics.median(turn['tokens'] / turn['seconds'] for turn in turns):,.0f}",
            *("" if way == "e" else describe_spread(find_ratios(pairs[way], "tokens", each), 2) for each in _SECONDS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def update_page(folder: Path, names: Sequence[str]) -> None:
    """Write what was measured into its processor's section, and leave the others as they are.

    Args:
        folder: has a JSON file of each table.
        names: of the tables of one page.
    """
    results = [
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in names
        if (folder / f"{name}.json").exists()
    ]
    machine, is_adapters = results[0]["machine"], names == (ADAPTERS,)
    page, introduction, to_lines, more, flag = (
        (ADAPTERS_PAGE, ADAPTERS_INTRODUCTION, to_adapter_table, ("trl", "peft"), " --adapter")
        if is_adapters
        else (PAGE, INTRODUCTION, to_table, ("trl",), "")
    )
    lines = [describe_measurement(machine, f"python -m benchmarks.causal_lm{flag}", more), ""]
    for result in results:
        lines += [f"#{line}" if line.startswith("## ") else line for line in to_lines(result)]
    old = read_sections(page.read_text(encoding="utf-8")) if page.exists() else {}
    sections = {**old, machine["kind"]: "\n".join(lines).strip()}
    page.write_text(build_page(introduction, sections), encoding="utf-8")


def build_page(introduction: str, sections: Mapping[str, str]) -> str:
    """The introduction and the sections that were measured."""
    return "\n\n".join([introduction, *(f"## {kind}\n\n{text}" for kind, text in sections.items())]) + "\n"
