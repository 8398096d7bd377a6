"""Whether what makes training fast costs accuracy: many seeds of each way, against the tutorial's mathematics.

    python -m benchmarks.accuracy [--seeds 15]     about a minute a training on each core, four ways

The demo's real model and news, of each article as many words as `WORDS` says, drawn once: on the demo itself every text fills
its 128 tokens, and batches of near-equal length would change nothing. One epoch. Ways differ in what is named and in
nothing else; a seed gives all of them the same new head. Prints a table and writes benchmarks/accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.speed_data import DEMO, FOLDER, ROOT

PAGE = ROOT / "benchmarks" / "accuracy.md"

# Of an article, the fewest and the most.
WORDS = (8, 60)

_PLAIN = {"length_window": "1", "dropout_masks": "torch", "mixed_precision": "no"}
WAYS: dict[str, dict[str, str]] = {
    "the tutorial's mathematics: random order, torch's masks, float32": _PLAIN,
    "batches of near-equal length": {**_PLAIN, "length_window": "64"},
    "bf16 and masks by example": {**_PLAIN, "dropout_masks": "by_example", "mixed_precision": "bf16"},
    "all of these, which is Onecurve in bf16": {"mixed_precision": "bf16"},
}


def write_data() -> Path:
    """The demo's rows, cut to a random number of words, the same in every call."""
    folder = FOLDER / "data" / "accuracy"
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for split in ("train", "validation"):
        rows = [json.loads(line) for line in (DEMO / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row["text"] = " ".join(row["text"].split()[: generator.randint(*WORDS)])
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def train(settings: Mapping[str, str], seed: int, data: Path) -> float:
    """Train once, on one core; returns the accuracy on the validation data after the last step, between 0 and 1."""
    output = FOLDER / "runs" / f"accuracy_{'_'.join(settings.values())}_{seed}"
    shutil.rmtree(output, ignore_errors=True)
    recipe = {
        "config": "training/recipes/demo.yaml",
        "train_file": str(data / "train.jsonl"),
        "validation_file": str(data / "validation.jsonl"),
        "seed": str(seed),
        "per_device_batch_size": "4",  # Only fewer padded tokens: a step's texts are the same.
        "output_dir": str(output),
        **settings,
    }
    command = [sys.executable, "training/run.py"]
    command += [word for key, value in recipe.items() for word in (f"--{key}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ONECURVE_CACHE": str(FOLDER / "cache")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(output)
    return float([line["eval_accuracy"] for line in lines if line["event"] == "eval"][-1])


def describe_difference(differences: Sequence[float]) -> str:
    """The mean difference and its standard error, in points of a hundred."""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{100 * statistics.mean(differences):+.2f} ± {100 * error:.2f}"


def to_markdown(found: Mapping[str, Sequence[float]], num_validated: int) -> str:
    """The page."""
    plain = next(iter(found.values()))
    lines = [
        "# Accuracy of the fast settings",
        "",
        f"What `python -m benchmarks.accuracy --seeds {len(plain)}` wrote: one epoch of the demo's model on the demo's news, of",
        f"each article {WORDS[0]} to {WORDS[1]} words; accuracy on {num_validated} articles, mean over {len(plain)} seeds. The",
        "difference is taken seed by seed, and stands with its standard error.",
        "",
        "| way | accuracy | lowest to highest | points over the tutorial's |",
        "|---|---|---|---|",
    ]
    for way, accuracies in found.items():
        difference = describe_difference([a - b for a, b in zip(accuracies, plain, strict=True)])
        lines.append(
            f"| {way} | {statistics.mean(accuracies):.2%} | {min(accuracies):.1%} to {max(accuracies):.1%} | "
            f"{'' if accuracies is plain else difference} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str]) -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=15, help="at least 2")
    parser.add_argument("--print", action="store_true", help="write no page")
    options = parser.parse_args(arguments)
    data = write_data()
    num_validated = len((data / "validation.jsonl").read_text(encoding="utf-8").splitlines())
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with ThreadPoolExecutor(os.cpu_count() or 1) as cores:
        trainings = {
            (way, seed): cores.submit(train, settings, seed, data)
            for seed in range(1, options.seeds + 1)
            for way, settings in WAYS.items()
        }
        for (way, seed), training in trainings.items():
            found[way].append(training.result())
            print(f"seed {seed}, {way}: {found[way][-1]:.4f}", flush=True)
    text = to_markdown(found, num_validated)
    print(text)
    if not options.print:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
