"""Which tokens of a conversation are learned, over templates of three kinds; what is unclear is refused or counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from onecurve.training.config import build_recipe
from onecurve.training.errors import BadInput
from onecurve.training.tasks import build_task
from onecurve.training.tasks.base import NO_TARGET, Rows, Task
from tests.conftest import ROOT
from tests.messages import naming
from tests.training.tasks import templates

Encode = Callable[..., tuple[Task, dict[str, Any]]]

SYSTEM = {"role": "system", "content": "Be kind."}
FIRST = {"role": "user", "content": "How are you?"}
ANSWER = {"role": "assistant", "content": "I am fine."}
SECOND = {"role": "user", "content": "And now?"}
LAST = {"role": "assistant", "content": "Good, thanks."}
CHAT = [SYSTEM, FIRST, ANSWER, SECOND, LAST]


@pytest.fixture(scope="module")
def tokenizer(decoder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(decoder)


@pytest.fixture
def encode(tokenizer: Any) -> Encode:
    """Encode rows as a recipe with these keys does: encode(template, rows, **keys)."""

    def run(template: str | None, rows: Sequence[dict[str, Any]], **keys: Any) -> tuple[Task, dict[str, Any]]:
        base = {"task": "causal_lm", "model_name_or_path": "m", "train_file": "t.jsonl", "messages_column": "messages"}
        named = {key: value for key, value in {**base, **keys}.items() if value is not None}
        task = build_task(build_recipe(named))
        tokenizer.chat_template, tokenizer.bos_token = template, "<s>"
        data = Rows(pa.Table.from_pylist(list(rows)), np.arange(len(rows)), "t.jsonl")
        task.check(data)
        return task, task.encode(data, tokenizer)

    return run


def find_learned(tokenizer: Any, examples: dict[str, Any], row: int = 0) -> list[str]:
    """The runs of tokens that are learned, as text."""
    runs: list[str] = []
    tokens: list[int] = []
    for token, label in zip(examples["input_ids"][row], examples["labels"][row], strict=True):
        assert label in (token, NO_TARGET)
        if label != NO_TARGET:
            tokens.append(token)
        elif tokens:
            runs, tokens = [*runs, tokenizer.decode(tokens)], []
    return [*runs, *([tokenizer.decode(tokens)] if tokens else [])]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (templates.CHATML, "<|im_end|>"),
        (templates.LLAMA3, "<|turn_end|>"),
        (templates.GENERATION, "<|im_end|>"),
        ((ROOT / "training" / "recipes" / "chatml.jinja").read_text(encoding="utf-8"), "<|im_end|>"),
    ],
    ids=["ChatML", "Llama-3", "generation", "shipped"],
)
def test_only_the_assistants_turns_are_learned_and_where_they_end(
    encode: Encode, tokenizer: Any, template: str, end: str
) -> None:
    task, examples = encode(template, [{"messages": CHAT}], assistant_only_loss=True)
    assert find_learned(tokenizer, examples) == [f"{ANSWER['content']}{end}", f"{LAST['content']}{end}"]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert examples["input_ids"][0] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    prompt = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    start = examples["prompt_length"][0]
    assert examples["input_ids"][0][:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert task.facts == {}


def test_the_shipped_template_writes_what_chatml_does(tokenizer: Any) -> None:
    shipped = (ROOT / "training" / "recipes" / "chatml.jinja").read_text(encoding="utf-8")
    for asks in (True, False):
        texts = [
            tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False, add_generation_prompt=asks)
            for template in (shipped, templates.CHATML)
        ]
        assert texts[0] == texts[1]


def test_without_assistant_only_loss_all_is_learned(encode: Encode, tokenizer: Any) -> None:
    _, examples = encode(templates.CHATML, [{"messages": CHAT}])
    assert examples["labels"] == [[NO_TARGET, *row[1:]] for row in examples["input_ids"]]
    prompt = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    assert examples["prompt_length"][0] == len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_a_conversation_in_prompt_and_completion(encode: Encode, tokenizer: Any) -> None:
    keys = {"messages_column": None, "prompt_column": "prompt", "completion_column": "completion"}
    rows = [{"prompt": CHAT[:3], "completion": [*CHAT[3:]]}, {"prompt": CHAT[:2], "completion": [ANSWER]}]
    _, examples = encode(templates.CHATML, [rows[1]], **keys)
    assert find_learned(tokenizer, examples) == ["I am fine.<|im_end|>"]
    _, examples = encode(
        templates.GENERATION, [{"prompt": CHAT[:4], "completion": [LAST]}], assistant_only_loss=True, **keys
    )
    assert find_learned(tokenizer, examples) == ["Good, thanks.<|im_end|>"]
    _, examples = encode(templates.CHATML, [rows[1]], completion_only_loss=False, **keys)
    assert examples["labels"] == [[NO_TARGET, *row[1:]] for row in examples["input_ids"]]
    with pytest.raises(BadInput, match=naming("row 1")):
        encode(templates.CHATML, [rows[0]], **keys)


def test_prompts_and_completions_in_text(encode: Encode, tokenizer: Any) -> None:
    keys = {"messages_column": None, "prompt_column": "prompt", "completion_column": "completion"}
    row = {"prompt": "2 and 2 is", "completion": " four."}
    _, examples = encode(None, [row], **keys)
    assert find_learned(tokenizer, examples) == [" four.<|endoftext|>"]
    assert tokenizer.decode(examples["input_ids"][0]) == "2 and 2 is four.<|endoftext|>"
    # A prompt is at generation what it was in training.
    start = examples["prompt_length"][0]
    assert examples["input_ids"][0][:start] == tokenizer(row["prompt"])["input_ids"]


def test_what_begins_inside_a_token_is_left_out_and_counted(encode: Encode, tokenizer: Any) -> None:
    keys = {"messages_column": None, "prompt_column": "prompt", "completion_column": "completion"}
    rows = [{"prompt": "All of", "completion": " the"}, {"prompt": "All of t", "completion": "he"}]
    task, examples = encode(None, rows, **keys)
    assert examples["row"].tolist() == [0]
    assert sum(task.facts["left_out"].values()) == 1


def test_tools_and_calls_are_rendered_as_they_were_written(encode: Encode, tokenizer: Any) -> None:
    """Columns of a table give each object all keys of all rows: those that were not written are not shown."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {key: {"type": "string"}}}}}
        for name, key in (("find", "what"), ("add", "number"))
    ]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": {"what": "tea"}}}]}
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"number": 1}}}]}
    result = {"role": "tool", "content": "green"}
    rows = [{"messages": [FIRST, call, result, LAST], "tools": tools}, {"messages": [FIRST, other], "tools": tools[:1]}]
    _, examples = encode(templates.TOOLS, rows, tools_column="tools", assistant_only_loss=True)
    for row, (written, messages, own) in enumerate(
        (("find", rows[0]["messages"], tools), ("add", rows[1]["messages"], tools[:1]))
    ):
        whole = tokenizer.apply_chat_template(messages, tools=own, tokenize=False)
        assert tokenizer.decode(examples["input_ids"][row]) == whole
        assert written in find_learned(tokenizer, examples, row)[0]


