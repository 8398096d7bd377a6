"""From `accelerate launch` to the first step, beside the imports alone; and how fast texts become tokens.

    python -m benchmarks.first_step           about two minutes on two idle cores
    python -m benchmarks.first_step --quick   once each

Prints a table, and writes it to build/benchmarks for benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed import Lock, describe_spread
from benchmarks.speed_data import DEMO, FOLDER, ROOT, read_long

# What any training script of this kind must import, and no more.
_BARE_IMPORTS = (
    "import torch, accelerate, datasets\nfrom transformers import BertForSequenceClassification, AutoTokenizer\n"
)
_OUR_IMPORTS = "import training.run\nfrom transformers import BertForSequenceClassification\n"

_LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]


def time_until(command: Sequence[str], mark: str) -> float:
    """Seconds from the start of a command to the line that begins with `mark`; what it goes on to do is ended.

    Raises:
        SystemExit: the command ended without that line.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "ONECURVE_CACHE": str(FOLDER / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(mark):
            seconds = time.perf_counter() - started
            os.killpg(process.pid, 9)
            process.wait()
            return seconds
    raise SystemExit(f"{' '.join(command)} never said {mark!r}:\n{''.join(said)[-3000:]}")


def measure_start(num_rounds: int, lock: Lock) -> list[tuple[str, list[float]]]:
    """Seconds of each kind of start, taking turns."""
    scripts = FOLDER / "starts"
    scripts.mkdir(parents=True, exist_ok=True)
    commands: dict[str, list[str]] = {}
    for name, text in {"the imports any such script needs": _BARE_IMPORTS, "our imports": _OUR_IMPORTS}.items():
        path = scripts / f"{name.split()[0]}.py"
        path.write_text(text + "print('here', flush=True)\n", encoding="utf-8")
        commands[name] = [*_LAUNCH, str(path)]
    run = ["training/run.py", "--config", "training/recipes/demo.yaml", "--resume", "never"]
    run += ["--train_batch_size", "1"]  # The three steps before the line take no time to speak of.
    run += ["--output_dir", str(FOLDER / "runs" / "first_step")]
    commands["second start of the demo, until its first step's line"] = [*_LAUNCH, *run]
    found: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(num_rounds + 1):
        with lock.round():
            for name, command in commands.items():
                shutil.rmtree(FOLDER / "runs" / "first_step", ignore_errors=True)
                seconds = time_until(command, "step 1/" if "demo" in name else "here")
                if number:  # The first tokenizes, and reads every file for the first time.
                    found[name].append(seconds)
    return list(found.items())


def measure_tokenizing(num_rounds: int, lock: Lock) -> dict[str, list[float]]:
    """Tokens a second of the bare tokenizer on ready strings, of the task, and of the whole preparation from file to disk."""
    import datasets
    from tokenizers import Tokenizer

    from onecurve.training.config import load_recipe
    from onecurve.training.data.preparation import prepare_data
    from onecurve.training.models.loading import load_config
    from onecurve.training.tasks import build_task
    from onecurve.training.tasks.processors import TOKENIZER
    from onecurve.training.tasks.texts import encode_texts

    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = [row["text"] for row in read_long()] * 4
    file = FOLDER / "texts.jsonl"
    rows = ({"text": text, "label": number % 2} for number, text in enumerate(texts))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = load_recipe(
        None,
        {"model_name_or_path": str(DEMO / "model"), "train_file": str(file), "validation_fraction": "0.001"},
    ).recipe
    tokenizer = TOKENIZER.load(recipe, load_config(recipe))
    bare = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    bare.enable_truncation(512)
    bare.no_padding()

    def run_bare() -> int:
        return sum(len(encoding.ids) for encoding in bare.encode_batch_fast(texts))

    def run_task() -> int:
        return sum(
            len(ids)
            for start in range(0, len(texts), 2000)
            for ids in encode_texts([texts[start : start + 2000]], tokenizer, recipe)["input_ids"]
        )

    def run_all() -> int:
        os.environ["ONECURVE_CACHE"] = str(FOLDER / "tokenizing")
        shutil.rmtree(FOLDER / "tokenizing", ignore_errors=True)
        data = prepare_data(recipe, build_task(recipe), tokenizer)
        return int(data.train.lengths.sum() + data.validation.lengths.sum())

    ways: dict[str, Callable[[], int]] = {
        "`tokenizers` alone, ready strings": run_bare,
        "our tokenizing of ready strings": run_task,
        "file to disk: read, checked, tokenized, written": run_all,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds + 1):
        with lock.round():
            for name, call in ways.items():
                started = time.perf_counter()
                num_tokens = call()
                if number:
                    found[name].append(num_tokens / (time.perf_counter() - started))
    return found


def to_markdown(starts: Sequence[tuple[str, list[float]]], rates: dict[str, list[float]]) -> str:
    """The two tables for RESULTS.md."""

    def ratios(mine: Sequence[float], theirs: Sequence[float]) -> str:
        return f"{statistics.median(a / b for a, b in zip(mine, theirs, strict=True)):.2f}"

    base = starts[0][1]
    lines = [
        "## Start (`python -m benchmarks.first_step`)",
        "",
        "| `accelerate launch` of | seconds | of the imports |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {describe_spread(seconds)} | {ratios(seconds, base)} |" for name, seconds in starts]
    fastest = next(iter(rates.values()))
    lines += [
        "",
        "The line of a step is written two steps late, so the last row holds three steps, of one text each.",
        "",
    ]
    lines += ["## Tokenizing", "", "| way | million tokens/s | of the bare tokenizer |", "|---|---|---|"]
    lines += [
        f"| {name} | {describe_spread([rate / 1e6 for rate in found], 2)} | {ratios(found, fastest)} |"
        for name, found in rates.items()
    ]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="once each; writes nothing")
    parser.add_argument("--lock", type=Path, help="a file whose lock is held during each round")
    options: Any = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    num_rounds = 1 if options.quick else 3
    lock = Lock(options.lock)
    text = to_markdown(measure_start(num_rounds, lock), measure_tokenizing(num_rounds, lock))
    lock.release()
    print(text)
    if not options.quick:
        (FOLDER / "results").mkdir(parents=True, exist_ok=True)
        (FOLDER / "results" / "part_2_start.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
