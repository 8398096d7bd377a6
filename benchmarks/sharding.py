"""Peak anonymous memory of each process where all weights are divided: in loading, ten steps, saving, final/ and resuming.

    python -m benchmarks.sharding --measure after.json        two processes, FSDP2 and ZeRO-3, on this machine's CPU
    python -m benchmarks.sharding --page before.json after.json    writes benchmarks/sharding.md

A Llama of 0.1B parameters with random weights, in float32 or saved in bf16. The kernel's own count of a process's anonymous
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
from onecurve.launcher.planning.memory import CPU_OVERHEAD_BYTES, estimate_memory
from onecurve.launcher.planning.work import Work
from tools.jobs import Job, write_script
from tools.trainings import DEMO, ROOT, build_news

PAGE = ROOT / "benchmarks" / "sharding.md"
SHAPE: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
TOPOLOGIES = {"FSDP2": "fsdp", "ZeRO-3": "deepspeed_zero3"}
PHASES = ("start", "load", "steps", "save", "final", "resume")
NUM_PROCESSES = 2
GB = 1e9

# Trains as training/run.py does, and notes in a file what each process is at.
_MARKS = """
from pathlib import Path
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter

def mark(name):
    Path(os.environ["PHASES"], os.environ["RANK"]).write_text(name)

def marked(name, call, then=None):
    def wrapped(*arguments, **more):
        mark(name)
        result = call(*arguments, **more)
        if then is not None:
            then(*arguments)
        mark("steps")
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


def build_llama(folder: Path, dtype: str) -> tuple[Path, int]:
    """Write a Llama with random weights and the demo's tokenizer; returns its folder and number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**SHAPE)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(DEMO / "model" / name, folder / name)
    return folder, sum(parameter.numel() for parameter in model.parameters())


def watch(settings: dict[str, Any], topology: str, folder: Path, first_phase: str) -> dict[str, int]:
    """Run a training to its end; returns the most anonymous bytes of any process in each phase."""
    phases = folder / "phases"
    shutil.rmtree(phases, ignore_errors=True)
    phases.mkdir()
    script = write_script(folder / "marked.py", _MARKS)
    variables = {"PHASES": str(phases), "FIRST_PHASE": first_phase, "PYTHONPATH": str(ROOT)}
    job = Job(settings, topology, NUM_PROCESSES, script=script, environment=variables)
    job.wait_until(lambda: len(list(phases.iterdir())) == NUM_PROCESSES, seconds=600, what="all processes")
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


def measure(dtypes: list[str]) -> dict[str, Any]:
    """Peaks by case and phase, and the number of parameters.

    Args:
        dtypes: of the model's files.
    """
    os.environ.update(HF_HUB_OFFLINE="1")
    peaks: dict[str, dict[str, int]] = {}
    parameters = 0
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["ONECURVE_CACHE"] = str(folder / "cache")
            build_news(folder)
            validation = folder / "validation.jsonl"
            validation.write_text(
                "".join(validation.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8"
            )
            model, parameters = build_llama(folder / "model", dtype)
            for strategy, topology in TOPOLOGIES.items():
                settings = {
                    "model_name_or_path": str(model), "train_file": str(folder / "train.jsonl"),
                    "validation_file": str(validation), "output_dir": str(folder / f"run_{topology}"),
                    "max_length": 16, "train_batch_size": 2, "per_device_batch_size": 1, "max_train_steps": 10,
                    "checkpointing_steps": 10,
                }  # fmt: skip
                found = watch(settings, topology, folder, "load")
                run = Path(str(settings["output_dir"]))
                shutil.rmtree(run / "final")
                (run / "status.json").unlink()
                found["resume"] = watch(settings, topology, folder, "resume")["resume"]
                shutil.rmtree(run)
                peaks[f"{strategy}, {dtype} files"] = found
                print(strategy, dtype, found, flush=True)
    return {"parameters": parameters, "peaks": peaks}


def write_page(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Write benchmarks/sharding.md."""
    share = 16 * after["parameters"] / NUM_PROCESSES
    bound = 1.25 * share + 1.5 * GB
    lines = [
        "# Peak anonymous memory of a process where all weights are divided",
        "",
        "<!-- Written by benchmarks/sharding.py. -->",
        "",
        f"{NUM_PROCESSES} processes on a CPU, a Llama of {after['parameters'] / 1e6:.0f} million parameters with random weights,",
        f"float32, 16 tokens. Its share of weights, gradients and moments is {share / GB:.2f} GB a process; what is allowed is",
        f"1.25 times as much and 1.5 GB: {bound / GB:.2f} GB. Each cell: before this way of loading and saving, and with it, in",
        "GB, of the process that has more. `start` is Python with its packages, before the training begins.",
        "",
        f"| case | {' | '.join(PHASES)} |",
        f"|---|{'---|' * len(PHASES)}",
    ]
    for case, peaks in after["peaks"].items():
        cells = [f"{before['peaks'][case][phase] / GB:.2f} -> {peaks[phase] / GB:.2f}" for phase in PHASES]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    above = [f"{case}, {phase}" for case, peaks in after["peaks"].items() for phase in PHASES if peaks[phase] > bound]
    lines += ["", f"More than is allowed: {'; '.join(above) or 'none'}."]
    shape = build_shape({"model_type": "llama", **SHAPE})
    for case, peaks in after["peaks"].items():
        planned = estimate_memory(shape, case.partition(",")[0], Work(1, 16), NUM_PROCESSES).peak + CPU_OVERHEAD_BYTES
        off = f"{planned / peaks['steps'] - 1:+.0%}"
        lines.append(f"{case}: `onecurve plan` predicts {planned / GB:.2f} GB for the steps ({off}).")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, or write the page from two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--page", type=Path, nargs=2)
    arguments = parser.parse_args()
    if arguments.measure:
        arguments.measure.write_text(json.dumps(measure(arguments.dtypes), indent=2), encoding="utf-8")
    if arguments.page:
        write_page(*(json.loads(path.read_text(encoding="utf-8")) for path in arguments.page))


if __name__ == "__main__":
    main()
