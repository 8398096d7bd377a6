"""Packed sequences and rows without a mask give what single sequences give, and no tensor is looked at to get there."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig, MambaConfig, T5Config

from onecurve.training.data.layout import Collator, Layout
from onecurve.training.data.plan import Placement
from onecurve.training.models import attention, example_dropout, example_masks, matrix_attention
from onecurve.training.models.causal_matrices import attend_causally
from onecurve.training.models.example_masks import ExampleMasks
from onecurve.training.tasks.base import NO_TARGET
from onecurve.training.tasks.causal_lm import CausalLM
from onecurve.training.tasks.causal_lm_recipe import CausalLMRecipe
from tests.training.models.decoders import CONFIGS, build_decoder
from tests.training.models.next_token import NextToken

LENGTHS = (5, 5, 7, 1)


class Tokenizer:
    pad_token_id = 0
    padding_side = "right"


class LooksAtValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts numbers that Python reads of tensors, and shapes that depend on them: on a GPU, each of them waits for it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        by_mask = any(torch.is_tensor(each) and each.dtype == torch.bool for each in indices)
        self.count += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select")
        return operator(*args, **(kwargs or {}))


def build_sequences() -> list[Any]:
    torch.manual_seed(1)
    return [torch.randint(3, 101, (length,)).numpy() for length in LENGTHS]


def collate(layout: Layout, sequences: list[Any]) -> dict[str, Any]:
    task = NextToken.__new__(NextToken)  # A collator asks it for padding alone.
    return Collator(task, Tokenizer(), layout)({"input_ids": sequences})


def compute(model: Any, batch: dict[str, Any], layout: Layout) -> torch.Tensor:
    """[tokens, vocabulary] logits of all sequences."""
    return torch.cat(layout.split(model(**batch, use_cache=False).logits, LENGTHS))


def find_gradients(model: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    model.zero_grad()
    torch.autograd.backward((logits * torch.randn_like(logits)).sum())
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_gradients_are_those_of_single_sequences(family: str) -> None:
    own = build_decoder(CONFIGS[family]())
    ours = copy.deepcopy(own)
    assert attention.find_obstacle(ours) is None
    attention.prevent_reads(ours)
    attention.install(ours)
    sequences = build_sequences()
    expected = torch.cat([own(input_ids=torch.tensor(each)[None], use_cache=False).logits[0] for each in sequences])
    of_own = find_gradients(own, expected)
    whole = torch.cat([each.flatten() for each in of_own.values()]).norm()
    for layout in (Layout(is_packed=True), Layout(mask="never")):
        with LooksAtValues() as looks:
            logits = compute(ours, collate(layout, sequences), layout)
            found = find_gradients(ours, logits)
        assert looks.count == 0
        assert deviation(logits, expected) < 1e-5
        for name, gradient in of_own.items():
            assert (found[name] - gradient).norm() < 1e-5 * max(gradient.norm(), 1e-3 * whole), name


@pytest.mark.parametrize("chunk_tokens", ["auto", 8])
@pytest.mark.parametrize("layout", [Layout(is_packed=True), Layout(mask="never")], ids=["packed", "padded"])
def test_a_step_of_a_language_model_waits_for_nothing(layout: Layout, chunk_tokens: Any) -> None:
    keys = {"model_name_or_path": "none", "train_file": "none", "loss_chunk_tokens": chunk_tokens}
    recipe = CausalLMRecipe.model_validate(keys)
    task, sequences = CausalLM(recipe), build_sequences()
    model = build_decoder(CONFIGS["llama"]()).train()
    attention.prevent_reads(model)
    attention.install(model)
    labels = [np.where(np.arange(len(each)) < 3, NO_TARGET, each) for each in sequences]
    batch = Collator(task, Tokenizer(), layout)({"input_ids": sequences, "labels": labels})
    expected = task.forward(model, batch).losses  # The head's own trial is not counted.
    with LooksAtValues() as looks:
        loss = task.loss_sum(model, batch) / 7
        torch.autograd.backward(loss)
    assert looks.count == 0
    assert expected is not None
    assert loss.item() == pytest.approx(expected.sum().item() / 7, rel=1e-6)


@pytest.mark.parametrize("wrong", [{"sequence_lengths": None}, {"position_ids": torch.arange(sum(LENGTHS))[None]}])
def test_boundaries_and_positions_matter(wrong: dict[str, Any]) -> None:
    """What the test above would see if sequences saw each other, or if positions did not begin anew."""
    model = build_decoder(CONFIGS["gpt2"]())
    attention.install(model)
    layout = Layout(is_packed=True)
    batch = collate(layout, build_sequences())
    assert deviation(compute(model, {**batch, **wrong}, layout), compute(model, batch, layout)) > 0.1


def test_the_mean_over_masks_is_the_attention_without_dropout() -> None:
    """A token that dropout let see what follows it, or another sequence, would shift the mean."""
    torch.manual_seed(4)
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    lengths, offsets = (2, 4), torch.tensor([0, 2, 6], dtype=torch.int32)
    module = torch.nn.Module()

    def attend(dropout: float) -> torch.Tensor:
        context: torch.Tensor
        context, _ = attention.attend(
            module, query, key, value, None, dropout, sequence_lengths=lengths, sequence_offsets=offsets
        )
        return context

    def attend_in(step: int) -> torch.Tensor:
        placement = Placement(np.array(lengths), frozenset({6}), is_packed=True)
        example_masks.begin(ExampleMasks(1, step, range(2), placement))
        return attend(0.25)

    mean = torch.stack([attend_in(step) for step in range(1000)]).mean(0)
    example_masks.begin(None)
    assert (mean - attend(0.0)).abs().max() < 0.1


@pytest.mark.parametrize("groups", [{"enable_gqa": True}, {}])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_kernel_of_gpus_is_asked_for_the_same(
    family: str, groups: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of torch's kernel, which runs on GPUs alone, what its documentation says of it: torch 2.13's, and 2.11's."""
    monkeypatch.setattr(attention, "_GROUPS", groups)
    model = build_decoder(CONFIGS[family]())
    attention.install(model)
    layout = Layout(is_packed=True)
    batch = collate(layout, build_sequences())
    expected = compute(model, batch, layout)
    calls = []

    def attend(query: Any, key: Any, value: Any, starts: Any, of_keys: Any, longest: int, _: int, **more: Any) -> Any:
        calls.append(longest)
        assert groups or query.shape[1] == key.shape[1] == value.shape[1]
        assert groups == {name: each for name, each in more.items() if name == "enable_gqa"}
        places = torch.arange(len(query))
        of_token = torch.bucketize(places, starts[1:], right=True)
        distance = places[:, None] - places[None]
        left, right = more["window_size"]
        seen = (of_token[:, None] == of_token[None]) & (distance >= -right)
        seen = seen & (distance <= left) if left >= 0 else seen
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * (more["scale"] or query.shape[-1] ** -0.5)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)

    monkeypatch.setattr(attention, "varlen_attn", attend)
    monkeypatch.setattr(attention, "has_kernel", lambda *what: True)
    assert deviation(compute(model, batch, layout), expected) < 1e-5
    assert calls == [max(LENGTHS)] * 2


