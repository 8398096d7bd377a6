"""What a report says in words and tables: the run in a sentence, its figures, starts, settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onecurve.launcher.facts.history import (
    History,
    count_device_hours,
    count_seconds,
    estimate_num_steps,
    find_best,
    is_metric,
    list_metrics,
)
from onecurve.launcher.facts.recipes import load_defaults
from onecurve.launcher.facts.results import StartFact
from onecurve.launcher.units import format_count, format_gib, format_result, format_seconds, format_setting
from onecurve.launcher.views.compare import describe_cost, find_best_cells, has_other_best
from onecurve.launcher.views.report_charts import name_metric
from onecurve.training.metric_names import pick_main_metrics

_MAX_EVALUATIONS = 200
_MAX_COLUMNS = 7
_MAX_FIGURES = 6

Pair = tuple[str, str]


def describe_data(history: History) -> dict[str, dict[str, Any]]:
    """What environment.json says of each split; empty for runs of versions before 0.2."""
    data = history.environment.get("data")
    return {name: each for name, each in data.items() if isinstance(each, dict)} if isinstance(data, dict) else {}


def describe_lede(history: History) -> list[tuple[str, bool]]:
    """The run in one sentence, in parts, and which of them are strong: what was trained on what, for how long, where."""
    settings, train = history.settings, describe_data(history).get("train", {})
    model = format_setting(settings.get("model_name_or_path"))
    parts = [(model, True), (", trained for ", False)]
    parts += [(format_setting(settings.get("task")).replace("_", " "), True), (" on ", False)]
    if "examples" in train:
        parts += [(f"{format_result(train['examples'])} examples", True), (f" of {train.get('origin')}", False)]
    else:
        names = (settings.get(key) for key in ("train_file", "dataset_name"))
        parts.append((next((format_setting(name) for name in names if name), "unknown data"), False))
    if history.steps:
        step = history.steps[-1]["step"]
        parts += [
            (": ", False),
            (f"{step:,} step{'s' * (step != 1)}", True),
            (f" on {_describe_place(history.topology)}", False),
        ]
    return [*parts, (".", False)]


def _describe_place(topology: Mapping[str, Any]) -> str:
    number, device = topology.get("num_processes"), str(topology.get("device", "an unknown device"))
    device = device.upper() if device in ("cpu", "mps") else str(topology.get("device_name") or device)
    if number in (None, 1):
        return f"one {device}" if number else device
    return f"{number} processes ({device}, {topology.get('strategy')})"


def describe_figures(history: History) -> list[Pair]:
    """Name and value of the main results."""
    steps, last = history.steps, history.evaluations[-1] if history.evaluations else {}
    names = [name for name, value in last.items() if is_metric(name, value)]
    main = pick_main_metrics(names, history.main_metrics)
    ordered = [name for name in main if name != "eval_loss"] + [name for name in main if name == "eval_loss"]
    figures = [(name_metric(name), _shorten(last[name])) for name in ordered[:4]]
    figures = [(f"validation {name}" if name == "loss" else name, value) for name, value in figures]
    if steps:
        figures.append(("training loss", _shorten(steps[-1].get("loss"))))
    num_steps = estimate_num_steps(history)
    done = steps[-1]["step"] if steps else 0
    whole = f" of {num_steps:,}" if num_steps and num_steps != done else ""
    figures.append(("steps", f"{done:,}{whole}"))
    if seconds := count_seconds(steps):
        figures.append(("time in steps", format_seconds(seconds)))
    return figures[:_MAX_FIGURES]


def _shorten(value: object) -> str:
    """A result in large letters: no more digits than one reads."""
    return f"{value:,.1f}" if isinstance(value, float) and 100 <= abs(value) < 1e6 else format_result(value)


def describe_facts(history: History) -> list[Pair]:
    """What was trained on what, for how long and at what cost."""
    facts = [("model", format_setting(history.settings.get("model_name_or_path")))]
    total, trained = (history.environment.get(key) for key in ("parameters", "trained_parameters"))
    if isinstance(total, int) and isinstance(trained, int):
        share = "all trained" if trained == total else f"{format_count(trained)} trained ({trained / total:.2%})"
        facts.append(("parameters", f"{format_count(total)}, {share}"))
    facts += [(f"{name} data", _describe_split(split)) for name, split in describe_data(history).items()]
    steps = history.steps
    if steps:
        tokens, seconds = sum(line.get("tokens", 0) for line in steps), count_seconds(steps)
        epoch = steps[-1].get("epoch")
        facts.append(("seen", f"{format_count(tokens)} tokens" + (f" in {epoch:.2f} epochs" if epoch else "")))
        if seconds:
            hours = format_result(round(count_device_hours(history), 4))
            facts.append(("time in steps", f"{format_seconds(seconds)} ({hours} device-hours)"))
            facts.append(("throughput", f"{tokens / seconds:,.0f} tokens per second"))
        padded = sum(
            line.get("tokens", 0) / (1 - line.get("padding", 0.0)) for line in steps if line.get("padding", 0) < 1
        )
        if padded:
            facts.append(("padding", f"{max(0.0, 1 - tokens / padded):.1%} of all tokens"))
    if history.peak_memory_bytes is not None:
        facts.append(("peak memory", f"{format_gib(history.peak_memory_bytes)} GiB in one process"))
    best = find_best(history, "eval_loss")
    if best is not None and best[0] != history.evaluations[-1]["step"]:
        facts.append(("best validation loss", f"{format_result(best[1])} after step {best[0]:,}"))
    facts.append(("hardware", _describe_place(history.topology)))
    if history.num_restarts is not None:
        facts.append(("restarts", str(history.num_restarts)))
    return [*facts, ("run directory", str(history.path))]


def _describe_split(split: Mapping[str, Any]) -> str:
    sizes = f"{format_result(split.get('examples'))} examples of {split.get('origin')}"
    return f"{sizes}; {format_setting(split.get('mean_tokens'))} tokens on average, {format_result(split.get('longest'))} at most"


def tabulate_evaluations(history: History) -> tuple[tuple[list[str], list[list[str]]], list[Pair]]:
    """Names and rows of the evaluations' main metrics; and what else the last one found."""
    names = list_metrics([history])
    shown = names if len(names) <= _MAX_COLUMNS else pick_main_metrics(names, history.main_metrics)[:_MAX_COLUMNS]
    lines = history.evaluations[-_MAX_EVALUATIONS:]
    rows = [[f"{line['step']:,}", *(format_result(line.get(name)) for name in shown)] for line in lines]
    others = [(name_metric(name), format_result(lines[-1].get(name))) for name in names if name not in shown]
    return ([name_metric(name) for name in shown], rows), others


