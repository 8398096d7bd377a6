"""What may not change a curve on a GPU: micro-batches, layouts, strategies, a restart."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.scene import Row, Scene
from benchmarks.invariance import Curve, build_data, compare, read_curve
from tools.jobs import cut_short
from tools.trainings import Run

# Relative, of a step's loss, a gradient's norm and all weights together. bf16 rounds at 4e-3; its bounds hold over 26 steps.
BOUNDS = {"no": (1e-5, 1e-4, 1e-5), "bf16": (5e-3, 1e-1, 1e-2)}

REFERENCE = "reference"

# Topologies beside the reference's, and those of a single GPU by precision.
SHARDED = ("multi_gpu", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
ALONE = {"no": ("fsdp", "deepspeed_zero2", "deepspeed_zero3"), "bf16": ("fsdp",)}


def build_recipe(scene: Scene, name: str, model: str = "model", **more: Any) -> dict[str, Any]:
    """52 steps of a model of two layers on texts of very different length, as benchmarks/invariance.py has them; half in bf16."""
    data = scene.folder / "data"
    if not (data / "model").exists():
        data.mkdir(parents=True, exist_ok=True)
        build_data(data)
    return {
        "model_name_or_path": str(data / model),
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


@dataclass(frozen=True)
class Group:
    """Trainings that have one curve.

    Attributes:
        settings: what they share; their first one has nothing else, and is the reference.
        variations: by name, what each of the others changes.
        model: a folder of build_data's.
    """

    settings: dict[str, Any]
    variations: dict[str, dict[str, Any]]
    model: str = "model"


FEW_EXAMPLES = {"micro-batches of 3": {"per_device_batch_size": 3}}
FEW_TOKENS = {"micro-batches of 256 tokens": {"per_device_batch_tokens": 256}}
RECOMPUTED = {"gradient_checkpointing": {"gradient_checkpointing": True}}

# In float32 no GPU's kernel takes packed sequences, and `auto` would pad.
PACKED = {"task": "causal_lm", "layout": "packed"}

# What may not change a curve on one device.
GROUPS = {
    "encoder": Group({}, {**FEW_EXAMPLES, **FEW_TOKENS, **RECOMPUTED}),
    "encoder, dropout": Group({"dropout": 0.1}, FEW_EXAMPLES),
    "decoder": Group(
        PACKED,
        {"padded": {"layout": "padded"}, "compiled": {"torch_compile": True}},
        "decoder",
    ),
    "decoder, dropout": Group({**PACKED, "dropout": 0.1}, FEW_EXAMPLES, "decoder"),
}
TINY_GROUPS = {
    "encoder": Group({}, {**FEW_EXAMPLES, **FEW_TOKENS}),
    "decoder": Group(PACKED, {"padded": {"layout": "padded"}}, "decoder"),
}


def measure_invariance(scene: Scene) -> list[Row]:
    """(a) One loss curve: micro-batches, layouts and compiled layers on one device, and every strategy on all of them."""
    rows: list[Row] = []
    for precision in ("no",) if scene.is_tiny else ("no", "bf16"):
        rows += measure_devices(scene, precision)
    return rows


def measure_devices(scene: Scene, precision: str) -> list[Row]:
    """One precision: what one device may change, then every strategy, on a single device in a group of one."""
    rows: list[Row] = []
    common: dict[str, Any] = {"mixed_precision": precision}
    if precision == "bf16":
        common["max_train_steps"] = 26
    recipes: dict[tuple[str, str], dict[str, Any]] = {}
    for name, group in (TINY_GROUPS if scene.is_tiny else GROUPS).items():
        for variation, changes in {REFERENCE: {}, **group.variations}.items():
            folder = f"{name}_{variation}_{precision}".replace(" ", "_").replace(",", "")
            settings: dict[str, Any] = {**common, **group.settings, **changes}
            recipes[name, variation] = build_recipe(scene, folder, group.model, **settings)
    answers = scene.try_here(f"invariance_{precision}", list(recipes.values()))
    curves: dict[tuple[str, str], Curve] = {}
    for key, answer in zip(recipes, answers, strict=True):
        if answer["exit_code"]:
            rows.append(Row.of_failure(f"{': '.join(key)}, {precision}", answer))
        else:
            curves[key] = read_curve(Path(recipes[key]["output_dir"]))
    for (name, variation), curve in curves.items():
        if variation != REFERENCE and (name, REFERENCE) in curves:
            rows.append(judge(curve, curves[name, REFERENCE], precision, f"{name}: {variation}"))
    for topology, num_processes in list_topologies(scene, precision):
        recipe = build_recipe(scene, f"{topology}_{precision}", **common, per_device_batch_size=3)
        name = f"{topology} x {num_processes}"
        try:
            scene.launch(topology, num_processes, recipe)
            rows.append(judge(read_curve(Path(recipe["output_dir"])), curves["encoder", REFERENCE], precision, name))
        except (KeyError, RuntimeError, subprocess.TimeoutExpired) as error:
            rows.append(Row(f"{name}, {precision}", str(error)[:300], "FAILED"))
    return rows


def list_topologies(scene: Scene, precision: str) -> list[tuple[str, int]]:
    """Topologies and numbers of processes. A start takes half a minute on a GPU: on a single one, fewer are tried."""
    if scene.is_tiny:
        return [("multi_gpu", 2)]
    if scene.num_gpus > 1:
        return [(topology, scene.num_gpus) for topology in SHARDED]
    return [(topology, 1) for topology in ALONE[precision]]


def measure_resume(scene: Scene) -> list[Row]:
    """(b) With `deterministic`, a resumed run has the bits of one that was not stopped, dropout on."""
    rows = []
    for precision in ("no",) if scene.is_tiny else ("no", "bf16"):
        num_steps, cut = (4, 2) if scene.is_tiny else (30, 20)
        settings: dict[str, Any] = {
            "deterministic": True, "mixed_precision": precision, "dropout": 0.1, "max_train_steps": num_steps
        }  # fmt: skip
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
