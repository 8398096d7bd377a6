"""Losses in chunks of tokens are those of all logits at once, with the same gradients, for every family and every wrapper."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from onecurve.training.architectures import choose_chunk_tokens
from onecurve.training.tasks import chunked_head
from onecurve.training.tasks.base import NO_TARGET
from onecurve.training.tasks.token_losses import TokenLosses, token_losses
from tests.conftest import Launch, Run
from tests.messages import names, naming

Train = Callable[[dict[str, Any]], Run]

VOCABULARY = 97
_SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": VOCABULARY, "pad_token_id": 0,
    "eos_token_id": 0, "bos_token_id": 1, "head_dim": 8,
}  # fmt: skip
_WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# Caps and scales are so strong that a forgotten one would be seen.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", _SHAPE),
    "llama_tied": ("LlamaConfig", {**_SHAPE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _SHAPE),
    "gemma2": ("Gemma2Config", {**_SHAPE, "final_logit_softcapping": 0.3}),
    "gemma3": ("Gemma3TextConfig", {**_SHAPE, "final_logit_softcapping": 0.2}),
    "granite": ("GraniteConfig", {**_SHAPE, "logits_scaling": 0.2}),
    "cohere": ("CohereConfig", {**_SHAPE, "logit_scale": 3.0}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY, "eos_token_id": 0,
         "bos_token_id": 0, **_WITHOUT_DROPOUT},
    ),
    "phi": ("PhiConfig", _SHAPE),
    "mistral": ("MistralConfig", _SHAPE),
}  # fmt: skip


def build(family: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    import transformers

    torch.manual_seed(0)
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**settings)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)


@pytest.fixture
def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Three rows; of the first, five tokens are no targets, as a prompt's; of the last, three, as padding."""
    tokens = torch.randint(0, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :5] = labels[2, 8:] = NO_TARGET
    return {"input_ids": tokens}, labels


Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def learn(
    model: Any, batch: Batch, chunk_tokens: int | None, weights: torch.Tensor | None = None
) -> tuple[TokenLosses, dict[str, torch.Tensor | None]]:
    """Losses, and the gradients of their sum as the loop takes it, or of a weighted sum."""
    model.zero_grad()
    found = token_losses(model, *batch, chunk_tokens)
    total = found.losses.sum(-1).sum() * 0.37 if weights is None else (found.losses * weights).sum()
    total.backward()  # type: ignore[no-untyped-call]
    return found, {name: weight.grad for name, weight in model.named_parameters()}


