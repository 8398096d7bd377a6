"""torchtitan's checks of chat data, on Onecurve's preparation and on trl's: targets, shift, packing, invalid chats, resume."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.conformance_curve import NO_TARGET
from onecurve.training.config import load_recipe
from onecurve.training.data.layout import Collator, Layout
from onecurve.training.data.loading import draw_features
from onecurve.training.data.plan import Order, TrainingPlan
from onecurve.training.data.preparation import PreparedData, prepare_data
from onecurve.training.errors import BadInput
from onecurve.training.models.loading import load_task
from onecurve.training.models.packing import prepare_attention
from tools.decoders import build_decoder

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CHATS: list[list[dict[str, str]]] = [
    [
        {"role": "user", "content": f"What is {number} and {number}?"},
        {"role": "assistant", "content": f"It is {2 * number}, as every child knows."},
    ]
    for number in range(10)
]

INVALID: Mapping[str, list[dict[str, str]]] = {
    "an answer without a question": [
        {"role": "system", "content": "You are helpful."},
        {"role": "assistant", "content": "OK"},
    ],
    "two questions": [{"role": "user", "content": "hi"}, {"role": "user", "content": "hello again"}],
    "a question at the end": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ],
}


@dataclass(frozen=True)
class Chats:
    """What a way makes of `CHATS`.

    Attributes:
        rows: (tokens, labels) of each chat; a label stands at the token that it is.
        packed_deviation: the largest difference between logits of chats in one packed row and of each alone.
        positions: of the tokens of that row.
        refused: those of `INVALID` that are refused or left out, or of which what is not answered is left out.
    """

    rows: Sequence[tuple[list[int], list[int]]]
    packed_deviation: float
    positions: Sequence[int]
    refused: Sequence[str]

    def has_only_answers(self, tokenizer: Any) -> bool:
        """Whether exactly the assistant's words and the token that ends its turn are targets."""
        return [tokenizer.decode([label for label in labels if label != NO_TARGET]) for _, labels in self.rows] == [
            chat[1]["content"] + "<|im_end|>" for chat in CHATS
        ]

    def is_shifted_once(self) -> bool:
        """Whether each target is the token at its own place, which the model's loss shifts."""
        return all(label in (NO_TARGET, token) for row in self.rows for token, label in zip(*row, strict=True))

    def begins_anew(self) -> bool:
        """Whether positions count each chat of the packed row from 0."""
        lengths = [len(tokens) for tokens, _ in self.rows]
        return list(self.positions) == [place for length in lengths for place in range(length)]


def build_chat_model(folder: Path) -> Path:
    """A tiny decoder whose template marks the assistant's part, and of which each token depends on all that it may see."""
    target = folder / "chat-decoder"
    if not target.exists():
        build_decoder(target, chat_template=TEMPLATE, initializer_range=0.3)
        tokenizer = AutoTokenizer.from_pretrained(target)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(target)
    return target


def _prepare(folder: Path, name: str, chats: Sequence[Any]) -> tuple[PreparedData, Any, Any, Any]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    flags = {
        "task": "causal_lm",
        "model_name_or_path": str(build_chat_model(folder)),
        "train_file": str(path),
        "validation_file": str(path),
        "messages_column": "messages",
        "assistant_only_loss": "true",
        "max_length": "128",
    }
    recipe = load_recipe(None, flags).recipe
    task, _, tokenizer = load_task(recipe)
    return prepare_data(recipe, task, tokenizer), task, tokenizer, recipe


def chats_of_onecurve(folder: Path) -> Chats:
    """Onecurve's preparation, its packed layout, and its attention."""
    data, task, tokenizer, recipe = _prepare(folder, "chats", CHATS)
    examples = data.train.examples
    tokens, labels = (examples[name][np.arange(len(CHATS))] for name in ("input_ids", "labels"))
    batch = Collator(task, tokenizer, Layout(is_packed=True))(
        draw_features(data.train, task, np.arange(len(CHATS)), epoch=0)
    )
    model: Any = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path)
    alone = _logits_alone(model, [row.tolist() for row in tokens])
    prepare_attention(model, recipe)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        packed = model(**inputs, use_cache=False).logits[0]
    refused = []
    for name, chat in INVALID.items():
        try:
            data, *_ = _prepare(folder, "invalid", [*CHATS, chat])
            last = data.train.examples["input_ids"][[len(data.train) - 1]][0]
            if _is_left_out(len(data.train), last, tokenizer, chat):  # Which is counted, and said.
                refused.append(name)
        except BadInput:
            refused.append(name)
    return Chats(
        [(row.tolist(), targets.tolist()) for row, targets in zip(tokens, labels, strict=True)],
        float((packed - alone).abs().max()),
        batch["position_ids"][0].tolist(),
        refused,
    )


def _is_left_out(num_examples: int, last: Any, tokenizer: Any, chat: Sequence[Mapping[str, str]]) -> bool:
    """Whether a chat behind `CHATS`, or at least its last message where that is a question, is in no example."""
    question = chat[-1]["content"]
    return num_examples == len(CHATS) or (chat[-1]["role"] == "user" and question not in tokenizer.decode(last))


def chats_of_trl(folder: Path) -> Chats | None:
    """trl's SFTTrainer with packing; None where trl is not installed."""
    if not importlib.util.find_spec("trl"):
        return None
    separate = _build_trl(folder, CHATS, is_packed=False)
    rows = []
    for batch in separate.get_train_dataloader():
        rows.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    packed = _build_trl(folder, CHATS, is_packed=True)
    batch = next(iter(packed.get_train_dataloader()))
    model = packed.model.eval()
    positions = batch["position_ids"][0].tolist()
    starts = [place for place, position in enumerate(positions) if position == 0]
    tokens = batch["input_ids"][0].tolist()
    pieces = [tokens[start:stop] for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True)]
    alone = _logits_alone(model, pieces)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    refused = []
    for name, chat in INVALID.items():
        try:
            trainer = _build_trl(folder, [*CHATS, chat], is_packed=False)
            rows_of_trl = trainer.train_dataset
            tokenizer = trainer.processing_class
            if _is_left_out(len(rows_of_trl), rows_of_trl[-1]["input_ids"], tokenizer, chat):
                refused.append(name)
        except (ValueError, RuntimeError):
            refused.append(name)
    # The row is put together by length: its chats are counted in the order in which they lie.
    whole = [place for piece in pieces for place in range(len(piece))]
    lengths = [place for tokens, _ in rows for place in range(len(tokens))]
    return Chats(rows, float((logits - alone).abs().max()), lengths if positions == whole else positions, refused)


def _build_trl(folder: Path, chats: Sequence[Any], is_packed: bool) -> Any:
    import datasets

    trl = importlib.import_module("trl")
    model = build_chat_model(folder)
    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=512,
        packing=is_packed,
        assistant_only_loss=True,
        per_device_train_batch_size=1,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        train_sampling_strategy="sequential",
        dataset_num_proc=None,
    )
    return trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"messages": list(chats)}),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def _logits_alone(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([list(row)]), use_cache=False).logits[0] for row in rows])


def is_resumed_exactly(num_processes: int = 2) -> bool:
    """Whether the plan of a resumed run has the micro-batches of one that was not stopped, on each process, past an epoch."""
    order = Order(10, 4, 42)
    whole = TrainingPlan(order, 16, num_processes, max_examples=1)
    resumed = TrainingPlan(order, 16, num_processes, max_examples=1, start_step=12)
    rest = [each for each in whole if each.step >= 12]
    return [each.indices.tolist() for each in rest] == [each.indices.tolist() for each in resumed]
