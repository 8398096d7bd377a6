"""Small images that differ by their class, and a tiny ViT with random weights to learn them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("dark", "light", "red")


def write_image(path: Path, number: int) -> str:
    """Write an image as `build_image` makes it; returns its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    build_image(number).save(path)
    return CLASSES[number % len(CLASSES)]


def build_image(number: int) -> Image.Image:
    """Noise in the colors of the class `number % 3`, of a size of its own."""
    generator = np.random.default_rng(number)
    name = CLASSES[number % len(CLASSES)]
    height, width = 12 + number % 9, 12 + number * 5 % 11
    colors = {"dark": (0, 0, 0), "light": (130, 130, 130), "red": (130, 0, 0)}[name]
    pixels = generator.integers(0, 120, (height, width, 3)) + np.array(colors)
    return Image.fromarray(pixels.astype(np.uint8))


def build_vit(folder: Path) -> Path:
    """A ViT of two layers for images of 16 x 16 pixels, in patches of 4, with the image processor that belongs to it."""
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    ViTModel(ViTConfig(image_size=16, patch_size=4, **shape, **dropout)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
