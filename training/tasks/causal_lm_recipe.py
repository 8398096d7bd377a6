"""The keys of causal language models, and which of them go together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from onecurve.training.recipe import Integer, PathText, Recipe


class CausalLMRecipe(Recipe):
    """The keys of causal language models beside those of every recipe."""

    text_column: str | None = Field(
        default=None, min_length=1, description="column with plain text; `text` where no other kind of column is named"
    )
    messages_column: str | None = Field(
        default=None, min_length=1, description="column with conversations: lists of messages with role and content"
    )
    tools_column: str | None = Field(
        default=None, min_length=1, description="column with JSON schemas of the tools that a conversation may call"
    )
    prompt_column: str | None = Field(
        default=None, min_length=1, description="column with prompts: texts, or the first messages of conversations"
    )
    completion_column: str | None = Field(
        default=None,
        min_length=1,
        description="column with what follows each prompt, directly behind it; of the same kind",
    )
    completion_only_loss: bool | None = Field(
        default=None, description="learn only completions, not their prompts; by default true where there are prompts"
    )
    assistant_only_loss: bool = Field(
        default=False, description="learn only the assistant's messages, each with the token that ends it"
    )
    chat_template: PathText | None = Field(
        default=None, description="file with a chat template in Jinja; none takes the tokenizer's own"
    )
    eos_token: str | None = Field(default=None, description="token that ends a text; none takes the tokenizer's own")
    split_special_tokens: bool = Field(
        default=True,
        description="whether special tokens that texts and prompts write are read as plain text; false reads them as special "
        "tokens, as chats need it that were rendered before",
    )
    long_texts: Literal["cut", "split"] = Field(
        default="cut",
        description="what happens to more than max_length tokens: cut off, or split into several examples",
    )
    num_samples: Annotated[Integer, Field(ge=0)] = Field(
        default=0,
        description="validation examples that the model continues at the start and at each evaluation, into samples.jsonl",
    )
    max_new_tokens: Annotated[Integer, Field(ge=1)] = Field(default=128, description="most tokens of one generation")


def find_contradictions(recipe: CausalLMRecipe) -> list[str]:
    """Keys of two kinds of columns, and keys that the kind of columns does not read."""
    kinds = [key for key in ("text_column", "messages_column", "prompt_column") if getattr(recipe, key) is not None]
    has_prompts, has_chats = recipe.prompt_column is not None, recipe.messages_column is not None
    problems = []
    if len(kinds) > 1:
        problems.append(f"{' and '.join(kinds)}: give one of them, a recipe reads one kind of column")
    if has_prompts != (recipe.completion_column is not None):
        problems.append("prompt_column and completion_column: give both, or none of them")
    if recipe.completion_only_loss is not None and not has_prompts:
        problems.append("completion_only_loss: needs prompt_column and completion_column")
    for key in ("assistant_only_loss", "tools_column", "chat_template"):
        if getattr(recipe, key) and not has_prompts and not has_chats:
            problems.append(f"{key}: needs conversations; name their column in messages_column")
    if recipe.assistant_only_loss and recipe.completion_only_loss is False:
        problems.append("assistant_only_loss and completion_only_loss: false: give one of them, not both")
    return problems
