"""The parts of the benchmark. Each returns rows (what, figure, verdict) and the figures themselves, or raises an error."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.invariance import Curve, build_data, compare, read_curve
from benchmarks.speed import Lock, measure
from benchmarks.speed_data import WORKLOADS, build_workload
from onecurve.training.launch_protocol import choose_allocator
from tools.decoders import build_tokenizer
from tools.jobs import cut_short
from tools.launches import build_arguments
from tools.trainings import ROOT, Run, to_flags

MIB = 2**20

# Relative, of a step's loss, a gradient's norm and all weights together. bf16 rounds at 4e-3; its bounds hold over 26 steps.
BOUNDS = {"no": (1e-5, 1e-4, 1e-5), "bf16": (5e-3, 1e-1, 1e-2)}

# Topologies beside the reference's.
SHARDED = ("multi_gpu", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")


@dataclass
class Row:
    """A line of the table."""

    what: str
    figure: str
    verdict: str = ""


@dataclass
class Scene:
    """Where everything is measured.

    Attributes:
        is_tiny: sizes for a CPU and a test; nothing they say is a result.
        num_gpus: 0 on a CPU, where two processes stand for GPUs.
    """

    folder: Path
    is_tiny: bool
    num_gpus: int
    seconds_left: Any
    figures: dict[str, Any] = field(default_factory=dict)

    def train_here(self, name: str, recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Train on one device, one recipe after the other in one new process; see child.py."""
        request, answer = self.folder / f"{name}.request.json", self.folder / f"{name}.answer.json"
        request.write_text(json.dumps(list(recipes)), encoding="utf-8")
        told = self._run([sys.executable, "-m", "benchmarks.gpu.child", str(request), str(answer)])
        answers: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
        for recipe, found in zip(recipes, answers, strict=True):
            if found["exit_code"]:
                raise RuntimeError(f"{Path(recipe['output_dir']).name}: exit code {found['exit_code']}: {told[-1500:]}")
        return answers

    def train_with_trainer(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Train a recipe of a causal LM with transformers.Trainer in a new process; see trainer.py."""
        request, answer = self.folder / "trainer.request.json", self.folder / "trainer.answer.json"
        request.write_text(json.dumps(recipe), encoding="utf-8")
        self._run([sys.executable, "-m", "benchmarks.gpu.trainer", str(request), str(answer)])
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found

    def launch(self, topology: str, num_processes: int, recipe: Mapping[str, Any]) -> None:
        """Train with `accelerate launch`."""
        words = build_arguments(topology, num_processes, (), "training/run.py", to_flags(recipe))
        self._run([sys.executable, "-m", "accelerate.commands.launch", *words])

    def _run(self, words: Sequence[str]) -> str:
        search_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {"PYTHONPATH": search_path, "ONECURVE_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        variables |= choose_allocator(os.environ)  # As `onecurve run` does; Trainer has it too.
        if not self.num_gpus:
            variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            list(words), cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
            timeout=max(1.0, self.seconds_left()),
        )  # fmt: skip
        if result.returncode:
            raise RuntimeError(f"exit code {result.returncode}: {(result.stderr or result.stdout)[-1500:]}")
        return result.stderr


def build_recipe(scene: Scene, name: str, **more: Any) -> dict[str, Any]:
    """52 steps of a two-layer BERT on texts of very different length, as benchmarks/invariance.py has them; half in bf16."""
    data = scene.folder / "data"
    if not (data / "model").exists():
        data.mkdir(parents=True, exist_ok=True)
        build_data(data)
    return {
        "model_name_or_path": str(data / "model"),
        "train_file": str(data / "train.jsonl"),
        "validation_file": str(data / "validation.jsonl"),
        "output_dir": str(scene.folder / name),
        "max_length": 128, "train_batch_size": 16, "per_device_batch_size": 16, "learning_rate": 1e-3,
        "weight_decay": 0.1, "dropout": 0.0, "max_train_steps": 4 if scene.is_tiny else 52, **more,
    }  # fmt: skip


def judge(curve: Curve, reference: Curve, precision: str, what: str) -> Row:
    """A curve beside its reference."""
    found = compare(curve, reference)
    holds = all(
        value <= bound
        for value, bound in zip((found.loss, found.grad_norm, found.weights), BOUNDS[precision], strict=True)
    )
    figure = f"loss {found.loss:.1e}, grad_norm {found.grad_norm:.1e}, weights {found.weights:.1e}"
    return Row(f"{what}, {precision}", figure, "holds" if holds and found.has_same_examples else "DEVIATES")


def list_variations(scene: Scene) -> Iterator[tuple[str, dict[str, Any]]]:
    """What may not change a curve on one device."""
    yield "micro-batches of 3", {"per_device_batch_size": 3}
    yield "micro-batches of 256 tokens", {"per_device_batch_tokens": 256}
    if not scene.is_tiny:
        yield "gradient_checkpointing", {"gradient_checkpointing": True}


def measure_invariance(scene: Scene) -> list[Row]:
    """(a) One loss curve: micro-batches on one device, and every strategy on all of them (on a single one in a group of one)."""
    rows: list[Row] = []
    for precision in ("no",) if scene.is_tiny else ("no", "bf16"):
        common: dict[str, Any] = {"mixed_precision": precision}
        if precision == "bf16":
            common["max_train_steps"] = 26
        variations = [("reference", {}), *list_variations(scene)]
        recipes = [
            build_recipe(scene, f"{name.replace(' ', '_')}_{precision}", **common, **more) for name, more in variations
        ]
        scene.train_here(f"invariance_{precision}", recipes)
        curves = [read_curve(Path(recipe["output_dir"])) for recipe in recipes]
        rows += [
            judge(curve, curves[0], precision, name)
            for (name, _), curve in list(zip(variations, curves, strict=True))[1:]
        ]
        for topology, num_processes in list_topologies(scene, precision):
            recipe = build_recipe(scene, f"{topology}_{precision}", **common, per_device_batch_size=3)
            name = f"{topology} x {num_processes}"
            try:
                scene.launch(topology, num_processes, recipe)
                rows.append(judge(read_curve(Path(recipe["output_dir"])), curves[0], precision, name))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                rows.append(Row(f"{name}, {precision}", str(error)[:300], "FAILED"))
    return rows


def list_topologies(scene: Scene, precision: str) -> list[tuple[str, int]]:
    """Topologies and numbers of processes. A start takes half a minute on a GPU: on a single one, bf16 tries fewer of them."""
    if scene.is_tiny:
        return [("multi_gpu", 2)]
    if scene.num_gpus > 1 or precision == "no":
        return [(topology, scene.num_gpus) for topology in SHARDED]
    return [("fsdp", 1), ("deepspeed_zero3", 1)]


def measure_resume(scene: Scene) -> list[Row]:
    """(b) With `deterministic`, a resumed run has the bits of one that was not stopped, dropout on."""
    rows = []
    for precision in ("no",) if scene.is_tiny else ("no", "bf16"):
        num_steps, cut = (4, 2) if scene.is_tiny else (30, 20)
        settings = {"deterministic": True, "mixed_precision": precision, "dropout": 0.1, "max_train_steps": num_steps}
        whole = build_recipe(scene, f"whole_{precision}", **settings, checkpointing_steps=cut)
        scene.train_here(f"whole_{precision}", [whole])
        run = Run(0, "", "", Path(whole["output_dir"]))
        resumed = {**whole, "output_dir": str(cut_short(run, cut, scene.folder / f"cut_{precision}"))}
        scene.train_here(f"resumed_{precision}", [resumed])
        curve, reference = read_curve(Path(resumed["output_dir"])), read_curve(Path(whole["output_dir"]))
        is_same = bool((curve.losses == reference.losses).all()) and all(
            (curve.weights[name] == values).all() for name, values in reference.weights.items()
        )
        found = compare(curve, reference)
        rows.append(
            Row(f"resumed after step {cut} of {num_steps}, {precision}", f"loss {found.loss:.1e}, weights {found.weights:.1e}",
                "same bits" if is_same else "DIFFERS")
        )  # fmt: skip
    return rows


def measure_speed(scene: Scene) -> list[Row]:
    """(d) Tokens a second and MFU of a BERT-large beside transformers.Trainer at its best, on the same texts, in turns."""
    name = "tiny" if scene.is_tiny else "bert-large"
    os.environ["BENCHMARK_DEVICE"] = "cuda" if scene.num_gpus else "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    os.environ.update(choose_allocator(os.environ))
    result = measure(WORKLOADS[name], "ce", (), Lock(None))
    peak = statistics.median(peak["bfloat16"] for peak in result["peaks"])
    scene.figures["speed"] = result
    rows = [Row("fastest bf16 product measured", f"{peak / 1e12:.1f} TFLOP/s")]
    for way, turns in result["ways"].items():
        shares = statistics.median(turns["flops_per_second"]) / peak
        tokens = statistics.median(turns["tokens_per_second"])
        rows.append(
            Row({"c": "Trainer at its best", "e": "Onecurve"}[way], f"{tokens:,.0f} tokens/s, MFU {shares:.1%}")
        )
    return rows


def measure_run(scene: Scene) -> list[Row]:
    """(c, e, f) Waits a step, peak memory beside the plan's, and what a checkpoint takes, in a training of a BERT-large."""
    from onecurve.launcher.facts.shape import load_shape
    from onecurve.launcher.planning.memory import estimate_memory
    from onecurve.launcher.planning.work import build_work
    from onecurve.training.config import build_recipe as build_checked_recipe

    workload = WORKLOADS["tiny" if scene.is_tiny else "bert-large"]
    settings: dict[str, Any] = {
        **build_workload(workload), "output_dir": str(scene.folder / "large"), "mixed_precision": "bf16", "allow_slow_bf16": True,
        "train_batch_size": workload.train_batch_size, "per_device_batch_size": workload.micro_batch_size,
        "max_length": 512, "max_train_steps": 8 if scene.is_tiny else 24, "checkpointing_steps": 4 if scene.is_tiny else 12,
        "max_eval_samples": 20,
    }  # fmt: skip
    (found,) = scene.train_here("large", [settings])
    scene.figures["run"] = found
    shape = load_shape(settings["model_name_or_path"])
    recipe = build_checked_recipe(settings)
    work = build_work(recipe, shape, "cuda" if scene.num_gpus else "cpu", 512, 1)
    predicted = estimate_memory(shape, "one process", work, 1).peak
    steps = [line for line in Run(0, "", "", Path(settings["output_dir"])).steps if line["step"] > 5]
    tokens = sum(line["tokens"] for line in steps) / sum(line["tokens"] / line["tokens_per_second"] for line in steps)
    rows = [Row("tokens a second in the run itself", f"{tokens:,.0f}")]
    if found["waits"] is None:
        rows.append(Row("waits for the GPU", "-", "no CUDA here"))
    else:
        count = sum(found["waits"].values())
        places = ", ".join(f"{place} x {number}" for place, number in found["waits"].items())
        rows.append(
            Row("waits for the GPU a step", f"{count / max(1, found['steps_watched']):.2f} {places}",
                "none" if not count else "WAITS")
        )  # fmt: skip
    measured = found["peak_bytes"]
    rows.append(
        Row("peak memory, predicted and measured",
            f"{predicted / MIB:,.0f} and {'-' if measured is None else f'{measured / MIB:,.0f}'} MiB",
            "no CUDA here" if measured is None else f"{predicted / measured - 1:+.0%}")
    )  # fmt: skip
    for save in found["saves"]:
        rows.append(
            Row("a checkpoint", f"{save['seconds']:.2f} s, of which training waits {save['seconds_blocked']:.2f} s")
        )
    return rows


# 1.0 billion parameters, most of them in layers: the shape of Llama 3.2 with a smaller vocabulary.
DECODER = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32_000, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
TINY_DECODER = {**DECODER, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip


def build_decoder(scene: Scene) -> Path:
    """Random weights: speed does not depend on them."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = build_tokenizer(scene.folder / "decoder")
    config = LlamaConfig(**(TINY_DECODER if scene.is_tiny else DECODER), pad_token_id=0, eos_token_id=0, bos_token_id=0)
    with torch.device("cuda" if scene.num_gpus else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    del model
    if scene.num_gpus:
        torch.cuda.empty_cache()
    return folder


def measure_decoder(scene: Scene) -> list[Row]:
    """(d, e) Tokens a second, MFU and peak memory of a decoder of a billion parameters, trained on whole texts."""
    folder = build_decoder(scene)
    data = build_workload(WORKLOADS["tiny" if scene.is_tiny else "bert-large"])
    settings: dict[str, Any] = {
        "task": "causal_lm", "model_name_or_path": str(folder), "train_file": data["train_file"],
        "validation_file": data["validation_file"], "output_dir": str(scene.folder / "decoder_run"),
        "mixed_precision": "bf16", "allow_slow_bf16": True, "max_length": 64 if scene.is_tiny else 2048, "max_eval_samples": 4,
        "train_batch_size": 4 if scene.is_tiny else 64, "per_device_batch_size": 4 if scene.is_tiny else 8, "max_train_steps": 10,
    }  # fmt: skip
    adapted = {**settings, "output_dir": str(scene.folder / "adapter_run"), "adapter": "lora", "base_dtype": "bfloat16"}
    compiled = {**settings, "output_dir": str(scene.folder / "compiled_run"), "torch_compile": True}
    recipes = {"all weights": settings, "LoRA, base in bf16": adapted, "all weights, compiled": compiled}
    found = scene.train_here("decoder", list(recipes.values()))
    scene.figures["decoder"] = found
    rows = [
        describe_decoder(recipe, each, f"decoder, {name}", scene.is_tiny)
        for (name, recipe), each in zip(recipes.items(), found, strict=True)
    ]
    beside = scene.figures["trainer"] = scene.train_with_trainer(settings)
    memory = "-" if beside["peak_bytes"] is None else f"{beside['peak_bytes'] / MIB:,.0f}"
    rows.append(
        Row(
            "Trainer at its best on the same texts",
            f"{beside['tokens_per_second']:,.0f} tokens/s ({beside['padding']:.1%} padding beside them), {memory} MiB",
        )
    )
    return rows


def describe_decoder(settings: Mapping[str, Any], found: Mapping[str, Any], name: str, is_tiny: bool) -> Row:
    """A row about a decoder's training."""
    from onecurve.launcher.facts.machine import detect_machine
    from onecurve.launcher.facts.shape import load_shape
    from onecurve.launcher.planning.compute import count_flops
    from onecurve.launcher.planning.devices import describe_devices

    steps = [line for line in Run(0, "", "", Path(settings["output_dir"])).steps if line["step"] > 4]
    tokens = sum(line["tokens"] for line in steps) / sum(line["tokens"] / line["tokens_per_second"] for line in steps)
    length = sum(line["tokens"] for line in steps) / sum(line["examples"] for line in steps)
    shape = load_shape(settings["model_name_or_path"])
    head = 6 * shape.hidden_size * (TINY_DECODER if is_tiny else DECODER)["vocab_size"] * tokens
    peak = describe_devices(detect_machine()).teraflops("bf16")
    share = "unknown" if peak is None else f"{(count_flops(shape, tokens, length) + head) / (peak * 1e12):.1%}"
    memory = "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / MIB:,.0f}"
    return Row(
        f"{name}, {shape.num_parameters / 1e9:.2f} B parameters",
        f"{tokens:,.0f} tokens/s, MFU {share} (data sheet), {memory} MiB",
    )


PARTS = {
    "invariance": measure_invariance,
    "resume": measure_resume,
    "run": measure_run,
    "speed": measure_speed,
    "decoder": measure_decoder,
}