def check_same(
    mine: tuple[TokenLosses, dict[str, Any]], reference: tuple[TokenLosses, dict[str, Any]], bound: float
) -> None:
    torch.testing.assert_close(mine[0].losses, reference[0].losses, rtol=bound, atol=bound)
    assert torch.equal(mine[0].is_right, reference[0].is_right)
    for name, gradient in reference[1].items():
        if gradient is None:
            assert mine[1][name] is None, name
            continue
        scale = gradient
        if name.endswith("k_proj.bias") and gradient.dtype == torch.float32:
            # Softmax is blind to a shift of all scores, so most of what a bias of the keys gets cancels. It is rounded as
            # its summands are, which are those of the keys' weights.
            scale = reference[1][name.replace("bias", "weight")]
        assert float((mine[1][name] - gradient).norm()) <= bound * float(scale.norm()), name


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_are_the_whole(
    family: str, dtype: torch.dtype, bound: float, batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four tokens, the last of fewer; with one gradient for all losses, and with one for each."""
    model = build(family, dtype)
    weights = torch.rand(3, 10, generator=torch.Generator().manual_seed(2), dtype=dtype)
    for wanted in (None, weights):
        check_same(learn(model, batch, 4, wanted), learn(model, batch, None, wanted), bound)
    assert capsys.readouterr().out == "", "it was not computed whole"
    with torch.no_grad():
        check_same((token_losses(model, *batch, 4), {}), (token_losses(model, *batch), {}), bound)


def spy_on(model: Any) -> list[int]:
    """How many tokens went through the output layer at once, call by call."""
    seen: list[int] = []
    layer = model.get_output_embeddings()
    own = layer.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[:-1].numel())
        return own(hidden)  # type: ignore[no-any-return]

    layer.forward = forward
    return seen


def test_only_targets_go_through_the_head_a_chunk_at_a_time(batch: Batch) -> None:
    model = build()
    token_losses(model, *batch, 4)  # Tried before.
    seen = spy_on(model)
    num_targets = int((batch[1][:, 1:] != NO_TARGET).sum())
    assert num_targets == 23
    token_losses(model, *batch, 4).losses.sum().backward()  # type: ignore[no-untyped-call]
    assert seen == [4, 4, 4, 4, 4, 3], "each target once, and none again in the backward pass"


def test_nothing_of_a_chunk_is_left_when_the_next_begins(batch: Batch) -> None:
    """Logits, and the gradient of the weights that a chunk adds: each is as large as the largest tensors of a model."""
    model = build()
    token_losses(model, *batch, 4)  # Tried before.
    layer, alive = model.lm_head, list[weakref.ref[torch.Tensor]]()
    own, grad = layer.forward, torch.autograd.grad

    def note(tensor: torch.Tensor) -> torch.Tensor:
        assert not any(each() is not None for each in alive)
        alive.append(weakref.ref(tensor))
        return tensor

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return note(own(hidden))

    layer.forward = forward
    token_losses(model, *batch, 4).losses.sum().backward()  # type: ignore[no-untyped-call]
    assert len(alive) == 6
    alive.clear()
    layer.forward = own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *words: (lambda found: (note(found[-1]), found)[1])(grad(*words)))
        token_losses(model, *batch, 4).losses.sum().backward()  # type: ignore[no-untyped-call]
    assert len(alive) == 6


def test_the_model_is_as_it_was(batch: Batch) -> None:
    for family in ("llama", "gemma2", "granite", "cohere"):
        model = build(family)
        before = model(**batch[0]).logits
        token_losses(model, *batch, 4)
        assert torch.equal(model(**batch[0]).logits, before)
        assert "forward" not in vars(model.get_output_embeddings())
        with pytest.raises((RuntimeError, IndexError)):
            token_losses(model, batch[0], batch[1].clamp(min=VOCABULARY), 4)  # Within the output layer.
        assert torch.equal(model(**batch[0]).logits, before)


def test_a_batch_without_targets_has_no_loss_and_gradients_of_zero(batch: Batch) -> None:
    """A process without examples runs one with weight 0, and DDP waits for the gradient of every weight."""
    model = build()
    found, gradients = learn(model, (batch[0], torch.full_like(batch[1], NO_TARGET)), 4)
    assert not found.losses.detach().any()
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
@pytest.mark.parametrize("target_modules", [["lm_head", "q_proj"], ["q_proj"]], ids=["with", "without"])
def test_a_head_with_an_adapter(batch: Batch, target_modules: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False))
    model = model.double()
    check_same(learn(model, batch, 4), learn(model, batch, None), 1e-12)


def test_a_frozen_head(batch: Batch) -> None:
    model = build()
    model.lm_head.weight.requires_grad_(False)
    check_same(learn(model, batch, 4), learn(model, batch, None), 1e-12)


def test_under_autocast_to_bf16(batch: Batch) -> None:
    """Gradients of chunks are added up in float32: they are nearer to the exact ones than those of all logits."""
    model = build(dtype=torch.float32)
    _, exact = learn(model, batch, None)
    with torch.autocast("cpu", torch.bfloat16):
        mine, whole = learn(model, batch, 4), learn(model, batch, None)
    torch.testing.assert_close(mine[0].losses, whole[0].losses, rtol=2e-2, atol=2e-2)
    for name, gradient in exact.items():
        assert gradient is not None
        assert float((mine[1][name] - gradient).norm() / gradient.norm()) < 3e-2, name  # type: ignore[operator]


def test_a_model_that_changes_logits_in_an_unknown_way_is_computed_whole(
    batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    model = build()

    class Capped(transformers.LlamaForCausalLM):
        """So weakly that the losses of the trial are almost the same."""

        def forward(self, *arguments: Any, **inputs: Any) -> Any:
            found = super().forward(*arguments, **inputs)
            found.logits = torch.tanh(found.logits / 1e4) * 1e4
            return found

    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    model.__class__ = Capped
    check_same(learn(model, batch, 4), learn(model, batch, None), 1e-12)
    learn(model, batch, 4)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1, "said once"
    assert names(said[0], "loss_chunk_tokens")


def test_a_scale_of_another_kind_is_found_out(batch: Batch, capsys: pytest.CaptureFixture[str]) -> None:
    """HyperCLOVA X multiplies by the number that Granite divides by."""
    model = build()
    model.config.logits_scaling = 1.7  # A Llama does nothing with it.
    check_same(learn(model, batch, 4), learn(model, batch, None), 1e-12)
    assert names(capsys.readouterr().out, "loss_chunk_tokens")


def test_gradients_are_taken_once(batch: Batch) -> None:
    model = build()
    total = token_losses(model, *batch, 4).losses.sum()
    total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=naming("once")):
        total.backward()  # type: ignore[no-untyped-call]


def test_auto_goes_by_the_vocabulary() -> None:
    assert choose_chunk_tokens("auto", 128_000) == 262
    assert choose_chunk_tokens("auto", 10_000_000) == 64
    assert choose_chunk_tokens(5, 128_000) == 5


def test_another_task_does_not_read_the_key(train: Train, recipe: dict[str, Any]) -> None:
    refused = train({**recipe, "loss_chunk_tokens": 64})
    assert refused.exit_code == 2
    assert names(refused.stderr, "loss_chunk_tokens", "causal_lm")


def test_the_curve_is_that_of_all_logits(
    train: Train, causal: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, **settings: Any) -> Run:
        done = train({**causal, "max_train_steps": 12, "output_dir": str(tmp_path / name), **settings})
        assert done.exit_code == 0, done.stderr
        return done

    chunked = [run("auto"), run("few", loss_chunk_tokens=7)]
    monkeypatch.setattr(chunked_head, "find_tried_head", lambda model: None)
    whole = run("whole")
    for mine in chunked:
        assert mine.losses == pytest.approx(whole.losses, rel=1e-5)
        assert mine.evaluations[-1]["eval_loss"] == pytest.approx(whole.evaluations[-1]["eval_loss"], rel=1e-5)
        assert mine.evaluations[-1]["eval_accuracy"] == whole.evaluations[-1]["eval_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["multi_cpu", "fsdp", "deepspeed_zero3"])
def test_the_curve_is_the_same_on_two_processes(
    train: Train, launch: Launch, causal: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, topology: str
) -> None:
    """One process with all logits, two with chunks of five tokens."""
    settings = {**causal, "max_train_steps": 25, "per_device_batch_size": 3}
    both = launch({**settings, "loss_chunk_tokens": 5, "output_dir": str(tmp_path / "both")}, topology, 2)
    assert both.exit_code == 0, both.stderr
    assert "loss_chunk_tokens" not in both.stdout, "it was computed in chunks"
    monkeypatch.setattr(chunked_head, "find_tried_head", lambda model: None)
    alone = train({**settings, "output_dir": str(tmp_path / "alone")})
    assert both.losses == pytest.approx(alone.losses, rel=1e-5)
    norms = [[step["grad_norm"] for step in run.steps] for run in (both, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
