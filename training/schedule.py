"""How many steps, evaluations and checkpoints a recipe makes: arithmetic that training and launcher share."""

from __future__ import annotations

import math

from onecurve.training.recipe import Recipe


def count_steps_per_epoch(recipe: Recipe, num_examples: int) -> int:
    """Steps that visit each example once; the last may hold fewer than `train_batch_size`."""
    return -(-num_examples // recipe.train_batch_size)


def count_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Steps of the whole training: `max_train_steps`, or the epochs rounded up to a whole step."""
    if recipe.max_train_steps is not None:
        return recipe.max_train_steps
    return count_steps_of_epochs(recipe.num_train_epochs, steps_per_epoch)


def count_steps_of_epochs(num_epochs: float, steps_per_epoch: int) -> int:
    """Steps of some epochs, rounded up to a whole one."""
    # 1.1 epochs of 100 steps are 110 steps, though 1.1 * 100 is a little more than 110.
    return max(1, math.ceil(round(num_epochs * steps_per_epoch, 6)))


def count_most_checkpoints(recipe: Recipe, steps_per_epoch: int, num_steps: int) -> int:
    """The most checkpoints on disk at once: those that are kept, the best one, and the one that is being written."""

    def count(every: int | str | None, steps: int = num_steps) -> int:
        return 0 if every is None else steps // (steps_per_epoch if every == "epoch" else int(every))

    num_planned, has_best = count(recipe.checkpointing_steps), recipe.metric_for_best_model is not None
    if has_best:  # Each evaluation, and there is one after the last step, may be the best so far and among the newest.
        num_planned += count(recipe.eval_steps, num_steps - 1) + 1
    if recipe.save_total_limit is None:
        return max(1, num_planned)
    return min(recipe.save_total_limit, max(1, num_planned)) + has_best + 1
