"""How the examples of a micro-batch lie in memory: in padded rows, or packed one behind the other.

Lengths are numbers of the host, taken from the prepared data. What the device holds is never looked at to find them, so a
GPU never has to be waited for. A layout changes memory and speed, and nothing that is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from onecurve.training.data.columns import Array
from onecurve.training.data.plan import Placement
from onecurve.training.tasks.base import Task


@dataclass(frozen=True)
class Layout:
    """Where the tokens of an example lie in a batch.

    Attributes:
        is_packed: all sequences in one row [1, tokens], without padding; else one row each [examples, longest].
        mask: when the model is given an attention mask of padded rows: where there is "padding", "always", or "never". A
            causal model whose rows are padded on the right needs none, because no token sees what follows it.
        pads_left: whether padding comes before the tokens.
    """

    is_packed: bool = False
    mask: Literal["padding", "always", "never"] = "padding"
    pads_left: bool = False

    def split(self, values: torch.Tensor, lengths: Sequence[int] | Array) -> list[torch.Tensor]:
        """What belongs to the tokens of each example, without padding.

        Args:
            values: [examples, longest, ...], or [1, tokens, ...] where packed.
            lengths: [examples] tokens of each.

        Returns:
            For each example [its tokens, ...].
        """
        if self.is_packed:
            return list(torch.split(values[0], [int(length) for length in lengths]))
        if self.pads_left:
            return [row[len(row) - length :] for row, length in zip(values, lengths, strict=True)]
        return [row[:length] for row, length in zip(values, lengths, strict=True)]


class Collator:
    """Examples as one batch: ragged features padded to the longest, or packed; dense ones stacked."""

    def __init__(self, task: Task, processor: Any, layout: Layout | None = None) -> None:
        self.layout = layout or Layout(mask="always", pads_left=task.padding_side(processor) == "left")
        self._pad_values = task.pad_values(processor)
        self._add_to_batch = task.add_to_batch
        self._sequence_lengths = task.sequence_lengths

    def __call__(self, features: Mapping[str, Array | Sequence[Any]]) -> dict[str, Any]:
        """The batch of some examples, as `Task.forward` describes it.

        Args:
            features: of each an array [examples, ...] or a list of one-dimensional sequences.
        """
        batch: dict[str, Any] = {}
        for name, values in features.items():
            if isinstance(values, np.ndarray):
                batch[name] = torch.from_numpy(np.array(values))
            elif self.layout.is_packed:
                batch[name] = torch.from_numpy(np.concatenate(values).astype(_choose_type(values)))[None]
            else:
                batch[name] = self._pad(values, self._pad_values.get(name, 0))
        if "input_ids" in features:
            lengths = [len(row) for row in features["input_ids"]]
            batch.update(_describe_packing(lengths) if self.layout.is_packed else self._build_mask(lengths))
        self._add_to_batch(batch)
        return batch

    def describe_placement(self, features: Mapping[str, Array | Sequence[Any]]) -> Placement:
        """Where these examples lie in the batch that is made of them."""
        if (sequences := self._sequence_lengths(features)) is not None:
            lengths = np.concatenate(sequences)
            counts = np.array([len(each) for each in sequences])
            return Placement(lengths, frozenset({int(lengths.max())}), rows_per_example=counts)
        ragged = [[len(row) for row in values] for values in features.values() if not isinstance(values, np.ndarray)]
        tokens = features.get("input_ids")
        return Placement(
            lengths=np.max(ragged, axis=0) if ragged else None,
            sizes=frozenset(map(max, ragged)),
            rows_per_example=tokens.shape[1] if isinstance(tokens, np.ndarray) and tokens.ndim == 3 else 1,
            is_packed=self.layout.is_packed,
            pads_left=self.layout.pads_left,
        )

    def _build_mask(self, lengths: Sequence[int]) -> dict[str, torch.Tensor | None]:
        is_full = min(lengths) == max(lengths)
        if self.layout.mask == "never" or (self.layout.mask == "padding" and is_full):
            return {"attention_mask": None}
        return {"attention_mask": self._pad([np.ones(length, dtype=np.int64) for length in lengths], 0)}

    def _pad(self, rows: Sequence[Any], value: int) -> torch.Tensor:
        longest = max(map(len, rows))
        padded: Array = np.full((len(rows), longest), value, dtype=_choose_type(rows))
        for target, row in zip(padded, rows, strict=True):
            if self.layout.pads_left:
                target[longest - len(row) :] = row
            else:
                target[: len(row)] = row
        return torch.from_numpy(padded)


def _choose_type(rows: Sequence[Any]) -> type:
    return np.float32 if any(np.asarray(row).dtype.kind == "f" for row in rows) else np.int64


def _describe_packing(lengths: Sequence[int]) -> dict[str, Any]:
    """Where each packed sequence lies. Nothing of it is ever inferred from the tokens."""
    return {
        "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        "sequence_offsets": torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        "sequence_lengths": tuple(lengths),
    }
