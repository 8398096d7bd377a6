"""The logits of a model's output, whatever head it has."""

from __future__ import annotations

from typing import Any

import torch


def read_logits(output: Any) -> torch.Tensor:
    """[examples, outputs], or [examples, length, outputs] where the head has outputs for each token.

    Args:
        output: of a model of transformers. One that answers questions gives the logits of starts and of ends: two outputs.
    """
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    logits: torch.Tensor = output.logits
    return logits
