"""What draws random numbers that are not by example is found at the start, and named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from onecurve.training.models import example_masks
from onecurve.training.models.mask_trial import try_masks
from onecurve.training.tasks.base import Forward
from tests.messages import names
from tests.training.models.conftest import make_recipe


class Ragged:
    """A feature of examples of 4, 4, 6 and 9 tokens."""

    def __getitem__(self, rows: Any) -> list[Any]:
        return [np.arange(5, 5 + (4, 4, 6, 9)[row]) for row in rows]


SPLIT: Any = SimpleNamespace(lengths=np.array([4, 4, 6, 9]), examples={"input_ids": Ragged()})


def forward(model: Any, batch: dict[str, Any]) -> Forward:
    return Forward(model(**batch).logits.logsumexp(-1))


TASK: Any = SimpleNamespace(
    padding_side=lambda tokenizer: "right", pad_values=lambda tokenizer: {}, add_to_batch=lambda batch: None,
    sequence_lengths=lambda features: None, draw=lambda features, numbers, epoch: features,
    unbatched_features=frozenset(), forward=forward,
)  # fmt: skip


def build(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3,
        max_position_embeddings=40, **settings,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Noise(torch.nn.Module):
    """Random numbers of a model's own."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden) * (torch.rand(len(hidden), hidden.shape[1], 1) > 0.3)  # type: ignore[no-any-return]


def test_dropout_of_modules_functions_and_attention_is_by_example() -> None:
    model = build().eval()
    state = torch.get_rng_state()
    assert try_masks(model, TASK, None, SPLIT, make_recipe()) is None
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert example_masks.open_site() is None


def test_what_draws_by_itself_is_named() -> None:
    model = build()
    dense = model.bert.encoder.layer[1].intermediate
    dense.dense = Noise(dense.dense)
    found = try_masks(model, TASK, None, SPLIT, make_recipe())
    assert found is not None
    assert names(found, "bert.encoder.layer.1.intermediate.dense", "Noise")


def test_a_mask_that_does_not_follow_the_example_is_seen() -> None:
    """Dropout over a layout that nobody knows: the tokens of all examples in one row, with padding between them."""
    model = build(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.bert.encoder.layer[0].register_forward_hook(
        lambda module, inputs, output: torch.nn.functional.dropout(output.flatten(0, 1)[None], 0.5).view_as(output)
    )
    assert try_masks(model, TASK, None, SPLIT, make_recipe()) is not None


@pytest.mark.parametrize("settings", [{"dropout_masks": "torch"}, {"dropout": 0}], ids=str)
def test_nothing_is_tried_where_masks_are_torchs_or_none(settings: dict[str, Any]) -> None:
    assert try_masks(None, TASK, None, SPLIT, make_recipe(**settings)) is None


def test_a_kernel_that_drops_by_itself_is_named() -> None:
    recipe = make_recipe(attn_implementation="flash_attention_2")
    found = try_masks(build(), TASK, None, SPLIT, recipe)
    assert found is not None
    assert names(found, "attn_implementation", "flash_attention_2")
    assert try_masks(build(attention_probs_dropout_prob=0.0), TASK, None, SPLIT, recipe) is None
