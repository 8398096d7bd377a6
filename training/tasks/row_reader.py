"""Which of a row's columns are what a causal language model reads: one kind for all rows of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onecurve.training.errors import BadInput
from onecurve.training.tasks import chats
from onecurve.training.tasks.base import Rows, TokenCounter
from onecurve.training.tasks.causal_lm_recipe import CausalLMRecipe
from onecurve.training.tasks.conversations import Conversation, build_conversation, find_messages_problem
from onecurve.training.tasks.sequences import (
    TokenSequence,
    encode_completions,
    encode_conversations,
    encode_plain,
)
from onecurve.training.tasks.texts import check_texts, find_text_problem
from onecurve.training.tasks.token_spans import PLAIN, RENDERED, TEMPLATE, cut_into_examples, tokenize_parts


def find_row_problem(row: Mapping[str, Any], columns: Mapping[str, Sequence[str]]) -> str | None:
    """What is wrong with a row; None where nothing is.

    Args:
        columns: names of the columns by the key that names them.
    """
    kinds = set()
    for key, [name] in columns.items():
        value = row.get(name)
        if key == "tools_column":
            continue
        is_chat = key == "messages_column" or (key != "text_column" and isinstance(value, list))
        kinds.add(is_chat)
        if problem := find_messages_problem(value, name) if is_chat else find_text_problem(value, name):
            return problem
    if len(kinds) > 1:
        return f"of {' and '.join(columns)} one holds text, the other messages; write both in one way"
    return None


# What templates write around a message: two special tokens, the role and a new line.
_TOKENS_AROUND_A_MESSAGE = 4


def estimate_pieces(
    row: Mapping[str, Any], columns: Mapping[str, Sequence[str]], counter: TokenCounter, recipe: CausalLMRecipe
) -> list[list[int]]:
    """The tokens of each example of a row, as far as they are known without a chat template.

    Args:
        columns: as `find_row_problem` takes them.
    """
    values = [row[name] for key, [name] in columns.items() if key != "tools_column"]
    is_chat = isinstance(values[0], list)
    sizes = [
        sum(_TOKENS_AROUND_A_MESSAGE + counter.count(_read_text(each)) for each in value)
        if is_chat
        else counter.count(value)
        for value in values
    ]
    num_tokens = sum(sizes) + (0 if is_chat else counter.count_special(1) + 1)
    first_target = sizes[0] if len(sizes) > 1 and recipe.completion_only_loss is not False else 1
    pieces = cut_into_examples(max(1, num_tokens), recipe.max_length, recipe.long_texts)
    return [[piece.stop - piece.start] for piece in pieces if piece.stop > first_target]


def _read_text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


class RowReader:
    """Rows of one kind: plain texts, prompts and completions in text, or conversations."""

    def __init__(self, recipe: CausalLMRecipe, columns: Mapping[str, Sequence[str]], rows: Rows) -> None:
        """See what the rows are.

        Args:
            columns: that it reads, by the key that names them.
        """
        import pyarrow as pa

        self._recipe, self._columns, self._rows = recipe, columns, rows
        self._has_prompts = recipe.prompt_column is not None
        self._reading = PLAIN if recipe.split_special_tokens else RENDERED
        # The first column is the text, the conversation or the prompt.
        self._input = next(iter(columns.values()))[0]
        is_nested = pa.types.is_nested(rows.table.column(self._input).type)
        self.is_chat = recipe.messages_column is not None or (self._has_prompts and is_nested)

    def check(self) -> None:
        """Refuse the first row that is none of its kind.

        Raises:
            BadInput: naming the row.
        """
        recipe, columns, rows = self._recipe, self._columns, self._rows
        if not self.is_chat:
            for key in ("assistant_only_loss", "tools_column", "chat_template"):
                if getattr(recipe, key):
                    raise BadInput(f"{rows.origin}: {key} needs conversations, column {self._input!r} holds text")
            check_texts(rows, [name for [name] in columns.values()])
            return
        rows.refuse_first(lambda row: find_row_problem(row, columns))

    def encode(self, tokenizer: Any) -> list[TokenSequence | None]:
        """Each row in tokens, with its targets; None where they begin or end inside a token.

        Raises:
            BadInput: naming the first row that can't be encoded.
        """
        recipe, rows = self._recipe, self._rows
        completion_only = self._has_prompts and recipe.completion_only_loss is not False
        if self.is_chat:
            self._check_template(tokenizer)
            prompts = rows.values(self._input)
            if not self._has_prompts:
                return encode_conversations(rows, self._build(prompts), tokenizer, recipe.assistant_only_loss)
            completions = self._read_completions()
            whole = self._build([prompt + rest for prompt, rest in zip(prompts, completions, strict=True)])
            num_before = list(map(len, prompts)) if completion_only else None
            return encode_conversations(rows, whole, tokenizer, recipe.assistant_only_loss, num_before)
        if self._has_prompts:
            texts, completions = rows.values(self._input), self._read_completions()
            return encode_completions(texts, completions, tokenizer, completion_only, self._reading)
        return list(encode_plain(rows.values(self._input), tokenizer, recipe.max_length, self._reading))

    def encode_prompts(self, tokenizer: Any, max_tokens: int | None) -> list[list[int]]:
        """The tokens that a generation continues: a text or prompt, or a conversation up to the answer that is wanted.

        A conversation that ends with the assistant's message is continued from before that message.

        Args:
            max_tokens: most tokens of a prompt; None for any number.

        Raises:
            BadInput: naming the first row that has more, or that the chat template refuses.
        """
        recipe, rows = self._recipe, self._rows
        texts = []
        if self.is_chat:
            self._check_template(tokenizer)
            for position, conversation in enumerate(self._build(rows.values(self._input))):
                is_answered = conversation.messages[-1]["role"] == "assistant"
                asked = conversation.cut(len(conversation.messages) - is_answered)
                try:
                    texts.append(chats.render(tokenizer, asked, asks_for_answer=True))
                except chats.UnclearChat as error:
                    rows.refuse(position, str(error))
        else:
            texts = rows.values(self._input)
        reading = TEMPLATE if self.is_chat else self._reading
        prompts = [tokens for tokens, _ in tokenize_parts(tokenizer, texts, [()] * len(texts), reading)]
        for position, tokens in enumerate(prompts):
            if max_tokens is not None and len(tokens) > max_tokens:
                rows.refuse(
                    position,
                    f"its prompt has {len(tokens)} tokens; the model's positions leave room for {max_tokens} beside "
                    f"max_new_tokens: {recipe.max_new_tokens}",
                )
        return prompts

    def _read_completions(self) -> list[Any]:
        return self._rows.values(self._columns["completion_column"][0])

    def _check_template(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise BadInput("chat_template: the tokenizer has no chat template of its own; give a file with one")

    def _build(self, messages: Sequence[list[Any]]) -> list[Conversation]:
        """The conversation of each row.

        Raises:
            BadInput: naming the first row whose tools are no list of schemas.
        """
        column = self._recipe.tools_column
        tools = self._rows.values(column) if column is not None else [None] * len(messages)
        found = []
        for position, pair in enumerate(zip(messages, tools, strict=True)):
            try:
                found.append(build_conversation(*pair))
            except ValueError as error:
                self._rows.refuse(position, str(error))
        return found
