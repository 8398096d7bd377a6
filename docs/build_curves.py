"""Draw docs/images/curves.svg: the loss curves of one recipe on several topologies, and how far they lie apart.

    python docs/build_curves.py "one process=runs/cpu" "DDP x 2=runs/ddp" ...

The first run is the one that the others are compared with. The relative differences are printed as a table as well.
docs/topologies.md has the commands that made the runs of the picture.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from onecurve.launcher.views.svg import Scale, circle, drawing, polyline, rectangle, text

IMAGE = Path(__file__).parent / "images" / "curves.svg"

# Okabe and Ito's palette: told apart by people who see colours differently.
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#000000")
LOSS_BOUND = 1e-5  # Promised by the project for float32: relative difference of each step's loss.

WIDTH, LEFT, RIGHT = 860, 70, 20
LOSS_TOP, LOSS_BOTTOM = 50, 290
DIFFERENCE_TOP, DIFFERENCE_BOTTOM = 350, 470
HEIGHT = 520
LOWEST_DECADE, HIGHEST_DECADE = -10, -4


@dataclass(frozen=True)
class Curve:
    """The train lines of one run's metrics.jsonl."""

    name: str
    losses: list[float]
    grad_norms: list[float]


def load_curve(argument: str) -> Curve:
    """Read "NAME=RUN_DIRECTORY"."""
    name, _, folder = argument.partition("=")
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    return Curve(name, [step["loss"] for step in steps], [step["grad_norm"] for step in steps])


def differences(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Relative difference at each step."""
    return [abs(value - wanted) / abs(wanted) for value, wanted in zip(values, reference, strict=True)]


def build_table(curves: Sequence[Curve]) -> str:
    """A Markdown table of the largest relative differences to the first curve."""
    reference = curves[0]
    rows = ["| compared with " + reference.name + " | loss, at most | gradient norm, at most |", "|---|---|---|"]
    for curve in curves[1:]:
        loss = max(differences(curve.losses, reference.losses))
        norm = max(differences(curve.grad_norms, reference.grad_norms))
        rows.append(f"| {curve.name} | {loss:.1e} | {norm:.1e} |")
    return "\n".join(rows)


def build_image(curves: Sequence[Curve]) -> str:
    """The text of the SVG: losses above, their differences below."""
    num_steps = len(curves[0].losses)
    across = Scale(0, max(1, num_steps - 1), LEFT + 10, WIDTH - RIGHT - 10)
    parts = [
        f"<title>{escape(_describe(curves))}</title>",
        rectangle(WIDTH, HEIGHT, fill="#ffffff"),
        *_draw_losses(curves, across),
        *_draw_steps(num_steps, across, LOSS_BOTTOM),
        *_draw_differences(curves, across),
        *_draw_steps(num_steps, across, DIFFERENCE_BOTTOM),
        _label((LEFT + WIDTH - RIGHT) / 2, DIFFERENCE_BOTTOM + 38, "step", text_anchor="middle"),
    ]
    style = {"xmlns": "http://www.w3.org/2000/svg", "font_family": "sans-serif", "font_size": 13}
    return drawing(parts, WIDTH, HEIGHT, **style) + "\n"


def _describe(curves: Sequence[Curve]) -> str:
    names = ", ".join(curve.name for curve in curves)
    return f"Loss curves of one recipe on several topologies, which agree: {names}"


def _draw_losses(curves: Sequence[Curve], across: Scale) -> Iterator[str]:
    highest = math.ceil(max(curves[0].losses) * 5) / 5
    up = Scale(0, highest, LOSS_BOTTOM, LOSS_TOP)
    yield _label(LEFT, 26, "Loss of each step: all curves are drawn, one on top of the other", font_size=15)
    for tenths in range(0, round(highest * 10) + 1, 4):
        yield from _draw_grid_line(up.place(tenths / 10), f"{tenths / 10:.1f}")
    for number, curve in enumerate(curves):
        # Each curve is thinner than the one below it, or only the last would be seen.
        style = {"stroke": COLOURS[number], "stroke_width": f"{2.4 * (len(curves) - number):g}", "fill": "none"}
        points = [(across.place(step), up.place(loss)) for step, loss in enumerate(curve.losses)]
        yield polyline(points, stroke_linejoin="round", **style)
        y = LOSS_TOP + 16 + 20 * number
        yield polyline([(600, y - 4), (636, y - 4)], **style)
        yield _label(646, y, curve.name)


def _draw_differences(curves: Sequence[Curve], across: Scale) -> Iterator[str]:
    up = Scale(LOWEST_DECADE, HIGHEST_DECADE, DIFFERENCE_BOTTOM, DIFFERENCE_TOP)
    yield _label(LEFT, 336, f"Relative difference from {curves[0].name}", font_size=15)
    for decade in range(LOWEST_DECADE, HIGHEST_DECADE + 1, 2):
        yield from _draw_grid_line(up.place(decade), "0" if decade == LOWEST_DECADE else f"1e{decade}")
    y = up.place(math.log10(LOSS_BOUND))
    yield polyline([(LEFT, y), (WIDTH - RIGHT, y)], stroke="#b00000", stroke_width=1.5)
    yield _label(WIDTH - RIGHT, y - 5, "promised: below 1e-5", text_anchor="end")
    for number, curve in enumerate(curves[1:], start=1):
        for step, value in enumerate(differences(curve.losses, curves[0].losses)):
            decade = max(math.log10(value), LOWEST_DECADE) if value else LOWEST_DECADE
            yield circle(across.place(step), up.place(decade), 2.6, fill=COLOURS[number])


def _draw_grid_line(y: float, label: str) -> Iterator[str]:
    yield polyline([(LEFT, y), (WIDTH - RIGHT, y)], stroke="#dddddd", stroke_width=1)
    yield _label(LEFT - 8, y + 4, label, text_anchor="end")


def _draw_steps(num_steps: int, across: Scale, bottom: float) -> Iterator[str]:
    for step in [1, *range(10, num_steps + 1, 10)]:
        yield _label(across.place(step - 1), bottom + 18, str(step), text_anchor="middle")


def _label(x: float, y: float, content: str, **attributes: object) -> str:
    return text(x, y, content, fill="#222222", **attributes)


def main(arguments: Sequence[str]) -> None:
    """Draw the curves and print their differences."""
    if len(arguments) < 2 or len(arguments) > len(COLOURS):
        sys.exit(f"give 2 to {len(COLOURS)} runs as NAME=RUN_DIRECTORY")
    curves = [load_curve(argument) for argument in arguments]
    IMAGE.parent.mkdir(exist_ok=True)
    IMAGE.write_text(build_image(curves), encoding="utf-8")
    print(build_table(curves))


if __name__ == "__main__":
    main(sys.argv[1:])
