"""Conversations -> text by a chat template, and where in that text the assistant's part stands.

A template with `{% generation %}` marks that part itself. Of others it is found by rendering the conversation up to each
message of the assistant: what comes before the message, with the prompt to answer, must be the beginning of the whole, and
so must what ends with the message. A template that writes earlier turns differently once later ones follow fails this and
is refused: which of its tokens are the assistant's can't be known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from onecurve.training.tasks.conversations import Conversation
from onecurve.training.tasks.special_tokens import guard

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_ADVICE = "give a chat_template with {% generation %} and {% endgeneration %} around the assistant's part"


class UnclearChat(Exception):
    """A conversation that the template can't render, or of whose text the assistant's part is not known; says why."""


def render(tokenizer: Any, conversation: Conversation, asks_for_answer: bool = False) -> str:
    """The conversation as text.

    Args:
        asks_for_answer: whether the text ends where the assistant's next message begins.

    Raises:
        UnclearChat: the template refuses it.
    """
    from jinja2 import TemplateError

    conversation = _guard(tokenizer, conversation)
    try:
        text: str = tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=asks_for_answer,
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UnclearChat(f"the chat template refuses it: {' '.join(str(error).split())}") from None
    return text


def _guard(tokenizer: Any, conversation: Conversation) -> Conversation:
    """The conversation with the special tokens in what people wrote parted: only the template writes special tokens."""
    tokens = sorted(find_special_tokens(tokenizer), key=len, reverse=True)
    return Conversation(guard(conversation.messages, tokens), guard(conversation.tools, tokens))


def find_assistant(tokenizer: Any, conversation: Conversation, ends: Sequence[str]) -> tuple[str, list[Span]]:
    """The conversation as text, and which of its characters are the assistant's, each turn with the token that ends it.

    Args:
        ends: tokens that can end a turn, as `find_special_tokens` finds them.

    Raises:
        UnclearChat: the template refuses it, or does not show what the assistant's part is.
    """
    template = tokenizer.get_chat_template(None, conversation.tools)
    if _GENERATION.search(template):
        return _find_marked(tokenizer, conversation, template, ends)
    whole = render(tokenizer, conversation)
    spans = []
    for number, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            start = len(
                _render_beginning(tokenizer, conversation.cut(number), True, whole, f"before message {number + 1}")
            )
            end = len(
                _render_beginning(tokenizer, conversation.cut(number + 1), False, whole, f"up to message {number + 1}")
            )
            if end <= start:
                raise UnclearChat(f"the chat template shows nothing of message {number + 1}; {_ADVICE}")
            spans.append((start, trim_end(whole, start, end, ends)))
    return whole, spans


def find_answer(tokenizer: Any, conversation: Conversation, num_before: int, ends: Sequence[str]) -> tuple[str, Span]:
    """The conversation as text, and the characters behind its first messages and the prompt to answer them.

    Raises:
        UnclearChat: as `find_assistant`.
    """
    whole = render(tokenizer, conversation)
    before = _render_beginning(tokenizer, conversation.cut(num_before), True, whole, f"before message {num_before + 1}")
    return whole, (len(before), trim_end(whole, len(before), len(whole), ends))


def _render_beginning(tokenizer: Any, conversation: Conversation, asks_for_answer: bool, whole: str, which: str) -> str:
    text = render(tokenizer, conversation, asks_for_answer) if conversation.messages else ""
    if not whole.startswith(text):
        raise UnclearChat(
            f"the chat template writes the conversation {which} otherwise than in the whole, so the assistant's tokens are "
            f"not known; {_ADVICE}"
        )
    return text


def _find_marked(
    tokenizer: Any, conversation: Conversation, template: str, ends: Sequence[str]
) -> tuple[str, list[Span]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = _guard(tokenizer, conversation)
    try:
        [text], [spans] = render_jinja_template(
            [conversation.messages],
            tools=conversation.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UnclearChat(f"the chat template refuses it: {' '.join(str(error).split())}") from None
    num_turns = sum(message["role"] == "assistant" for message in conversation.messages)
    if len(spans) != num_turns or any(end <= start for start, end in spans):
        raise UnclearChat(
            f"the chat template marks {len(spans)} parts with {{% generation %}}, the assistant has {num_turns} messages"
        )
    return text, [(start, trim_end(text, start, end, ends)) for start, end in spans]


def trim_end(text: str, start: int, end: int, ends: Sequence[str]) -> int:
    """Where a part ends: behind its last special token, if only white space follows that; nothing is generated there."""
    part = text[start:end].rstrip()
    return start + len(part) if part.endswith(tuple(ends)) else end


def find_special_tokens(tokenizer: Any) -> Sequence[str]:
    """Tokens that a template can end a turn with."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted({*added, *tokenizer.all_special_tokens} - {""})
