"""How labels of words mark entities: BIO, IOB1, BIOES, BILOU; or not at all, as parts of speech do.

O stands outside of all entities. Ramshaw and Marcus 1995 (IOB1), Tjong Kim Sang and Veenstra 1999 (IOB2, here BIO).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

OUTSIDE = "O"
PLAIN = "plain"

SCHEMES = {
    "BIO": "BIO (IOB2): B- begins every entity",
    "IOB1": "IOB1: B- begins an entity only behind another one of its kind",
    "IO": "IO: words of one kind in a row are one entity",
    "BIOES": "BIOES: E- ends an entity, S- is one of a single word",
    "BILOU": "BILOU: L- ends an entity, U- is one of a single word",
    "mixed": "BIO and IOB1 mixed: I- begins an entity in some rows, and B- does where none came before; all are counted",
    PLAIN: "plain: each word is counted by itself, and there are no entities",
}

_TAG = re.compile(r"([BIESLU])-(.+)", re.DOTALL)


def split_tag(tag: str) -> tuple[str, str]:
    """Prefix and kind of an entity's tag: "B", "PER"; of any other the empty prefix and the tag."""
    match = _TAG.fullmatch(tag)
    return (match[1], match[2]) if match else ("", tag)


def find_odd_names(names: Sequence[str]) -> list[str]:
    """Of labels that mark entities, those that do not; empty also where fewer than half do: then none is meant to."""
    odd = [name for name in names if name != OUTSIDE and not split_tag(name)[0]]
    marking = [name for name in names if split_tag(name)[0]]
    return odd if len(marking) >= len(odd) else []


def are_entities(names: Sequence[str]) -> bool:
    """Whether labels mark entities: each is O or has a prefix; without O there are both B- and another one."""
    prefixes = {split_tag(name)[0] for name in names if name != OUTSIDE}
    if not prefixes or "" in prefixes:
        return False
    return OUTSIDE in names or ("B" in prefixes and len(prefixes) > 1)


def find_scheme(names: Sequence[str], sequences: Iterable[Sequence[str]]) -> str:
    """One of `SCHEMES`.

    Args:
        names: of all labels.
        sequences: the labels of each row's words.
    """
    if not are_entities(names):
        return PLAIN
    prefixes = {split_tag(name)[0] for name in names if name != OUTSIDE}
    if prefixes & {"L", "U"}:
        return "BILOU"
    if prefixes & {"E", "S"}:
        return "BIOES"
    if "B" not in prefixes:
        return "IO"
    begins_inside, begins_apart = False, False
    for tags in sequences:
        before = ("", OUTSIDE)
        for tag in map(split_tag, tags):
            follows = bool(before[0]) and before[1] == tag[1]
            begins_inside = begins_inside or (tag[0] == "I" and not follows)
            begins_apart = begins_apart or (tag[0] == "B" and not follows)
            before = tag
    if not begins_inside:
        return "BIO"
    return "mixed" if begins_apart else "IOB1"


def to_bioes(tag: str) -> str:
    """A tag of BILOU in BIOES, which seqeval knows."""
    prefix, kind = split_tag(tag)
    return f"{ {'L': 'E', 'U': 'S'}[prefix] }-{kind}" if prefix in ("L", "U") else tag


def find_inner(names: Sequence[str]) -> list[int]:
    """[labels] the label of a word's further tokens: I- behind B-, where there is such a label; else the word's own."""
    numbers = {name: number for number, name in enumerate(names)}
    return [
        numbers.get(f"I-{split_tag(name)[1]}", number) if split_tag(name)[0] == "B" else number
        for name, number in numbers.items()
    ]
