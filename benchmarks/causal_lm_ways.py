"""One way to train a causal language model, in a process of its own that takes its turn when `benchmarks.causal_lm` says so.

    python -m benchmarks.causal_lm_ways e dialogues     # then type {"do": "train", "steps": 2}

t  TRL's SFTTrainer at its best on padded rows: bf16 where the processor has it, sampling by length, fused AdamW, no
   checkpointing of activations
q  the same without padding: its padding_free
p  the same with its packing
e  Onecurve: training/run.py itself, packed
o  Onecurve, padded
f  bare PyTorch on the batches that e has just trained on, run by e's process: the floor
x  e without an adapter, whatever the others have

All have the tokens and targets that Onecurve's preparation makes of the data. With --adapter lora they train adapters.
"""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers import logging as transformers_logging

from benchmarks.causal_lm_data import WORKLOADS, Workload
from benchmarks.gate import TurnGate, answer
from benchmarks.processor import PRECISION
from benchmarks.speed_data import FOLDER
from onecurve.training.config import load_recipe, parse_arguments
from onecurve.training.data.plan import Order
from onecurve.training.data.preparation import prepare_data
from onecurve.training.models.loading import load_task

LEARNING_RATE = 1e-4
NUM_STEPS = 1_000_000
MIXED = os.environ.get(PRECISION, "no")
NO_TARGET = -100


@dataclasses.dataclass
class Work:
    """What a loop did: tokens that are no padding, places that were computed, and targets."""

    tokens: int = 0
    places: int = 0
    targets: int = 0

    def add(self, tokens: int, places: int, labels: torch.Tensor) -> None:
        """Add a batch; `labels` [rows, length] as the model gets them, the first of every sequence none."""
        self.tokens += tokens
        self.places += places
        self.targets += int((labels != NO_TARGET).sum())


class Gate(TurnGate):
    """A gate whose loop counts its batches in `work`, and whose optimizer can be asked for what it holds."""

    gradient_bytes = 0

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the gradients whenever the optimizer makes its step, and at its moments when asked to."""

        def look(*arguments: object) -> None:
            self.gradient_bytes = sum(
                each.grad.nbytes
                for group in optimizer.param_groups
                for each in group["params"]
                if each.grad is not None
            )

        optimizer.register_step_pre_hook(look)
        self.answers["held"] = lambda: {
            "gradients": self.gradient_bytes,
            "moments": sum(
                value.nbytes for state in optimizer.state.values() for name, value in state.items() if name != "step"
            ),
        }

    def save_with(self, save: Callable[[], Path]) -> None:
        """Let the bytes of a checkpoint's tensors be asked for; `save` writes one and gives its folder."""
        self.answers["checkpoint"] = lambda: {
            "bytes": sum(path.stat().st_size for path in save().iterdir() if path.suffix in (".safetensors", ".pt"))
        }

    def forget(self) -> None:
        """Count anew."""
        self.work = Work()

    def describe(self) -> dict[str, Any]:
        """What the batches held."""
        return dataclasses.asdict(self.work)


# TRL ----------------------------------------------------------------------------------------------------------------------


def read_examples(recipe: dict[str, str]) -> tuple[datasets.Dataset, Order]:
    """Tokens and labels as Onecurve prepares them, the first label of each example none: TRL trains on them as they are.

    And the order in which Onecurve takes them.
    """
    loaded = load_recipe(*parse_arguments(to_flags(recipe))).recipe
    task, _, tokenizer = load_task(loaded)
    train = prepare_data(loaded, task, tokenizer).train
    rows = {name: [row.tolist() for row in train.examples[name][:]] for name in ("input_ids", "labels")}
    order = Order(len(train), loaded.train_batch_size, loaded.seed, train.lengths, loaded.length_window)
    return datasets.Dataset.from_dict(rows), order


