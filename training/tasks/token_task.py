"""What tasks have in common whose targets are tokens of what the model reads: causal and masked language models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from onecurve.training.tasks.base import Task
from onecurve.training.tasks.token_results import describe_right, describe_tokens


class TokenTask(Task):
    """A task whose results are sums over each example's targets, "loss", "targets" and "right", beside its "row"."""

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """All but targets and their places."""
        return {name: each for name, each in super().model_inputs(batch).items() if name != "target_places"}

    def describe_evaluated(self, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Of each evaluated example its row, the mean loss and number of its targets, and how many the model finds."""
        for number in range(len(results.get("targets", ()))):
            yield {"row": int(results["row"][number]), **describe_tokens(results, number)}

    def show_example(
        self, examples: Mapping[str, Any], number: int, results: Mapping[str, Any], processor: Any
    ) -> dict[str, str]:
        """The text, and how many of its targets the model finds."""
        shown = super().show_example(examples, number, results, processor)
        return {**shown, "prediction": describe_right(results, number)}
