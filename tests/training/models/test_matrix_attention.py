"""Attention as matrix products computes what transformers' plain forward computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from onecurve.training.data.plan import Placement
from onecurve.training.models import example_dropout, example_masks, matrix_attention
from onecurve.training.models.example_masks import ExampleMasks
from onecurve.training.models.matrix_attention import ATTENTION, drop_elements
from tests.training.models.conftest import make_recipe

BERT = BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3,
    max_position_embeddings=64,
)  # fmt: skip
# Fewer key heads than query heads, and a causal mask.
LLAMA = LlamaConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, num_labels=3, pad_token_id=0, max_position_embeddings=64,
)  # fmt: skip


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def masks_of_torch() -> Iterator[None]:
    """What is installed asks for masks by example only where a test begins them."""
    example_masks.begin(None)
    yield
    example_masks.begin(None)


def build_pair(config: Any, dtype: torch.dtype, **settings: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model with transformers' eager attention, and a copy of it with ours."""
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_config(copy.deepcopy(config), attn_implementation="eager").to(dtype)
    ours = copy.deepcopy(plain)
    assert example_dropout.install(ours, make_recipe(mixed_precision="bf16", **settings), CPU)
    assert ours.config._attn_implementation == ATTENTION
    return plain, ours


def build_batch(num_examples: int, length: int, pads_left: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 100, (num_examples, length))
    mask = torch.ones_like(ids)
    for example in range(num_examples // 2):
        hidden = slice(0, 1 + example) if pads_left else slice(length - 1 - example, length)
        mask[example, hidden], ids[example, hidden] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    logits = model(**batch).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 3)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**found, "logits": logits.detach()}


