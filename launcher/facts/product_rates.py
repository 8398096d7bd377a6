"""How fast this machine's processor multiplies matrices: measured by the training's own code in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from onecurve.training.product_rates import ProductRates

_MEASURE = Path(__file__).resolve().parents[2] / "training" / "measure_products.py"


def measure_product_rates() -> ProductRates | None:
    """Rates of both precisions, of one thread; None if PyTorch can't be imported here. Takes as long as that import."""
    result = subprocess.run([sys.executable, str(_MEASURE)], capture_output=True, text=True, check=False)
    try:
        return ProductRates(**json.loads(result.stdout))
    except ValueError:
        return None
