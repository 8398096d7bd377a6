"""Shapes of an SVG as text, with every value escaped. `onecurve report` and docs/build_curves.py draw with them.

Keywords become attributes: `stroke_width=2` is `stroke-width="2"`, and `class_` is `class`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """An axis: `low` lies at `start` and `high` at `stop`, both in the drawing's units."""

    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        """Where a value lies."""
        return self.start + (value - self.low) / ((self.high - self.low) or 1) * (self.stop - self.start)


def drawing(parts: Iterable[str], width: int, height: int, **attributes: object) -> str:
    """The whole SVG."""
    return _element("svg", "\n" + "\n".join(parts) + "\n", viewBox=f"0 0 {width} {height}", **attributes)


def polyline(points: Iterable[Point], **attributes: object) -> str:
    """A line through points."""
    return _element("polyline", points=" ".join(f"{_write(x)},{_write(y)}" for x, y in points), **attributes)


def rectangle(width: float, height: float, title: str = "", **attributes: object) -> str:
    """A rectangle from the upper left corner of the drawing, or from x and y; its title is shown under the pointer."""
    return _element("rect", _title(title), width=width, height=height, **attributes)


def group(parts: Iterable[str], **attributes: object) -> str:
    """Shapes that belong together."""
    return _element("g", "".join(parts), **attributes)


def text(x: float, y: float, content: str, **attributes: object) -> str:
    """A line of text; `text_anchor` says which end of it lies at x."""
    return _element("text", escape(content), x=x, y=y, **attributes)


def circle(x: float, y: float, radius: float, title: str = "", **attributes: object) -> str:
    """A dot; its title is shown while the pointer rests on it."""
    return _element("circle", _title(title), cx=x, cy=y, r=radius, **attributes)


def _title(title: str) -> str:
    return f"<title>{escape(title)}</title>" if title else ""


def _element(name: str, content: str = "", /, **attributes: object) -> str:
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_write(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def _write(value: object) -> str:
    return f"{round(value, 1):g}" if isinstance(value, float) else str(value)
