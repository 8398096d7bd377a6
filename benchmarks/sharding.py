"""Peak anonymous memory of each process where all weights are divided: in loading, ten steps, saving, final/ and resuming.

    python -m benchmarks.sharding --measure 99M --into after.json    FSDP2 and ZeRO-3, two processes; --processes 4 has four
    python -m benchmarks.sharding --page before.json after.json      writes benchmarks/sharding.md

Llamas with random weights, saved in float32 or bf16. The kernel's own count of a process's anonymous
pages (RssAnon in /proc/PID/status) is read 200 times a second; mapped files do not count, the system can drop their pages.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from onecurve.launcher.facts.shape import build_shape
from onecurve.launcher.planning.memory import CPU_OVERHEAD_BYTES, STRATEGIES, estimate_memory
from onecurve.launcher.planning.work import Work, count_trained_parameters
from onecurve.training.recipe import Recipe
from tools.jobs import Job, write_script
from tools.launches import share_operators
from tools.trainings import DEMO, ROOT, build_news

PAGE = ROOT / "benchmarks" / "sharding.md"
_COMMON = {"vocab_size": 30522, "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "99M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, **_COMMON},
    "0.2B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18, "num_attention_heads": 16, **_COMMON},
    "0.5B": {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 27, "num_attention_heads": 20, **_COMMON},
}  # fmt: skip
TOPOLOGIES = {"FSDP2": "fsdp", "ZeRO-3": "deepspeed_zero3"}
PHASES = ("start", "load", "steps", "save", "final", "resume")
NUM_PROCESSES = 2
FOUR = ", 4 processes"
LORA = ", LoRA"  # Ends the name of a case where an adapter is trained.
GB = 1e9

# Trains as training/run.py does, and notes in a file what each process is at.
_MARKS = """
from pathlib import Path
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from tools.launches import share_operators

def mark(name):
    Path(os.environ["PHASES"], os.environ["RANK"]).write_text(name)

def marked(name, call, then=None):
    def wrapped(*arguments, **more):
        mark(name)
        result = call(*arguments, **more)
        if then is not None:
            then(*arguments)
        if name == os.environ["FIRST_PHASE"]:
            mark("steps")  # A save leaves its copy of the state, so the phase stays.
        return result
    return wrapped

def leave(*arguments):
    if os.environ["FIRST_PHASE"] == "resume":
        import torch
        torch.distributed.barrier()
        os._exit(0)

mark("start")
run.build = marked(os.environ["FIRST_PHASE"], run.build, leave)
CheckpointWriter.save = marked("save", CheckpointWriter.save, lambda writer, *more: writer.wait())
CheckpointWriter.save_final = marked("final", CheckpointWriter.save_final)
"""


def build_llama(folder: Path, size: str, dtype: str) -> tuple[Path, int]:
    """Write a Llama with random weights and the demo's tokenizer; returns its folder and number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**SHAPES[size])).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(DEMO / "model" / name, folder / name)
    return folder, sum(parameter.numel() for parameter in model.parameters())


def watch(
    settings: dict[str, Any], topology: str, num_processes: int, folder: Path, first_phase: str
) -> dict[str, int]:
    """Run a training to its end; returns the most anonymous bytes of any process in each phase."""
    phases = folder / "phases"
    shutil.rmtree(phases, ignore_errors=True)
    phases.mkdir()
    script = write_script(folder / "marked.py", _MARKS)
    variables = {"PHASES": str(phases), "FIRST_PHASE": first_phase, "PYTHONPATH": str(ROOT)}
    job = Job(settings, topology, num_processes, script=script, environment=variables)
    job.wait_until(lambda: len(list(phases.iterdir())) == num_processes, seconds=600, what="all processes")
    ranks, peaks = job.ranks(), dict.fromkeys(PHASES, 0)
    while job.is_running():
        for rank, process in enumerate(ranks):
            with contextlib.suppress(
                OSError, KeyError, IndexError
            ):  # A mark that is half written, or a process that has ended.
                phase = (phases / str(rank)).read_text()
                peaks[phase] = max(peaks[phase], _read_anonymous(process.pid))
        time.sleep(0.005)
    if job.process.returncode != 0:
        raise SystemExit(job.output)
    return peaks


