"""What a checkpoint costs where all weights are divided: what a save blocks, the whole of it, and a start from it.

    python -m benchmarks.saving_by_shares [--size 99M] [--rounds 5] [--starts 3]     writes benchmarks/saving_by_shares.md

Two processes, FSDP2 and ZeRO-3, on this machine's CPU and disk: a Llama with random weights. In each round, in turn, with all
processes writing and with one: every tensor is gathered and dropped, by torch's and DeepSpeed's own functions and as a save
gathers; a save, up to where training goes on; its end. Saves are measured with a copy of the whole state in memory, as on a GPU,
and in pieces, as where the training lies in host memory. A start
is measured from files that the system does not hold in memory, and so is the reading of their bytes, which all processes
share, in the same launch. Ratios within a round or a launch, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processor import describe_machine
from benchmarks.sharding import NUM_PROCESSES, SHAPES, TOPOLOGIES, build_llama
from onecurve.training.run_directory import PIECE_BYTES
from tools.jobs import Job, write_script
from tools.launches import share_operators
from tools.trainings import ROOT, build_news

PAGE = ROOT / "benchmarks" / "saving_by_shares.md"
PIECES = {"whole copy": 2**60, "pieces": PIECE_BYTES}
"""Bytes of a piece, by what is in memory."""

_COMMON = """
import json, time
from pathlib import Path
import torch

FOUND = Path(os.environ["FOUND"])

def meet():
    torch.distributed.barrier()
    return time.perf_counter()

def keep(content):
    if os.environ["RANK"] == "0":
        FOUND.write_text(json.dumps(content))
"""

# At its first save the training measures some, and leaves the last one behind.
_SAVES = (
    _COMMON
    + """
from torch.distributed.tensor import DTensor
from onecurve.training.parallel.gathering import Divided, Transfers
from onecurve.training.parallel.states import list_moments, list_weights, unwrap
from onecurve.training.recovery import checkpoint_writer
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter

checkpoint_writer.PIECE_BYTES = int(os.environ["PIECE_BYTES"])
save = CheckpointWriter.save

def list_states(writer):
    yield from list_weights(writer.accelerator, writer.model)
    yield from list_moments(writer.accelerator, writer.model, writer.optimizer)

def gather_on_all(writer):
    # As torch and DeepSpeed gather: whole on each process.
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for parameter in unwrap(writer.model).parameters():
        if hasattr(parameter, "ds_id"):
            safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                safe_get_full_optimizer_state(parameter, key)
        else:
            state = writer.optimizer.optimizer.state.get(parameter, {})
            for value in (parameter.detach(), *state.values()):
                if isinstance(value, DTensor):
                    value.full_tensor()

def gather_on_one(writer):
    # As a save does, into memory that is used again and again.
    transfers, memory, loads = Transfers(), {}, dict.fromkeys(writer.writers, 0)
    for name, tensor in list_states(writer):
        keeper = min(loads, key=loads.get)
        loads[keeper] += tensor.nbytes
        if isinstance(tensor, Divided) and keeper == writer.accelerator.process_index:
            if tensor.shape not in memory:
                memory[tensor.shape] = torch.empty(tensor.shape)
            transfers.receive(tensor, memory[tensor.shape])
        elif isinstance(tensor, Divided):
            transfers.send(tensor, keeper)
    transfers.finish()

def measure(writer, progress, is_best=False):
    everyone = writer.writers
    save(writer, progress)  # The first one makes the buffers.
    writer.wait()
    rounds = []
    for _ in range(int(os.environ["ROUNDS"])):
        found = {}
        for name, writers in (("all", everyone), ("one", everyone[:1])):
            if name == "one" and checkpoint_writer.PIECE_BYTES < 2**40:
                continue  # One process has one file.
            writer.writers = writers
            started = meet()
            gather_on_all(writer)
            on_all = meet()
            gather_on_one(writer)
            gathered = meet()
            save(writer, progress)
            blocked = meet()
            writer.wait()
            ended = meet()
            found[name] = {
                "gather on all": on_all - started, "gather": gathered - on_all, "blocks": blocked - gathered,
                "whole": ended - gathered,
            }
        rounds.append(found)
    writer.writers = everyone
    save(writer, progress)
    writer.wait()
    keep(rounds)
    meet()
    os._exit(0)

CheckpointWriter.save = measure
"""
)

# A start, in its parts; and then the bytes of the same files, which each process reads a part of.
_START = (
    _COMMON
    + """
from onecurve.training.recovery import resumption

seconds = {}

def timed(name, call):
    def wrapped(*arguments, **more):
        started = time.perf_counter()
        result = call(*arguments, **more)
        seconds[name] = time.perf_counter() - started
        return result
    return wrapped

def drop(paths):
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

def read(path):
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass

files = sorted(Path(os.environ["CHECKPOINT"]).glob("*.safetensors"))
drop(files)

def build(*arguments, **more):
    session = build_session(*arguments, **more)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meet()
    if rank == 0:
        drop(files)
    started = meet()
    for path in files[rank::size]:
        read(path)
    keep({**seconds, "read": meet() - started, "bytes": sum(path.stat().st_size for path in files)})
    meet()
    os._exit(0)