class PlannedBatches(torch.utils.data.Sampler[int]):
    """The examples of Onecurve's steps, one step after the other, so that each step of both has the same."""

    def __init__(self, order: Order) -> None:
        self._order, self._epoch = order, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch begins."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._order.num_examples

    def __iter__(self) -> Iterator[int]:
        first = self._epoch * self._order.steps_per_epoch
        steps = range(first, first + self._order.steps_per_epoch)
        return (int(row) for step in steps for row in self._order.global_batch(step))


class ShuffledBatches(torch.utils.data.Sampler[int]):
    """The batches of a sampler by length in another order: its own begins with the longest, and a turn sees only a few."""

    def __init__(self, rows: torch.utils.data.Sampler[int], batch_size: int) -> None:
        self._rows, self._batch_size = rows, batch_size

    def __len__(self) -> int:
        return len(self._rows)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        rows, size = list(self._rows), self._batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        last = batches.pop() if len(batches[-1]) < size else []
        random.Random(42).shuffle(batches)
        return chain(*batches, last)


def build_arguments(way: str, workload: Workload, mean_length: float) -> dict[str, Any]:
    """What SFTTrainer is told in each way; a step has as many examples as Onecurve's, packed as many tokens."""
    if way == "p":
        rows = max(1, round(workload.train_batch_size * mean_length / workload.packed_length))
        return {
            "packing": True,
            "max_length": workload.packed_length,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": rows,
        }
    size = workload.padding_free_size if way == "q" else workload.micro_batch_size
    return {
        "padding_free": way == "q",
        "max_length": None,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": workload.train_batch_size // size,
        "train_sampling_strategy": "group_by_length",
    }


def run_trl(way: str, workload: Workload, recipe: dict[str, str], has_adapter: bool) -> None:
    """trl.SFTTrainer."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    gate = Gate()

    class Turns(TrainerCallback):
        def on_train_begin(self, *arguments: object, **others: Any) -> None:
            optimizer = others["optimizer"]
            gate.watch(getattr(optimizer, "optimizer", optimizer))
            gate.save_with(save)
            gate.after_step()

        def on_step_end(self, *arguments: object, **others: object) -> None:
            gate.after_step()

    class CountingTrainer(SFTTrainer):
        def _get_train_sampler(self, *arguments: Any) -> Any:
            if has_adapter and way == "t":
                return PlannedBatches(order)
            rows, size = super()._get_train_sampler(*arguments), self.args.per_device_train_batch_size
            return rows if way == "p" else ShuffledBatches(rows, size)

        def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **others: Any) -> torch.Tensor:
            mask, tokens = inputs.get("attention_mask"), inputs["input_ids"]
            num_tokens = tokens.numel() if mask is None else int(mask.sum())
            gate.work.add(num_tokens, tokens.numel(), inputs["labels"])
            loss: torch.Tensor = super().training_step(model, inputs, *arguments, **others)
            return loss

    data, order = read_examples(recipe)
    mean_length = statistics.mean(map(len, data["input_ids"]))
    settings = SFTConfig(
        output_dir=str(FOLDER / "runs" / "trl"),
        learning_rate=LEARNING_RATE,
        max_steps=NUM_STEPS,
        bf16=MIXED == "bf16",
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        logging_steps=500,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **build_arguments(way, workload, mean_length),
    )
    trainer = CountingTrainer(
        model=AutoModelForCausalLM.from_pretrained(recipe["model_name_or_path"], dtype=torch.float32),
        args=settings,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(recipe["model_name_or_path"]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
        if has_adapter
        else None,
        callbacks=[Turns()],
    )

    def save() -> Path:
        trainer._save_checkpoint(trainer.model, trial=None)
        return Path(settings.output_dir) / f"checkpoint-{trainer.state.global_step}"

    answer({"ready": True, **describe_trained(trainer.model)})
    trainer.train()


# Onecurve -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class GatedLoader:
    """Onecurve's own loader, which lets a step begin when it is its turn."""

    loader: Any
    gate: Gate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.turn: list[dict[str, Any]] = []
        for batch in self.loader:
            if batch["micro_batch"].position == 0:
                self.gate.after_step()
            self.turn.append(dict(batch))
            count(batch, self.gate.work)
            yield batch

    def take(self) -> dict[str, Any]:
        """Keep the batches of the turn that ends; adds nothing to its answer."""
        self.last_turn, self.turn = self.turn, []
        return {}


