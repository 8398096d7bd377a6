"""AdamW without decay on biases and norms; every schedule by its steps, the last learning rate included."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from onecurve.training.models.optimization import build_optimizer, build_scheduler, needs_metric
from onecurve.training.recipe import SCHEDULER_TYPES, Recipe
from onecurve.training.schedule import count_steps

PEAK = 1e-3
NAMES = get_args(SCHEDULER_TYPES)


def make_recipe(**settings: Any) -> Recipe:
    return Recipe(model_name_or_path="m", train_file=("t",), **{"learning_rate": PEAK, **settings})


def build(recipe: Recipe, num_steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), recipe)
    return optimizer, build_scheduler(optimizer, recipe, num_steps)


def advance(recipe: Recipe, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    optimizer.step()
    scheduler.step(*([1.0] if needs_metric(recipe) else []))


def collect_rates(num_steps: int, **settings: Any) -> list[float]:
    """The learning rate of each step, and the one that would follow."""
    recipe = make_recipe(**settings)
    optimizer, scheduler = build(recipe, num_steps)
    rates = []
    for _ in range(num_steps + 1):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        assert {group["lr"] for group in optimizer.param_groups} == {rates[-1]}
        advance(recipe, optimizer, scheduler)
    return rates


# The optimizer -------------------------------------------------------------------------------------------------------


def test_biases_and_norms_do_not_decay() -> None:
    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    optimizer = build_optimizer(model, make_recipe(weight_decay=0.3))
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    names = dict(model.named_parameters())
    assert len(decay) == len(names), "every parameter is trained, and none twice"
    for name, parameter in names.items():
        spared = name.endswith(".bias") or "LayerNorm" in name
        assert decay[id(parameter)] == (0.0 if spared else 0.3), name
    assert 0.3 in decay.values()


def test_one_update_decays_weights_and_leaves_biases() -> None:
    layer = torch.nn.Linear(3, 3)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(layer, make_recipe(weight_decay=0.5, learning_rate=0.1)).step()
    assert torch.allclose(layer.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before["bias"])


def test_frozen_parameters_are_left_out() -> None:
    layer = torch.nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    optimizer = build_optimizer(layer, make_recipe())
    assert [parameter is layer.bias for group in optimizer.param_groups for parameter in group["params"]] == [True]


def test_the_recipe_sets_adam() -> None:
    optimizer = build_optimizer(
        torch.nn.Linear(2, 2), make_recipe(adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3, learning_rate=0.25)
    )
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.5, 0.6), 1e-3, 0.25)


@pytest.mark.parametrize("name", NAMES)
def test_lower_layers_have_lower_rates_and_keep_their_ratio(name: str) -> None:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config)
    recipe = make_recipe(layerwise_lr_decay=0.5, weight_decay=0.3, lr_scheduler_type=name)
    optimizer = build_optimizer(model, recipe)
    scheduler = build_scheduler(optimizer, recipe, 20)
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in model.parameters())
    for _ in range(9):
        advance(recipe, optimizer, scheduler)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == pytest.approx([rates[0] * ratio for ratio in (1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125)])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0] * 4


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "limit", "expected"),
    [(3, None, 30), (0.25, None, 3), (1.1, None, 11), (0.01, None, 1), (3, 4, 4), (1, 99, 99)],
)
def test_steps_are_whole_epochs_or_the_limit(epochs: float, limit: int | None, expected: int) -> None:
    assert count_steps(make_recipe(num_train_epochs=epochs, max_train_steps=limit), 10) == expected


@given(st.integers(1, 200), st.integers(1, 10_000))
def test_tenths_of_an_epoch_are_rounded_up_and_never_over(tenths: int, steps_per_epoch: int) -> None:
    steps = count_steps(make_recipe(num_train_epochs=tenths / 10), steps_per_epoch)
    assert steps == -(-tenths * steps_per_epoch // 10)


def test_the_smallest_training_has_a_step() -> None:
    assert count_steps(make_recipe(num_train_epochs=1e-9), 10) == 1


# The schedule --------------------------------------------------------------------------------------------------------

# name: the learning rate of step number `step` (0-based) of `num_steps`, in units of the peak, without warm-up.
FORMULAS: dict[str, Callable[[int, int], float]] = {
    "linear": lambda step, num_steps: 1 - step / num_steps,
    "cosine": lambda step, num_steps: 0.5 * (1 + math.cos(math.pi * step / num_steps)),
    "cosine_with_min_lr": lambda step, num_steps: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / num_steps)),
    "polynomial": lambda step, num_steps: (PEAK - 1e-7) / PEAK * (1 - step / num_steps) + 1e-7 / PEAK,
    "constant": lambda step, num_steps: 1.0,
    "constant_with_warmup": lambda step, num_steps: 1.0,
    "inverse_sqrt": lambda step, num_steps: 1 / math.sqrt((step + 10_000) / 10_000),
    "reduce_lr_on_plateau": lambda step, num_steps: 0.1 if step > 11 else 1.0,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_each_step_has_the_rate_of_its_formula(name: str) -> None:
    num_steps = 20
    rates = collect_rates(num_steps, lr_scheduler_type=name)
    expected = [PEAK * FORMULAS[name](step, num_steps) for step in range(num_steps + 1)]
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("num_steps", [1, 2, 17, 100])
def test_linear_ends_one_step_before_zero(num_steps: int) -> None:
    rates = collect_rates(num_steps, lr_scheduler_type="linear")
    assert rates[0] == PEAK
    assert rates[num_steps - 1] == pytest.approx(PEAK / num_steps)
    assert rates[num_steps] == 0


# name: the learning rate after the last of 40 steps with 10 % warm-up, in units of the peak.
ENDS = {
    "linear": 0.0, "cosine": 0.0, "cosine_with_restarts": 0.0, "polynomial": 1e-7 / PEAK, "constant": 1.0,
    "constant_with_warmup": 1.0, "inverse_sqrt": math.sqrt(4 / 40), "reduce_lr_on_plateau": 1e-3,
    "cosine_with_min_lr": 0.1, "cosine_warmup_with_min_lr": None, "warmup_stable_decay": 0.0, "greedy": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_ends_where_it_should(name: str) -> None:
    rates = collect_rates(40, lr_scheduler_type=name, warmup_ratio=0.1)
    assert all(0 <= rate <= PEAK * (1 + 1e-9) or name == "greedy" for rate in rates)
    assert all(math.isfinite(rate) for rate in rates)
    end = ENDS[name]
    if name == "cosine_warmup_with_min_lr":  # It is at its lowest with the last step, one step before the others.
        assert rates[39] == pytest.approx(PEAK * 0.1)
    elif end is not None:
        assert rates[40] == pytest.approx(PEAK * end, rel=1e-6, abs=1e-12)
        assert 0 < rates[39] <= PEAK


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "polynomial", "warmup_stable_decay"])
@pytest.mark.parametrize("warmup", [{"num_warmup_steps": 4}, {"warmup_ratio": 0.1}, {"warmup_ratio": 0.0901}], ids=str)
def test_warm_up_rises_by_equal_steps(name: str, warmup: dict[str, float]) -> None:
    rates = collect_rates(40, lr_scheduler_type=name, **warmup)
    assert rates[:5] == pytest.approx([0, PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 9])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.5, 1.0])
def test_every_schedule_builds_for_any_number_of_steps(name: str, num_steps: int, warmup_ratio: float) -> None:
    rates = collect_rates(num_steps, lr_scheduler_type=name, warmup_ratio=warmup_ratio)
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates)


def test_polynomial_takes_any_learning_rate_that_a_recipe_may_have() -> None:
    assert collect_rates(5, lr_scheduler_type="polynomial", learning_rate=1e-8)[0] == 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_goes_on_from_its_state_as_json(name: str) -> None:
    """progress.json holds it: no pickle."""
    recipe = make_recipe(lr_scheduler_type=name, warmup_ratio=0.1)
    whole = collect_rates(30, lr_scheduler_type=name, warmup_ratio=0.1)
    optimizer, scheduler = build(recipe, 30)
    for _ in range(13):
        advance(recipe, optimizer, scheduler)
    state, rates = json.loads(json.dumps(scheduler.state_dict())), scheduler.get_last_lr()
    optimizer, scheduler = build(recipe, 30)
    scheduler.load_state_dict(state)
    assert scheduler.get_last_lr() == rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for step in range(13, 30):
        assert optimizer.param_groups[0]["lr"] == whole[step]
        advance(recipe, optimizer, scheduler)
