"""Sizes, times and counts as people read them."""

from __future__ import annotations

from onecurve.training.units import GIB as GIB
from onecurve.training.units import format_seconds as format_seconds

MIB = 1024**2


def format_gib(size: int) -> str:
    """Bytes as GiB with two or more significant digits."""
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:,.0f}"


def format_count(number: float) -> str:
    """22.7 M, 1.2 B and the like."""
    for limit, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.0f}"


def format_flops(number: float) -> str:
    """Floating point operations with the nearest prefix."""
    for limit, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= limit:
            return f"{number / limit:.1f} {prefix}FLOP"
    return f"{number:.0f} FLOP"


def format_result(value: object) -> str:
    """A measured value, rounded to four digits behind the point, from 100 on to two."""
    if isinstance(value, float):
        if 100 <= abs(value) < 1e6:
            return f"{value:,.2f}"
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return format_setting(value)


def format_setting(value: object) -> str:
    """A setting, as it is."""
    if value is None:
        return "-"
    return ", ".join(map(format_setting, value)) if isinstance(value, list) else str(value)
