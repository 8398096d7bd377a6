"""Names of the environment variables by which the launcher and a training exchange files and numbers.

$ONECURVE_CACHE belongs to cache.py.
"""

STATUS_FILE = "ONECURVE_STATUS_FILE"
"""A file to which rank 0 writes the status, beside the one in the run directory."""

STOP_FILE = "ONECURVE_STOP_FILE"
"""A file whose existence requests a stop."""

NUM_PROCESSES = "ONECURVE_NUM_PROCESSES"
"""How many processes the launcher started. A training that finds another number refuses to start."""

RESTARTS_LEFT = "ONECURVE_RESTARTS_LEFT"
"""How often the launcher will start the training again if it crashes."""
