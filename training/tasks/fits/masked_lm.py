"""Which column a masked language model could read: a text. Whether one is wanted, a table does not say."""

from __future__ import annotations

from onecurve.training.survey import Survey
from onecurve.training.tasks.fits.columns import choose_encoders, find_texts, is_alone, list_unread
from onecurve.training.tasks.fits.fit import LIKELY, POSSIBLE, Fit


def find_fits(table: Survey) -> list[Fit]:
    """A fit for each text; the likeliest first."""
    return [
        Fit(
            keys={"text_column": column.name},
            certainty=LIKELY if is_alone(table, column) else POSSIBLE,
            reason=f"{column.name!r} ({column.describe()}) is text whose hidden words an encoder can learn",
            models=choose_encoders(column.filled),
            training={"learning_rate": 5e-5},
            lengths={"max_length": [value or "" for value in column.values]},
            remarks=list_unread(table, [column.name]),
        )
        for column in find_texts(table)
    ]
