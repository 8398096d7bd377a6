"""How far two topologies come apart in bf16, where float32 keeps one curve. Prints deviations and writes docs/BF16.md.

    python -m benchmarks.bf16 [--only Llama] [--folder DIR]      about a quarter of an hour on two cores

Three models, 200 steps each, with dropout. A product in bf16 rounds each result to 8 bits, and the gradient of a weight is
rounded once a micro-batch; so another cut of a step into micro-batches gives another rounding, and training carries it on.
Where two topologies cut a step alike, only sums of float32 gradients can differ, in their order.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import write_data
from benchmarks.bf16_batches import Computed, compare_batches
from benchmarks.processor import describe_machine, describe_measurement
from tools.decoders import build_decoder
from tools.launches import ROOT, LaunchServer, build_arguments, build_environment
from tools.seq2seq import build_pair, build_seq2seq
from tools.trainings import Run, build_tiny_model, to_flags

PAGE = ROOT / "docs" / "BF16.md"
NUM_STEPS = 200
BATCH = 8
MAX_LENGTH = 32
_LLAMA = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Way:
    """How a model is trained, and by its name the way that it is compared with; "" is itself."""

    topology: str
    num_processes: int
    micro_batch: int
    reference: str
    settings: Mapping[str, Any]


_BF16 = {"mixed_precision": "bf16", "allow_slow_bf16": True}
_WHOLE, _HALVES, _SINGLE = "1 process, a step at once", "1 process, micro-batch 4", "1 process, micro-batch 1"
WAYS: dict[str, Way] = {
    _WHOLE: Way("cpu", 1, BATCH, "", _BF16),
    _HALVES: Way("cpu", 1, 4, _WHOLE, _BF16),
    _SINGLE: Way("cpu", 1, 1, _WHOLE, _BF16),
    "padded rows, a step at once": Way("cpu", 1, BATCH, _WHOLE, {**_BF16, "layout": "padded"}),
    "float32, 1 process, a step at once": Way("cpu", 1, BATCH, _WHOLE, {"mixed_precision": "no"}),
    # A step is cut alike: the same products everywhere.
    "DDP x 2, micro-batch 4": Way("multi_cpu", 2, 4, _HALVES, _BF16),
    "FSDP2 x 2, micro-batch 4": Way("fsdp", 2, 4, _HALVES, _BF16),
    "DDP x 2, micro-batch 1": Way("multi_cpu", 2, 1, _SINGLE, _BF16),
}


@dataclass(frozen=True)
class Parting:
    """How far a curve is from its reference.

    Attributes:
        largest, median: relative deviations of the loss of a step.
        mean: relative deviation of the mean loss of all steps.
        evaluation: relative deviation of the last evaluation's loss.
        accuracy: difference of the last evaluation's accuracy, in points of a hundred.
        num_equal: steps from the first one on whose loss has the same bits.
    """

    largest: float
    median: float
    mean: float
    evaluation: float
    accuracy: float
    num_equal: int


def build_models(folder: Path) -> dict[str, dict[str, Any]]:
    """Recipes of the models; writes what they name. Texts have 8 to 60 words."""
    news = write_data()
    for split in ("train", "validation"):
        rows = [json.loads(line) for line in (news / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        pairs = [json.dumps(build_pair(row["text"], number)) + "\n" for number, row in enumerate(rows)]
        (folder / f"pairs_{split}.jsonl").write_text("".join(pairs), encoding="utf-8")
    texts = {"train_file": news / "train.jsonl", "validation_file": news / "validation.jsonl"}
    return {
        "BERT (2 layers of 32, random weights), classes": {
            **texts,
            "model_name_or_path": build_tiny_model(folder / "bert"),
            "max_length": MAX_LENGTH,
            "learning_rate": 1e-3,
        },
        "Llama (4 layers of 128, random weights), next token": {
            **texts,
            "task": "causal_lm",
            "model_name_or_path": build_decoder(folder / "llama", shape=_LLAMA),
            "max_length": MAX_LENGTH,
            "learning_rate": 1e-3,
            "dropout": 0.1,
        },
        "T5 (2 + 2 layers of 32, random weights), text to text": {
            "task": "seq2seq_lm",
            "model_name_or_path": build_seq2seq(folder / "t5"),
            "train_file": folder / "pairs_train.jsonl",
            "validation_file": folder / "pairs_validation.jsonl",
            "max_length": MAX_LENGTH,
            "max_target_length": 16,
            "predict_with_generate": False,
            "learning_rate": 1e-3,
            "dropout": 0.1,
        },
    }


def is_finished(output: Path) -> bool:
    """Whether a training has left its run directory complete."""
    status = output / "status.json"
    return status.exists() and json.loads(status.read_text(encoding="utf-8"))["state"] == "finished"


def train(server: LaunchServer, recipe: Mapping[str, Any], way: Way, output: Path, num_steps: int = NUM_STEPS) -> Run:
    """Run one training, unless its run directory is finished.

    Raises:
        RuntimeError: the training failed.
    """
    if not is_finished(output):
        shutil.rmtree(output, ignore_errors=True)
        settings = {
            **recipe,
            **way.settings,
            "output_dir": output,
            "train_batch_size": BATCH,
            "per_device_batch_size": way.micro_batch,
            "max_train_steps": num_steps,
            "warmup_ratio": 0.1,
            "max_eval_samples": 200,
        }
        flags = to_flags({key: str(value) if isinstance(value, Path) else value for key, value in settings.items()})
        words = build_arguments(way.topology, way.num_processes, (), "training/run.py", flags)
        result = server.launch(words, build_environment({"ONECURVE_CACHE": str(output.parent / "cache")}))
        if result.returncode:
            raise RuntimeError(f"{output.name} failed:\n{result.stderr[-3000:]}")
    return Run(0, "", "", output)


def compare(run: Run, reference: Run) -> Parting:
    """Deviations of a run from its reference."""
    losses, wanted = np.array(run.losses), np.array(reference.losses)
    deviations = np.abs(losses / wanted - 1)
    last, wanted_last = run.evaluations[-1], reference.evaluations[-1]
    return Parting(
        largest=float(deviations.max()),
        median=statistics.median(deviations.tolist()),
        mean=abs(float(losses.mean() / wanted.mean()) - 1),
        evaluation=abs(last["eval_loss"] / wanted_last["eval_loss"] - 1),
        accuracy=100 * (last["eval_accuracy"] - wanted_last["eval_accuracy"]),
        num_equal=int(np.argmin([*(losses == wanted), False])),
    )


def measure(folder: Path, only: str, is_over: bool = False) -> dict[str, dict[str, Parting]]:
    """Train each model in each way, or if `is_over` take what is finished; deviations by model and way."""
    found: dict[str, dict[str, Parting]] = {}
    with LaunchServer() as server:
        for model, recipe in build_models(folder).items():
            runs: dict[str, Run] = {}
            found[model] = {}
            for place, (name, way) in enumerate(WAYS.items()):
                # Only a model of next tokens is packed by itself.
                if only not in model or ("layout" in way.settings and recipe.get("task") != "causal_lm"):
                    continue
                output = folder / f"{model.split()[0]}-{place}"
                if is_over and not is_finished(output):
                    continue
                runs[name] = train(server, recipe, way, output)
                if way.reference in runs:
                    parting = compare(runs[name], runs[way.reference])
                    found[model][name] = parting
                    print(f"{model}, {name}: {parting}", flush=True)
    return found


def load_batches(folder: Path) -> list[Computed]:
    """What bf16_batches.py measures, unless it is there already."""
    path = folder / "batches.json"
    if not path.exists():
        path.write_text(json.dumps([asdict(each) for each in compare_batches()]), encoding="utf-8")
    return [Computed(**each) for each in json.loads(path.read_text(encoding="utf-8"))]


_CURVES = f"""\
{NUM_STEPS} steps of {BATCH} texts of up to {MAX_LENGTH} tokens, with dropout 0.1.

