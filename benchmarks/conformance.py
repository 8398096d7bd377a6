"""Others' own checks replayed on Onecurve and beside it on Trainer, trl and accelerate's example loop.

    make conformance                          about two minutes on two idle cores; writes docs/CONFORMANCE.md
    python -m benchmarks.conformance --folder build/conformance    keeps the trainings there, and goes on with those it finds

Each check keeps the rule and the bound that its project has for itself, on tiny models and the same examples in the same
steps. A way that holds a check better than Onecurve stands in the table as such.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks import conformance_alignment as alignment
from benchmarks.conformance_curve import (
    LESSONS,
    TOPOLOGIES,
    Curve,
    build_settings,
    measure_eval_loss,
    name_curve,
)
from benchmarks.invariance import build_data
from benchmarks.processor import describe_machine
from benchmarks.references import format_rows
from onecurve.training.run_directory import RunDirectory
from tools.launches import LaunchServer, build_arguments, build_environment, share_operators
from tools.trainings import to_flags

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "CONFORMANCE.md"
NUM_STEPS = 26
FULL_STEPS = 12
"""Steps before the first that has fewer examples: 200 rows are 12 x 16 + 8."""
WAYS = ("Onecurve", "Trainer", "SFTTrainer", "accelerate")
RESUMES = {"ZeRO-1": "deepspeed_zero1", "ZeRO-3": "deepspeed_zero3", "FSDP2": "fsdp"}
HEADINGS = ["check", "rule", *WAYS]

Curves = Mapping[tuple[int, int], Curve]
Launch = Callable[[str, int, str, Sequence[str]], None]


@dataclass(frozen=True)
class Verdict:
    """How a way does in a check; a figure says by how much."""

    holds: bool
    figure: str

    def __str__(self) -> str:
        return f"{'holds' if self.holds else '**fails**'}: {self.figure}"


# Checks of curves ----------------------------------------------------------------------------------------------------


def _others(curves: Curves) -> list[Curve]:
    return [curve for topology, curve in curves.items() if topology != (1, 1)]


def of_full_batches(check: Callable[[Curves], Verdict]) -> Callable[[Curves], Verdict]:
    """The check of the steps before the first uneven one, after which weights may differ."""

    def run(curves: Curves) -> Verdict:
        return check(
            {
                topology: replace(
                    curve,
                    losses=curve.losses[:FULL_STEPS],
                    grad_norms=curve.grad_norms[:FULL_STEPS],
                    rates=curve.rates[:FULL_STEPS],
                )
                for topology, curve in curves.items()
            }
        )

    return run


def _relative(one: Sequence[float], other: Sequence[float]) -> float:
    if len(one) != len(other):
        return math.inf
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(one, other, strict=True))


def check_gradients(curves: Curves, bound: float = 1e-2) -> Verdict:
    """accelerate's test_sync: accumulated and reduced gradients are those of the whole batch."""
    whole = curves[1, 1].grad_norms
    figure = max(_relative(curve.grad_norms, whole) for curve in _others(curves))
    return Verdict(figure <= bound, f"{figure:.1e}")


def check_rates(curves: Curves) -> Verdict:
    """accelerate's test_sync: the learning rates are those of one process, step by step."""
    whole = curves[1, 1].rates
    figure = max(_relative(curve.rates, whole) for curve in _others(curves))
    return Verdict(figure <= 1e-12, f"{figure:.1e}")


def check_count(curves: Curves, num_examples: int) -> Verdict:
    """accelerate's test_metrics: metrics are computed from each example once."""
    counts = sorted({curve.num_evaluated for curve in curves.values()})
    return Verdict(counts == [num_examples], f"{' and '.join(map(str, counts))} of {num_examples}")


def check_eval_loss(curves: Curves, bound: float = 1e-5) -> Verdict:
    """Beside test_metrics: the loss that is reported is the mean over all targets."""
    figure = max(abs(curve.eval_loss / curve.true_eval_loss - 1) for curve in curves.values())
    return Verdict(figure <= bound, f"{figure:.1e}")