@pytest.fixture
def attends_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our attention in any precision: without dropout it leaves float32 to SDPA, which is faster there."""

    def run(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **others: Any) -> Any:
        context = matrix_attention.attend_by_example(query, key, value, mask, scaling, 0.0, None)
        return context.transpose(1, 2).contiguous(), None

    monkeypatch.setattr(matrix_attention, "attend", run)


@pytest.mark.parametrize(
    ("config", "shape", "pads_left", "dtype", "bound"),
    [
        pytest.param(BERT, (4, 16), False, torch.float64, 1e-12, id="few long texts"),
        pytest.param(BERT, (20, 12), False, torch.float64, 1e-12, id="many short texts"),
        pytest.param(BERT, (4, 16), True, torch.float64, 1e-12, id="padded on the left"),
        pytest.param(BERT, (4, 16), False, torch.float32, 2e-5, id="in float32"),
        # Llama's own softmax is in float32 whatever the rest is in.
        pytest.param(LLAMA, (4, 16), False, torch.float64, 1e-6, id="a decoder"),
        pytest.param(LLAMA, (4, 16), True, torch.float32, 2e-5, id="a decoder, padded on the left"),
    ],
)
@pytest.mark.usefixtures("attends_always")
def test_gradients_are_those_of_the_plain_forward(
    config: Any, shape: tuple[int, int], pads_left: bool, dtype: torch.dtype, bound: float
) -> None:
    config = copy.deepcopy(config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    batch = build_batch(*shape, pads_left)
    plain, ours = (gradients(model, batch) for model in build_pair(config, dtype))
    assert plain.keys() == ours.keys()
    for name, expected in plain.items():
        assert torch.dist(ours[name], expected) <= bound * max(1e-3, expected.norm().item()), name


def test_gradients_with_dropout_are_those_of_the_same_masks() -> None:
    """Autograd's own derivative of the textbook's formula, with the masks that were drawn."""
    torch.manual_seed(0)
    shape, scale, probability = (2, 3, 10, 8), 0.3, 0.25
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(2, 1, 1, 10)
    mask[0, ..., -4:] = torch.finfo(torch.float32).min
    masks = ExampleMasks(1, 0, range(2), Placement(np.array([10, 10]), frozenset({10})))
    example_masks.begin(masks)
    site = example_masks.open_site()
    queries, keys, values = tensors
    ours = matrix_attention.attend_by_example(queries, keys, values, mask, scale, probability, site)
    weight = torch.randn(shape, dtype=torch.float64)
    found = torch.autograd.grad((ours * weight).sum(), tensors)

    kept = masks.draw(1, (2, 3, 10, 10), probability, CPU) != 0
    weights = torch.softmax(queries @ keys.transpose(-2, -1) * scale + mask.double(), dim=-1)
    plain = (weights * kept / (1 - probability)) @ values
    expected = torch.autograd.grad((plain * weight).sum(), tensors)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [torch.int8, torch.int16])
def test_dropout_keeps_and_scales_and_its_gradient_does_too(dtype: torch.dtype, width: torch.dtype) -> None:
    kept = torch.tensor([-1, 0, -1, -1, 0]).to(width).repeat(7)
    values = torch.full((35,), -3.0, dtype=dtype, requires_grad=True)
    dropped = drop_elements(values, kept, 0.25)
    assert torch.equal(dropped, torch.where(kept != 0, values * (1 / 0.75), 0.0))
    dropped.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert torch.equal(values.grad, torch.where(kept != 0, torch.tensor(1 / 0.75, dtype=dtype), 0.0))


def test_bf16_is_within_its_own_rounding() -> None:
    config = copy.deepcopy(BERT)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    plain, ours = build_pair(config, torch.float32)
    batch = build_batch(6, 40)
    exact = gradients(copy.deepcopy(plain), batch)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = gradients(plain, batch), gradients(ours, batch)
    for name in (
        "logits",
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.embeddings.word_embeddings.weight",
    ):
        error = torch.dist(theirs[name].float(), exact[name])
        assert torch.dist(mine[name].float(), exact[name]) < 1.5 * error, name


def test_the_saved_model_is_plain_transformers(tmp_path: Path) -> None:
    _, ours = build_pair(BERT, torch.float32)
    ours.save_pretrained(tmp_path)  # type: ignore[operator]
    assert ATTENTION not in (tmp_path / "config.json").read_text(encoding="utf-8")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = build_batch(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, ours.eval()(**batch).logits, rtol=1e-5, atol=1e-6)


def test_torchs_masks_leave_the_model_and_its_attention_alone() -> None:
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(BERT))
    assert not example_dropout.install(model, make_recipe(dropout_masks="torch"), CPU)
    assert model.config._attn_implementation in (None, "sdpa")


@pytest.mark.parametrize(
    ("settings", "device"),
    [({"attn_implementation": "eager"}, "cpu"), ({"torch_compile": True}, "cpu"), ({}, "cuda")],
    ids=str,
)
def test_attention_stays_where_it_is_named_compiled_or_on_a_gpu(settings: dict[str, Any], device: str) -> None:
    named = settings.get("attn_implementation")
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(BERT), attn_implementation=named)
    assert example_dropout.install(model, make_recipe(**settings), torch.device(device))
    assert model.config._attn_implementation in (named or "sdpa", named)


Launch = Callable[..., Any]
Train = Callable[..., Any]


def test_the_recipe_chooses_the_masks(train: Train, recipe: dict[str, Any], tmp_path: Path) -> None:
    runs = {
        masks: train(
            {
                **recipe,
                "dropout": 0.1,
                "max_train_steps": 3,
                "dropout_masks": masks,
                "output_dir": str(tmp_path / masks),
            }
        )
        for masks in ("by_example", "torch")
    }
    again = train({**recipe, "dropout": 0.1, "max_train_steps": 3, "output_dir": str(tmp_path / "again")})
    assert [run.exit_code for run in (*runs.values(), again)] == [0, 0, 0]
    assert runs["by_example"].losses != runs["torch"].losses
    assert runs["by_example"].losses == again.losses


# Relative, on each of 50 steps. bf16 keeps 8 bits: sums cut elsewhere round by 2^-9 in each layer, and training carries it on.
MAX_BF16_LOSS_DEVIATION = 2e-2
BF16 = {"mixed_precision": "bf16"}


def deviation(run: Any, reference: Any) -> float:
    assert len(run.losses) == len(reference.losses)
    return max(abs(float(mine) / float(theirs) - 1) for mine, theirs in zip(run.losses, reference.losses, strict=True))


@pytest.mark.slow
def test_bf16_losses_agree_whatever_the_micro_batch(train: Train, recipe: dict[str, Any], tmp_path: Path) -> None:
    settings = {**recipe, **BF16, "max_train_steps": 50}
    cuts: dict[str, dict[str, Any]] = {
        "whole": {"per_device_batch_size": 16},
        "threes": {"per_device_batch_size": 3},
        "tokens": {"per_device_batch_size": 16, "per_device_batch_tokens": 256},
    }
    runs = {name: train({**settings, **cut, "output_dir": str(tmp_path / name)}) for name, cut in cuts.items()}
    assert [run.exit_code for run in runs.values()] == [0, 0, 0]
    found = [deviation(runs[name], runs["whole"]) for name in ("threes", "tokens")]
    assert 0 < max(found) < MAX_BF16_LOSS_DEVIATION, found


@pytest.mark.slow
def test_bf16_losses_agree_on_two_processes(
    train: Train, launch: Launch, recipe: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**recipe, **BF16, "max_train_steps": 50, "per_device_batch_size": 16}
    alone = train({**settings, "output_dir": str(tmp_path / "alone")})
    both = launch({**settings, "output_dir": str(tmp_path / "both")}, topology="multi_cpu", num_processes=2)
    assert (alone.exit_code, both.exit_code) == (0, 0), both.stderr
    assert deviation(both, alone) < MAX_BF16_LOSS_DEVIATION


def test_a_resumed_run_draws_the_masks_that_it_would_have_drawn(
    train: Train, recipe: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**recipe, **BF16, "dropout": 0.1, "max_train_steps": 6, "checkpointing_steps": 3}
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000003"
    resumed = train({**settings, "output_dir": str(tmp_path / "resumed"), "resume": str(checkpoint)})
    assert (whole.exit_code, resumed.exit_code) == (0, 0)
    assert resumed.losses == whole.losses[3:]