@pytest.mark.parametrize(
    ("template", "messages", "named"),
    [
        (templates.CHANGING, CHAT, ("row 2", "message 3", "chat_template")),
        (templates.GENERATION.replace("'assistant'", "'bot'"), CHAT, ("row 2", "2")),
        ("{{ raise_exception('roles must alternate') }}", CHAT, ("row 2", "alternate")),
        (templates.CHATML, [{"role": "human", "content": "x"}], ("row 2", "'human'", "user")),
        (templates.CHATML, [{"role": "user", "content": " "}], ("row 2", "message 1", "user")),
        (templates.CHATML, [FIRST, {"role": "assistant", "content": None}], ("row 2", "message 2")),
        (templates.CHATML, [], ("row 2", "'messages'")),
        (None, CHAT, ("chat_template",)),
    ],
    ids=["changes", "marks nothing", "refuses", "role", "empty", "null", "no messages", "no template"],
)
def test_what_is_unclear_is_refused_by_its_row(
    encode: Encode, template: str | None, messages: list[Any], named: tuple[str, ...]
) -> None:
    good = [FIRST, LAST]
    if template is not None and template.startswith("{{"):
        template = "{% if messages | length > 2 %}" + template + "{% endif %}" + templates.CHATML
    if template is not None and "'bot'" in template:
        good = [FIRST]
    with pytest.raises(BadInput, match=naming(*named)):
        encode(template, [{"messages": good}, {"messages": messages}], assistant_only_loss=True)


