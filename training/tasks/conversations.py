"""Conversations as data sets hold them: lists of messages with a role and content, and the tools that could be called.

Columns of tables give every message all keys that any message has. What is null was not there: it is left out, at every
depth, so a template sees what was written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from onecurve.training.recipe import find_nearest

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

# Whose message the assistant answers.
_ASKING = frozenset(ROLES) - {"system", "developer", "assistant"}

# The words of ShareGPT's files.
_OTHER_WORDS = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant"}

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """What a chat template renders.

    Attributes:
        messages: each with "role", and "content" or "tool_calls"; without keys that are null.
        tools: JSON schemas of the tools that the assistant may call.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def cut(self, num_messages: int) -> Conversation:
        """Its first messages."""
        return Conversation(self.messages[:num_messages], self.tools)

    @property
    def answers_nobody(self) -> bool:
        """Whether the assistant speaks and nobody asks."""
        roles = {message["role"] for message in self.messages}
        return "assistant" in roles and not roles & _ASKING

    def cut_unanswered(self) -> Conversation:
        """Without the messages behind the assistant's last; whole where the assistant says nothing."""
        turns = [number for number, message in enumerate(self.messages, start=1) if message["role"] == "assistant"]
        return self.cut(turns[-1]) if turns else self


def find_messages_problem(messages: Any, name: str) -> str | None:
    """What is wrong with the messages in a column; None where nothing is."""
    if not isinstance(messages, list) or not messages:
        return f"column {name!r} must hold a list of messages, it holds {messages!r:.40}"
    for number, message in enumerate(messages, start=1):
        if problem := _find_message_problem(message):
            return f"column {name!r}, message {number}: {problem}"
    return None


def _find_message_problem(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"expected an object with role and content, got {message!r:.40}"
    role = message.get("role")
    if role not in ROLES:
        if "from" in message and role is None:
            return "has no role; rename its keys 'from' and 'value' to role and content"
        nearest = _OTHER_WORDS.get(str(role)) or find_nearest(str(role), ROLES)
        return f"role {role!r} is none of {', '.join(ROLES)}" + (f"; did you mean {nearest}?" if nearest else "")
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(content, str | list | None):
        return f"content must be text, it is {content!r:.40}"
    is_empty = not content or (isinstance(content, str) and not content.strip())
    if is_empty and not (role == "assistant" and calls) and role != "tool":
        return f"the {role}'s content is empty; fill it, or remove the message"
    return None


def build_conversation(messages: list[Any], tools: Any = None) -> Conversation:
    """A conversation of a row's values, which `find_messages_problem` accepts.

    Args:
        tools: a list of schemas, such a list as JSON text, or None.

    Raises:
        ValueError: the tools are neither; `args` say why.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"its tools are no JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"its tools must be a list of JSON schemas, they are {tools!r:.40}")
    return Conversation(_drop_nulls(messages), _drop_nulls(tools) or None)


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_drop_nulls(inner) for inner in value]
    return value
