"""Images of rows: paths, or the bytes of a file; read by Pillow, as 8 bits of red, green and blue."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

# Pillow cuts these to 8 bits instead of scaling them: nearly all of such an image would be white.
_WIDE_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")


class UnreadableImage(Exception):
    """A row's image can't be read; its text says why."""


def open_image(value: Any, name: str, folder: Path) -> Image.Image:
    """The image of a row, of which only the header is read.

    Args:
        value: of the row's column `name`: a path, bytes, or both as `datasets` keeps them, {"bytes", "path"}.
        folder: from which a path that is not absolute leads.

    Raises:
        UnreadableImage: there is none, it is of no known format, or its pixels have more than 8 bits.
    """
    from PIL import Image

    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value in ("", b""):
        raise UnreadableImage(f"column {name!r} is empty; every row needs an image")
    if not isinstance(value, str | bytes):
        kind = type(value).__name__
        raise UnreadableImage(
            f"column {name!r} holds {kind} {value!r:.40}; it must hold paths of images, or their bytes"
        )
    where = f"the image in column {name!r}"
    source: Any = io.BytesIO(value) if isinstance(value, bytes) else folder / value
    if isinstance(value, str):
        where = f"image {value!r}"
        if not os.path.isfile(source):
            raise UnreadableImage(
                f"{where} does not exist in {str(folder.absolute())!r}; image_folder says where paths lead from"
            )
    try:
        image = Image.open(source)
    except Exception as error:  # Pillow's plugins raise whatever they find.
        raise UnreadableImage(f"{where} can't be read: {_describe(error)}; replace it or remove the row") from None
    if image.mode in _WIDE_MODES:
        image.close()
        raise UnreadableImage(f"{where} has more than 8 bits for each color ({image.mode}); save it with 8")
    return image


def read_image(value: Any, name: str, folder: Path) -> NDArray[np.uint8]:
    """[height, width, 3] pixels of an image, turned as its camera was held; of several frames the first one.

    Raises:
        UnreadableImage: as `open_image`, or what follows the header is broken.
    """
    import numpy as np
    from PIL import ImageOps

    with open_image(value, name, folder) as image:
        where = f"image {value!r}" if isinstance(value, str) else f"the image in column {name!r}"
        try:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except Exception as error:  # As above.
            raise UnreadableImage(f"{where} is broken: {_describe(error)}; replace it or remove the row") from None


def _describe(error: Exception) -> str:
    reason = " ".join(str(error).split())
    return "no known format, or not an image" if type(error).__name__ == "UnidentifiedImageError" else reason


def crop_randomly(pixels: NDArray[np.uint8], generator: np.random.Generator, smallest_area: float) -> NDArray[np.uint8]:
    """A random part of an image, scaled to the image's size (Szegedy et al. 2015, "Going deeper with convolutions").

    Its area is uniform between `smallest_area` of the image and all of it, and its sides are to each other as 3:4 to 4:3, unless
    the image is too narrow for that.

    Args:
        pixels: [height, width, 3].
    """
    import numpy as np
    from PIL import Image

    height, width = pixels.shape[:2]
    area, ratio, left, top = generator.random(4)
    share = smallest_area + (1 - smallest_area) * area
    sides = np.sqrt(share) * np.array([1, 1]) * np.exp((2 * ratio - 1) * np.log(4 / 3) / 2) ** np.array([1, -1])
    part_width, part_height = np.minimum(np.round(sides * (width, height)), (width, height)).clip(1).astype(int)
    x, y = int(left * (width - part_width + 1)), int(top * (height - part_height + 1))
    box = (x, y, x + int(part_width), y + int(part_height))
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box))