def tabulate_starts(starts: Sequence[StartFact]) -> list[list[str]]:
    """Number, step, processes, strategy, device and versions of each start."""
    rows = []
    for start in starts:
        topology, packages = (start.environment.get(key) for key in ("topology", "packages"))
        topology = topology if isinstance(topology, dict) else {}
        packages = packages if isinstance(packages, dict) else {}
        machines = topology.get("num_machines")
        processes = format_setting(topology.get("num_processes"))
        versions = (f"{name} {packages[name]}" for name in ("onecurve", "torch", "transformers") if name in packages)
        rows.append([
            str(start.number),
            "-" if start.step is None else f"{start.step:,}",
            f"{processes} on {machines} machines" if isinstance(machines, int) and machines > 1 else processes,
            format_setting(topology.get("strategy")),
            " ".join(dict.fromkeys(format_setting(topology.get(key)) for key in ("device", "device_name"))),
            ", ".join(versions) or "-",
        ])  # fmt: skip
    return rows


def split_settings(history: History) -> tuple[list[tuple[str, str, str]], list[Pair]]:
    """The settings that are not defaults, with who set them; and those that are.

    A resumed run's are all from its config.yaml, so values are compared, not who set them.
    """
    defaults = load_defaults(str(history.settings.get("task")))
    chosen, left = [], []
    for key, value in history.settings.items():
        if key in defaults and defaults[key] == value:
            left.append((key, format_setting(value) or "-"))
        else:
            chosen.append((key, format_setting(value), history.sources.get(key, "")))
    return chosen, left


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterable[Pair]:
    """The entries of nested objects, each under one name."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}".replace("_", " "), format_setting(value)


Cells = list[tuple[str, bool]]


def tabulate_comparison(comparison: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Cells]]]]:
    """By heading the rows of the table of several runs: settings that differ, results, cost; the best values are marked."""
    names = pick_main_metrics(list(comparison["best"]), comparison["main_metrics"])
    settings = [
        (key, [(format_setting(value), False) for value in row])
        for key, row in comparison["differing_settings"].items()
    ]
    results = [
        (
            f"final {name_metric(name)}" if name != "loss" else "last training loss",
            find_best_cells(name, comparison["final"][name]),
        )
        for name in ("loss", *names)
    ]
    for name in names:
        if has_other_best(comparison, name):
            row = comparison["best"][name]
            shown = [f"{format_result(entry['value'])} at {entry['step']:,}" if entry else "-" for entry in row]
            results.append((f"best {name_metric(name)}", [(value, False) for value in shown]))
    steps = [(f"{value:,}", False) for value in comparison["steps"]]
    cost = [
        describe_cost(name, row) for name, row in comparison["cost"].items() if any(each is not None for each in row)
    ]
    return [
        ("settings that differ", settings),
        ("results", [("steps", steps), *results]),
        ("cost", [(row[0], [(value, False) for value in row[1:]]) for row in cost]),
    ]
