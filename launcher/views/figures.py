"""Pictures of a run's results as SVG: confusions, calibration, lengths. Their colors come from the page's style."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onecurve.launcher.facts.results import Calibration, Confusion, normalize
from onecurve.launcher.views.charts import choose_ticks, label_tick
from onecurve.launcher.views.svg import Scale, circle, drawing, group, polyline, rectangle, text

MOST_CLASSES = 50
"""More have no room in a confusion matrix."""

MOST_IN_HALF = 20
"""A confusion matrix of more classes takes the width of the page."""

_WIDTH = 520
_MOST_WITH_NUMBERS = 12
_MOST_LETTERS = 18
# Of a letter, in the SVG's units, at the page's font size.
_LETTER = 6.4
# From here on letters on a cell are of the other color: what is readable on it depends on the scheme (report.css).
_MIDDLE_SHARE, _HIGH_SHARE = 0.57, 0.71


def draw_confusion(confusion: Confusion) -> str:
    """A cell for each label (row) and prediction (column), as dark as its share of the row."""
    names = [_shorten(name) for name in confusion.labels]
    longest = _LETTER * max(map(len, names))
    left, width = 16 + longest, _WIDTH if len(names) <= MOST_IN_HALF else 2 * _WIDTH
    size = min((width - left - 2) / len(names), 84.0)
    is_dense = len(names) > _MOST_WITH_NUMBERS
    # Names above the columns lie slantwise, unless each has room; the last one ends beside the cells.
    is_slanted = longest > size - 6
    if is_slanted:
        size = min(size, (width - left - 0.72 * longest) / len(names))
    top = 18 + (0.72 * longest if is_slanted else 8)
    parts = []
    for number, name in enumerate(names):
        middle = (number + 0.5) * size
        small = {"class_": "tiny"} if is_dense else {}
        parts.append(text(left - 8, top + middle + 4, name, text_anchor="end", **small))
        x, y = left + middle, top - 8
        turned = {"transform": f"rotate(-45 {x:.1f} {y:.1f})"} if is_slanted else {"text_anchor": "middle"}
        parts.append(text(x, y, name, **turned, **small))
    for row, shares in enumerate(normalize(confusion.counts)):
        for column, share in enumerate(shares):
            title = (
                f"{confusion.labels[row]} → {confusion.labels[column]}: {confusion.counts[row][column]:,}, {share:.1%}"
            )
            corner = (left + column * size, top + row * size)
            parts.append(_draw_cell(corner, size, share, title, has_number=not is_dense))
    height = round(top + size * len(names) + 4)
    kind = "matrix" if width == _WIDTH else "matrix whole"
    return drawing(parts, width, height, role="img", aria_label="confusion matrix", class_=kind)


def _draw_cell(corner: tuple[float, float], size: float, share: float, title: str, has_number: bool) -> str:
    x, y = corner
    gap = 1.0 if has_number else 0.5
    parts = [rectangle(size - gap, size - gap, title, x=x, y=y, class_="cell", fill_opacity=f"{max(share, 0.03):.2f}")]
    if has_number and share > 0:
        shown = round(share, 2)
        level = "high" if shown >= _HIGH_SHARE else "middle" if shown >= _MIDDLE_SHARE else "low"
        number = f"{100 * share:.0f}" if share >= 0.005 else "<1"
        parts.append(text(x + size / 2, y + size / 2 + 4, number, text_anchor="middle", class_=f"on {level}"))
    return group(parts)


def _shorten(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"


def draw_calibration(calibration: Calibration) -> str:
    """The share that is true over the probability; on the diagonal probabilities mean what they say."""
    left, right, top, bottom, height = 46, 404, 12, 312, 352
    across, up = Scale(0, 1, left, right), Scale(0, 1, bottom, top)
    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        parts.append(polyline([(left, up.place(tick)), (right, up.place(tick))], class_="grid"))
        parts.append(text(left - 8, up.place(tick) + 4, f"{tick:g}", text_anchor="end"))
        parts.append(text(across.place(tick), bottom + 20, f"{tick:g}", text_anchor="middle"))
    parts.append(polyline([(left, bottom), (right, top)], class_="mark"))
    total = sum(each.count for each in calibration.bins) or 1
    for each in calibration.bins:
        x, y = across.place(each.low), up.place(each.share)
        title = (
            f"probability {each.low:g} to {each.high:g}: {each.count:,.0f} decisions, mean {each.probability:.3f}, "
            f"true {each.share:.3f}"
        )
        width = across.place(each.high) - x - 2
        parts.append(rectangle(width, max(bottom - y, 0.5), title, x=x + 1, y=y, class_="bar"))
    places = [(across.place(each.probability), up.place(each.share)) for each in calibration.bins]
    parts.append(polyline(places, class_="strong"))
    parts += [
        circle(x, y, 3 + 6 * (each.count / total) ** 0.5, class_="point")
        for (x, y), each in zip(places, calibration.bins, strict=True)
    ]
    parts.append(text((left + right) / 2, height - 2, "probability", text_anchor="middle"))
    return drawing(parts, 420, height, role="img", aria_label="calibration", class_="square")


def draw_lengths(counts: Sequence[int], longest: int) -> str:
    """How many examples (bars) have how many tokens (from 0 to the longest)."""
    left, right, top, bottom, height = 58, 508, 14, 190, 220
    ticks = choose_ticks(0, max(counts), whole=True)
    across, up = Scale(0, longest, left, right), Scale(0, ticks[-1], bottom, top)
    parts = []
    for tick in ticks:
        parts.append(polyline([(left, up.place(tick)), (right, up.place(tick))], class_="grid"))
        parts.append(text(left - 8, up.place(tick) + 4, label_tick(tick, ticks[1]), text_anchor="end"))
    width = (right - left) / len(counts)
    parts += _draw_bars(counts, longest, left, width, up)
    for tick in choose_ticks(0, longest, whole=True):
        if tick <= longest:
            x = across.place(tick)
            anchor = "end" if x > right - 16 else "middle"
            parts.append(text(x, bottom + 20, f"{tick:,.0f}", text_anchor=anchor))
    return drawing(parts, _WIDTH, height, role="img", aria_label="lengths of the training examples")


def _draw_bars(counts: Sequence[int], longest: int, left: float, width: float, up: Scale) -> Iterable[str]:
    for number, count in enumerate(counts):
        if not count:
            continue
        y = up.place(count)
        low, high = (longest * (number + place) / len(counts) for place in (0, 1))
        title = f"{low:,.0f} to {high:,.0f} tokens: {count:,} examples"
        yield rectangle(max(width - 1, 0.5), up.start - y, title, x=left + number * width, y=y, class_="bar full")


def draw_share(share: float) -> str:
    """A bar in a table, as long as the share of 1."""
    return drawing(
        [rectangle(100, 8, class_="track"), rectangle(100 * share, 8, class_="bar full")],
        100, 8, class_="inline", preserveAspectRatio="none", aria_hidden="true",
    )  # fmt: skip
