"""A tiny T5 and a tiny BART with random weights, and sources with targets that they can learn in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.decoders import VOCABULARY, train_tokenizer
from tools.questions import build_question
from tools.trainings import DEMO

SPECIAL_TOKENS = ("<pad>", "</s>", "<s>", "<unk>")


def build_seq2seq(folder: Path, family: str = "t5") -> Path:
    """Write a model, and a byte-level tokenizer that ends every text with `</s>`."""
    import torch
    import transformers
    from tokenizers import processors

    backend = train_tokenizer(SPECIAL_TOKENS)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1}
    if family == "t5":
        # Of version 1.1. A ReLU's gradient jumps where rounding moves an input across zero: curves would part there.
        shared |= {"feed_forward_proj": "gated-gelu"}
        config: Any = transformers.T5Config(
            **shared, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0
        )
    else:
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2}
        ends = {"bos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": 1}
        config = transformers.BartConfig(**shared, **heads, **sizes, **ends, max_position_embeddings=256, dropout=0.0)
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return folder


def build_pair(text: str, number: int) -> dict[str, Any]:
    """A source of up to 40 words with a drink somewhere among them, and a target that names the drink."""
    question = build_question(text, number, most_words=40)
    source, [target] = question["context"], question["answers"]["text"]
    return {"source": source, "target": target, "translation": {"en": source, "de": target}}


def build_pairs(folder: Path) -> Path:
    """Write train.jsonl (203 rows) and validation.jsonl (61)."""
    for split, count in (("train", 203), ("validation", 61)):
        whole = (DEMO / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [
            build_pair(json.loads(line)["text"], number) for number, line in enumerate(whole[:: len(whole) // count])
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows[:count])) + "\n", encoding="utf-8")
    return folder
