"""Images become pixels as they are seen; random crops are parts of them, of the area that was asked for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onecurve.training.tasks.base import build_generator
from onecurve.training.tasks.images import UnreadableImage, crop_randomly, read_image
from tests.messages import naming

# Red above green.
PIXELS = np.zeros((4, 2, 3), dtype=np.uint8)
PIXELS[:2, :, 0] = PIXELS[2:, :, 1] = 255


def to_bytes(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colors_are_read_whatever_the_file_keeps(mode: str) -> None:
    found = read_image(to_bytes(Image.fromarray(PIXELS).convert(mode)), "image", Path())
    assert found.dtype == np.uint8
    assert np.array_equal(found, PIXELS)


def test_gray_has_three_equal_colors() -> None:
    found = read_image(to_bytes(Image.fromarray(PIXELS[:, :, 0])), "image", Path())
    assert np.array_equal(found, np.repeat(PIXELS[:, :, :1], 3, axis=2))


def test_an_image_is_turned_as_its_camera_was_held() -> None:
    turned = Image.fromarray(PIXELS)
    exif = turned.getexif()
    exif[0x0112] = 3  # Upside down.
    assert np.array_equal(read_image(to_bytes(turned, exif=exif), "image", Path()), PIXELS[::-1, ::-1])


@pytest.mark.parametrize(
    ("value", "needed"), [(3, ("'image'", "int")), ({}, ("'image'",)), (["a"], ("list",)), (b"x", ())]
)
def test_what_is_no_image_is_said(value: Any, needed: tuple[str, ...]) -> None:
    with pytest.raises(UnreadableImage, match=naming(*needed)):
        read_image(value, "image", Path())


def test_crops_are_parts_of_at_least_the_area_that_was_asked_for() -> None:
    """Of an image whose two colors say where a pixel was."""
    size = 64
    places = np.zeros((size, size, 3), dtype=np.uint8)
    places[:, :, 0], places[:, :, 1] = np.arange(size)[:, None], np.arange(size)
    areas = []
    for number in range(200):
        crop = crop_randomly(places, build_generator(1, 0, number), 0.25).astype(int)
        assert crop.shape == places.shape
        height, width = (np.ptp(crop[:, :, axis]) + 1 for axis in (0, 1))
        assert 0.7 < height / width < 1.45
        areas.append(height * width / size**2)
    assert min(areas) > 0.22
    assert max(areas) > 0.9
    assert np.mean(areas) == pytest.approx(0.625, abs=0.05)
    assert len({round(area, 3) for area in areas}) > 100
