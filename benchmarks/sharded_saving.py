"""What a checkpoint of a divided model blocks, and what a start from it reads: two processes over gloo on this machine's CPU.

    python -m benchmarks.sharded_saving [--size 99M] [--rounds 5]

After a few steps of benchmarks/sharding.py's training, in each round and in turn: all tensors are gathered and let go; saved
by all processes; saved by one. Then: the checkpoint's bytes are read once, each process its part of them; loaded into the
training, as a resume does; and verified, which rank 0 does at a start. Seconds of wall and of processor time of all
processes' threads together; medians over rounds. A ratio is the median of those within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.sharding import NUM_PROCESSES, SHAPES, TOPOLOGIES, build_llama
from onecurve.training.cache import find_cache
from tools.jobs import Job, write_script
from tools.trainings import ROOT, build_news

# Runs in each process in the place of final/, when all steps are made.
_ROUNDS = """
import json, time
from pathlib import Path

import torch
from onecurve.training.models.tensor_files import TensorFiles
from onecurve.training.parallel.launch import Launch
from onecurve.training.parallel.states import load_moments, unwrap, whole_moments, whole_weights
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.manifest import find_fault

def timed(call):
    torch.distributed.barrier()
    started = time.perf_counter(), time.process_time()
    call()
    blocked = time.perf_counter() - started[0], time.process_time() - started[1]
    torch.distributed.barrier()
    return blocked

def measure(writer, *more):
    accelerator, model, optimizer, session = writer.accelerator, writer.model, writer.optimizer, run._KEPT[-1]
    rank, count, everyone = accelerator.process_index, accelerator.num_processes, writer.writers
    folder = writer.run.checkpoint(session.progress.step)

    def gather():
        for _ in whole_weights(accelerator, model):
            pass
        for _ in whole_moments(accelerator, model, optimizer):
            pass

    def save(writers):
        writer.writers, writer._is_held = writers, False
        writer.save(session.progress)

    def read():
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            begin, end = size * rank // count, size * (rank + 1) // count
            with path.open("rb") as file:
                file.seek(begin)
                while file.tell() < end:
                    file.read(min(1 << 24, end - file.tell()))

    def load():
        load_moments(accelerator, model, optimizer, folder, 10.0)
        parts = {name: parameter.to_local() if hasattr(parameter, "to_local") else parameter.ds_tensor
                 for name, parameter in unwrap(model).named_parameters()}
        cut = Launch.from_environment().find_cut()
        with torch.no_grad(), TensorFiles(folder / "model.safetensors") as file:
            for name in parts:
                part = cut.read(file, name)
                parts[name].flatten()[: part.numel()].copy_(part.flatten())

    found = []
    for number in range(int(os.environ["ROUNDS"]) + 1):
        times = {"gather": timed(gather)}
        for name, writers in (("all", everyone), ("one", everyone[:1])):
            started = time.perf_counter(), time.process_time()
            times[f"blocked, {name}"] = timed(lambda: save(writers))
            writer.wait()
            times[f"whole, {name}"] = time.perf_counter() - started[0], time.process_time() - started[1]
        times |= {"read": timed(read), "load": timed(load)}
        times["verify"] = timed(lambda: rank or find_fault(folder))
        found.append(times)
    # The first round allocates the copies.
    Path(os.environ["FOUND"], f"{rank}.json").write_text(json.dumps(found[1:]))
    torch.distributed.barrier()
    os._exit(0)

CheckpointWriter.save_final = measure
"""


def measure(size: str, strategy: str, rounds: int) -> list[list[dict[str, Any]]]:
    """By process and round: wall and processor seconds of each part."""
    # DeepSpeed's operator stays compiled, whatever becomes of the cache.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(find_cache() / "torch_extensions"))
    os.environ.update(HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ONECURVE_CACHE"] = str(folder / "cache")
        build_news(folder)
        model, _ = build_llama(folder / "model", size, "bfloat16")
        script = write_script(folder / "marked.py", _ROUNDS)
        settings = {
            "model_name_or_path": str(model), "train_file": str(folder / "train.jsonl"), "output_dir": str(folder / "run"),
            "max_length": 16, "train_batch_size": 2, "per_device_batch_size": 1, "max_train_steps": 2, "eval_steps": 1000,
            "checkpointing_steps": 2, "validation_file": str(folder / "few.jsonl"),
        }  # fmt: skip
        lines = (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "few.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
        variables = {"FOUND": str(folder), "ROUNDS": str(rounds), "PYTHONPATH": str(ROOT)}
        job = Job(settings, TOPOLOGIES[strategy], NUM_PROCESSES, script=script, environment=variables)
        job.process.wait()
        if job.process.returncode != 0:
            raise SystemExit(job.output)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_PROCESSES)]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="99M")
    parser.add_argument("--strategy", choices=TOPOLOGIES, default="FSDP2")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found = measure(arguments.size, arguments.strategy, arguments.rounds)
    # Of a round: the wall time of the slowest process, the processor time of all.
    rounds = [
        {name: (max(each[name][0] for each in at), sum(each[name][1] for each in at)) for name in at[0]}
        for at in zip(*found, strict=True)
    ]
    load = os.getloadavg()[0]
    print(f"{arguments.strategy}, {arguments.size}, {NUM_PROCESSES} processes, {len(rounds)} rounds, load {load:.0f}")
    for name in rounds[0]:
        wall, processor = (median(at[name][kind] for at in rounds) for kind in (0, 1))
        print(f"{name}: {wall:.2f} s, {processor:.2f} s of processor")
    for above, below in (("blocked, all", "gather"), ("blocked, one", "gather"), ("load", "read")):
        ratios = [median(at[above][kind] / at[below][kind] for at in rounds) for kind in (0, 1)]
        print(f"{above} / {below}: {ratios[0]:.2f} in wall time, {ratios[1]:.2f} in processor time")


if __name__ == "__main__":
    main()