def check_alignment(curves: Curves, bound: float = 0.01, num_steps: int = 5) -> Verdict:
    """transformers' test_gradient_accumulation_loss_alignment: the first losses with and without accumulation."""
    whole, cut = curves[1, 1].losses[:num_steps], curves[1, 4].losses[:num_steps]
    figure = max(abs(a - b) for a, b in zip(whole, cut, strict=True))
    return Verdict(figure < bound, f"{figure:.1e}")


def check_invariance(curves: Curves, bound: float = 5e-3, drift: float = 1e-3) -> Verdict:
    """trl's tests/invariant: loss and gradient norm of every step, and no drift, over accumulation and two ranks."""
    most, mean = 0.0, 0.0
    for curve in _others(curves):
        for name in ("losses", "grad_norms"):
            one, other = getattr(curve, name), getattr(curves[1, 1], name)
            if len(one) != len(other):
                return Verdict(False, f"{len(one)} steps, not {len(other)}")
            differences = [a - b for a, b in zip(one, other, strict=True)]
            most = max(most, *map(abs, differences))
            mean = max(mean, abs(sum(differences) / len(differences)))
    return Verdict(most <= bound and mean <= drift, f"{most:.1e}, drift {mean:.1e}")


# What is measured ----------------------------------------------------------------------------------------------------


def launch_by(server: LaunchServer, folder: Path) -> Launch:
    """Starts programs by a server that has torch imported, with one thread each and a cache of their own."""

    def launch(topology: str, num_processes: int, script: str, arguments: Sequence[str]) -> None:
        words = build_arguments(topology, num_processes, (), script, arguments)
        variables = {"ONECURVE_CACHE": str(folder / "cache")}
        result = server.launch(words, build_environment(variables))
        if result.returncode:
            raise SystemExit(
                f"{script} on {num_processes} of {topology} failed:\n{result.stdout[-500:]}{result.stderr[-3000:]}"
            )

    return launch


