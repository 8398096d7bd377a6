"""The digits of scikit-learn become images that hold the same grays."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tests.conftest import ROOT

SCRIPT = runpy.run_path(str(ROOT / "training" / "recipes" / "build_digits_demo.py"))


def test_every_digit_is_in_the_folder_of_its_class(tmp_path: Path) -> None:
    assert SCRIPT["write_digits"](tmp_path, 30) == {"train": 24, "validation": 6}
    digits = load_digits()
    for number in (0, 4, 29):
        [path] = tmp_path.glob(f"*/{digits.target[number]}/{number:04d}.png")
        assert path.parts[-3] == ("validation" if number % 5 == 4 else "train")
        assert np.array_equal(np.round(np.array(Image.open(path)) / 255 * 16), digits.images[number])
