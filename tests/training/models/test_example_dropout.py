"""With dropout on, an example has the same gradient whatever it is computed beside, and however it lies in memory."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
)  # fmt: skip

from onecurve.training.data.layout import Collator, Layout
from onecurve.training.data.plan import Placement
from onecurve.training.models import attention, example_dropout, example_masks, last_layer, matrix_attention
from onecurve.training.models.example_masks import ExampleMasks, checkpoint_contexts
from tests.training.models.conftest import make_recipe

Model = Any
Batch = dict[str, Any]

LENGTHS = (2, 2, 3, 5, 5, 8, 8, 9)
SEED, STEP = 3, 11

BERT: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 40, "num_labels": 3, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3,
}  # fmt: skip
PADS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "attention_dropout": 0.3, **PADS,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.2,
    "decoder_start_token_id": 0, **PADS,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40, "dropout": 0.2,
    "attention_dropout": 0.3, "activation_dropout": 0.1, "classifier_dropout": 0.2, "num_labels": 3, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, **PADS,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "resid_pdrop": 0.2, "embd_pdrop": 0.2,
    "attn_pdrop": 0.3, **PADS,
}  # fmt: skip
VIT: dict[str, Any] = {**BERT, "image_size": 8, "patch_size": 4}

CLASSIFIERS = {
    "bert": lambda: BertConfig(**BERT),
    "roberta": lambda: RobertaConfig(**{**BERT, **PADS}),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=24, dropout=0.2, attention_dropout=0.3, num_labels=3
    ),
    "albert": lambda: AlbertConfig(**{**BERT, "embedding_size": 8, "classifier_dropout_prob": 0.2}),
    "deberta": lambda: DebertaConfig(**BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_dropout=0.1),
    "deberta-v2": lambda: DebertaV2Config(
        **BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, norm_rel_ebd="layer_norm",
        share_att_key=True, pooler_dropout=0.1,
    ),
    "modernbert": lambda: ModernBertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3,
        attention_dropout=0.3, mlp_dropout=0.2, embedding_dropout=0.2, classifier_dropout=0.2, local_attention=4, **PADS,
        cls_token_id=1, sep_token_id=2,
    ),
    "gpt2": lambda: GPT2Config(**GPT2, num_labels=3),
    "llama": lambda: LlamaConfig(**LLAMA, num_labels=3),
}  # fmt: skip


def build(auto_class: Any, config: Any, **settings: Any) -> Model:
    torch.manual_seed(0)
    model = auto_class.from_config(config, attn_implementation=settings.pop("attn_implementation", None))
    for parameter in model.parameters():  # Weights that are far from their small beginning: every element matters.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    assert example_dropout.install(model, make_recipe(**settings), torch.device("cpu"))
    return model.double().train()


def build_sequences() -> list[Any]:
    numbers = np.random.default_rng(1)
    return [np.append(numbers.integers(5, 60, length - 1), 2) for length in LENGTHS]


def collate(layout: Layout, examples: Sequence[int], **more: list[Any]) -> tuple[Batch, Placement]:
    task: Any = SimpleNamespace(
        pad_values=lambda _: {}, add_to_batch=lambda batch: None, sequence_lengths=lambda _: None
    )
    collator = Collator(task, None, layout)
    features = {"input_ids": build_sequences(), **more}
    chosen = {name: [values[example] for example in examples] for name, values in features.items()}
    return collator(chosen), collator.describe_placement(chosen)


def weigh(outputs: torch.Tensor, example: int) -> torch.Tensor:
    """A loss that every output of an example counts in, each with another weight."""
    generator = torch.Generator().manual_seed(example)
    weights = torch.randn(outputs.numel(), generator=generator, dtype=torch.float64)
    return (outputs.double().flatten() * weights).sum()


def find_gradients(
    model: Model, layout: Layout, cut: Sequence[Sequence[int]], step: int = STEP, **more: Any
) -> dict[str, torch.Tensor]:
    """Losses of all examples and the gradients of their sum, computed in the micro-batches of `cut`."""
    model.zero_grad()
    losses: dict[int, torch.Tensor] = {}
    for examples in cut:
        batch, placement = collate(layout, examples, **more)
        example_masks.begin(ExampleMasks(SEED, step, examples, placement))
        cache = {} if hasattr(model.config, "image_size") or not model.can_generate() else {"use_cache": False}
        logits = model(**batch, **cache).logits
        pieces = list(logits)
        if logits.dim() == 3 and "labels" in batch:
            pieces = [row[: len(more["labels"][example])] for row, example in zip(logits, examples, strict=True)]
        elif logits.dim() == 3:
            pieces = layout.split(logits, [LENGTHS[example] for example in examples])
        found = [weigh(piece, example) for piece, example in zip(pieces, examples, strict=True)]
        torch.stack(found).sum().backward()  # type: ignore[no-untyped-call]
        losses.update(zip(examples, (each.detach() for each in found), strict=True))
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return {**gradients, "losses": torch.stack([losses[example] for example in range(len(LENGTHS))])}


CUTS = {
    "one by one": [[example] for example in range(len(LENGTHS))],
    "threes": [[5, 0, 7], [2, 4, 1], [3, 6]],
}
WHOLE = [list(range(len(LENGTHS)))]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(each.norm()) for each in expected.values())
    for name, values in expected.items():
        assert float(torch.dist(found[name], values)) <= 1e-6 * scale, name


def assert_exact(model: Model, layouts: Sequence[Layout], **more: Any) -> None:
    whole = find_gradients(model, layouts[0], WHOLE, **more)
    for layout in layouts:
        for cut in (WHOLE, *CUTS.values()):
            assert_same(find_gradients(model, layout, cut, **more), whole)
    other = find_gradients(model, layouts[0], WHOLE, step=STEP + 1, **more)
    assert float(torch.dist(other["losses"], whole["losses"])) > 1e-2 * float(whole["losses"].norm()), (
        "nothing is dropped"
    )


PADDED = Layout(mask="padding")


@pytest.mark.parametrize("implementation", [None, "eager", "sdpa"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_is_exact(family: str, implementation: str | None) -> None:
    if "deberta" in family and implementation == "sdpa":
        pytest.skip("it has no other attention than its own")
    model = build(AutoModelForSequenceClassification, CLASSIFIERS[family](), attn_implementation=implementation)
    layout = Layout(mask="always") if family in ("gpt2", "llama") else PADDED
    assert_exact(model, [layout])


def test_padding_on_the_left_is_exact() -> None:
    """Of a model whose positions are relative: others see padding on the left as another text, dropout or not."""
    model = build(AutoModelForSequenceClassification, CLASSIFIERS["llama"]())
    assert_exact(model, [Layout(mask="always", pads_left=True)])


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_last_layer_of_one_token_is_exact(family: str) -> None:
    model = build(AutoModelForSequenceClassification, CLASSIFIERS[family]())
    assert last_layer.install(model)
    assert_exact(model, [PADDED])


def add_adapter(model: Model) -> Model:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False)
    inject_adapter_in_model(config, model, "adapter")
    return model.double().train()


DECODERS = {
    "gpt2": lambda: GPT2Config(**GPT2),
    "llama": lambda: LlamaConfig(**LLAMA),
    "gemma2": lambda: Gemma2Config(
        **{**LLAMA, "attention_dropout": 0.3}, head_dim=4, sliding_window=3, query_pre_attn_scalar=4
    ),
}


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_is_exact_padded_and_packed(family: str) -> None:
    """With our attention, and with what its own attention finds in padded rows."""
    model = build(AutoModelForCausalLM, DECODERS[family]())
    own = find_gradients(model, Layout(mask="always"), WHOLE)
    attention.install(model)
    layouts = [Layout(mask="never"), Layout(is_packed=True)]
    assert_exact(model, layouts)
    if family != "gemma2":  # transformers' SDPA leaves its cap out.
        assert_same(find_gradients(model, layouts[1], CUTS["threes"]), own)


def test_an_adapter_is_exact_padded_and_packed() -> None:
    model = add_adapter(build(AutoModelForCausalLM, LlamaConfig(**{**LLAMA, "attention_dropout": 0.0})))
    attention.install(model)
    assert_exact(model, [Layout(mask="never"), Layout(is_packed=True)])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("config", [T5Config(**T5), BartConfig(**BART)], ids=["t5", "bart"])
def test_an_encoder_with_a_decoder_is_exact(config: Any, implementation: str) -> None:
    """Sources and targets have lengths of their own, which meet in a cross-attention."""
    model = build(AutoModelForSeq2SeqLM, config, attn_implementation=implementation)
    targets = [np.full(2 + 5 * example % 7, 3 + example) for example in range(len(LENGTHS))]
    assert_exact(model, [Layout(mask="always")], labels=targets)


def test_a_classifier_of_an_encoder_with_a_decoder_is_exact() -> None:
    assert_exact(build(AutoModelForSequenceClassification, BartConfig(**BART)), [Layout(mask="always")])


def test_choices_of_an_example_are_exact() -> None:
    """Several rows belong to an example, not always as many, each with a length of its own."""
    model = build(AutoModelForMultipleChoice, BertConfig(**BERT))
    rows = [[2 + (example + 3 * choice) % 7 for choice in range(2 + example % 3)] for example in range(len(LENGTHS))]

    def compute(cut: list[list[int]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for examples in cut:
            lengths = np.array([length for example in examples for length in rows[example]])
            counts = np.array([len(rows[example]) for example in examples])
            mask = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
            ids = (torch.from_numpy(lengths)[:, None] + torch.arange(mask.shape[1])) * mask + 1
            placement = Placement(lengths, frozenset({mask.shape[1]}), counts)
            example_masks.begin(ExampleMasks(SEED, STEP, examples, placement))
            logits = model(input_ids=ids[:, None], attention_mask=mask[:, None].long()).logits.flatten()
            pieces = zip(logits.split(counts.tolist()), examples, strict=True)
            torch.stack([weigh(piece, example) for piece, example in pieces]).sum().backward()  # type: ignore[no-untyped-call]
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    for cut in CUTS.values():
        assert_same(compute(cut), compute(WHOLE))


def test_a_vision_transformer_is_exact() -> None:
    model = build(AutoModelForImageClassification, ViTConfig(**VIT))
    images = torch.randn(len(LENGTHS), 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def compute(cut: list[list[int]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for examples in cut:
            example_masks.begin(ExampleMasks(SEED, STEP, examples, Placement()))
            logits = model(pixel_values=images[examples]).logits
            torch.stack([weigh(row, example) for row, example in zip(logits, examples, strict=True)]).sum().backward()  # type: ignore[no-untyped-call]
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    for cut in CUTS.values():
        assert_same(compute(cut), compute(WHOLE))


def test_a_gpu_computes_the_same_with_its_own_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it computes differently is tried here on the CPU; its masks are bool."""
    layout = Layout(is_packed=True)
    encoder = build(AutoModelForSequenceClassification, CLASSIFIERS["bert"](), attn_implementation="sdpa")
    decoder = build(AutoModelForCausalLM, LlamaConfig(**LLAMA))
    attention.install(decoder)
    expected = find_gradients(encoder, PADDED, WHOLE), find_gradients(decoder, layout, WHOLE)
    draw = ExampleMasks.draw
    monkeypatch.setattr(ExampleMasks, "draw", lambda *arguments: draw(*arguments).bool())
    monkeypatch.setattr(matrix_attention, "_is_on_host", lambda tensor: False)
    assert_same(find_gradients(encoder, PADDED, WHOLE), expected[0])
    assert_same(find_gradients(decoder, layout, WHOLE), expected[1])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_recomputed_layer_has_the_masks_that_it_had(family: str) -> None:
    model = build(AutoModelForSequenceClassification, CLASSIFIERS[family]())
    whole = find_gradients(model, PADDED, WHOLE)
    keywords = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    for cut in (WHOLE, CUTS["threes"]):
        assert_same(find_gradients(model, PADDED, cut), whole)
