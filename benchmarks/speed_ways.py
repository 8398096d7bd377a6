"""One way to train, in a process of its own that takes its turn when `benchmarks.speed` says so.

    python -m benchmarks.speed_ways e minilm_short     # then type {"do": "train", "steps": 4}

a  the tutorial's native loop: everything padded to 512 tokens, float32
b  transformers.Trainer as it comes
c  Trainer at its best here: bf16 where the processor has it, its length sampling, fused AdamW, the attention that is
   fastest on this machine
d  accelerate's own example (nlp_example.py): padded to the longest of each batch
e  Onecurve: training/run.py itself, bf16 where the processor has it
f  bare PyTorch on the batches that e has just trained on: the floor, run by e's process between its turns
h, i  e and c with torch.compile (benchmarks.mfu)
j  e with torch's dropout masks
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers import logging as transformers_logging

from benchmarks.gate import TurnGate, answer, synchronize
from benchmarks.processor import PRECISION
from benchmarks.speed_data import FOLDER, WORKLOADS, Workload, build_workload

# What e's recipe says besides the workload. The others get the same rate; nobody's ever ends.
LEARNING_RATE = 1e-4
NUM_STEPS = 1_000_000

# benchmarks.mfu sets another one.
DEVICE = os.environ.get("BENCHMARK_DEVICE", "cpu")
# benchmarks.speed chooses it for the processor.
MIXED = os.environ.get(PRECISION, "bf16")
# With dropout on a CPU, SDPA takes its slow path; elsewhere it is the faster one.
ATTENTION_OF_C = "eager" if DEVICE == "cpu" else None


# Rows, inner size and columns of the matrix products that say what the device can do.
_PRODUCTS = ((4096, 768, 3072), (4096, 384, 1536), (2048, 2048, 2048))
_LARGE_PRODUCTS = ((16384, 1024, 4096), (8192, 8192, 8192))


class Gate(TurnGate):
    """A gate that counts what a model trains on at the model itself."""

    def __init__(self, model: torch.nn.Module, validation: Path, tokenizer: Any) -> None:
        super().__init__(DEVICE)
        self._model = model
        self._validation = validation
        self._tokenizer = tokenizer
        self.answers |= {"peak": measure_peak, "accuracy": self.measure_accuracy}
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: object, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if model.training:  # type: ignore[attr-defined]
            tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
            # Without a mask there is no padding. Neither is read before the turn is over.
            full = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
            self._lengths.append(full if mask is None else mask.sum(dim=1))
            self._num_padded += tokens.numel()

    def forget(self) -> None:
        """Count anew."""
        self._lengths: list[torch.Tensor] = []
        self._num_padded = 0

    def describe(self) -> dict[str, Any]:
        """Tokens of each text, and places that were computed."""
        return {"lengths": torch.cat(self._lengths).tolist(), "padded": self._num_padded}

    def measure_accuracy(self) -> dict[str, Any]:
        """Accuracy on the validation texts, measured alike for everyone."""
        rows = [json.loads(line) for line in self._validation.read_text(encoding="utf-8").splitlines()]
        rows.sort(key=lambda row: len(row["text"]))
        names = sorted({row["label"] for row in rows})
        num_right = 0
        self._model.eval()
        for start in range(0, len(rows), 10):
            chunk = rows[start : start + 10]
            inputs = self._tokenizer(
                [row["text"] for row in chunk], truncation=True, max_length=512, padding=True, return_tensors="pt"
            )
            inputs = inputs.to(DEVICE)
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=MIXED == "bf16"):
                logits = type(self._model).forward(self._model, **inputs).logits  # type: ignore[operator]
            num_right += sum(names[i] == row["label"] for i, row in zip(logits.argmax(-1).tolist(), chunk, strict=True))
        self._model.train()
        return {"accuracy": num_right / len(rows)}


def measure_peak() -> dict[str, Any]:
    """The fastest matrix product of a few shapes in each precision, in FLOP/s."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16) if MIXED == "bf16" else (torch.float32,):
        best = 0.0
        for rows, inner, columns in _PRODUCTS if DEVICE == "cpu" else _LARGE_PRODUCTS:
            left = torch.randn(rows, inner, dtype=dtype, device=DEVICE)
            right = torch.randn(inner, columns, dtype=dtype, device=DEVICE)
            out = torch.empty(rows, columns, dtype=dtype, device=DEVICE)
            for _ in range(8):
                synchronize(DEVICE)
                started = time.perf_counter()
                torch.mm(left, right, out=out)
                synchronize(DEVICE)
                best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started))
        found[str(dtype).removeprefix("torch.")] = best
    return found


