"""The tutorial's native PyTorch loop: a data loader, AdamW, a schedule, and six lines that train.

    python -m benchmarks.references_native --config training/recipes/demo.yaml --output_dir runs/references/native

To the loop of the transformers course are added what the recipe has and the tutorial leaves out: clipping, and no weight
decay on vectors.
"""

from __future__ import annotations

import sys

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from transformers import get_scheduler

from benchmarks.references_lesson import Learned, Lesson, Stopwatch, study


def train(lesson: Lesson) -> Learned:
    """Train and evaluate on one process."""
    recipe, model = lesson.recipe, lesson.model
    learned = Learned()
    train_dataloader = DataLoader(lesson.train, batch_sampler=lesson.batches, collate_fn=lesson.collate)
    eval_dataloader = DataLoader(lesson.validation, batch_size=recipe.per_device_batch_size, collate_fn=lesson.collate)
    decayed = [parameter for name, parameter in model.named_parameters() if name in lesson.decayed_names]
    undecayed = [parameter for name, parameter in model.named_parameters() if name not in lesson.decayed_names]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": undecayed, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        recipe.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=lesson.num_warmup_steps,
        num_training_steps=len(lesson.batches),
    )

    model.train()
    with Stopwatch() as stopwatch:
        for batch in train_dataloader:
            loss = model(**batch).loss
            loss.backward()
            grad_norm = clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            learned.losses.append(loss.item())
            learned.grad_norms.append(grad_norm.item())
    learned.train_seconds = stopwatch.seconds

    model.eval()
    num_right = 0
    for batch in eval_dataloader:
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(dim=-1)
        num_right += int((predictions == batch["labels"]).sum())
    learned.accuracy = num_right / len(lesson.validation)
    return learned


if __name__ == "__main__":
    study(train, sys.argv[1:])
