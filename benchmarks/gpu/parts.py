"""The parts of the benchmark. Each returns rows (what, figure, verdict) and the figures themselves, or raises an error."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.curves import measure_invariance, measure_resume
from benchmarks.gpu.scene import Row, Scene
from benchmarks.speed import Lock, measure
from benchmarks.speed_data import WORKLOADS, build_workload
from onecurve.training.launch_protocol import choose_allocator
from tools.decoders import build_tokenizer
from tools.trainings import Run

MIB = 2**20


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

LARGER = {"per_device_batch_size": 16, "loss_chunk_tokens": 4096}


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
    # What takes time once a micro-batch, and the gradient of the output layer once a chunk, is done half as often here.
    larger = {"per_device_batch_size": 4, "loss_chunk_tokens": 64} if scene.is_tiny else LARGER
    compiled = {**settings, "output_dir": str(scene.folder / "compiled_run"), "torch_compile": True, **larger}
    recipes = {"all weights": settings, "LoRA, base in bf16": adapted, "all weights, compiled, larger pieces": compiled}
    found = scene.try_here("decoder", list(recipes.values()))
    scene.figures["decoder"] = found
    rows = []
    for (name, recipe), each in zip(recipes.items(), found, strict=True):
        if each["exit_code"]:
            rows.append(Row.of_failure(f"decoder, {name}", each))
        else:
            rows.append(describe_decoder(recipe, each, f"decoder, {name}", scene.is_tiny))
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