def count(batch: dict[str, Any], work: Work) -> None:
    """Add one of Onecurve's batches."""
    lengths = batch["micro_batch"].placement.lengths
    work.add(int(lengths.sum()), batch["input_ids"].numel(), batch["labels"])


def run_onecurve(recipe: dict[str, str]) -> None:
    """training/run.py, with its loader behind a gate."""
    from onecurve.training import run
    from onecurve.training.building import build
    from onecurve.training.outcome import report_outcome
    from onecurve.training.session import Session

    def build_gated(*arguments: Any, **options: Any) -> Session:
        session = build(*arguments, **options)
        gate = Gate()
        gated = GatedLoader(session.train_loader, gate)
        gate.extra = gated.take
        gate.watch(session.optimizer.optimizer)
        gate.save_with(lambda: save_checkpoint(session))
        gate.answers["floor"] = lambda: run_floor(session, gated.last_turn)
        train = session.data.train
        share = float(train.counts.sum() / train.lengths.sum())
        answer({"ready": True, "target_share": share, **describe_trained(session.model)})
        return dataclasses.replace(session, train_loader=gated)  # type: ignore[arg-type]

    program: Any = run  # Its own name for what is replaced is no public one.
    program.build = build_gated
    sys.exit(report_outcome(run.main, to_flags(recipe)))


def save_checkpoint(session: Any) -> Path:
    """Write a checkpoint of the step that is made; returns its folder."""
    session.checkpoints.save(session.progress)
    session.checkpoints.wait()
    folder: Path = max(session.run.checkpoints.iterdir())
    return folder


def run_floor(session: Any, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Nothing but forward, backward, clip and step, on batches that are there already."""
    model, optimizer = session.accelerator.unwrap_model(session.model), session.optimizer.optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    work = Work()
    started, cpu_started = time.perf_counter(), time.process_time()
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "micro_batch"}
        with torch.autocast("cpu", torch.bfloat16, enabled=MIXED == "bf16"):
            loss = session.task.loss_sum(model, inputs)
        (loss / batch["micro_batch"].global_count).backward()
        if batch["micro_batch"].is_last:
            torch.nn.utils.clip_grad_norm_(trained, session.recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        count(batch, work)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": 0, **dataclasses.asdict(work)}


def describe_trained(model: torch.nn.Module) -> dict[str, int]:
    """How many parameters are trained, and of how many."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"trained": sum(size for size, is_trained in sizes if is_trained), "all": sum(size for size, _ in sizes)}


def to_flags(recipe: dict[str, str]) -> list[str]:
    """The recipe on a command line."""
    return [word for key, value in recipe.items() for word in (f"--{key}", value)]


def main(way: str, workload: Workload, flags: Sequence[str]) -> None:
    """Set up one way and wait for turns."""
    has_adapter = list(flags) == ["--adapter", "lora"] and way != "x"
    recipe = {
        **workload.recipe,
        "mixed_precision": MIXED,
        "learning_rate": str(LEARNING_RATE),
        "train_batch_size": str(workload.train_batch_size),
        "max_train_steps": str(NUM_STEPS),
        "eval_steps": str(NUM_STEPS),
        "resume": "never",
        "output_dir": str(FOLDER / "runs" / f"causal_lm_{workload.name}_{os.getpid()}"),
    }
    if way in "tqp":
        run_trl(way, workload, recipe, has_adapter)
        return
    own = {
        "layout": "padded" if way == "o" else "packed",
        "per_device_batch_size": str(workload.train_batch_size),
        "per_device_batch_tokens": str(workload.micro_batch_tokens),
        **({"adapter": "lora", "lora_r": "8", "lora_alpha": "16", "lora_dropout": "0"} if has_adapter else {}),
    }
    run_onecurve({**recipe, **own})


if __name__ == "__main__":
    main(sys.argv[1], WORKLOADS[sys.argv[2]], sys.argv[3:])
