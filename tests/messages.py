"""What a message has to name: keys, files, rows, numbers, codes. How it says it is free, and no test pins it."""

from __future__ import annotations

import re


def naming(*needed: str) -> str:
    """A pattern for `pytest.raises(match=...)`: the message names each of `needed`, whole and in any order."""
    return "(?si)" + "".join(rf"(?=.*(?<!\w){re.escape(word)}(?!\w))" for word in needed)


def names(message: object, *needed: str) -> bool:
    """Whether a message, or the text of an error, names each of `needed`, whole and in any order."""
    return re.match(naming(*needed), str(message)) is not None
