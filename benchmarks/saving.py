"""What a checkpoint costs the training: the copy that blocks, against a save that is waited for, against a step.

    python -m benchmarks.saving [--rounds 7]

The demo's model with its moments, on this machine's disk. In each round, in turn: some steps; the same with a checkpoint
that is written beside them; the same with one that is waited for. Ratios within a round, medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification

from onecurve.training.parallel.states import count_state_bytes
from onecurve.training.record.console import quiet_third_parties
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.milestones import Progress
from onecurve.training.run_directory import RunDirectory

MODEL = Path(__file__).parent.parent / "build" / "demo" / "model"

# Long enough for a save beside them to be written.
STEPS_A_ROUND = 6


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    quiet_third_parties()
    accelerator = Accelerator(cpu=True)
    plain = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=5)
    num_bytes = count_state_bytes(plain)
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=1e-5, fused=True))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer)
    tokens = torch.randint(1000, 20000, (16, 128))
    labels = torch.randint(0, 5, (16,))

    def make_steps() -> float:
        started = time.perf_counter()
        for _ in range(STEPS_A_ROUND):
            accelerator.backward(model(input_ids=tokens, labels=labels).loss)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory(dir=Path.cwd() / "build") as folder:
        writer = CheckpointWriter(accelerator, model, optimizer, scheduler, RunDirectory(Path(folder)), 1)
        make_steps()
        writer.save(Progress(1))  # The first one makes the buffers.
        writer.wait()
        steps, beside, copies, waited, saves = [], [], [], [], []
        for _ in range(rounds):
            steps.append(make_steps())
            started = time.perf_counter()
            writer.save(Progress(1))
            copies.append(time.perf_counter() - started)
            make_steps()
            beside.append(time.perf_counter() - started)
            writer.wait()
            started = time.perf_counter()
            writer.save(Progress(1))
            writer.wait()
            saves.append(time.perf_counter() - started)
            make_steps()
            waited.append(time.perf_counter() - started)
        writer.wait()

    def ratio(above: list[float], below: list[float]) -> float:
        return median(a / b for a, b in zip(above, below, strict=True))

    step = median(steps) / STEPS_A_ROUND
    print(f"{num_bytes / 1e6:.0f} MB of weights and moments, {os.cpu_count()} cores, medians of {rounds} rounds")
    print(f"a step of 16 x 128 tokens: {step * 1e3:.0f} ms")
    print(
        f"the copy, for which training waits: {median(copies) * 1e3:.0f} ms = {ratio(copies, saves):.3f} of a whole save"
    )
    print(f"a whole save, waited for: {median(saves) * 1e3:.0f} ms = {median(saves) / step:.2f} steps")
    print(f"{STEPS_A_ROUND} steps with a save beside them: {ratio(beside, steps):.3f} of the same without")
    print(f"{STEPS_A_ROUND} steps with a save that is waited for: {ratio(waited, steps):.3f}")


if __name__ == "__main__":
    main()