In float32 the loss of every step is the same within 1e-5 on any topology ([INVARIANCE.md](INVARIANCE.md)). A number in bf16 has 8
bits, and the gradient of a weight is rounded to bf16 once a micro-batch. What counts is therefore how a step is cut:

- **Into the same micro-batches**, under DDP: every product is the same. Only the order can differ in which float32 gradients are
  added, and two gradients have one order: with two micro-batches a step, two processes have the bits of one.
- **Into others**, or with gradients added in another order: the losses differ from the first steps on, however small the first
  difference was, and stay as near to each other as bf16 is to float32. Nothing adds up: the mean loss agrees far better.
- **FSDP2** gives layers their weights in bf16, those of norms too, which DDP leaves in float32: other products, so another
  rounding. ZeRO was not measured in bf16.

Deviations are relative: of the loss of a step (the largest and the median), of the mean loss of all steps, and of the last
evaluation's loss. Accuracy, of texts or of tokens, differs by so many points of a hundred. Equal are the steps, counted from the
first, whose loss has the same bits.

| topology | compared with | step, largest | step, median | mean loss | evaluation | accuracy | equal |
|---|---|---|---|---|---|---|---|
"""

_KERNELS = """
TF32 exists on GPUs only and was not measured. Onecurve leaves torch's default, which multiplies float32 matrices in float32.

