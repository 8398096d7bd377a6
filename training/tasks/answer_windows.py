"""Windows of a context with a question: which tokens are the answer, and which answers a window suggests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onecurve.training.tasks.special_tokens import find_leaks

if TYPE_CHECKING:
    from onecurve.training.tasks.base import Array

# What a token is to the answer, as a sum: the label of each token of a window.
STARTS, ENDS = 1, 2


def read_answers(value: Any) -> list[tuple[str, int]]:
    """Text and start of each answer: of SQuAD's two lists, or of a list of objects with both.

    Raises:
        ValueError: it is neither; the text says what is wrong with it.
    """
    wanted = "give {'text': [...], 'answer_start': [...]}, with empty lists where there is no answer"
    if isinstance(value, Mapping) and {"text", "answer_start"} <= value.keys():
        texts, starts = value["text"], value["answer_start"]
    elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        texts, starts = ([each.get(key) for each in value] for key in ("text", "answer_start"))
    else:
        raise ValueError(f"holds {value!r:.60}; {wanted}")
    if not (isinstance(texts, list) and isinstance(starts, list)):
        raise ValueError(f"holds no lists; {wanted}")
    if len(texts) != len(starts):
        raise ValueError(f"has {len(texts)} of text and {len(starts)} of answer_start; give one start for each text")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"has the answer {text!r:.40}, which is no text; {wanted}")
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"has the answer_start {start!r:.40}; count the context's characters from 0")
    return list(zip(texts, starts, strict=True))


def find_answer_problem(text: str, start: int, context: str) -> str | None:
    """Why an answer does not stand in its context at its start; None where it does. Characters are Unicode's, not bytes."""
    if context.startswith(text, start):
        return None
    problem = f"the answer {text!r:.60} does not stand at answer_start {start}, where the context has "
    problem += (
        repr(context[start : start + len(text)])[:60] if start < len(context) else f"ended ({len(context)} characters)"
    )
    places = [place for place in range(len(context)) if context.startswith(text, place)]
    if not places:
        return f"{problem}; it stands nowhere in the context"
    nearest = min(places, key=lambda place: abs(place - start))
    return f"{problem}; it stands at {nearest}. Count characters (code points), not bytes"


@dataclass(frozen=True)
class Candidate:
    """A span of the context that may be the answer; `start` and `end` count its characters. The text is stripped."""

    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Window:
    """A question with a part of its context.

    Attributes:
        tokens, type_ids: of the question and the part.
        starts, ends: of each token the characters of the context that it stands for; -1 where it is not the context's.
        null_place: the token that stands for no answer.
    """

    tokens: list[int]
    type_ids: list[int]
    starts: list[int]
    ends: list[int]
    null_place: int

    @property
    def extent(self) -> tuple[int, int]:
        """The characters of the context that this part begins at and ends before."""
        return min((start for start in self.starts if start >= 0), default=0), max(self.ends, default=0)

    @property
    def features(self) -> dict[str, Any]:
        """As they are kept with the prepared data."""
        return {
            "input_ids": self.tokens,
            "token_type_ids": self.type_ids,
            "starts": self.starts,
            "ends": self.ends,
            "null_place": self.null_place,
        }

    def label(self, first: int, last: int) -> list[int]:
        """The label of each token, where the answer is from one place to another."""
        labels = [0] * len(self.tokens)
        labels[first] += STARTS
        labels[last] += ENDS
        return labels


def read_window(encoding: Any, tokenizer: Any) -> Window:
    """What the tokenizer says of a window, without special tokens that the text has written (special_tokens.py)."""
    leaks = find_leaks(tokenizer)
    tokens, kept = [], []
    for place, (token, is_template) in enumerate(zip(encoding.ids, encoding.special_tokens_mask, strict=True)):
        known = token if is_template else leaks.get(token, token)
        if known is not None:
            tokens.append(known)
            kept.append(place)
    spans = [encoding.offsets[place] if encoding.sequence_ids[place] == 1 else (-1, -1) for place in kept]
    special = tokenizer.cls_token_id if tokenizer.cls_token_id in tokens else tokenizer.bos_token_id
    return Window(
        tokens,
        [encoding.type_ids[place] for place in kept],
        [start for start, _ in spans],
        [end for _, end in spans],
        tokens.index(special) if special in tokens else 0,
    )


def label_window(window: Window, context: str, answers: Sequence[tuple[str, int]]) -> list[int] | None:
    """The label of each token, for the first answer; None where it is not whole in this window.

    Its first token is the first one that ends behind its first character, its last one the last that begins before its end:
    some tokenizers give the space before a word to the word, and some words have several tokens for one character.
    """
    if not answers:
        return None
    text, start = answers[0]
    first_character = start + len(text) - len(text.lstrip())
    end = start + len(text.rstrip())
    first, last = window.extent
    if not first <= first_character < end <= last:
        return None
    places = [place for place, begin in enumerate(window.starts) if begin >= 0]
    of_answer = [place for place in places if window.ends[place] > first_character and window.starts[place] < end]
    return window.label(of_answer[0], of_answer[-1]) if of_answer else None


def find_candidates(number: int, results: Mapping[str, Any], most: int, max_tokens: int) -> Iterator[Candidate]:
    """The answers of a window: its best starts with its best ends, as far as they are in the context and not too long."""
    import numpy as np

    starts, ends = (np.asarray(results[name][number]) for name in ("starts", "ends"))
    places = np.flatnonzero(starts >= 0)
    if not len(places):
        return
    text, first = bytes(results["text"][number]).decode(), int(starts[places].min())
    logits = [np.asarray(results[name][number]) for name in ("start_logits", "end_logits")]
    best: list[Array] = [places[np.argsort(-each[places], kind="stable")[:most]] for each in logits]
    for start in best[0].tolist():
        for end in best[1].tolist():
            if not start <= end < start + max_tokens:
                continue
            whole = text[starts[start] - first : ends[end] - first]
            begin = int(starts[start]) + len(whole) - len(whole.lstrip())
            if stripped := whole.strip():
                yield Candidate(float(logits[0][start] + logits[1][end]), begin, begin + len(stripped), stripped)