def train_onecurve(launch: Launch, lesson: str, folder: Path, num_steps: int, topology: tuple[int, int]) -> Curve:
    """training/run.py on some processes, with some micro-batches each."""
    num_processes, accumulation = topology
    settings = build_settings(lesson, folder, num_steps, 16 // (num_processes * accumulation))
    output = folder / f"onecurve_{lesson}_{num_processes}x{accumulation}"
    flags = to_flags({**settings, "output_dir": str(output)})
    if not (output / "final").is_dir():
        launch("multi_cpu" if num_processes > 1 else "cpu", num_processes, "training/run.py", flags)
    return read_onecurve(output, lesson, folder)


def read_onecurve(output: Path, lesson: str, folder: Path) -> Curve:
    """A run directory; the true loss of its final model is computed here."""
    import transformers

    from benchmarks.references_lesson import build_lesson
    from onecurve.training.config import load_recipe, parse_arguments

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    predictions = (output / "eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    recipe = load_recipe(*parse_arguments(to_flags(build_settings(lesson, folder, len(steps))))).recipe
    validation = build_lesson(recipe).validation
    names = [name for name in validation.column_names if name not in ("row", "prompt_length")]
    kind = "AutoModelForCausalLM" if lesson == "decoder" else "AutoModelForSequenceClassification"
    model = getattr(transformers, kind).from_pretrained(output / "final")
    return Curve(
        [line["loss"] for line in steps],
        [line["grad_norm"] for line in steps],
        [line["learning_rate"] for line in steps],
        [line["eval_loss"] for line in lines if line["event"] == "eval"][-1],
        measure_eval_loss(model, list(validation.select_columns(names))),
        len(predictions),
    )


def measure_curves(launch: Launch, folder: Path, num_steps: int) -> dict[str, dict[str, Curves]]:
    """By lesson and way, the curves of all topologies."""
    for num_processes in (1, 2):
        topology, last = "multi_cpu" if num_processes > 1 else "cpu", [*LESSONS][-1]
        if not (folder / name_curve("Trainer", last, num_processes, 4)).exists():
            launch(topology, num_processes, "benchmarks/conformance_peers.py", [str(folder), str(num_steps)])
    found: dict[str, dict[str, Curves]] = {}
    for lesson in LESSONS:
        train = partial(train_onecurve, launch, lesson, folder, num_steps)
        found[lesson] = {"Onecurve": {topology: train(topology) for topology in TOPOLOGIES}}
        for way in WAYS[1:]:
            paths = {topology: folder / name_curve(way, lesson, *topology) for topology in TOPOLOGIES}
            if all(path.exists() for path in paths.values()):
                found[lesson][way] = {topology: Curve.load(path) for topology, path in paths.items()}
    return found


def measure_alignment(launch: Launch, folder: Path) -> dict[str, alignment.Losses]:
    """By way, the losses of each variant of transformers' rule; of the peers those that `measure_curves` left."""
    found: dict[str, dict[str, Sequence[float]]] = {"Onecurve": {}}
    for variant in alignment.VARIANTS:
        settings = alignment.build_alignment(folder, variant)
        if not (output := Path(settings["output_dir"]) / "final").is_dir():
            launch("cpu", 1, "training/run.py", to_flags(settings))
        found["Onecurve"][variant] = _read_losses(output.parent)
    for way in WAYS[1:]:
        paths = {variant: folder / alignment.name_losses(way, variant) for variant in alignment.VARIANTS}
        found[way] = {variant: Curve.load(path).losses for variant, path in paths.items() if path.exists()}
    return {way: losses for way, losses in found.items() if losses}


def check_resume(launch: Launch, folder: Path, strategy: str, first: int, second: int, num_steps: int = 8) -> Verdict:
    """DeepSpeed's "train at n, load at m": stopped on some processes, gone on with on others, beside a run that was not.

    Moments that were lost or dealt wrongly show in the losses of the steps that follow.
    """
    settings = {**build_settings("classifier", folder, num_steps, 4), "resume": "auto"}
    whole, resumed = folder / "whole", folder / f"{strategy}_{first}_{second}"
    if not (whole / "final").is_dir():
        launch("cpu", 1, "training/run.py", to_flags({**settings, "output_dir": str(whole)}))
    if not _has_finished_twice(resumed):
        shutil.rmtree(resumed, ignore_errors=True)
        flags = to_flags({**settings, "output_dir": str(resumed), "checkpointing_steps": num_steps // 2})
        launch(strategy, first, "training/run.py", flags)
        # As a kill in the second half leaves it.
        (resumed / "status.json").unlink()
        shutil.rmtree(resumed / "checkpoints" / f"step_{num_steps:08d}", ignore_errors=True)
        launch(strategy, second, "training/run.py", flags)
    curves = [_read_losses(run) for run in (resumed, whole)]
    figure = _relative(*curves)
    return Verdict(figure <= 1e-5, f"{figure:.1e}")


def _has_finished_twice(run: Path) -> bool:
    found = RunDirectory(run)
    return found.read_environment().get("num_starts") == 2 and (found.read_status() or {}).get("state") == "finished"


def _read_losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["event"] == "train"]


# The page ------------------------------------------------------------------------------------------------------------


def build_rows(
    curves: Mapping[str, Mapping[str, Curves]], resumed: Mapping[str, Verdict], num_validation: int
) -> list[list[str]]:
    """A row for each check and lesson."""
    checks: list[tuple[str, str, Callable[[Curves], Verdict]]] = [
        ("accelerate test_sync: gradients", "gradient norms within 1e-2", of_full_batches(check_gradients)),
        ("beside it: uneven last steps too", "gradient norms within 1e-2", check_gradients),
        ("accelerate test_sync: schedule", "the same learning rates", check_rates),
        ("accelerate test_metrics", "each example counts once", partial(check_count, num_examples=num_validation)),
        ("beside it: evaluation loss", "the mean over all targets, within 1e-5", check_eval_loss),
        ("transformers: loss alignment", "first 5 losses within 0.01", check_alignment),
        ("trl tests/invariant", "every step within 5e-3, mean within 1e-3", of_full_batches(check_invariance)),
        ("beside it: uneven last steps too", "the same, over two epochs", check_invariance),
    ]
    rows = []
    for lesson, ways in curves.items():
        for name, rule, check in checks:
            cells = [str(check(ways[way])) if way in ways else "-" for way in WAYS]
            rows.append([f"{name} ({lesson})", rule, *cells])
    for name, verdict in resumed.items():
        rows.append(
            [f"DeepSpeed, train at n, load at m: {name}", "losses go on, within 1e-5", str(verdict), "-", "-", "-"]
        )
    return rows


def build_alignment_rows(losses: Mapping[str, alignment.Losses]) -> list[list[str]]:
    """transformers' accumulation rule: the right loss, and the one with the fault, which must be seen."""
    rows = []
    for name, rule, variant, holds in (
        ("transformers: loss alignment (ragged decoder)", "5 losses within 0.01", "cut", alignment.is_aligned),
        ("the same with the old fault put in", "seen: more than 0.7 apart", "broken", alignment.is_seen_broken),
    ):
        cells = {
            way: str(Verdict(holds(found), f"{alignment.measure_distance(found, variant):.1e}"))
            for way, found in losses.items()
            if variant in found
        }
        rows.append([name, rule, *(cells.get(way, "-") for way in WAYS)])
    return rows


def build_chat_rows(folder: Path) -> list[list[str]]:
    """torchtitan's checks, of Onecurve and of trl."""
    from transformers import AutoTokenizer

    from benchmarks.conformance_chats import (
        INVALID,
        build_chat_model,
        chats_of_onecurve,
        chats_of_trl,
        is_resumed_exactly,
    )

    tokenizer = AutoTokenizer.from_pretrained(build_chat_model(folder))
    ways = {"Onecurve": chats_of_onecurve(folder), "SFTTrainer": chats_of_trl(folder)}
    rows = []
    for name, rule, check in (
        (
            "only answers are targets",
            "exactly the answer and its end",
            lambda chats: (chats.has_only_answers(tokenizer), ""),
        ),
        ("shifted once", "a target is the token at its place", lambda chats: (chats.is_shifted_once(), "")),
        ("packed: positions", "begin anew with each chat", lambda chats: (chats.begins_anew(), "")),
        (
            "packed: attention",
            "logits as of each chat alone, within 1e-5",
            lambda chats: (chats.packed_deviation <= 1e-5, f"{chats.packed_deviation:.1e}"),
        ),
        (
            "invalid chats",
            f"{len(INVALID)} kinds are refused or left out",
            lambda chats: (len(chats.refused) == len(INVALID), f"{len(chats.refused)} of {len(INVALID)}"),
        ),
    ):
        cells = {way: _word(*check(chats)) for way, chats in ways.items() if chats is not None}
        rows.append([f"torchtitan chats: {name}", rule, *(cells.get(way, "-") for way in WAYS)])
    holds = _word(is_resumed_exactly(), "")
    rows.append(["torchtitan chats: resume", "the same data on each rank, past an epoch", holds, "-", "-", "-"])
    return rows


def _word(holds: bool, figure: str) -> str:
    return str(Verdict(holds, figure)).removesuffix(": ")


def format_page(rows: Sequence[Sequence[str]], num_steps: int) -> str:
    """The text of docs/CONFORMANCE.md."""
    machine = describe_machine()
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    return f"""# Conformance

`make conformance` wrote this page: the checks that other projects have for themselves, replayed on Onecurve and on three other
ways of training. {num_steps} steps in float32 on a CPU; {versions}{_describe_trl()}.

{format_rows(HEADINGS, rows)}

How to read it:

- All ways get the same weights, examples and order, 16 examples a step, from 200 rows, so the last step of each epoch has 8. Each
  trains on one process with one and with four micro-batches, and on two processes over gloo with one and four each. The first is
  what the others are compared with; a figure is the largest relative difference, of trl's rule the largest absolute one.
- The projects check full batches. The rows beside go on over the uneven last step of an epoch. There Trainer and trl on two
  processes repeat examples so that both have as many, and accelerate's loop divides by micro-batches that do not come.
- `accelerate` is the loop of its examples: `accumulate`, the model's own mean loss of each micro-batch, a prepared schedule,
  `gather_for_metrics`.
- Where a step's micro-batches hold unequal numbers of targets, a mean of their means is not the mean of the step. Onecurve
  divides by the count of the whole step; Trainer and trl do for decoders, and are as exact as Onecurve there. A classifier's
  gradient and loss Trainer multiplies by micro-batches and processes, its evaluation loss by processes
  ([REFERENCES.md](REFERENCES.md)).
- An evaluation loss that is a mean over batches is not one over targets. It is no part of accelerate's check, which counts.
- DeepSpeed's check converts a checkpoint and loads it on another number of processes. Onecurve's checkpoints need no conversion.
  The other ways are not measured here: `-` says so.
- transformers' rule is replayed in full on the ragged decoder: half of its rows have a single token. With the old fault put in (a
  loss that does not know the step's number of targets: a task file of 20 lines for Onecurve, `model_accepts_loss_kwargs` off for
  Trainer and trl) the losses part, so the check can fail. accelerate's loop has that fault by itself: its first row shows it.
- torchtitan refuses a chat that is not one question and one answer. Onecurve and trl are made for other chats too (a system
  message, tools, several turns). Where the assistant's part is learned, Onecurve refuses an answer to nobody, leaves out a chat
  without an answer, and of a chat that ends with a question that question: it is counted, and the answers before it are learned.
- torchtitan drops a chat that is longer than the context without a word. Onecurve and trl cut it, so that check is not replayed.

The originals: `accelerate/test_utils/scripts/test_sync.py` and `external_deps/test_metrics.py`; transformers'
`tests/trainer` (gradient accumulation loss alignment); trl's `tests/invariant/test_invariant.py`; torchtitan's
`tests/unit_tests/cpu/test_chat_dataset.py`; DeepSpeed's `tests/unit/checkpoint/test_universal_checkpoint.py`. Models and data are
smaller here, and theirs are not copied.
"""


def _describe_trl() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f", trl {version('trl')}"
    except PackageNotFoundError:
        return "; trl is not installed"


def measure(folder: Path, num_steps: int, resumes: Sequence[tuple[str, int, int]]) -> list[list[str]]:
    """All checks; rows of the table."""
    if not (folder / "decoder").is_dir():
        build_data(folder)
    alignment.build_rows(folder)
    num_validation = len((folder / "validation.jsonl").read_text(encoding="utf-8").splitlines())
    with LaunchServer() as server:
        launch = launch_by(server, folder)
        curves = measure_curves(launch, folder, num_steps)
        aligned = build_alignment_rows(measure_alignment(launch, folder))
        resumed = {
            f"{name}, {first} -> {second}": check_resume(launch, folder, RESUMES[name], first, second)
            for name, first, second in resumes
        }
    return build_rows(curves, resumed, num_validation) + aligned + build_chat_rows(folder)


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where trainings are kept; a temporary one otherwise")
    parser.add_argument(
        "--resumes", nargs="*", help="such as ZeRO-1:2:1; all strategies on 2 -> 1 and 1 -> 2 otherwise"
    )
    folder, wanted = (parsed := parser.parse_args(arguments)).folder, parsed.resumes
    resumes = [(name, first, second) for name in RESUMES for first, second in ((2, 1), (1, 2))]
    if wanted is not None:
        resumes = [each for each in resumes if ":".join(map(str, each)) in wanted]
    share_operators()
    with tempfile.TemporaryDirectory(prefix="onecurve-conformance-") as temporary:
        folder = (folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["ONECURVE_CACHE"] = str(folder / "cache")
        PAGE.write_text(format_page(measure(folder, NUM_STEPS, resumes), NUM_STEPS), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
