"""Questions over short articles, small enough for tests: what somebody drinks, put somewhere into an article."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.trainings import DEMO

QUESTION = "What do they drink?"
DRINKS = ("green tea", "black coffee", "cold water", "warm milk")


def build_question(text: str, number: int, most_words: int = 60, is_answerable: bool = True) -> dict[str, Any]:
    """A row in SQuAD's columns.

    Args:
        number: of the row: the context has from 8 to `most_words` words, and the drink a place of its own among them.
    """
    words = text.split()[: 8 + number * 7 % (most_words - 7)]
    place, drink = number * 5 % len(words), DRINKS[number % len(DRINKS)]
    answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
    if is_answerable:
        answers = {"text": [drink], "answer_start": [len(" ".join([*words[:place], ""]))]}
        words.insert(place, drink)
    return {"id": str(number), "question": QUESTION, "context": " ".join(words), "answers": answers}


def build_questions(folder: Path, has_unanswerable: bool = False, most_words: int = 60) -> Path:
    """Write train.jsonl (203 questions) and validation.jsonl (61); of version 2.0 every third has no answer."""
    for split, count in (("train", 203), ("validation", 61)):
        whole = (DEMO / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in whole[:: len(whole) // count][:count]]
        rows = [
            build_question(text, number, most_words, not has_unanswerable or number % 3 > 0)
            for number, text in enumerate(texts)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder
