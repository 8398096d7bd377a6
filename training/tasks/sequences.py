"""Rows -> token sequences to learn: plain texts, prompts with completions, conversations; and which tokens are targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onecurve.training.tasks import chats
from onecurve.training.tasks.base import NO_TARGET, Rows
from onecurve.training.tasks.conversations import Conversation
from onecurve.training.tasks.special_tokens import GUARD
from onecurve.training.tasks.token_spans import TEMPLATE, Reading, Span, tokenize_parts

# A sample continues as many tokens of a plain text, at most half of it.
_PROMPT_TOKENS = 32

INSIDE_A_TOKEN = (
    "what is to be learned begins or ends inside a token; "
    "where a prompt ends with a space, begin the completion with it instead"
)


NO_END = "the end of a turn is no target, so that the model does not learn to stop there"
NOT_SHOWN = "the chat template leaves out or changes the content of a message"
UNANSWERED = "messages behind the assistant's last one are left out, because nothing answers them"
NO_QUESTION = "the assistant answers, but no message asks; put the question in a message of the user before it"
GUARDED = "messages write special tokens, which are read as plain text"


@dataclass(frozen=True)
class TokenSequence:
    """A row in tokens.

    Attributes:
        tokens: all of them, in order.
        targets: which of them are learned, as spans.
        prompt_length: how many stand before what a generation would write; 0 where that is not known.
        oddities: what is worth a look: it may be meant, and is counted.
    """

    tokens: list[int]
    targets: Sequence[Span]
    prompt_length: int
    oddities: Sequence[str] = ()

    @property
    def labels(self) -> list[int]:
        """The tokens, and NO_TARGET for those that are not learned."""
        labels = [NO_TARGET] * len(self.tokens)
        for start, end in self.targets:
            labels[start:end] = self.tokens[start:end]
        return labels


def encode_plain(texts: Sequence[str], tokenizer: Any, max_length: int, reading: Reading) -> list[TokenSequence]:
    """Texts, each with the tokenizer's own special tokens and its end-of-text token behind it; all tokens are targets.

    Args:
        max_length: tokens that will be left of a text, of which a sample continues half.
    """
    found = []
    for tokens, _ in tokenize_parts(tokenizer, texts, [()] * len(texts), reading):
        tokens = [*tokens, tokenizer.eos_token_id]
        found.append(TokenSequence(tokens, [(0, len(tokens))], min(_PROMPT_TOKENS, min(len(tokens), max_length) // 2)))
    return found


def encode_completions(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Any, completion_only: bool, reading: Reading
) -> list[TokenSequence | None]:
    """Prompts with their completions directly behind, and the end-of-text token; None where the two share a token.

    Args:
        completion_only: whether only the tokens of the completion are targets, its end among them.
    """
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    spans = [[(len(prompt), len(text))] for prompt, text in zip(prompts, texts, strict=True)]
    found: list[TokenSequence | None] = []
    for tokens, parts in tokenize_parts(tokenizer, texts, spans, reading):
        if parts is None:
            found.append(None)
            continue
        tokens = [*tokens, tokenizer.eos_token_id]
        start = parts[0][0]
        found.append(TokenSequence(tokens, [(start if completion_only else 0, len(tokens))], start))
    return found


def encode_conversations(
    rows: Rows,
    conversations: Sequence[Conversation],
    tokenizer: Any,
    assistant_only: bool,
    num_before: Sequence[int] | None = None,
) -> list[TokenSequence | None]:
    """Conversations as the chat template writes them; None where a part that is learned shares a token with what is not.

    The template writes all special tokens: the tokenizer adds none.

    Args:
        assistant_only: whether only the assistant's messages are targets, each with the token that ends its turn.
        num_before: of each conversation how many messages are a prompt, of which nothing is a target; None for none.

    Raises:
        BadInput: naming the first row that the template refuses, in which the assistant's part is not known, or in which
            the assistant is to be learned and answers nobody.
    """
    whole = conversations
    if assistant_only and num_before is None:
        for position, conversation in enumerate(whole):
            if conversation.answers_nobody:
                rows.refuse(position, NO_QUESTION)
        conversations = [conversation.cut_unanswered() for conversation in whole]
    texts, spans_of_texts, prompts = [], [], []
    ends = chats.find_special_tokens(tokenizer)
    for position, conversation in enumerate(conversations):
        before = num_before[position] if num_before is not None else 0
        try:
            text, spans, prompt = _find_spans(tokenizer, conversation, assistant_only, before, ends)
        except chats.UnclearChat as error:
            rows.refuse(position, str(error))
        texts.append(text)
        spans_of_texts.append(spans)
        prompts.append(prompt)
    found: list[TokenSequence | None] = []
    special = {tokenizer.convert_tokens_to_ids(token) for token in ends}
    learns_all = not assistant_only and num_before is None
    of_texts = tokenize_parts(tokenizer, texts, spans_of_texts, TEMPLATE)
    read = zip(texts, conversations, whole, prompts, of_texts, strict=True)
    for text, conversation, written, has_prompt, (tokens, parts) in read:
        oddities = [GUARDED] if GUARD in text else []
        if len(conversation.messages) < len(written.messages):
            oddities.append(UNANSWERED)
        if not _shows_contents(text.replace(GUARD, ""), conversation):
            oddities.append(NOT_SHOWN)
        if learns_all:
            start = parts[-1][0] if parts and has_prompt else 0
            found.append(TokenSequence(tokens, [(0, len(tokens))], start, oddities))
        elif parts is None:
            found.append(None)
        else:
            if any(tokens[end - 1] not in special for _, end in parts):
                oddities.append(NO_END)
            found.append(TokenSequence(tokens, parts, parts[-1][0] if parts else 0, oddities))
    return found


def _shows_contents(text: str, conversation: Conversation) -> bool:
    """Whether each message's text stands in what the template has written; white space around it does not matter."""
    contents = (message.get("content") for message in conversation.messages)
    return all(content.strip() in text for content in contents if isinstance(content, str))


def _find_spans(
    tokenizer: Any, conversation: Conversation, assistant_only: bool, num_before: int, ends: Sequence[str]
) -> tuple[str, list[Span], bool]:
    """The text, the characters of what is learned or answered, and whether the last of them is the assistant's answer."""
    if assistant_only:
        text, spans = chats.find_assistant(tokenizer, conversation, ends)
        if num_before:
            _, (start, _) = chats.find_answer(tokenizer, conversation, num_before, ends)
            spans = [span for span in spans if span[0] >= start]
        return text, spans, True
    if num_before:
        text, span = chats.find_answer(tokenizer, conversation, num_before, ends)
        return text, [span], True
    turns = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if turns:  # Everything is learned; where the last answer begins is for samples only.
        try:
            text, span = chats.find_answer(tokenizer, conversation, turns[-1], ends)
        except chats.UnclearChat:
            pass
        else:
            return text, [span], True
    return chats.render(tokenizer, conversation), [], False
