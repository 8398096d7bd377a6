"""Keras as the tutorial uses it, `compile` and `fit`, over the same PyTorch weights by Keras's torch backend.

    python -m benchmarks.references_keras --config training/recipes/demo.yaml --output_dir runs/references/keras

transformers 5 has no TensorFlow classes any more; `TorchModuleWrapper` makes a Keras layer of its PyTorch model.

Keras's AdamW is PyTorch's, with one difference: PyTorch adds epsilon to sqrt(v / (1 - beta2^t)), Keras to sqrt(v), which
Kingma and Ba call epsilon hat. The two are equal where epsilon hat = epsilon x sqrt(1 - beta2^t), and Keras reads its
epsilon anew at every step, so a callback sets it so. Of clipping a trace remains: PyTorch divides by norm + 1e-6, Keras
by the norm.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from keras import ops
from torch.utils.data import DataLoader

from benchmarks.references_lesson import Learned, Lesson, Stopwatch, study


class Classifier(keras.Model):
    """The PyTorch model as a Keras model: inputs by name in, logits out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.wrapped = keras.layers.TorchModuleWrapper(model)

    def call(self, inputs: dict[str, torch.Tensor], training: bool | None = None) -> torch.Tensor:
        """Logits [examples, num_labels]."""
        logits: torch.Tensor = self.wrapped(**inputs, training=training).logits
        return logits


class LinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then linear decay to 0; Keras's own PolynomialDecay knows no warm-up."""

    def __init__(self, peak: float, num_warmup_steps: int, num_steps: int) -> None:
        self.peak = peak
        self.num_warmup_steps = num_warmup_steps
        self.num_steps = num_steps

    def __call__(self, step: Any) -> Any:
        """The learning rate of a 0-based step."""
        step = ops.cast(step, "float32")
        rising = step / max(1, self.num_warmup_steps)
        falling = (self.num_steps - step) / max(1, self.num_steps - self.num_warmup_steps)
        return self.peak * ops.minimum(rising, falling) if self.num_warmup_steps else self.peak * falling


class CorrectedEpsilon(keras.callbacks.Callback):
    """Makes Keras's epsilon hat of PyTorch's epsilon before every step."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self._epsilon = epsilon

    def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
        """Called by `fit`."""
        optimizer = self.model.optimizer
        optimizer.epsilon = self._epsilon * math.sqrt(1 - optimizer.beta_2 ** (batch + 1))


class CurveRecorder(keras.callbacks.Callback):
    """Keeps each step's loss; Keras would show the mean since the epoch began."""

    def __init__(self, learned: Learned) -> None:
        super().__init__()
        self._learned = learned

    def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
        """Forget the steps before this one."""
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        """Keep this step's loss."""
        self._learned.losses.append(float(logs["loss"]))


class Pairs:
    """Collates rows into what `fit` expects: inputs and labels."""

    def __init__(self, lesson: Lesson) -> None:
        self._collate = lesson.collate

    def __call__(self, rows: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs by name, each [rows, longest], and labels [rows]."""
        batch = dict(self._collate(rows))
        return batch, batch.pop("labels")


def build_optimizer(lesson: Lesson, model: Classifier) -> keras.optimizers.Optimizer:
    """AdamW with global clipping, the schedule, and no decay on vectors."""
    recipe = lesson.recipe
    optimizer = keras.optimizers.AdamW(
        learning_rate=LinearDecay(recipe.learning_rate, lesson.num_warmup_steps, len(lesson.batches)),
        weight_decay=recipe.weight_decay,
        beta_1=recipe.adam_beta1,
        beta_2=recipe.adam_beta2,
        epsilon=recipe.adam_epsilon,
        global_clipnorm=recipe.max_grad_norm,
    )
    optimizer.exclude_from_weight_decay([variable for variable in model.trainable_variables if len(variable.shape) < 2])
    return optimizer


def train(lesson: Lesson, corrects_epsilon: bool = True) -> Learned:
    """Train and evaluate on one process.

    Args:
        corrects_epsilon: whether Keras's epsilon is turned into PyTorch's.
    """
    recipe = lesson.recipe
    learned = Learned()
    pairs = Pairs(lesson)
    # One long pass over all steps: the order differs from epoch to epoch, and `fit` would repeat the first.
    train_data = DataLoader(lesson.train, batch_sampler=lesson.batches, collate_fn=pairs)
    validation_data = DataLoader(lesson.validation, batch_size=recipe.per_device_batch_size, collate_fn=pairs)
    model = Classifier(lesson.model)
    model.compile(
        optimizer=build_optimizer(lesson, model),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    callbacks: list[keras.callbacks.Callback] = [CurveRecorder(learned)]
    if corrects_epsilon:
        callbacks.append(CorrectedEpsilon(recipe.adam_epsilon))
    with Stopwatch() as stopwatch:
        model.fit(train_data, shuffle=False, verbose=0, callbacks=callbacks)
    learned.train_seconds = stopwatch.seconds
    learned.accuracy = float(model.evaluate(validation_data, verbose=0, return_dict=True)["accuracy"])
    return learned


if __name__ == "__main__":
    study(train, sys.argv[1:])