@pytest.mark.parametrize("template", [templates.CHATML, templates.GENERATION], ids=["ChatML", "generation"])
def test_a_question_without_an_answer_is_left_out_and_counted(encode: Encode, tokenizer: Any, template: str) -> None:
    call = {"role": "tool", "content": "green"}
    rows = [{"messages": [FIRST, ANSWER, *rest]} for rest in ([], [SECOND], [call, SECOND])]
    task, examples = encode(template, rows, assistant_only_loss=True)
    assert examples["input_ids"] == [examples["input_ids"][0]] * 3
    assert find_learned(tokenizer, examples, 2) == [f"{ANSWER['content']}<|im_end|>"]
    assert list(task.facts["noticed"].values()) == [2]

    # Where every message is learned, so is the question.
    task, examples = encode(template, rows[:2])
    assert len(examples["input_ids"][1]) > len(examples["input_ids"][0])
    assert task.facts == {}


@pytest.mark.parametrize("before", [[], [SYSTEM]], ids=["alone", "system"])
def test_an_answer_to_nobody_is_refused_by_its_row(encode: Encode, before: list[Any]) -> None:
    rows = [{"messages": [ANSWER, FIRST, LAST]}, {"messages": [*before, ANSWER]}]  # A greeting may stand first.
    with pytest.raises(BadInput, match=naming("row 2", "user")):
        encode(templates.CHATML, rows, assistant_only_loss=True)
    encode(templates.CHATML, rows)


def test_a_turn_whose_end_is_not_learned_is_counted(encode: Encode, tokenizer: Any) -> None:
    task, examples = encode(templates.GENERATION_WITHOUT_END, [{"messages": CHAT}], assistant_only_loss=True)
    assert find_learned(tokenizer, examples) == [ANSWER["content"], LAST["content"]]
    assert sum(task.facts["noticed"].values()) == 1
    assert task.describe_left_out() is not None


def test_a_message_that_the_template_does_not_show_is_counted(encode: Encode) -> None:
    silent = templates.CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    task, _ = encode(silent, [{"messages": CHAT}, {"messages": CHAT[1:]}])
    assert list(task.facts["noticed"].values()) == [1]
    task, _ = encode(templates.LLAMA3, [{"messages": [{**FIRST, "content": " How? "}, LAST]}], assistant_only_loss=True)
    assert task.facts == {}


def test_an_example_without_a_target_is_left_out_and_counted(encode: Encode) -> None:
    rows = [{"messages": [FIRST]}, {"messages": CHAT}, {"messages": [{**FIRST, "content": "x" * 200}, LAST]}]
    task, examples = encode(templates.CHATML, rows, assistant_only_loss=True, max_length=64)
    assert examples["row"].tolist() == [1]
    assert list(task.facts["left_out"].values()) == [1, 1]


def test_a_text_with_two_beginnings_is_refused(encode: Encode, tokenizer: Any, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"messages_column": None, "text_column": "text"}
    _, examples = encode(None, [{"text": "<s><s>twice"}], **keys)
    assert tokenizer.convert_tokens_to_ids("<s>") not in examples["input_ids"][0], (
        "by itself a text writes no special token"
    )
    keys["split_special_tokens"] = False
    with pytest.raises(BadInput, match=naming("row 2", "'<s>'")):
        encode(None, [{"text": "<s>once"}, {"text": "<s><s>twice"}], **keys)


