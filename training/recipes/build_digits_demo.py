"""Write handwritten digits and a small ViT to learn them: build/demo-digits/{train,validation}/0 to 9, and model/.

    python training/recipes/build_digits_demo.py [FOLDER]

scikit-learn brings the images: 1,797 digits of 43 people in 8 x 8 pixels of 17 grays, from the test set of Alpaydin and Kaynak
(UCI, 1998; CC BY 4.0). Every fifth is held out. The model has random weights: nothing of it was trained on anything before.
"""

from __future__ import annotations

from pathlib import Path

from onecurve.training.recipes.build_demo import build_once

VALIDATION_EVERY = 5
_GRAYS = 16
_PIXELS = 8


def main() -> None:
    """Build the folder unless it is complete."""
    build_once("build/demo-digits", write_demo)


def write_demo(folder: Path) -> str:
    """Images of both splits, and the model."""
    counts = write_digits(folder)
    write_model(folder / "model")
    return f"{counts['train']} digits to train on, {counts['validation']} held out, and a model without training"


def write_digits(folder: Path, most: int | None = None) -> dict[str, int]:
    """Write the images, or the first `most` of them, in a folder for each digit; returns how many of each split."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    counts = {"train": 0, "validation": 0}
    for number, (pixels, digit) in enumerate(zip(digits.images[:most], digits.target[:most], strict=True)):
        split = "validation" if number % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"
        path = folder / split / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * 255 / _GRAYS).astype(np.uint8)).save(path)
        counts[split] += 1
    return counts


def write_model(folder: Path) -> None:
    """Save a ViT for these images with random weights, and its image processor."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel, set_seed

    set_seed(0)
    config = ViTConfig(
        image_size=_PIXELS,
        patch_size=2,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": _PIXELS, "width": _PIXELS}).save_pretrained(folder)


if __name__ == "__main__":
    main()
