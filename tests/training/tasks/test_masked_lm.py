"""Masked language models: which tokens are hidden, what a step's loss is, and how masks in a file are filled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from onecurve.training.config import load_recipe
from onecurve.training.data.plan import Order, TrainingPlan
from onecurve.training.data.preparation import PreparedData, prepare_data
from onecurve.training.models.loading import load_task
from onecurve.training.outcome import report_outcome
from onecurve.training.tasks.base import EVALUATION_EPOCH, NO_TARGET
from onecurve.training.tasks.chunked_head import find_tried_head
from onecurve.training.tasks.masked_lm import MaskedLM, count_hidden
from onecurve.training.tasks.token_losses import token_losses
from tests.conftest import Run, to_flags
from tests.messages import names
from tests.training.conftest import assert_refused, stop_and_resume
from tools.decoders import build_decoder, build_tokenizer

Settings = dict[str, Any]
Train = Callable[[Settings], Run]

ALL_ROWS = {"max_train_samples": None, "max_eval_samples": None}


@pytest.fixture
def masked(recipe: Settings) -> Settings:
    """Settings of a training of a masked language model that takes a second."""
    return {**recipe, "task": "masked_lm", "max_train_steps": 4, "max_train_samples": 60, "max_eval_samples": 30}


def prepare(settings: Settings) -> tuple[MaskedLM, PreparedData, Any]:
    """The task, the data and the tokenizer, as a training with these settings has them."""
    words = to_flags(settings)
    flags = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    task, _, tokenizer = load_task(load_recipe(None, flags).recipe)
    assert isinstance(task, MaskedLM)
    return task, prepare_data(task.recipe, task, tokenizer), tokenizer


def draw(
    task: MaskedLM, data: PreparedData, epoch: int, split: str = "train"
) -> tuple[list[Any], list[Any], list[Any]]:
    """Of all examples of a split the tokens, what an epoch shows of them, and the labels."""
    examples = getattr(data, split).examples
    numbers = np.arange(len(examples["input_ids"]))
    drawn = task.draw({name: feature[numbers] for name, feature in examples.items()}, numbers, epoch)
    return examples["input_ids"][numbers], drawn["input_ids"], drawn["labels"]


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Which tokens are hidden ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.01, 0.15, 0.5, 0.99])
def test_an_example_hides_exactly_its_share(masked: Settings, probability: float) -> None:
    task, data, tokenizer = prepare({**masked, "mlm_probability": probability})
    for epoch in (EVALUATION_EPOCH, 0, 7):
        for tokens, shown, labels in zip(*draw(task, data, epoch), strict=True):
            ordinary = [token not in tokenizer.all_special_ids for token in tokens]
            is_hidden = labels != NO_TARGET
            assert is_hidden.sum() == max(1, round(probability * sum(ordinary)))
            assert not (is_hidden & ~np.array(ordinary)).any(), "special tokens are never hidden"
            assert (labels[is_hidden] == tokens[is_hidden]).all()
            assert (shown[~is_hidden] == tokens[~is_hidden]).all()
    counts = [(labels != NO_TARGET).sum() for labels in draw(task, data, 3)[2]]
    assert data.train.counts.tolist() == counts, "known from preparation, in every epoch"
    assert count_hidden(3, 0.01) == 1


def test_hidden_tokens_become_masks_others_or_stay(masked: Settings) -> None:
    """80, 10 and 10 percent of them; what replaces one is any ordinary token."""
    task, data, tokenizer = prepare({**masked, "mlm_probability": 0.5})
    fates, others = np.zeros(3), []
    for epoch in range(12):
        for tokens, shown, labels in zip(*draw(task, data, epoch), strict=True):
            hidden = labels != NO_TARGET
            is_mask, is_same = shown[hidden] == tokenizer.mask_token_id, shown[hidden] == tokens[hidden]
            fates += (is_mask.sum(), (~is_mask & ~is_same).sum(), is_same.sum())
            others += shown[hidden][~is_mask & ~is_same].tolist()
    assert fates.sum() > 10_000
    assert chisquare(fates, fates.sum() * np.array([0.8, 0.1, 0.1])).pvalue > 1e-3
    assert not set(others) & set(tokenizer.all_special_ids)
    halves = np.bincount(np.array(others) > len(tokenizer) // 2)
    assert chisquare(halves).pvalue > 1e-3


def test_every_place_is_as_likely_and_epochs_are_independent(masked: Settings) -> None:
    """Of one example of 20 places over 3,000 epochs, and of neighbouring examples and epochs."""
    task, _, _ = prepare({**masked, "mlm_probability": 0.25})
    units, chosen = np.arange(20), np.zeros((3000, 20))
    for epoch in range(3000):
        chosen[epoch, task._choose(units, 5, epoch)[0]] = 1
    assert (chosen.sum(axis=1) == 5).all()
    # Places of one epoch exclude each other, which shrinks the variance of their counts by 3/4 x 20/19.
    statistic = ((chosen.sum(axis=0) - 750) ** 2).sum() / 750 / (0.75 * 20 / 19)
    assert statistic < 43.8, "chi-squared with 19 degrees of freedom, p > 0.001"
    together = (chosen[:-1] * chosen[1:]).sum()
    assert abs(together - 2999 * 1.25) < 4 * math.sqrt(2999 * 0.74), "hypergeometric: mean 1.25, variance 0.74"
    neighbours = sum(
        len(set(task._choose(units, n, 0)[0]) & set(task._choose(units, n + 1, 0)[0])) for n in range(3000)
    )
    assert abs(neighbours - 3000 * 1.25) < 4 * math.sqrt(3000 * 0.74)
    seeds = [prepare({**masked, "mlm_probability": 0.25, "seed": seed})[0]._choose(units, 5, 0)[0] for seed in range(9)]
    assert len({tuple(places) for places in seeds}) == 9


def test_whole_words_are_hidden_whole_and_counted(masked: Settings) -> None:
    task, data, tokenizer = prepare({**masked, "whole_word_mask": True, "mlm_probability": 0.3})
    split = 0
    for epoch in (0, 1, EVALUATION_EPOCH):
        for tokens, _, labels in zip(*draw(task, data, epoch), strict=True):
            pieces = tokenizer.convert_ids_to_tokens(tokens)
            words = np.cumsum([not piece.startswith("##") for piece in pieces])
            ordinary = ~np.isin(tokens, tokenizer.all_special_ids)
            hidden = {int(word) for word in words[labels != NO_TARGET]}
            assert len(hidden) == max(1, round(0.3 * len(set(words[ordinary]))))
            assert (np.isin(words, list(hidden)) == (labels != NO_TARGET)).all()
            split += sum(int(np.count_nonzero(words == word) > 1) for word in hidden)
    assert split > 30, "words of several tokens are among them"
    order = Order(len(data.train), 16, 0, data.train.lengths, 4)
    plan = TrainingPlan(
        order, 8, 2, 3, draw_counts=lambda examples, epoch: task.draw_counts(data.train.examples, examples, epoch)
    )
    for epoch in (0, 1):
        drawn = draw(task, data, epoch)[2]
        for step in range(4 * epoch, 4 * epoch + 4):
            expected = sum((drawn[number] != NO_TARGET).sum() for number in order.global_batch(step))
            assert {each.global_count for each in plan.micro_batches(step)} == {expected}
    of_evaluation = [(labels != NO_TARGET).sum() for labels in draw(task, data, EVALUATION_EPOCH, "validation")[2]]
    assert data.validation.counts.tolist() == of_evaluation


def test_long_texts_are_split_and_no_token_is_lost_or_doubled(masked: Settings) -> None:
    _, data, tokenizer = prepare({**masked, **ALL_ROWS, "long_texts": "split", "max_length": 16})
    found: dict[int, list[int]] = {}
    examples = data.train.examples
    for row, tokens in zip(examples["row"][:], examples["input_ids"][:], strict=True):
        assert len(tokens) <= 16
        assert (tokens[0], tokens[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        found.setdefault(int(row), []).extend(int(token) for token in tokens[1:-1])
    texts = [row["text"] for row in read_rows(masked["train_file"])]
    assert list(found.values()) == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    cut = prepare({**masked, **ALL_ROWS, "max_length": 16})[1].train.examples["input_ids"][:]
    assert [list(tokens) for tokens in cut] == tokenizer(texts, truncation=True, max_length=16)["input_ids"]


def test_the_tokenizers_words_for_special_tokens_are_plain_text_in_a_text(masked: Settings, tmp_path: Path) -> None:
    rows = [{"text": f"one [MASK] two [SEP] number {number}"} for number in range(20)]
    _, data, tokenizer = prepare({**masked, **ALL_ROWS, "train_file": write_rows(tmp_path / "special.jsonl", rows)})
    for tokens in data.train.examples["input_ids"][:]:
        assert tokenizer.mask_token_id not in tokens
        assert list(tokens).count(tokenizer.sep_token_id) == 1
    assert any("row 1" in note and "[MASK]" in note for note in data.notes)


# Losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys", [{}, {"whole_word_mask": True, "loss_chunk_tokens": 7}], ids=["tokens", "words, in chunks of seven"]
)
def test_a_step_is_that_of_plain_transformers(masked: Settings, train: Train, keys: Settings) -> None:
    """Loss and gradient of a step over all the data, against the model's own loss of each text alone."""
    from transformers import AutoModelForMaskedLM, set_seed

    settings = {**masked, **keys, "train_batch_size": 60, "max_train_steps": 1, "max_grad_norm": 0}
    run = train({**settings, "per_device_batch_size": 7})
    assert run.exit_code == 0, run.stderr
    task, data, _ = prepare(settings)
    set_seed(42)  # The head is new.
    model = AutoModelForMaskedLM.from_pretrained(masked["model_name_or_path"], dtype=torch.float32).eval()
    total, count = 0.0, 0
    for _, shown, labels in zip(*draw(task, data, epoch=0), strict=True):
        num_targets = int((labels != NO_TARGET).sum())
        loss = model(input_ids=torch.tensor(shown)[None], labels=torch.tensor(labels)[None]).loss * num_targets
        loss.backward()
        total, count = total + loss.item(), count + num_targets
    gradients = [each.grad / count for each in model.parameters() if each.grad is not None]
    norm = math.sqrt(sum(float(each.double().square().sum()) for each in gradients))
    assert run.steps[0]["loss"] == pytest.approx(total / count, rel=1e-6)
    assert run.steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)


