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
    lines = [json.loads(text) for text in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
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
    top = math.ceil(max(curves[0].losses) * 5) / 5
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f"<title>{escape(_describe(curves))}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 26, "Loss of each step: all curves are drawn, one on the other", size=15),
        *_loss_axis(top),
        *_step_axis(num_steps, LOSS_BOTTOM, has_label=False),
    ]
    for number, curve in enumerate(curves):
        # Each curve is thinner than the one below it, or only the last would be seen.
        points = [
            (_x(step, num_steps), _scale(loss, top, 0.0, LOSS_TOP, LOSS_BOTTOM))
            for step, loss in enumerate(curve.losses)
        ]
        parts.append(_line(points, COLOURS[number], 2.4 * (len(curves) - number)))
        y = LOSS_TOP + 16.0 + 20 * number
        parts.append(_line([(600, y - 4), (636, y - 4)], COLOURS[number], 2.4 * (len(curves) - number)))
        parts.append(_text(646, y, curve.name))
    parts += [
        _text(LEFT, 336, f"Relative difference to {curves[0].name}", size=15),
        *_difference_axis(),
        *_step_axis(num_steps, DIFFERENCE_BOTTOM, has_label=True),
    ]
    for number, curve in enumerate(curves[1:], start=1):
        for step, value in enumerate(differences(curve.losses, curves[0].losses)):
            height = max(math.log10(value), LOWEST_DECADE) if value else LOWEST_DECADE
            y = _scale(height, HIGHEST_DECADE, LOWEST_DECADE, DIFFERENCE_TOP, DIFFERENCE_BOTTOM)
            parts.append(f'<circle cx="{_x(step, num_steps):.1f}" cy="{y:.1f}" r="2.6" fill="{COLOURS[number]}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _describe(curves: Sequence[Curve]) -> str:
    names = ", ".join(curve.name for curve in curves)
    return f"Loss curves of one recipe on several topologies, which agree: {names}"


def _loss_axis(top: float) -> Iterator[str]:
    for tenths in range(0, round(top * 10) + 1, 4):
        y = _scale(tenths / 10, top, 0.0, LOSS_TOP, LOSS_BOTTOM)
        yield _line([(LEFT, y), (WIDTH - RIGHT, y)], "#dddddd", 1)
        yield _text(LEFT - 8, y + 4, f"{tenths / 10:.1f}", anchor="end")


def _difference_axis() -> Iterator[str]:
    for decade in range(LOWEST_DECADE, HIGHEST_DECADE + 1, 2):
        y = _scale(decade, HIGHEST_DECADE, LOWEST_DECADE, DIFFERENCE_TOP, DIFFERENCE_BOTTOM)
        yield _line([(LEFT, y), (WIDTH - RIGHT, y)], "#dddddd", 1)
        label = "0" if decade == LOWEST_DECADE else f"1e{decade}"
        yield _text(LEFT - 8, y + 4, label, anchor="end")
    y = _scale(math.log10(LOSS_BOUND), HIGHEST_DECADE, LOWEST_DECADE, DIFFERENCE_TOP, DIFFERENCE_BOTTOM)
    yield _line([(LEFT, y), (WIDTH - RIGHT, y)], "#b00000", 1.5)
    yield _text(WIDTH - RIGHT, y - 5, "promised: below 1e-5", anchor="end")


def _step_axis(num_steps: int, bottom: float, has_label: bool) -> Iterator[str]:
    for step in [1, *range(10, num_steps + 1, 10)]:
        yield _text(_x(step - 1, num_steps), bottom + 18, str(step), anchor="middle")
    if has_label:
        yield _text((LEFT + WIDTH - RIGHT) / 2, bottom + 38, "step", anchor="middle")


def _x(step: int, num_steps: int) -> float:
    return LEFT + 10 + (WIDTH - RIGHT - LEFT - 20) * step / max(1, num_steps - 1)


def _scale(value: float, highest: float, lowest: float, top: float, bottom: float) -> float:
    return top + (highest - value) / (highest - lowest) * (bottom - top)


def _line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="{width:g}" stroke-linejoin="round"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#222222">{escape(text)}</text>'
    )


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