def _read_anonymous(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def measure(size: str, dtypes: list[str], strategies: list[str], adapter: str, num_processes: int, into: Path) -> None:
    """Add a model's peaks by case and phase, and its number of parameters, to a file of measurements.

    Args:
        size: a key of `SHAPES`.
        dtypes: of the model's files.
        strategies: keys of `TOPOLOGIES`.
        adapter: the recipe's.
    """
    share_operators()
    os.environ.update(HF_HUB_OFFLINE="1")
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["ONECURVE_CACHE"] = str(folder / "cache")
            build_news(folder)
            validation = folder / "validation.jsonl"
            validation.write_text(
                "".join(validation.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8"
            )
            model, parameters = build_llama(folder / "model", size, dtype)
            for strategy in strategies:
                settings = {
                    "model_name_or_path": str(model), "train_file": str(folder / "train.jsonl"),
                    "validation_file": str(validation), "output_dir": str(folder / f"run_{TOPOLOGIES[strategy]}"),
                    "max_length": 16, "train_batch_size": num_processes, "per_device_batch_size": 1, "max_train_steps": 10,
                    "checkpointing_steps": 10, "adapter": adapter,
                }  # fmt: skip
                found = watch(settings, TOPOLOGIES[strategy], num_processes, folder, "load")
                run = Path(str(settings["output_dir"]))
                shutil.rmtree(run / "final")
                (run / "status.json").unlink()
                found["resume"] = watch(settings, TOPOLOGIES[strategy], num_processes, folder, "resume")["resume"]
                shutil.rmtree(run)
                print(size, strategy, dtype, found, flush=True)
                known = json.loads(into.read_text(encoding="utf-8")) if into.exists() else {}
                known.setdefault(size, {"parameters": parameters, "peaks": {}})
                case = f"{strategy}, {dtype} files" + (FOUR if num_processes == 4 else "")
                known[size]["peaks"][case + (LORA if adapter == "lora" else "")] = found
                into.write_text(json.dumps(known, indent=2), encoding="utf-8")


def find_share(size: str, case: str, parameters: int) -> float:
    """Bytes of a process's share of weights, gradients and moments; with LoRA only what is trained has the latter two."""
    return (4 * parameters + 12 * (count_trained(size, case) or parameters)) / count_processes(case)


def count_processes(case: str) -> int:
    """Of a case."""
    return 4 if FOUR in case else NUM_PROCESSES


def count_trained(size: str, case: str) -> int | None:
    """The parameters of a case's adapter; None without one."""
    recipe = Recipe(model_name_or_path="none", train_file=("none",), adapter="lora" if case.endswith(LORA) else "none")
    return count_trained_parameters(recipe, build_shape({"model_type": "llama", **SHAPES[size]}))


def find_bound(share: float) -> float:
    """Bytes that a process may hold: its share by 1.25, and 1.5 GB."""
    return 1.25 * share + 1.5 * GB


def predict(size: str, case: str) -> float:
    """Bytes of a process in a step, as `onecurve plan` counts them.

    Args:
        case: the strategy, and behind a comma the model's files and what is trained.
    """
    strategy = next(each for each in STRATEGIES if each == case.partition(",")[0])
    shape = build_shape({"model_type": "llama", **SHAPES[size]})
    work = Work(1, 16, trained_parameters=count_trained(size, case))
    return estimate_memory(shape, strategy, work, count_processes(case)).peak + CPU_OVERHEAD_BYTES


def write_page(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Write benchmarks/sharding.md."""
    lines = [
        "# Peak anonymous memory of a process where all weights are divided",
        "",
        "<!-- Written by benchmarks/sharding.py. -->",
        "",
        f"{NUM_PROCESSES} processes or four on a CPU, Llamas with random weights, float32, 16 tokens. Allowed is 1.25 times a",
        "process's share of weights, gradients and moments, and 1.5 GB. GB of the process that has more; an arrow leads from",
        "what it was before weights were read and written by shares. `start` is Python with its packages, before the",
        "training begins; `plan` is what `onecurve plan` predicts for the steps.",
        "",
        f"| model | case | share | allowed | {' | '.join(PHASES)} | plan |",
        f"|---|---|---|---|{'---|' * len(PHASES)}---|",
    ]
    above = []
    for size, found in after.items():
        for case, peaks in found["peaks"].items():
            share = find_share(size, case, found["parameters"])
            bound = find_bound(share)
            earlier = before.get(size, {"peaks": {}})["peaks"].get(case)
            old = {phase: "" if earlier is None else f"{earlier[phase] / GB:.2f} -> " for phase in PHASES}
            cells = [f"{old[phase]}{peaks[phase] / GB:.2f}" for phase in PHASES]
            planned = predict(size, case)
            cells.append(f"{planned / GB:.2f} ({planned / peaks['steps'] - 1:+.0%})")
            lines.append(f"| {size} | {case} | {share / GB:.2f} | {bound / GB:.2f} | {' | '.join(cells)} |")
            above += [f"{size}, {case}, {phase}" for phase in PHASES if peaks[phase] > bound]
    lines += ["", f"More than is allowed: {'; '.join(above) or 'none'}."]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, or write the page from two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=SHAPES)
    parser.add_argument("--into", type=Path, default=Path("sharding.json"))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--strategies", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--adapter", choices=("none", "lora"), default="none")
    parser.add_argument("--processes", type=int, choices=(2, 4), default=NUM_PROCESSES)
    parser.add_argument("--page", type=Path, nargs=2)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(
            arguments.measure, arguments.dtypes, arguments.strategies, arguments.adapter, arguments.processes,
            arguments.into,
        )  # fmt: skip
    if arguments.page:
        write_page(*(json.loads(path.read_text(encoding="utf-8")) for path in arguments.page))


if __name__ == "__main__":
    main()
