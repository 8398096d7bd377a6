"""How examples lie in a batch: padded on either side, packed, with a mask only where one is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onecurve.training.data.layout import Collator, Layout
from onecurve.training.tasks.base import NO_TARGET, sum_by_example
from tests.training.models.next_token import NextToken

ROWS = [np.array([5, 6]), np.array([7, 8]), np.array([9, 10, 11])]


class Tokenizer:
    pad_token_id = 3
    padding_side = "left"


def collate(layout: Layout | None, rows: list[Any], **others: Any) -> dict[str, Any]:
    task = NextToken.__new__(NextToken)  # A collator asks it for padding alone.
    return Collator(task, Tokenizer(), layout)({"input_ids": rows, "labels": rows, **others})


def test_packed_examples_lie_one_behind_the_other() -> None:
    batch = collate(Layout(is_packed=True), ROWS, weight=np.array([1.0, 2.0, 3.0]))
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1, 2]]
    assert batch["sequence_offsets"].tolist() == [0, 2, 4, 7]
    assert batch["sequence_lengths"] == (2, 2, 3)
    assert all(type(length) is int for length in batch["sequence_lengths"]), "numbers of the host"
    assert batch["weight"].tolist() == [1.0, 2.0, 3.0]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("pads_left", [False, True])
def test_padded_rows_have_their_padding_on_one_side(pads_left: bool) -> None:
    batch = collate(Layout(pads_left=pads_left), ROWS)
    assert batch["input_ids"][0].tolist() == ([3, 5, 6] if pads_left else [5, 6, 3])
    assert batch["labels"][0].tolist() == ([NO_TARGET, 5, 6] if pads_left else [5, 6, NO_TARGET])
    assert batch["attention_mask"].tolist()[1:] == [[0, 1, 1] if pads_left else [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("mask", "of_padded", "of_full"), [("padding", True, False), ("always", True, True), ("never", False, False)]
)
def test_a_mask_is_given_where_the_layout_says(mask: Any, of_padded: bool, of_full: bool) -> None:
    layout = Layout(mask=mask)
    assert (collate(layout, ROWS)["attention_mask"] is not None) == of_padded
    assert (collate(layout, ROWS[:2])["attention_mask"] is not None) == of_full


def test_without_a_layout_padding_is_on_the_tokenizers_side_and_always_masked() -> None:
    assert collate(None, ROWS)["input_ids"][0].tolist() == [3, 5, 6]
    assert collate(None, ROWS[:2])["attention_mask"].all()


@pytest.mark.parametrize("layout", [Layout(), Layout(pads_left=True), Layout(is_packed=True)])
def test_what_belongs_to_each_example_is_found_again(layout: Layout) -> None:
    batch = collate(layout, ROWS)
    pieces = layout.split(batch["input_ids"], [2, 2, 3])
    assert [piece.tolist() for piece in pieces] == [row.tolist() for row in ROWS]


@pytest.mark.parametrize("layout", [Layout(), Layout(is_packed=True)])
def test_sums_by_example_and_their_gradients(layout: Layout) -> None:
    batch = collate(layout, ROWS)
    values = torch.where(batch["labels"] == NO_TARGET, 0, batch["labels"]).double().requires_grad_()
    sums = sum_by_example(values, batch)
    assert sums.tolist() == [11.0, 15.0, 30.0]
    (gradient,) = torch.autograd.grad((sums * torch.tensor([1.0, 2.0, 4.0])).sum(), values)
    assert torch.cat(layout.split(gradient, [2, 2, 3])).tolist() == [1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0]
