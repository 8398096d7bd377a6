"""Whether what makes training fast, or one curve, costs accuracy: many seeds of each way, against the first of them.

    python -m benchmarks.accuracy settings [--seeds 15]    about a minute a training on each core, four ways
    python -m benchmarks.accuracy masks [--seeds 12]       dropout masks by example against torch's, two ways

The demo's real model and news, of each article as many words as `WORDS` says, drawn once: on the demo itself every text fills
its 128 tokens, and batches of near-equal length would change nothing. Ways differ in what is named and in nothing else; a
seed gives all of them the same new head. Prints a table and writes its section of benchmarks/accuracy.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import os
import random
import re
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed_data import DEMO, FOLDER, ROOT
from tools.launches import LaunchServer, build_arguments, build_environment
from tools.trainings import to_flags

PAGE = ROOT / "benchmarks" / "accuracy.md"

# Of an article, the fewest and the most.
WORDS = (8, 60)

_PLAIN = {"length_window": "1", "dropout_masks": "torch", "mixed_precision": "no"}
# The first way of a comparison is what the others are compared with.
WAYS: dict[str, dict[str, str]] = {
    "the tutorial's mathematics: random order, torch's masks, float32": _PLAIN,
    "batches of near-equal length": {**_PLAIN, "length_window": "64"},
    "bf16 and masks by example": {**_PLAIN, "dropout_masks": "by_example", "mixed_precision": "bf16"},
    "all of these, which is Onecurve in bf16": {"mixed_precision": "bf16"},
}
# Same order, same head, float32: with a seed, nothing but the masks differs. Few and short, so that twelve seeds take minutes.
_FEW = {"max_train_samples": "400", "max_length": "16", "learning_rate": "3e-4"}
MASKS = {
    "`dropout_masks: torch`": {**_FEW, "dropout_masks": "torch"},
    "`dropout_masks: by_example`": {**_FEW, "dropout_masks": "by_example"},
}


@dataclass(frozen=True)
class Comparison:
    """A section of the page: its heading, what was trained, and the ways."""

    title: str
    training: str
    ways: Mapping[str, Mapping[str, str]]


COMPARISONS = {
    "settings": Comparison("Fast settings", "one epoch of the demo's model on the demo's news", WAYS),
    "masks": Comparison(
        "Dropout masks by example",
        "the demo's model with its own dropout of 0.1, in float32, one epoch of 400 of the demo's news, cut to 16 tokens",
        MASKS,
    ),
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


def train(settings: Mapping[str, str], seed: int, data: Path, server: LaunchServer) -> float:
    """Train once, on one core; returns the accuracy on the validation data after the last step, between 0 and 1."""
    output = FOLDER / "runs" / f"accuracy_{'_'.join(settings.values())}_{seed}"
    shutil.rmtree(output, ignore_errors=True)
    recipe = {
        "config": "training/recipes/demo.yaml",
        "train_file": str(data / "train.jsonl"),
        "validation_file": str(data / "validation.jsonl"),
        "seed": str(seed),
        "eval_steps": "1000000",
        "per_device_batch_size": "4",  # Only fewer padded tokens: a step's texts are the same.
        "output_dir": str(output),
        **settings,
    }
    words = build_arguments("cpu", None, (), "training/run.py", to_flags(recipe))
    result = server.launch(words, build_environment({"ONECURVE_CACHE": str(FOLDER / "cache")}))
    if result.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{result.stderr[-3000:]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(output)
    return float([line["eval_accuracy"] for line in lines if line["event"] == "eval"][-1])


def describe_difference(differences: Sequence[float]) -> str:
    """The mean difference and its standard error, in points of a hundred."""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{100 * statistics.mean(differences):+.2f} ± {100 * error:.2f}"


def find_chance(differences: Sequence[float]) -> float:
    """How often chance alone gives a mean difference as far from 0, if both ways are alike: between 0 and 1.

    Fisher's exact test of pairs: were there no difference, each could as well have the other sign. All signs are tried.
    """
    found = abs(sum(differences)) * (1 - 1e-9)  # Sums of the same numbers in another order are equal.
    signs = itertools.product((1, -1), repeat=len(differences))
    sums: list[float] = [abs(sum(map(operator.mul, differences, each))) for each in signs]
    return sum(each >= found for each in sums) / len(sums)


def to_markdown(name: str, found: Mapping[str, Sequence[float]], num_validated: int) -> str:
    """A comparison's section of the page, from accuracies by way and seed."""
    plain = next(iter(found.values()))
    lines = [
        f"## {COMPARISONS[name].title}",
        "",
        f"What `python -m benchmarks.accuracy {name} --seeds {len(plain)}` wrote: {COMPARISONS[name].training}, of each",
        f"article {WORDS[0]} to {WORDS[1]} words; accuracy on {num_validated} articles, mean over {len(plain)} seeds. The",
        "difference from the first way is taken seed by seed, and has its standard error; chance is how often two ways that",
        "are alike differ by as much (exact test, all signs of the differences).",
        "",
        "| way | accuracy | deviation of a seed | lowest to highest | points over the first way | chance |",
        "|---|---|---|---|---|---|",
    ]
    for way, accuracies in found.items():
        differences = [a - b for a, b in zip(accuracies, plain, strict=True)]
        compared = f"{describe_difference(differences)} | {find_chance(differences):.2f}"
        lines.append(
            f"| {way} | {statistics.mean(accuracies):.2%} | {100 * statistics.stdev(accuracies):.2f} | "
            f"{min(accuracies):.1%} to {max(accuracies):.1%} | {' | ' if accuracies is plain else compared} |"
        )
    return "\n".join([*lines, ""])


def replace_section(page: str, section: str) -> str:
    """The page with this section in place of the one with its heading, or at the end."""
    heading = section.partition("\n")[0]
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    others = [part.strip() for part in parts]
    places = [number for number, part in enumerate(others) if part.partition("\n")[0] == heading]
    if places:
        others[places[0]] = section.strip()
    else:
        others.append(section.strip())
    return "\n\n".join(others) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--seeds", type=int, default=12, help="at least 2")
    parser.add_argument("--print", action="store_true", help="write no page")
    options = parser.parse_args(arguments)
    data = write_data()
    num_validated = len((data / "validation.jsonl").read_text(encoding="utf-8").splitlines())
    ways = COMPARISONS[options.comparison].ways
    found: dict[str, list[float]] = {way: [] for way in ways}
    with LaunchServer() as server, ThreadPoolExecutor(os.cpu_count() or 1) as cores:
        trainings = {
            (way, seed): cores.submit(train, settings, seed, data, server)
            for seed in range(1, options.seeds + 1)
            for way, settings in ways.items()
        }
        for (way, seed), training in trainings.items():
            found[way].append(training.result())
            print(f"seed {seed}, {way}: {found[way][-1]:.4f}", flush=True)
    section = to_markdown(options.comparison, found, num_validated)
    print(section)
    if not options.print:
        PAGE.write_text(replace_section(PAGE.read_text(encoding="utf-8"), section), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
