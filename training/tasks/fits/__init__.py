"""How well a table's columns fit a task: each task's own judgement, from which `onecurve init` writes a recipe.

fit.py says what a judgement is, columns.py what several tasks see in columns; a module a task beside them.
"""

from onecurve.training.tasks.fits.fit import CERTAINTIES, LIKELY, NAMED, POSSIBLE, SURE, Fit, Models

__all__ = ["CERTAINTIES", "LIKELY", "NAMED", "POSSIBLE", "SURE", "Fit", "Models"]
