"""transformers' rule of gradient accumulation in full: the right loss stays, and one with the old fault is seen to part.

Their `test_gradient_accumulation_loss_alignment_with_model_loss` trains 5 steps with and without accumulation (losses within
0.01), and once more with a loss that does not know `num_items_in_batch` (losses more than 0.7 apart). So the check is shown
able to fail: here for each way of training, on rows of which some have far fewer targets than others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.conformance_curve import BATCH_SIZE, build_settings

NUM_STEPS = 5
ACCUMULATION = 4
MOST_APART, LEAST_BROKEN = 0.01, 0.7
LESSON = "ragged"
VARIANTS: Mapping[str, tuple[int, bool]] = {
    "whole": (1, False),
    "cut": (ACCUMULATION, False),
    "broken": (ACCUMULATION, True),
}
"""By name: micro-batches of a step, and whether the loss has the fault."""

Losses = Mapping[str, Sequence[float]]


def name_losses(way: str, variant: str) -> str:
    """The file of a peer's losses."""
    return f"{way}_{LESSON}_{variant}.json"


def build_rows(folder: Path) -> None:
    """As many rows as the steps need, every second one of a single token, and a decoder that finds its end hard to predict.

    The rule needs micro-batches of few targets whose losses are others than those of many targets, as wikitext's headings are.
    """
    from tools.decoders import build_decoder

    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = texts[: NUM_STEPS * BATCH_SIZE]
    for row, text in enumerate(texts):
        texts[row] = "igh" if row % 2 else text
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / f"{LESSON}.jsonl").write_text("".join(lines), encoding="utf-8")
    if not (target := folder / "sharp-decoder").exists():
        build_decoder(target, initializer_range=1.0)


def build_alignment(folder: Path, variant: str = "whole") -> dict[str, Any]:
    """The recipe of one variant: their rate and their length of rows."""
    accumulation, is_broken = VARIANTS[variant]
    fault = Path(__file__).with_name("conformance_fault.py")
    return {
        **build_settings("decoder", folder, NUM_STEPS, BATCH_SIZE // accumulation),
        "model_name_or_path": str(folder / "sharp-decoder"),
        "train_file": str(folder / f"{LESSON}.jsonl"),
        "max_length": 16,
        "learning_rate": 3e-4,
        "layout": "padded",
        "length_window": 1,
        **({"task": f"{fault}:MeanOfMeans"} if is_broken else {}),
        "output_dir": str(folder / f"onecurve_{LESSON}_{variant}"),
    }


def measure_distance(losses: Losses, variant: str) -> float:
    """The largest difference of a step's loss from the one without accumulation."""
    return max(abs(one - other) for one, other in zip(losses["whole"], losses[variant], strict=True))


def is_aligned(losses: Losses) -> bool:
    """Their first rule, of the right loss."""
    return measure_distance(losses, "cut") < MOST_APART


def is_seen_broken(losses: Losses) -> bool:
    """Their second rule, of the loss with the fault; and their third: in the mean the two don't part by a fifth."""
    base, broken = sum(losses["whole"]), sum(losses["broken"])
    return measure_distance(losses, "broken") > LEAST_BROKEN and abs(base - broken) / max(base, broken) < 0.2
