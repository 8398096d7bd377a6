"""The last layer computes the first token only; logits, gradients and what is saved stay what they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from onecurve.training.architectures import FIRST_TOKEN_CLASSIFIERS
from onecurve.training.data.plan import Placement
from onecurve.training.models import example_dropout, example_masks, last_layer, matrix_attention
from onecurve.training.models.example_masks import ExampleMasks
from tests.training.models.conftest import make_recipe

SHAPE = {
    "vocab_size": 100, "hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "num_labels": 3, "max_position_embeddings": 64, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    # DistilBERT's own names.
    "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
    "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
}  # fmt: skip
TYPES = {family: family.lower().replace("xlm", "xlm-") for family in FIRST_TOKEN_CLASSIFIERS.values()}


def build(kind: str, attention: str = "eager", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **settings})
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # Biases are zero at first, and would hide a mistake.
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def get_last_layer(model: Any) -> Any:
    base = model.base_model
    return (base.transformer if model.config.model_type == "distilbert" else base.encoder).layer[-1]


def build_batch(num_examples: int = 4, length: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 100, (num_examples, length))
    mask = torch.ones_like(ids)
    for example in range(num_examples):
        ids[example, length - example :], mask[example, length - example :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    logits = model(**batch).logits
    torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()  # type: ignore[no-untyped-call]
    return {"logits": logits.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("attention", ["eager", "sdpa", matrix_attention.ATTENTION])
@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_logits_and_gradients_are_those_of_the_whole_layer(kind: str, attention: str) -> None:
    plain = build(kind, "eager" if attention == "eager" else "sdpa").double().train()
    ours = copy.deepcopy(plain)
    if attention == matrix_attention.ATTENTION:
        assert example_dropout.install(ours, make_recipe(mixed_precision="bf16"), torch.device("cpu"))
    assert last_layer.install(ours)
    ours = copy.deepcopy(ours)  # What is exchanged follows the copy.
    batch = build_batch()
    lengths = []
    get_last_layer(ours).register_forward_hook(lambda *seen: lengths.append(seen[-1].shape[1]))
    expected, found = gradients(plain, batch), gradients(ours, batch)
    assert lengths == [1]
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if tensor is None:
            assert found[name] is None
            continue
        torch.testing.assert_close(found[name], tensor, rtol=1e-11, atol=1e-13, msg=name)


DROPOUT: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "num_hidden_layers": 1},
    "distilbert": {"dropout": 0.2, "attention_dropout": 0.3, "n_layers": 1},
}


@pytest.mark.parametrize("masks", ["by_example", "torch"])
@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_is_that_of_the_whole_layer_on_average(kind: str, masks: str) -> None:
    """The mean over many masks; each kind of dropout at a rate that would show."""
    plain = build(kind, **DROPOUT[kind]).train()
    example_dropout.install(plain, make_recipe(dropout_masks=masks), torch.device("cpu"))
    ours = copy.deepcopy(plain)
    assert last_layer.install(ours)
    batch = {name: tensor.repeat(500, 1) for name, tensor in build_batch().items()}
    lengths = batch["attention_mask"].sum(1).numpy()

    def compute(model: Any, step: int) -> torch.Tensor:
        by_example = ExampleMasks(model is plain, step, range(2000), Placement(lengths, frozenset({16})))
        example_masks.begin(by_example if masks == "by_example" else None)
        logits: torch.Tensor = model(**batch).logits
        return logits.detach()

    torch.manual_seed(2)
    samples = [torch.cat([compute(model, step) for step in range(4)]).view(-1, 4, 3) for model in (plain, ours)]
    example_masks.begin(None)
    spread = samples[0].std(dim=0)
    torch.testing.assert_close(samples[1].std(dim=0), spread, rtol=0.15, atol=0)
    difference = (samples[0].mean(dim=0) - samples[1].mean(dim=0)).abs()
    assert (difference < 5 * spread * (2 / len(samples[0])) ** 0.5).all()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_a_recomputed_layer_has_the_same_gradients() -> None:
    ours = build("bert", hidden_dropout_prob=0.1)
    last_layer.install(ours)
    found = []
    for is_recomputed in (False, True):
        model = copy.deepcopy(ours).train()
        if is_recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(2)
        found.append(gradients(model, build_batch()))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: build("bert", is_decoder=True), id="a decoder"),
        pytest.param(lambda: build("albert"), id="another family"),
        pytest.param(lambda: build("bert").base_model, id="no classifier"),
    ],
)
def test_other_models_are_left_alone(model: Any) -> None:
    assert not last_layer.install(model())


def test_the_saved_model_is_plain_transformers(tmp_path: Path) -> None:
    ours = build("bert")
    last_layer.install(ours)
    ours.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        whole = again(**build_batch(), output_hidden_states=True)
        torch.testing.assert_close(whole.logits, ours.eval()(**build_batch()).logits, rtol=1e-5, atol=1e-6)
    assert whole.hidden_states[-1].shape[1] == 16
