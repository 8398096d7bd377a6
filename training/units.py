"""Units of memory and time, for training and launcher."""

GIB = 2**30
"""Bytes."""


def format_seconds(seconds: float) -> str:
    """3 d 04 h, 2 h 05 min, 4 min 10 s, 12 s, 0.25 s."""
    if 0 < seconds < 1:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
