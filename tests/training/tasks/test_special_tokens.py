"""What users write never becomes a special token, whatever the tokenizer: fast or slow, WordPiece, BPE or Unigram."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onecurve.training.config import build_recipe
from onecurve.training.tasks.special_tokens import find_leaks, split_special_tokens
from onecurve.training.tasks.texts import encode_texts
from tests.conftest import Run
from tests.messages import names

Settings = dict[str, Any]

LETTERS = list("abcdefghijklmnopqrstuvwxyz/<>[]|")
RECIPE = build_recipe({"model_name_or_path": "m", "train_file": "t.csv"})


def wrap(core: tokenizers.Tokenizer, end: str, **special: str) -> Any:
    """A tokenizer of transformers whose sequences end with a special token."""
    core.add_special_tokens(list(special.values()))
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, core.token_to_id(end))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def build_bart() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet, "</"])}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, [("<", "/")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return wrap(core, "</s>", bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_llama() -> Any:
    """As Llama's: BPE over characters with a space written as an underline."""
    vocabulary = {name: number for number, name in enumerate(["<unk>", "<s>", "</s>", "▁", *LETTERS])}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    return wrap(core, "</s>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def build_t5() -> Any:
    """Unigram has the special tokens among its own pieces, with the best score of all; its normalizer also makes them."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    core = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    core.normalizer, core.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    return wrap(core, "</s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_words() -> Any:
    """Words between spaces: a special token that stands alone is a word of the vocabulary."""
    core = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(core, "</s>", pad_token="</s>", eos_token="</s>", unk_token="[UNK]")


KINDS = [build_bart, build_llama, build_t5, build_words]


@pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("text", ["a </s> b", "</s>", "a</s>b", "a \uff1c/s\uff1e b", "<s> a </s><pad>"])
def test_a_text_has_one_end_whatever_it_writes(build: Callable[[], Any], text: str) -> None:
    tokenizer = build()
    encoded = encode_texts([[text], ["b"]], tokenizer, RECIPE)["input_ids"][0]
    special = {number for number in tokenizer.all_special_ids if number != tokenizer.unk_token_id}
    assert [place for place, token in enumerate(encoded) if token in special] == [
        place for place, token in enumerate(encoded) if token == tokenizer.eos_token_id
    ]
    assert encoded.count(tokenizer.eos_token_id) == 2, "of the text and of its pair"


@pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)
def test_a_text_without_special_tokens_is_encoded_as_ever(build: Callable[[], Any]) -> None:
    plain = build()(["a b", "b < a"])["input_ids"]
    assert encode_texts([["a b", "b < a"]], build(), RECIPE)["input_ids"] == plain


def test_only_tokenizers_that_find_special_tokens_again_are_watched() -> None:
    assert [bool(find_leaks(build())) for build in KINDS] == [False, False, True, True]


def test_tokenizers_without_a_backend_split_as_well() -> None:
    from transformers import ByT5Tokenizer, CanineTokenizer

    byt5 = ByT5Tokenizer()
    assert encode_texts([["a</s>"]], byt5, RECIPE)["input_ids"] == [[ord(letter) + 3 for letter in "a</s>"] + [1]]
    canine = CanineTokenizer()  # Its special tokens are characters, which a text may hold; there is no unknown one.
    assert encode_texts([["a\ue001b"]], canine, RECIPE)["input_ids"] == [[0xE000, ord("a"), ord("b"), 0xE001]]


def test_berts_separator_is_text(demo: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    split_special_tokens(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(encode_texts([["a [SEP] b [MASK]"]], tokenizer, RECIPE)["input_ids"][0])
    assert tokens == ["[CLS]", "a", "[", "sep", "]", "b", "[", "mask", "]", "[SEP]"]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.convert_ids_to_tokens(again("a [SEP] b [MASK]")["input_ids"]) == tokens, "who loads it reads the same"


def test_it_is_said_once_in_training_and_in_predict(
    recipe: Settings, train: Callable[[Mapping[str, Any]], Run], tmp_path: Path
) -> None:
    from onecurve.training.outcome import report_outcome
    from onecurve.training.parallel.accelerator import forget_state
    from onecurve.training.predict import main

    rows = [{"text": f"word{number} [SEP] news", "label": "ab"[number % 2]} for number in range(40)]
    path = tmp_path / "marked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe |= {"train_file": str(path), "validation_file": str(path), "max_train_steps": 1}
    run = train(recipe)
    assert run.exit_code == 0, run.stderr
    assert run.stdout.count("[SEP]") == 1
    assert names(run.stdout, str(path), "row 1", "'text'", "'[SEP]'")
    try:
        output = str(tmp_path / "labelled.jsonl")
        assert report_outcome(main, ["--run", str(run.path), "--input", str(path), "--output", output]) == 0
    finally:
        forget_state()
