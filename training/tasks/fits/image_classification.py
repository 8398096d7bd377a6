"""Which columns image classification could read: an image, and a class, several classes, or a number."""

from __future__ import annotations

from pathlib import Path

from onecurve.training.survey import IMAGE, Column, Survey
from onecurve.training.tasks.fits.columns import list_unread
from onecurve.training.tasks.fits.fit import LIKELY, POSSIBLE, SURE, Fit, Models
from onecurve.training.tasks.fits.labels import Label, describe_label, find_labels, judge

_MODELS = Models("facebook/deit-tiny-patch16-224", "google/vit-base-patch16-224-in21k")


def find_fits(table: Survey) -> list[Fit]:
    """Fits of each column of images with each label; the likeliest images first."""
    images = [column for column in table.columns if column.holds(IMAGE)]
    images.sort(key=lambda column: not any(isinstance(value, dict) for value in column.filled))  # Bytes before paths.
    labels = find_labels(table)
    return [
        _build(table, image, label, judge(label, labels) if number == 0 else POSSIBLE)
        for number, image in enumerate(images)
        for label in labels
    ]


def _build(table: Survey, image: Column, label: Label, certainty: int) -> Fit:
    found = describe_label(table, label)
    folder = _find_folder(table, image)
    return Fit(
        keys={"image_column": image.name, **label.keys, **({"image_folder": folder} if folder else {})},
        # With images in the table nothing but the label can be in doubt.
        certainty=SURE if certainty > LIKELY else certainty,
        reason=f"{image.name!r} holds images, {found.reason}",
        models=_MODELS,
        training={**found.training, "learning_rate": 5e-5},
        comments={
            **found.comments,
            "image_folder": "paths in the file lead from here",
            "random_crop_area": "in training: random crops of at least this share, where classes stay the same in them",
            "random_flip": "in training: mirrors half of the images, where left and right mean nothing",
        },
        optional={**found.optional, "random_crop_area": 0.5, "random_flip": 0.5},
        remarks=[*list_unread(table, [image.name, *label.names]), *found.remarks],
        facts=found.facts,
    )


def _find_folder(table: Survey, image: Column) -> str:
    """The folder of the file, where paths lead from there and not from where the command runs; else empty."""
    paths = [Path(value) for value in image.filled if isinstance(value, str)]
    if not paths or not table.folder or any(path.is_file() for path in paths[:1]):
        return ""
    return table.folder if (Path(table.folder) / paths[0]).is_file() else ""
