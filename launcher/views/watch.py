"""`onecurve watch`: the panel of a run, with its loss curve in block characters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onecurve.launcher.facts.history import is_metric
from onecurve.launcher.units import format_gib, format_seconds
from onecurve.launcher.views.progress import View
from onecurve.training.metric_names import pick_main_metrics

if TYPE_CHECKING:
    from rich.console import RenderableType

# Columns of a panel's borders and of the space beside them.
_FRAME = 4

_BLOCKS = "▁▂▃▄▅▆▇█"


def draw_curve(values: Sequence[float], width: int, height: int = 8) -> list[str]:
    """A curve in block characters: `height` lines of at most `width` columns, labels included; each column is a mean."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return []
    ends = [f"{value:.4f}" for value in (max(values), min(values))]  # No label of a mean is longer.
    room = max(8, *map(len, ends))
    width = min(max(1, width - room - 2), len(values))
    edges = [round(number * len(values) / width) for number in range(width + 1)]
    means = [
        sum(values[start:stop]) / (stop - start) for start, stop in itertools.pairwise(edges)
    ]  # fmt: skip
    lowest, highest = min(means), max(means)
    spread = (highest - lowest) or 1.0
    levels = [1 + round((mean - lowest) / spread * (height * 8 - 1)) for mean in means]
    lines = []
    for row in range(height - 1, -1, -1):
        cells = [min(8, max(0, level - row * 8)) for level in levels]
        label = (
            f"{highest:{room}.4f} ┤"
            if row == height - 1
            else f"{lowest:{room}.4f} ┤"
            if row == 0
            else " " * room + " │"
        )
        lines.append(label + "".join(" " if cell == 0 else _BLOCKS[cell - 1] for cell in cells))
    return lines


def render(view: View, width: int) -> RenderableType:
    """A panel for a terminal of this many columns."""
    from rich.panel import Panel
    from rich.text import Text

    lines = [*_describe_progress(view), *_describe_surroundings(view)]
    if view.message:
        lines.append(view.message)
    curve = draw_curve(view.losses, width - _FRAME)
    text = Text("\n".join([*lines, "", *curve]) if curve else "\n".join(lines))
    colors = {"running": "green", "finished": "blue", "preempted": "yellow", "failed": "red", "stale": "yellow"}
    state = "stale" if view.is_stale else view.state
    room = max(8, width - len(state) - _FRAME - 4)
    title = Text(f"{state}  {view.run if len(view.run) <= room else '…' + view.run[-room:]}")
    return Panel(text, title=title, border_style=colors.get(state, "white"), expand=False)


def _describe_progress(view: View) -> list[str]:
    first = f"step {view.step:,}" + (f" of {view.num_steps:,}" if view.num_steps else "") + f"   epoch {view.epoch:.2f}"
    if view.seconds_left is not None and not view.is_stale:
        first += f"   {format_seconds(view.seconds_left)} left"
    lines = [first]
    if view.loss is not None:
        lines.append(
            f"loss {view.loss:.4f}   lr {view.learning_rate or 0:.2e}   gradient norm {view.grad_norm or 0:.3f}"
        )
        lines.append(f"{view.tokens_per_second or 0:,.0f} tokens/s   padding {view.padding or 0:.1%}")
        if view.peak_memory_bytes is not None:
            lines[-1] += f"   peak memory {format_gib(view.peak_memory_bytes)} GiB"
    if view.last_evaluation:
        names = [name for name, value in view.last_evaluation.items() if is_metric(name, value)]
        lines.append(
            f"evaluation after step {view.last_evaluation['step']}: "
            + "  ".join(
                f"{name.removeprefix('eval_')} {view.last_evaluation[name]:.4f}"
                for name in pick_main_metrics(names, view.main_metrics)[:3]
            )
        )
    return lines


def _describe_surroundings(view: View) -> list[str]:
    lines = []
    if view.num_restarts:
        lines.append(f"restarted {'once' if view.num_restarts == 1 else f'{view.num_restarts} times'}")
    if view.restarts_left:
        number = f"{view.restarts_left} more restart{'s' * (view.restarts_left != 1)}"
        lines.append(f"restarting from its last checkpoint; {number} allowed")
    if view.queue_state is not None:
        lines.append(view.queue_state)
    if view.is_stale:
        lines.append(
            f"No output for {format_seconds(view.seconds_silent or 0)}: probably killed; continue with onecurve resume"
        )
    elif view.seconds_silent is not None and view.seconds_silent > 60:
        lines.append(f"No output for {format_seconds(view.seconds_silent)} (evaluating, saving, or dead).")
    return lines
