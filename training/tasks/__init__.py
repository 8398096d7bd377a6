"""Tasks: one file each. A task is a plain class; `build_task` is the whole of the mechanism.

A task knows columns -> features, the model class, the loss of each example and what it counts, and the metrics.
"""

from onecurve.training.config import Recipe
from onecurve.training.tasks.text_classification import TextClassification

__all__ = ["TextClassification", "build_task"]


def build_task(recipe: Recipe) -> TextClassification:
    """The task that the recipe names."""
    return TextClassification(recipe)
