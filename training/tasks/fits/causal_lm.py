"""Which columns a causal language model could read: conversations, prompts with completions, or plain text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from onecurve.training.survey import LIST, OBJECT, TEXT, Column, Survey
from onecurve.training.tasks.fits.columns import (
    PROMPTS,
    find_classes,
    find_pair,
    find_texts,
    is_alone,
    list_unread,
    normalize,
)
from onecurve.training.tasks.fits.fit import LIKELY, NAMED, POSSIBLE, SURE, Fit, Models

# Beside an instruction: what it is about. No key reads a third text.
_INPUTS = ("input", "context", "system")
_PREFERENCES = {"chosen", "rejected"}
_CHATTING = Models("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-0.6B")
_WRITING = Models("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-0.6B-Base")
# Of a conversation; and half as many of the pieces of plain text.
_MOST_TOKENS = 2048
# What a chat template writes around a message.
_AROUND_A_MESSAGE = " ".join(["<|im_start|>"] * 3)


def find_fits(table: Survey) -> list[Fit]:
    """Fits of each kind of column; the likeliest first."""
    chats = [column for column in table.columns if _are_messages(column)]
    if {"chosen", "rejected"} <= {normalize(column.name) for column in table.columns}:
        return _find_preferred(table)
    if not chats:
        return [*_find_prompts(table), *_find_plain(table)]
    prompts = _pick_prompts(chats)
    return (
        [_build_prompts(table, *prompts, SURE)]
        if prompts is not None
        else [_build_chats(table, each) for each in chats]
    )


def _are_messages(column: Column) -> bool:
    """Lists of objects that say who speaks."""
    if not column.holds(f"{LIST} of {OBJECT}"):
        return False
    return all({"role", "from"} & each.keys() for value in column.filled for each in value if isinstance(each, Mapping))


def _pick_prompts(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    named = {normalize(column.name): column for column in columns}
    return next(((named[one], named[other]) for one, other in PROMPTS if one in named and other in named), None)


def _build_chats(table: Survey, column: Column) -> Fit:
    tools = table.find("tools")
    keys = {"messages_column": column.name, **({"tools_column": tools.name} if tools is not None else {})}
    sizes = [len(value) for value in column.filled]
    return Fit(
        keys=keys,
        certainty=SURE,
        reason=f"{column.name!r} holds conversations: messages with a role, {sum(sizes) / len(sizes):.1f} on average",
        models=_CHATTING,
        training={"assistant_only_loss": True, **_train()},
        comments={"assistant_only_loss": "learn what the assistant says, not what it is asked"},
        optional={"num_samples": 3},
        lengths={"max_length": [_join_messages(value) for value in column.values]},
        longest={"max_length": _MOST_TOKENS},
        remarks=list_unread(table, keys.values()),
    )


def _find_prompts(table: Survey) -> list[Fit]:
    named = find_pair(table, PROMPTS)
    texts = find_texts(table)
    certainty = LIKELY if named is None and len(texts) == 2 and not find_classes(table) else POSSIBLE
    pairs = [pair for pair in itertools.permutations(texts, 2) if pair != named]
    fits = [_build_prompts(table, *pair, certainty) for pair in pairs]
    if named is None:
        return fits
    inputs = [column for column in table.columns if normalize(column.name) in _INPUTS and column not in named]
    is_read = not any(column.num_filled and column.holds(TEXT) for column in inputs)
    return [_build_prompts(table, *named, NAMED if is_read else POSSIBLE, () if is_read else inputs), *fits]


def _build_prompts(
    table: Survey, prompt: Column, completion: Column, certainty: int, inputs: Sequence[Column] = ()
) -> Fit:
    keys = {"prompt_column": prompt.name, "completion_column": completion.name}
    reason = f"{prompt.name!r} ({prompt.describe()}) is a prompt, and {completion.name!r} ({completion.describe()}) its answer"
    if inputs:
        names = " and ".join(repr(column.name) for column in inputs)
        reason += f"; {names} would not be read: no key takes a third text, so write it into {prompt.name!r} first"
    return Fit(
        keys=keys,
        certainty=certainty,
        reason=reason,
        models=_CHATTING,
        training=_train(),
        optional={"num_samples": 3},
        lengths={
            "max_length": [
                f"{_join_messages(one)} {_join_messages(other)}"
                for one, other in zip(prompt.values, completion.values, strict=True)
            ]
        },
        longest={"max_length": _MOST_TOKENS},
        remarks=list_unread(table, keys.values()),
    )


def _find_plain(table: Survey) -> list[Fit]:
    return [
        Fit(
            keys={"text_column": column.name, "long_texts": "split"},
            certainty=LIKELY if is_alone(table, column) else POSSIBLE,
            reason=f"{column.name!r} ({column.describe()}) is text whose next words a decoder can learn",
            models=_WRITING,
            training=_train(),
            comments={"long_texts": "a text longer than max_length becomes several examples; nothing is cut off"},
            optional={"num_samples": 3},
            lengths={"max_length": [value or "" for value in column.values]},
            longest={"max_length": _MOST_TOKENS // 2},
            remarks=list_unread(table, [column.name]),
        )
        for column in find_texts(table)
    ]


def _find_preferred(table: Survey) -> list[Fit]:
    """Pairs of answers, of which one is preferred: this task can learn to write that one, no more."""
    named = {normalize(column.name): column for column in table.columns}
    chosen, prompt = named["chosen"], named.get("prompt") or named.get("question")
    why = "pairs of a preferred and a rejected answer; no task learns from both, this one learns to write the preferred one"
    if chosen.holds(TEXT) and prompt is not None:
        fit = _build_prompts(table, prompt, chosen, POSSIBLE)
    elif chosen.holds(TEXT):
        return []
    else:
        fit = _build_chats(table, chosen)
    return [Fit(**{**vars(fit), "certainty": POSSIBLE, "reason": why})]


def _train() -> dict[str, Any]:
    return {"learning_rate": 2e-5, "metric_for_best_model": "eval_loss"}


def _join_messages(value: Any) -> str:
    """The words of a conversation, and about as many tokens as a template adds; a text as it is."""
    if isinstance(value, str) or not value:
        return value or ""
    contents = (message.get("content") or message.get("value") or "" for message in value)
    return " ".join(f"{_AROUND_A_MESSAGE} {text}" if isinstance(text, str) else _AROUND_A_MESSAGE for text in contents)