build_session, run.build = run.build, build
run.find_start = timed("verify", run.find_start)
building.load_weights = timed("weights", building.load_weights)
resumption.load_moments = timed("moments", resumption.load_moments)
"""
)


def run_script(script: str, settings: dict[str, Any], topology: str, folder: Path, **variables: str) -> Any:
    """Launch a training that measures; returns what it found."""
    found = folder / "found.json"
    found.unlink(missing_ok=True)
    path = write_script(folder / "measured.py", script)
    environment = {"FOUND": str(found), "PYTHONPATH": str(ROOT), **variables}
    result = Job(settings, topology, NUM_PROCESSES, script=path, environment=environment).finish(900)
    if not found.exists():
        raise SystemExit(result.stdout)
    return json.loads(found.read_text(encoding="utf-8"))


def measure(size: str, strategy: str, rounds: int, starts: int) -> dict[str, Any]:
    """Rounds of saves, by the bytes of a piece, and starts from the last checkpoint."""
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as name:
        folder = Path(name)
        os.environ["ONECURVE_CACHE"] = str(folder / "cache")
        build_news(folder)
        model, parameters = build_llama(folder / "model", size, "float32")
        settings = {
            "model_name_or_path": str(model), "train_file": str(folder / "train.jsonl"),
            "validation_file": str(folder / "validation.jsonl"), "output_dir": str(folder / "run"),
            "max_length": 16, "train_batch_size": 2, "per_device_batch_size": 1, "max_train_steps": 4,
            "max_eval_samples": 8, "checkpointing_steps": 2,
        }  # fmt: skip
        topology, saves = TOPOLOGIES[strategy], {}
        for name, piece_bytes in PIECES.items():
            shutil.rmtree(folder / "run", ignore_errors=True)
            more = {"ROUNDS": str(rounds), "PIECE_BYTES": str(piece_bytes)}
            saves[name] = run_script(_SAVES, settings, topology, folder, **more)
        checkpoint = str(folder / "run" / "checkpoints" / "step_00000002")
        found = [run_script(_START, settings, topology, folder, CHECKPOINT=checkpoint) for _ in range(starts)]
    return {"strategy": strategy, "size": size, "parameters": parameters, "saves": saves, "starts": found}


def to_rows(found: dict[str, Any]) -> list[str]:
    """Rows of saves."""
    rows = []
    for name, saves in found["saves"].items():
        for writers in ("all", "one") if name == "whole copy" else ("all",):
            rounds = [each[writers] for each in saves]
            cells = [found["size"], found["strategy"], name, writers]
            for phase in ("gather on all", "gather", "blocks", "whole"):
                cells.append(f"{median(each[phase] for each in rounds):.2f}")
            for base in ("gather", "gather on all"):
                cells.append(f"{median(each['blocks'] / each[base] for each in rounds):.2f}")
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def to_start_row(found: dict[str, Any]) -> str:
    """A row of starts."""
    starts = found["starts"]
    parts = ("verify", "weights", "moments")
    cells = [found["size"], found["strategy"]]
    cells += [f"{median(each[part] for each in starts):.2f}" for part in (*parts, "read")]
    cells.append(f"{median(sum(each[part] for part in parts) / each['read'] for each in starts):.2f}")
    cells.append(f"{starts[0]['bytes'] / 1e9:.2f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="99M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    share_operators()
    os.environ.update(HF_HUB_OFFLINE="1")
    machine = describe_machine()
    found = [measure(options.size, strategy, options.rounds, options.starts) for strategy in TOPOLOGIES]
    lines = [
        "# What a checkpoint costs where all weights are divided",
        "",
        "<!-- Written by benchmarks/saving_by_shares.py. -->",
        "",
        f"{NUM_PROCESSES} processes on {machine['cores']} cores of {machine['processor']}: a Llama with random weights in",
        f"float32 and its moments. Seconds, medians of {options.rounds} saves of each kind, in turn, and of {options.starts}",
        "starts; ratios within a round or a launch.",
        "",
        "## Saves",
        "",
        "`on all` is torch's and DeepSpeed's own gathering, by which each process has every tensor; `gather` is a save's, in",
        "which each goes to the one process that keeps it. A save blocks the training until all have arrived; a thread writes",
        "it, reads it back and computes checksums. With a copy of the whole state, as on a GPU, it writes afterwards; in pieces,",
        "as where the training lies in host memory, all but the last are written before the training goes on.",
        "",
        "| model | strategy | memory | write | on all | gather | blocks | whole | blocks / gather | blocks / on all |",
        "|" + "---|" * 10,
        *(row for each in found for row in to_rows(each)),
        "",
        "## Starts",
        "",
        "A start verifies all checksums on rank 0 before the processes meet, and reads each process's share; beside it the same",
        "bytes, read by both processes. Neither finds the files in memory.",
        "",
        "| model | strategy | verify | weights | moments | bytes read | start / read | GB |",
        "|" + "---|" * 8,
        *(to_start_row(each) for each in found),
    ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
