"""Image classification: one label, several labels, or a number for each image.

Images are decoded once, when data is prepared, and kept as the processor resizes and crops them, in 8 bits: a corrupt one is
found before a training begins, and no epoch decodes a file again. They lie on disk and are mapped into memory, so that all
processes of a machine share what is in it. A batch is scaled and normalized by the processor when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from onecurve.training.errors import BadInput
from onecurve.training.recipe import Number, PathText
from onecurve.training.tasks.base import EVALUATION_EPOCH, Rows, build_generator
from onecurve.training.tasks.classification import Classification, ClassificationRecipe
from onecurve.training.tasks.images import UnreadableImage, crop_randomly, open_image, read_image
from onecurve.training.tasks.processors import IMAGE_PROCESSOR

if TYPE_CHECKING:
    from onecurve.training.survey import Survey
    from onecurve.training.tasks.base import Array
    from onecurve.training.tasks.fits.fit import Fit

_NUM_THREADS = 4
_CHANNELS = 3

# What the processor does before pixels are numbers, and what it does afterwards.
_ONLY_RESIZED = {"do_rescale": False, "do_normalize": False}
_ONLY_NORMALIZED = {"do_resize": False, "do_center_crop": False, "do_pad": False}


class ImageClassificationRecipe(ClassificationRecipe):
    """The keys of image classification beside those of every recipe."""

    image_column: str = Field(
        default="image", min_length=1, description="column with the image: a path, or the bytes of a file"
    )
    image_folder: PathText | None = Field(
        default=None, description="folder from which paths lead; none is the one where the command runs"
    )
    random_crop_area: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="in training, smallest share of an image that a random crop keeps, which is then scaled to the whole size; "
        "1 does not crop",
    )
    random_flip: Annotated[Number, Field(ge=0, le=1)] = Field(
        default=0.0, description="in training, how often an image is mirrored, left to right"
    )


class ImageClassification(Classification):
    """Images -> classes or numbers.

    An example is "pixels" [height, width, 3] uint8. In a batch it becomes "pixel_values" [3, height, width].
    """

    recipe: ImageClassificationRecipe
    recipe_class = ImageClassificationRecipe
    unread_keys = Classification.unread_keys | {"max_length", "tokenizer_name"}
    pipeline_tag = "image-classification"
    auto_class = "AutoModelForImageClassification"
    processor_kind = IMAGE_PROCESSOR
    input_feature = "pixels"
    rows_at_once = 256
    # Crops and normalized pixels: of 224 x 224, hundreds a second on a core, where a GPU takes thousands.
    batches_take_long = True

    def __init__(self, recipe: ImageClassificationRecipe) -> None:
        super().__init__(recipe)
        self._folder = Path(recipe.image_folder or ".")
        self._processor: Any = None
        self._shape: tuple[int, ...] | None = None

    # Declarations ---------------------------------------------------------------------------------------------------

    @classmethod
    def columns(cls, recipe: ImageClassificationRecipe, with_targets: bool = True) -> dict[str, list[str]]:
        """The image, and the label or labels."""
        return {"image_column": [recipe.image_column], **(cls.name_labels(recipe) if with_targets else {})}

    @classmethod
    def find_fits(cls, table: Survey) -> list[Fit]:
        """As training/tasks/fits/image_classification.py sees it."""
        from onecurve.training.tasks.fits import image_classification

        return image_classification.find_fits(table)

    def find_row_problem(self, row: Mapping[str, Any], with_targets: bool = True) -> str | None:
        """An image whose header can't be read, or a label that can't be one."""
        try:
            open_image(row.get(self.recipe.image_column), self.recipe.image_column, self._folder).close()
        except UnreadableImage as problem:
            return str(problem)
        return self.find_label_problem(row) if with_targets else None

    def named_files(self) -> Mapping[str, Path]:
        """Images by their paths."""
        return {self.recipe.image_column: self._folder}

    # Rows -> examples -----------------------------------------------------------------------------------------------

    def read_config(self, config: Any) -> None:
        """The labels of the model's head, and the size of its patches, if it has them.

        Raises:
            BadInput: the model sees no colors.
        """
        super().read_config(config)
        channels = getattr(config, "num_channels", _CHANNELS)
        if channels != _CHANNELS:
            raise BadInput(
                f"model_name_or_path: the model takes images of {channels} channels; this task gives it {_CHANNELS}"
            )
        patch = getattr(config, "patch_size", None)
        if isinstance(patch, int) and patch > 0:
            self.model_facts["patch_size"] = patch

    def configure_processor(self, processor: Any) -> None:
        """Nothing: a model's processor is as it was when the model was trained."""
        self._processor = processor

    def encode(self, rows: Rows, processor: Any, with_targets: bool = True) -> dict[str, Any]:
        """Pixels as the processor resizes and crops them, and the label of each row."""
        import numpy as np

        self._processor = processor
        values = rows.values(self.recipe.image_column)
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            found = list(pool.map(self._read, values))
        for position, each in enumerate(found):
            if isinstance(each, UnreadableImage):
                rows.refuse(position, str(each))
            self._shape = self._shape or each.shape
            if each.shape != self._shape:
                rows.refuse(
                    position,
                    f"the model's image processor makes it {_show_size(each.shape)} pixels and the first one "
                    f"{_show_size(self._shape)}; give its preprocessor_config.json a size of height and width, or a crop_size",
                )
        self._check_parts(values[0], found[0])
        examples: dict[str, Any] = {"pixels": np.stack(found)}
        if with_targets:
            examples["labels"] = self.encode_labels(rows)
        return examples

    def _read(self, value: Any) -> Any:
        """[height, width, 3] uint8 of an image, or why there is none."""
        try:
            image = read_image(value, self.recipe.image_column, self._folder)
        except UnreadableImage as problem:
            return problem
        return self._process([image], **_ONLY_RESIZED)[0].transpose(1, 2, 0)

    def _process(self, images: Any, **choices: bool) -> Array:
        """[images, 3, height, width] of images [height, width, 3]."""
        try:
            found = self._processor(images, input_data_format="channels_last", return_tensors="np", **choices)
            pixels: Array = found["pixel_values"]
        except Exception as error:  # Processors raise whatever they find.
            reason = " ".join(str(error).split())
            raise BadInput(
                f"model_name_or_path: its image processor fails with {type(error).__name__}: {reason}"
            ) from None
        return pixels

    def _check_parts(self, value: Any, resized: Array) -> None:
        """Refuse a processor that does more than to resize, crop, scale and normalize: its two parts would not be the whole.

        Raises:
            BadInput: it does.
        """
        import numpy as np

        whole = self._process([read_image(value, self.recipe.image_column, self._folder)])
        parts = self._process([resized], **_ONLY_NORMALIZED)
        if resized.dtype != np.uint8 or whole.shape != parts.shape or not np.allclose(whole, parts, rtol=0, atol=1e-5):
            raise BadInput(
                f"model_name_or_path: its image processor, {type(self._processor).__name__}, does more than to resize, crop, "
                "scale and normalize images; image_classification can't use it"
            )

    def lengths(self, examples: Mapping[str, Any]) -> Array:
        """The number of patches that the model makes of an image; 1 where its config has none."""
        import numpy as np

        height, width = examples["pixels"][[0]].shape[1:3]
        return np.full(len(examples["pixels"]), self._count_patches(height, width))

    def measure(self, encoded: Mapping[str, Any]) -> Array:
        """As `lengths`."""
        return self.lengths(encoded)

    def _count_patches(self, height: int, width: int) -> int:
        patch: int = self.model_facts.get("patch_size", max(height, width))
        return max(1, (height // patch) * (width // patch))

    # Examples -> batches --------------------------------------------------------------------------------------------

    def draw(self, features: Mapping[str, Any], numbers: Array, epoch: int) -> Mapping[str, Any]:
        """Random crops and mirrored images, in training."""
        import numpy as np

        recipe = self.recipe
        if epoch == EVALUATION_EPOCH or (recipe.random_crop_area == 1 and recipe.random_flip == 0):
            return features
        drawn = []
        for pixels, number in zip(features["pixels"], numbers, strict=True):
            generator = build_generator(recipe.seed, epoch, int(number))
            is_mirrored = generator.random() < recipe.random_flip
            if recipe.random_crop_area < 1:
                pixels = crop_randomly(pixels, generator, recipe.random_crop_area)
            drawn.append(pixels[:, ::-1] if is_mirrored else pixels)
        return {**features, "pixels": np.stack(drawn)}

    def padding_side(self, processor: Any) -> str:
        """None: images of a batch have one size."""
        return "right"

    def pad_values(self, processor: Any) -> dict[str, int]:
        """None."""
        self._processor = processor
        return {}

    def add_to_batch(self, batch: dict[str, Any]) -> None:
        """Pixels as the model takes them, scaled and normalized by its processor."""
        import torch

        pixels = self._process(list(batch.pop("pixels").numpy()), **_ONLY_NORMALIZED)
        batch["pixel_values"] = torch.from_numpy(pixels).float()

    # Results --------------------------------------------------------------------------------------------------------

    def describe_sample(self, examples: Mapping[str, Any], processor: Any) -> str:
        """The size of all images, and what is done to them in training."""
        recipe, [first] = self.recipe, examples["pixels"][[0]]
        crops = f", crops of {recipe.random_crop_area:.0%} or more" if recipe.random_crop_area < 1 else ""
        mirrored = f", {recipe.random_flip:.0%} mirrored" if recipe.random_flip else ""
        return f"{_show_size(first.shape)} pixels{crops}{mirrored}"


def _show_size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"