def test_torchs_kernel_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, and the shapes of it and of its derivative, on tensors without values."""
    monkeypatch.setattr(attention, "has_kernel", lambda *what: True)
    with FakeTensorMode():
        query, key, value = (
            torch.empty(1, heads, 17, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
        )
        offsets = torch.empty(4, dtype=torch.int32)
        context, _ = attention.attend(
            torch.nn.Module(),
            query,
            key,
            value,
            None,
            sliding_window=4,
            sequence_lengths=(5, 5, 7),
            sequence_offsets=offsets,
        )
        assert (context.shape, context.dtype) == ((1, 17, 4, 8), torch.bfloat16)
        torch.autograd.backward(context.sum())
        assert key.grad is not None
        assert key.grad.shape == key.shape


def test_recomputed_layers_keep_sequences_apart() -> None:
    model = build_decoder(CONFIGS["qwen3"]()).train()
    attention.install(model)
    layout = Layout(is_packed=True)
    batch = collate(layout, build_sequences())
    expected = find_gradients(model, compute(model, batch, layout))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    found = find_gradients(model, compute(model, batch, layout))
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_model_writes_with_an_attention_that_knows_masks_and_caches(family: str) -> None:
    own = build_decoder(CONFIGS[family]())
    ours = copy.deepcopy(own)
    attention.prevent_reads(ours)
    attention.install(ours)
    batch = collate(Layout(mask="always", pads_left=True), build_sequences()[1:])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with attention.of_transformers(ours):
        assert torch.equal(ours.generate(**batch, **settings), own.generate(**batch, **settings))
    assert ours.config._attn_implementation == attention.ATTENTION
    with pytest.raises(AssertionError):  # Ours would have left out the mask without a word.
        ours.generate(**batch, **settings)


# Models that keep their attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa", matrix_attention.ATTENTION])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("is_full", [False, True], ids=["padded", "full"])
def test_masks_are_built_without_a_look(family: str, implementation: str, is_full: bool) -> None:
    shape = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    bert = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = bert if family == "bert" else LlamaConfig(**shape, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    example_dropout.install(model, _Recipe(), torch.device("cpu"))  # type: ignore[arg-type]
    model.set_attn_implementation(implementation)
    sequences = build_sequences()[:2] if is_full else build_sequences()
    alone = torch.cat([model(input_ids=torch.tensor(each)[None]).logits for each in sequences])
    attention.prevent_reads(model)
    batch = collate(Layout(mask="always" if family == "llama" else "padding"), sequences)
    assert (batch["attention_mask"] is None) == (is_full and family == "bert")
    with LooksAtValues() as looks:
        logits = model(**batch).logits
        logits.sum().backward()
    assert looks.count == 0
    assert deviation(logits, alone) < 1e-5


class _Recipe:
    dropout_masks, torch_compile, attn_implementation, mixed_precision = "by_example", False, None, "bf16"


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50, state_size=4), id="no attention"),
        pytest.param(
            LlamaConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=50,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            ),
            id="positions of the longest",
        ),
    ],
)
def test_a_decoder_that_can_not_pack_is_refused(config: Any) -> None:
    assert attention.find_obstacle(build_decoder(config)) is not None


def test_models_that_are_not_causal_are_refused() -> None:
    from transformers import BertModel, T5ForConditionalGeneration

    shape = {"vocab_size": 50, "num_hidden_layers": 1}
    bert = BertModel(BertConfig(**shape, hidden_size=32, num_attention_heads=2, intermediate_size=48))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    assert attention.find_obstacle(bert) is not None
    assert attention.find_obstacle(t5) is not None


def test_rotary_positions_do_not_hide_from_autocast_what_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave queries and keys in float32: attention computes in bfloat16 all the same, as matrices on a CPU."""
    taken: list[torch.dtype] = []

    def watch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> torch.Tensor:
        taken.extend(each.dtype for each in (query, key, value))
        return attend_causally(query, key, value, *others)

    monkeypatch.setattr("onecurve.training.models.attention.attend_causally", watch)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = build_decoder(config)
    matrix_attention.install(model)
    attention.install(model)
    tokens = torch.arange(3, 17)[None]
    exact = model(input_ids=tokens, use_cache=False).logits
    assert not taken, "in float32 SDPA is quicker"
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits
    assert taken == [torch.bfloat16] * 3
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("family", "more", "device", "dtype", "is_slow"),
    [
        ("llama", {}, "cpu", torch.float32, False),
        ("llama", {}, "cuda", torch.float32, True),
        ("llama", {}, "cuda", torch.bfloat16, False),
        ("llama", {"attention_dropout": 0.1}, "cuda", torch.bfloat16, True),
        ("gpt2", {}, "cuda", torch.bfloat16, False),
        ("gemma3", {}, "cuda", torch.bfloat16, False),
        ("gemma2", {}, "cuda", torch.bfloat16, True),
        ("gpt_oss", {}, "cuda", torch.bfloat16, True),
    ],
)
def test_packing_is_slow_where_no_kernel_takes_all_sequences(
    monkeypatch: pytest.MonkeyPatch, family: str, more: dict[str, Any], device: str, dtype: torch.dtype, is_slow: bool
) -> None:
    model = build_decoder(CONFIGS[family]())
    model.config.update(more)
    has_kernel = Mock(side_effect=lambda device, dtype, size: dtype != torch.float32)
    monkeypatch.setattr(attention, "has_kernel", has_kernel)
    found = attention.find_slow_packing(model, torch.device(device), dtype)
    assert (found is not None) == is_slow
    assert [call.args[2] for call in has_kernel.call_args_list] == ([] if device == "cpu" else [8])


@pytest.mark.parametrize("has_flash", [True, False])
def test_a_build_without_flash_attention_has_no_kernel(monkeypatch: pytest.MonkeyPatch, has_flash: bool) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: has_flash)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert attention.has_kernel(torch.device("cuda"), torch.bfloat16, 64) == has_flash