FAMILIES = ("Bert", "Roberta", "DistilBert", "Albert", "Electra", "MPNet", "DebertaV2", "ModernBert")


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_in_chunks_are_those_of_each_familys_own_forward(family: str) -> None:
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if family == "DistilBert":
        shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    special = {"pad_token_id": 1, **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)}
    config = getattr(transformers, f"{family}Config")(vocab_size=300, max_position_embeddings=64, **shape, **special)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    tokens = torch.randint(5, 300, (4, 12))
    labels = torch.full_like(tokens, NO_TARGET)
    labels[:, 3], labels[1, 7] = tokens[:, 3], tokens[1, 7]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    (model(**inputs, labels=labels).loss * 5).backward()
    expected = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    model.zero_grad()
    found = token_losses(model, inputs, labels, 2, ahead=0)
    assert find_tried_head(model) is not None, "it needs no logits of all tokens"
    assert ((found.losses != 0) == (labels != NO_TARGET)).all()
    found.losses.sum().backward()  # type: ignore[no-untyped-call]
    for ours, theirs in zip((each.grad for each in model.parameters() if each.grad is not None), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_evaluation_hides_the_same_tokens_each_time_and_weighs_them_alike(masked: Settings, train: Train) -> None:
    from transformers import AutoModelForMaskedLM

    found = []
    for size in (1, 7):
        settings = {**masked, "per_device_batch_size": size, "learning_rate": 1e-12, "eval_steps": 1}
        run = train({**settings, "whole_word_mask": True, "output_dir": f"{masked['output_dir']}{size}"})
        assert run.exit_code == 0, run.stderr
        found += [line["eval_loss"] for line in run.evaluations]
    task, data, _ = prepare({**settings, "whole_word_mask": True})
    model = AutoModelForMaskedLM.from_pretrained(run.path / "final", dtype=torch.float32).eval()
    losses, right = [], []
    with torch.no_grad():
        for _, shown, labels in zip(*draw(task, data, EVALUATION_EPOCH, "validation"), strict=True):
            logits = model(input_ids=torch.tensor(shown)[None]).logits[0][labels != NO_TARGET]
            targets = torch.tensor(labels[labels != NO_TARGET])
            losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
            right += (logits.argmax(-1) == targets).tolist()
    loss = math.fsum(losses) / len(losses)
    assert len(found) == 8
    assert found == pytest.approx([loss] * 8, rel=1e-6)
    assert run.evaluations[-1]["eval_pseudo_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert run.evaluations[-1]["eval_accuracy"] == sum(right) / len(right)
    assert run.read("eval_report.json")["targets"] == len(losses)
    lines = read_rows(run.path / "eval_predictions.jsonl")
    assert [line["targets"] for line in lines] == data.validation.counts.tolist()
    assert sum(line["right"] for line in lines) == sum(right)
    hardest = run.read("eval_report.json")["hardest"][0]
    assert hardest["loss"] == pytest.approx(max(line["loss"] for line in lines), rel=1e-6)
    line = lines[hardest["example"]]
    assert hardest["prediction"].split()[:3] == [str(line["right"]), "of", str(line["targets"])]


def test_a_roberta_with_a_head_is_evaluated_as_it_came(masked: Settings, train: Train, tmp_path: Path) -> None:
    """Its words are pieces of bytes, its positions begin behind the padding token's number, and its head is not new."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

    build_tokenizer(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=80, pad_token_id=tokenizer.pad_token_id, **shape
    )
    torch.manual_seed(0)
    model = RobertaForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    settings = {**masked, "model_name_or_path": str(tmp_path / "model"), "whole_word_mask": True}
    run = train({**settings, "eval_only": True})
    assert run.exit_code == 0, run.stderr
    task, data, _ = prepare(settings)
    total, count = 0.0, 0
    with torch.no_grad():
        for _, shown, labels in zip(*draw(task, data, EVALUATION_EPOCH, "validation"), strict=True):
            hidden = labels != NO_TARGET
            loss = model(input_ids=torch.tensor(shown)[None], labels=torch.tensor(labels)[None]).loss
            total, count = total + loss.item() * int(hidden.sum()), count + int(hidden.sum())
    assert run.read("eval_report.json")["metrics"]["eval_loss"] == pytest.approx(total / count, rel=1e-6)
    assert run.read("eval_report.json")["targets"] == count


def test_memory_workers_and_a_stop_change_no_mask(masked: Settings, train: Train, tmp_path: Path) -> None:
    """Two epochs and more, so that masks that were drawn anew by each start, batch or worker would be seen."""
    settings = {**masked, "train_batch_size": 16, "max_train_steps": 9, "whole_word_mask": True, "max_eval_samples": 8}
    settings["dropout"] = 0.1
    whole = train({**settings, "output_dir": str(tmp_path / "whole"), "per_device_batch_size": 16})
    assert whole.exit_code == 0, whole.stderr
    small = {**settings, "per_device_batch_size": 5, "dataloader_num_workers": 1}
    other = train({**small, "output_dir": str(tmp_path / "small")})
    assert other.losses == pytest.approx(whole.losses, rel=1e-5)
    resumed = stop_and_resume(train, {**settings, "per_device_batch_size": 16}, tmp_path)
    assert resumed.losses == whole.losses


def test_it_learns_saves_and_fills_masks_in_a_file(masked: Settings, train: Train, tmp_path: Path) -> None:
    """A language of three words: what is filled is what transformers' own pipeline fills."""
    from transformers import pipeline

    from onecurve.training import predict

    sentences = ["the cat sees the dog", "a dog likes a cat", "we play football today"]
    rows = [{"text": sentences[number % 3]} for number in range(96)]
    files = {f"{name}_file": write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("train", "validation")}
    data = {**ALL_ROWS, **files}
    keys = {"learning_rate": 2e-2, "max_train_steps": 60, "mlm_probability": 0.3, "eval_steps": 30}
    run = train({**masked, **data, **keys})
    assert run.exit_code == 0, run.stderr
    assert run.evaluations[-1]["eval_loss"] < run.evaluations[0]["eval_loss"] < 5
    assert "pipeline_tag: fill-mask" in (run.path / "final" / "README.md").read_text(encoding="utf-8")
    asked = ["the [MASK] sees the dog", "we play [MASK] today, we [MASK] football", "[MASK]"]
    source = write_rows(tmp_path / "in.jsonl", [{"id": number, "text": text} for number, text in enumerate(asked)])
    words = ["--run", str(run.path), "--input", source, "--output", str(tmp_path / "out.jsonl")]
    assert report_outcome(predict.main, words) == 0
    filled = read_rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in filled] == [0, 1, 2]
    fill = pipeline("fill-mask", model=str(run.path / "final"), top_k=1)
    for text, row in zip(asked, filled, strict=True):
        answers = fill(text)
        best = answers if len(answers) == 1 else [each[0] for each in answers]
        assert row["tokens"] == [each["token_str"] for each in best]
        assert row["score"] == pytest.approx([each["score"] for each in best], rel=1e-4)
    assert filled[0]["prediction"] == f"the {filled[0]['tokens'][0]} sees the dog"
    again = train({**masked, **data, **keys, "eval_only": True})
    assert again.exit_code == 0, again.stderr


def test_an_adapter_is_trained_and_loaded(masked: Settings, train: Train) -> None:
    keys = {"adapter": "lora", "lora_r": 4, "modules_to_save": ["transform"], "max_train_steps": 20}
    run = train({**masked, **keys, "eval_steps": 10, "learning_rate": 1e-2})
    assert run.exit_code == 0, run.stderr
    assert run.losses[-1] < run.losses[0]
    before = run.read("eval_report.json")
    again = train({**masked, **keys, "eval_only": True})
    assert again.exit_code == 0, again.stderr
    assert again.read("eval_report.json") == before


# Bad input -----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Settings, tuple[str, ...]]] = {
    "nothing is hidden": ({"mlm_probability": 0}, ("mlm_probability", "0")),
    "everything is hidden": ({"mlm_probability": 1.0}, ("mlm_probability", "1")),
    "a share that is a word": ({"mlm_probability": "some"}, ("mlm_probability",)),
    "a treatment that there is not": ({"long_texts": "splt"}, ("long_texts", "split")),
    "a key of other tasks": ({"label_column": "label"}, ("label_column", "text_classification")),
    "a misspelt key": ({"mlm_probabilty": 0.2}, ("mlm_probabilty", "mlm_probability")),
    "no such column": ({"text_column": "txt"}, ("text_column", "txt")),
    "no room for text": ({"max_length": 2}, ("max_length", "2")),
    "a metric that is not measured": ({"metric_for_best_model": "perplexity"}, ("eval_pseudo_perplexity",)),
    "more rows than there are": ({"max_eval_samples": 62}, ("max_eval_samples", "62")),
    "a layout that there is not": ({"layout": "packd"}, ("layout", "packed")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_recipe_that_can_not_be_is_refused(masked: Settings, train: Train, name: str) -> None:
    keys, needed = BAD[name]
    run = train({**masked, **keys})
    assert_refused(run, *needed)
    assert len(run.stderr.strip().splitlines()) <= 2


BAD_ROWS: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "an empty text": ([{"text": "good"}, {"text": " "}], ("row 2", "text")),
    "no text": ([{"text": "good"}, {"text": "good"}, {"text": None}], ("row 3", "text")),
    "numbers": ([{"text": 1}, {"text": 2}], ("text", "int64")),
    "no token that is known": ([{"text": "☃ ☃"}, {"text": "☃"}], ("Left out", "2")),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_can_not_be_learned_is_refused(masked: Settings, train: Train, tmp_path: Path, name: str) -> None:
    rows, needed = BAD_ROWS[name]
    run = train({**masked, **ALL_ROWS, "train_file": write_rows(tmp_path / "bad.jsonl", rows)})
    assert_refused(run, "bad.jsonl", *needed)


def test_models_that_predict_no_masks_are_refused(masked: Settings, train: Train, tmp_path: Path) -> None:
    decoder = build_decoder(tmp_path / "llama")
    run = train({**masked, "model_name_or_path": str(decoder)})
    assert run.exit_code == 2
    assert names(run.stderr, "model_name_or_path", "llama", "causal_lm")
    run = train({**masked, "tokenizer_name": str(decoder)})
    assert run.exit_code == 2
    assert names(run.stderr, "mask token")
    run = train({**masked, "eval_only": True})
    assert run.exit_code == 2
    assert names(run.stderr, "eval_only", "head")


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("nothing to fill", ("row 2", "[MASK]")),
        ("a [MASK] and [SEP]", ("row 2", "[SEP]")),
        ("[MASK] " + "long " * 80, ("row 2", "83", "64")),
    ],
)
def test_a_text_that_can_not_be_filled_is_refused(
    masked: Settings,
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    needed: tuple[str, ...],
) -> None:
    from onecurve.training import predict

    run = train({**masked, "max_train_steps": 1})
    assert run.exit_code == 0, run.stderr
    source = write_rows(tmp_path / "in.jsonl", [{"text": "a [MASK] text"}, {"text": text}])
    words = ["--run", str(run.path), "--input", source, "--output", str(tmp_path / "out.jsonl")]
    assert report_outcome(predict.main, words) == 2
    assert names(capsys.readouterr().err, *needed)
    assert not (tmp_path / "out.jsonl").exists()
