"""RMSNorm as torch's own operation: the same bits as the models' own code, for every family that has this norm."""

from __future__ import annotations

import warnings
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSeq2SeqLM, T5Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from onecurve.training.models import rms_norms
from tests.training.models.decoders import CONFIGS, build_decoder

# Norms of each model: two or four a layer and one at the end, Qwen3 and Gemma 3 also of queries and keys.
NUM_NORMS = {"llama": 5, "qwen3": 9, "gemma3": 13, "gemma2": 9, "mistral": 5, "gpt2": 0, "phi": 0, "gpt_oss": 5}


def build(family: str) -> Any:
    if family == "t5":
        torch.manual_seed(0)
        config = T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, vocab_size=101, decoder_start_token_id=0)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
    else:
        model = build_decoder(CONFIGS[family]())
    for parameter in model.parameters():
        if parameter.dim() == 1:  # Ones, or zeros, would hide a mistake.
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def compute(model: Any) -> dict[str, torch.Tensor]:
    tokens = torch.arange(1, 25).view(2, 12)
    model.zero_grad()
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


@pytest.mark.parametrize(("family", "num_norms"), [*NUM_NORMS.items(), ("t5", 12)])
def test_logits_and_gradients_are_the_same_bits(family: str, num_norms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    expected, names = compute(model), {type(module).__name__ for module in model.modules()}
    assert rms_norms.install(model) == num_norms
    spy = Mock(wraps=F.rms_norm)
    monkeypatch.setattr(F, "rms_norm", spy)
    found = compute(model)
    assert spy.call_count == num_norms
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert {type(module).__name__ for module in model.modules()} == names


def test_all_norms_of_a_model_share_a_class() -> None:
    """A compiler compiles once what they share."""
    model = build("llama")
    own = {type(module) for module in model.modules() if isinstance(module, LlamaRMSNorm)}
    rms_norms.install(model)
    exchanged = {type(module) for module in model.modules() if isinstance(module, LlamaRMSNorm)}
    assert len(own) == len(exchanged) == 1
    assert own != exchanged


@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma3RMSNorm])
def test_weights_that_are_not_there_yet(norm: Any) -> None:
    with torch.device("meta"):
        holder = torch.nn.Sequential(norm(16))
    assert rms_norms.install(holder) == 1
    assert holder[0].weight.device.type == "meta"
    holder.to_empty(device="cpu")
    torch.nn.init.normal_(holder[0].weight)
    expected = norm(16)
    expected.load_state_dict(holder[0].state_dict())
    hidden = torch.randn(4, 16)
    assert torch.equal(holder[0](hidden), expected(hidden))


class Scaled(LlamaRMSNorm):
    """Looks like an RMSNorm, and is none."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * 1.001  # type: ignore[no-any-return]


class Biased(LlamaRMSNorm):
    """Has more weights than one."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bias = torch.nn.Parameter(torch.zeros(size))


@pytest.mark.parametrize(
    "norm",
    [
        torch.nn.LayerNorm(16, bias=False),
        torch.nn.RMSNorm(16, eps=1e-5),
        Scaled(16),
        Biased(16),
        Qwen3NextRMSNormGated(16),
        torch.nn.Linear(16, 1),
    ],
)
def test_other_modules_stay_as_they_are(norm: torch.nn.Module) -> None:
    own = type(norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rms_norms.install(torch.nn.Sequential(norm)) == 0
    assert type(norm) is own


class Switched(LlamaRMSNorm):
    """Computes what it is set to."""

    def __init__(self, size: int, scale: float) -> None:
        super().__init__(size)
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * self.scale  # type: ignore[no-any-return]


@pytest.mark.parametrize("scales", [(1.0, 2.0), (2.0, 1.0)])
def test_modules_of_a_class_may_differ(scales: tuple[float, float]) -> None:
    """As Gemma 3n's, some of which have no weights."""
    norms = torch.nn.Sequential(*(Switched(8, scale) for scale in scales))
    hidden = torch.randn(4, 8)
    expected = norms(hidden)
    assert rms_norms.install(norms) == 1
    assert torch.equal(norms(hidden), expected)
    bare = Gemma3nRMSNorm(8, with_scale=False)
    both = torch.nn.Sequential(Gemma3nRMSNorm(8), bare)
    expected = both(hidden)
    assert rms_norms.install(both) == 1
    assert type(bare) is Gemma3nRMSNorm
    assert torch.equal(both(hidden), expected)


def test_a_forward_that_somebody_exchanged_stays() -> None:
    norm: Any = LlamaRMSNorm(16)
    norm.forward = lambda hidden: hidden + 1
    assert rms_norms.install(torch.nn.Sequential(norm)) == 0
    assert torch.equal(norm(torch.zeros(1, 16)), torch.ones(1, 16))


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_bf16_keeps_its_type_and_is_as_near_to_the_formula(kind: Any, weights: torch.dtype, is_autocast: bool) -> None:
    torch.manual_seed(0)
    norm = kind(64).to(weights)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    hidden = torch.randn(100, 64).to(torch.bfloat16)
    offset, epsilon = (0, norm.variance_epsilon) if kind is LlamaRMSNorm else (1, norm.eps)
    exact = F.rms_norm(hidden.double(), (64,), norm.weight.double() + offset, epsilon)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        own = norm(hidden)
        assert rms_norms.install(torch.nn.Sequential(norm)) == 1
        found = norm(hidden)
    assert found.dtype == own.dtype
    assert (found.double() - exact).norm() <= (own.double() - exact).norm()


def test_weights_of_less_precision_than_the_input_take_the_models_own_code() -> None:
    norm = LlamaRMSNorm(16).to(torch.bfloat16)
    hidden = torch.randn(4, 16)
    expected = norm(hidden)
    rms_norms.install(torch.nn.Sequential(norm))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = norm(hidden)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
