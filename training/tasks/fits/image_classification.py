"""Which columns image classification could read: an image, and a class, several classes, or a number."""

from __future__ import annotations

from onecurve.training.survey import IMAGE, Survey
from onecurve.training.tasks.fits.columns import list_unread
from onecurve.training.tasks.fits.fit import POSSIBLE, SURE, Fit, Models
from onecurve.training.tasks.fits.labels import describe_label, find_labels, judge

_MODELS = Models("facebook/deit-tiny-patch16-224", "google/vit-base-patch16-224-in21k")


def find_fits(table: Survey) -> list[Fit]:
    """Fits of each column of images with each label; the likeliest first."""
    images = [column for column in table.columns if column.holds(IMAGE)]
    labels = find_labels(table)
    fits = []
    for number, image in enumerate(images):
        for label in labels:
            found = describe_label(table, label)
            best = judge(label, labels)
            is_best = number == 0 and best == max(judge(each, labels) for each in labels)
            fits.append(
                Fit(
                    keys={"image_column": image.name, **label.keys},
                    certainty=SURE if is_best else POSSIBLE,
                    reason=f"{image.name!r} holds images, {found.reason}",
                    models=_MODELS,
                    training=found.training,
                    comments=found.comments,
                    optional=found.optional,
                    remarks=[*list_unread(table, [image.name, *label.names]), *found.remarks],
                    facts=found.facts,
                )
            )
    return fits