# The data as the tutorials hold it --------------------------------------------------------------------------------------


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenized rows in memory."""

    def __init__(self, path: str, tokenizer: Any, padding: bool | str) -> None:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        names = sorted({row["label"] for row in rows})
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=512, padding=padding)
        self.column_names = [*encoded.keys(), "labels"]
        self.rows = [
            {**{name: values[i] for name, values in encoded.items()}, "labels": names.index(row["label"])}
            for i, row in enumerate(rows)
        ]
        self.num_labels = len(names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def build_parts(
    settings: Mapping[str, str], padding: bool | str, attention: str | None = None
) -> tuple[Any, Examples, torch.nn.Module]:
    """Tokenizer, training data and model."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    data = Examples(settings["train_file"], tokenizer, padding)
    torch.manual_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(
        settings["model_name_or_path"], num_labels=data.num_labels, attn_implementation=attention
    )
    return tokenizer, data, model


# The ways -----------------------------------------------------------------------------------------------------------------


def run_tutorial(workload: Workload, settings: Mapping[str, str]) -> None:
    """The transformers tutorial's "train in native PyTorch"."""
    tokenizer, data, model = build_parts(settings, "max_length")
    gate = Gate(model, Path(settings["validation_file"]), tokenizer)
    # Padded to 512, a larger batch would not fit into memory.
    batch_size = min(workload.train_batch_size, workload.padded_examples)
    loader = DataLoader(data, shuffle=True, batch_size=batch_size, collate_fn=DataCollatorWithPadding(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = get_scheduler("linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=NUM_STEPS)
    answer({"ready": True})
    gate.after_step()
    model.train()
    while True:
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            gate.after_step()


def run_trainer(workload: Workload, settings: Mapping[str, str], is_tuned: bool, compiles: bool = False) -> None:
    """transformers.Trainer."""
    tokenizer, data, model = build_parts(settings, False, ATTENTION_OF_C if is_tuned else None)
    gate = Gate(model, Path(settings["validation_file"]), tokenizer)

    class Turns(TrainerCallback):
        def on_train_begin(self, *arguments: object, **others: object) -> None:
            gate.after_step()

        def on_step_end(self, *arguments: object, **others: object) -> None:
            gate.after_step()

    best: dict[str, Any] = {
        "bf16": MIXED == "bf16",
        "train_sampling_strategy": "group_by_length",
        "optim": "adamw_torch_fused",
    }
    micro_batch_size = min(workload.train_batch_size, workload.micro_batch_size)
    arguments = TrainingArguments(
        output_dir=str(FOLDER / "runs" / "trainer"),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=workload.train_batch_size // micro_batch_size,
        learning_rate=LEARNING_RATE,
        max_steps=NUM_STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=DEVICE == "cpu",
        dataloader_pin_memory=DEVICE == "cuda",
        torch_compile=compiles,
        **(best if is_tuned else {}),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Turns()],
    )
    answer({"ready": True})
    trainer.train()


def run_accelerate_example(workload: Workload, settings: Mapping[str, str]) -> None:
    """accelerate's examples/nlp_example.py."""
    from accelerate import Accelerator

    tokenizer, data, model = build_parts(settings, False)
    gate = Gate(model, Path(settings["validation_file"]), tokenizer)
    accelerator = Accelerator(cpu=True)
    micro_batch_size = min(workload.train_batch_size, workload.micro_batch_size)
    num_accumulated = workload.train_batch_size // micro_batch_size
    loader = DataLoader(
        data, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer), batch_size=micro_batch_size, drop_last=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=100, num_training_steps=NUM_STEPS)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    answer({"ready": True})
    gate.after_step()
    model.train()
    while True:
        for number, batch in enumerate(loader):
            loss = model(**batch).loss / num_accumulated
            accelerator.backward(loss)
            if (number + 1) % num_accumulated == 0:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                gate.after_step()


@dataclasses.dataclass
class GatedLoader:
    """e's own loader, which lets a step begin when it is e's turn, and times how long the loop waits for data."""

    loader: Any
    gate: Gate
    waited: float = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.turn: list[dict[str, Any]] = []
        batches = iter(self.loader)
        batch = next(batches)
        while True:
            if batch["micro_batch"].position == 0:
                self.gate.after_step()
            self.turn.append(dict(batch))
            yield batch
            started = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - started

    def take(self) -> dict[str, Any]:
        """What this turn adds to its answer."""
        found = {"waited": self.waited}
        self.waited, self.last_turn, self.turn = 0.0, self.turn, []
        return found


def run_onecurve(workload: Workload, settings: Mapping[str, str], flags: list[str]) -> None:
    """training/run.py, with its loader behind a gate."""
    from onecurve.training import run
    from onecurve.training.building import build
    from onecurve.training.outcome import report_outcome
    from onecurve.training.session import Session

    def build_gated(*arguments: Any, **options: Any) -> Session:
        session = build(*arguments, **options)
        gate = Gate(
            session.accelerator.unwrap_model(session.model), Path(settings["validation_file"]), session.processor
        )
        gated = GatedLoader(session.train_loader, gate)
        gate.extra = gated.take
        gate.answers["floor"] = lambda: run_floor(session, gated.last_turn)
        answer({"ready": True})
        return dataclasses.replace(session, train_loader=gated)  # type: ignore[arg-type]

    program: Any = run  # Its own name for what is replaced is no public one.
    program.build = build_gated
    recipe = {
        **settings,
        "mixed_precision": MIXED,
        "per_device_batch_size": str(workload.micro_batch_size),
        "learning_rate": str(LEARNING_RATE),
        "max_train_steps": str(NUM_STEPS),
        "eval_steps": str(NUM_STEPS),
        "resume": "never",
        "output_dir": str(FOLDER / "runs" / f"onecurve_{workload.name}_{os.getpid()}"),
    }
    sys.exit(report_outcome(run.main, [word for key, value in recipe.items() for word in (f"--{key}", value)] + flags))


def run_floor(session: Any, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Nothing but forward, backward, clip and step, on batches that are there already."""
    model, optimizer = session.accelerator.unwrap_model(session.model), session.optimizer.optimizer
    forward = type(model).forward  # Without accelerate's wrapping.
    started, cpu_started = time.perf_counter(), time.process_time()
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("micro_batch", "labels")}
        with torch.autocast(DEVICE, torch.bfloat16, enabled=MIXED == "bf16"):
            logits = forward(model, **inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum")
        (loss / batch["micro_batch"].global_count).backward()  # type: ignore[no-untyped-call]
        if batch["micro_batch"].is_last:
            torch.nn.utils.clip_grad_norm_(model.parameters(), session.recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    lengths = [length for batch in batches for length in _find_lengths(batch)]
    num_padded = sum(batch["input_ids"].numel() for batch in batches)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "lengths": lengths, "padded": num_padded}


def _find_lengths(batch: Mapping[str, Any]) -> list[int]:
    """Tokens of each row; there is no mask where no row is padded."""
    rows, longest = batch["input_ids"].shape
    mask = batch["attention_mask"]
    return [longest] * rows if mask is None else list(mask.sum(dim=1).tolist())


def main(way: str, workload: Workload, flags: list[str]) -> None:
    """Set up one way and wait for turns."""
    if DEVICE == "cuda" and way != "b":
        # Built anew for each length of a batch: Trainer at its best does without it too.
        torch.backends.cuda.enable_cudnn_sdp(False)
    settings = build_workload(workload)
    if way == "a":
        run_tutorial(workload, settings)
    elif way in ("b", "c", "i"):
        run_trainer(workload, settings, is_tuned=way != "b", compiles=way == "i")
    elif way == "d":
        run_accelerate_example(workload, settings)
    else:
        own = {"h": ["--torch_compile", "true"], "j": ["--dropout_masks", "torch"]}
        run_onecurve(workload, settings, [*flags, *own.get(way, [])])


if __name__ == "__main__":
    main(sys.argv[1], WORKLOADS[sys.argv[2]], sys.argv[3:])
