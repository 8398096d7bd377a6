"""The fault that gradient accumulation once had in transformers, put into Onecurve's causal language model on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onecurve.training.tasks.base import NO_TARGET
from onecurve.training.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    import torch


class MeanOfMeans(CausalLM):
    """A step's loss is the mean of its micro-batches' means, whatever number of targets each has."""

    def counts(self, examples: Mapping[str, Any]) -> Any:
        """1 for each example: a micro-batch weighs as much as it has rows."""
        import numpy as np

        return np.ones(len(examples["labels"]))

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The mean over the targets of this micro-batch alone, as often as it has rows."""
        labels = batch["labels"]
        return super().loss_sum(model, batch) * len(labels) / (labels[:, 1:] != NO_TARGET).sum().clamp(min=1)