## Does a fixed order of sums make bf16 equal?

Batch-invariant kernels compute an example in an order of sums that does not depend on its neighbours. {num} texts went through
MiniLM twice, forward and backward in bf16, the second time in another order: with other neighbours, and with their gradients
added in that order. Forwards are equal where logits have the same bits; the gradient is that of all texts, and differs by so much
of its norm; the cost is in processor time.

| computed | equal forwards | gradient differs by | times the cost |
|---|---|---|---|
"""

_ANSWER = """
Forwards are the smaller part of it: where they are equal already, curves still differ, because the gradient of a weight is one
sum over all examples of a micro-batch. Each example alone has gradients of its own, and what is left is the order in which
float32 adds them up. Training in bf16 does not forgive even that: see micro-batch 1 above, where a last bit of float32 moves
some weight over the edge of a rounding. So equal curves on any number of processes need both, each example alone and gradients
gathered and added in one order instead of reduced: the cost of the table, and messages as many times as large as there are
processes. Onecurve does not do that. Where curves must agree step by step, train in float32; where bits must agree in bf16, keep
`per_device_batch_size` at half of `train_batch_size`, on one process or on two.
"""


def format_page(
    found: Mapping[str, Mapping[str, Parting]], batches: Sequence[Computed], machine: Mapping[str, Any]
) -> str:
    """docs/BF16.md."""
    measured = describe_measurement(machine, "python -m benchmarks.bf16")
    curves = []
    for model, ways in found.items():
        curves.append(f"| **{model}** | | | | | | | |")
        for name, each in ways.items():
            losses = f"{each.largest:.1e} | {each.median:.1e} | {each.mean:.1e} | {each.evaluation:.1e}"
            curves.append(f"| {name} | {WAYS[name].reference} | {losses} | {each.accuracy:+.2f} | {each.num_equal} |")
    kernels = [
        f"| {each.name} | {each.num_equal} | {each.gradient:.0e} | {each.cpu_seconds / batches[0].cpu_seconds:.2f} |"
        for each in batches
    ]
    tables = ("\n".join(lines) + "\n" for lines in (curves, kernels))
    parts = (f"# Curves in bf16\n\n{measured}\n{_CURVES}", _KERNELS.format(num=batches[0].num_examples))
    return "".join(text + table for text, table in zip(parts, tables, strict=True)) + _ANSWER


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the page, unless a part was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of a model's name; the page is then not written")
    parser.add_argument("--folder", help="keep the trainings here, and go on with what is there")
    parser.add_argument("--finished", action="store_true", help="train nothing: the page of what --folder has finished")
    options = parser.parse_args(arguments)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="onecurve-bf16-"))
    folder.mkdir(parents=True, exist_ok=True)
    found = measure(folder, options.only, options.finished)
    if not options.only:
        PAGE.write_text(format_page(found, load_batches(folder), describe_machine()), encoding="utf-8")
    if options.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