def test_a_conversation_begins_once_where_template_and_tokenizer_would_both_begin_it(
    encode: Encode, tokenizer: Any
) -> None:
    from tokenizers.processors import TemplateProcessing

    before = tokenizer.backend_tokenizer.post_processor
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    try:
        _, examples = encode(templates.LLAMA3, [{"messages": CHAT}])
        assert examples["input_ids"][0].count(start) == 1
        _, examples = encode(None, [{"text": "once"}], messages_column=None)
        assert examples["input_ids"][0].count(start) == 1
        with pytest.raises(BadInput, match=naming("row 1", "'<s>'")):
            encode(None, [{"text": "<s>once more"}], messages_column=None, split_special_tokens=False)
        with pytest.raises(BadInput, match=naming("row 1", "'<s>'")):
            encode("<s>" + templates.LLAMA3, [{"messages": CHAT}])
    finally:
        tokenizer.backend_tokenizer.post_processor = before


def test_long_texts_are_cut_or_split_so_that_each_token_is_a_target_once(encode: Encode, tokenizer: Any) -> None:
    keys = {"messages_column": None, "text_column": "text", "max_length": 10}
    text = "All the words of a rather long text, which has more tokens than an example."
    tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    _, examples = encode(None, [{"text": text}, {"text": "of"}], **keys)
    assert [len(row) for row in examples["input_ids"]] == [10, 3]
    assert examples["input_ids"][0] == tokens[:10]
    _, examples = encode(None, [{"text": text}, {"text": "of"}], long_texts="split", **keys)
    pieces = [row for row, number in zip(examples["input_ids"], examples["row"], strict=True) if number == 0]
    assert tokens == pieces[0] + [token for piece in pieces[1:] for token in piece[1:]]
    assert all(2 <= len(piece) <= 10 for piece in pieces)
    assert (examples["prompt_length"] > 0).tolist() == [True, *[False] * (len(pieces) - 1), True]


def test_pieces_of_a_conversation_without_a_target_are_counted(encode: Encode, tokenizer: Any) -> None:
    long = [{**FIRST, "content": "x " * 40}, LAST]
    keys = {"assistant_only_loss": True, "long_texts": "split", "max_length": 24}
    task, examples = encode(templates.CHATML, [{"messages": long}], **keys)
    learned = [label for row in examples["labels"] for label in row if label != NO_TARGET]
    assert tokenizer.decode(learned) == f"{LAST['content']}<|im_end|>"
    [(reason, count)] = task.facts["left_out"].items()
    assert "pieces" in reason
    assert count + len(examples["labels"]) > 3


def test_prompt_and_completion_are_of_one_kind(encode: Encode) -> None:
    keys = {"messages_column": None, "prompt_column": "prompt", "completion_column": "completion"}
    for row in ({"prompt": "Hello", "completion": [ANSWER]}, {"prompt": [FIRST], "completion": "Hello"}):
        with pytest.raises(BadInput, match=naming("text")):
            encode(templates.CHATML, [row], **keys)
    with pytest.raises(BadInput, match=naming("assistant_only_loss", "'prompt'")):
        encode(templates.CHATML, [{"prompt": "a", "completion": "b"}], assistant_only_loss=True, **keys)


def test_tools_that_are_no_schemas_are_refused_by_their_row(encode: Encode) -> None:
    for tools in ("[{", '"find"', "[1]"):
        with pytest.raises(BadInput, match=naming("row 1", "tools")):
            encode(templates.TOOLS, [{"messages": CHAT, "tools": tools}], tools_column="tools")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"text_column": "text"}, ("text_column", "messages_column")),
        ({"prompt_column": "p"}, ("prompt_column", "completion_column")),
        ({"completion_only_loss": True}, ("completion_only_loss", "prompt_column")),
        ({"messages_column": None, "assistant_only_loss": True}, ("assistant_only_loss", "messages_column")),
        ({"messages_column": None, "tools_column": "t"}, ("tools_column", "messages_column")),
        ({"max_new_tokens": 0}, ("max_new_tokens",)),
        ({"label_column": "label"}, ("label_column", "text_classification")),
    ],
    ids=str,
)
def test_contradictions_are_refused(encode: Encode, keys: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=naming(*named)):
        encode(templates.CHATML, [{"messages": CHAT}], **keys)
