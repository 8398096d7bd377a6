"""Time a matrix product in float32 and in bf16 on the CPU, and print both rates as one JSON object.

    python training/measure_products.py

The launcher, which imports no torch, runs this where a recipe asks for bf16 on a CPU.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

from onecurve.training.parallel.product_timing import measure_product_rates

if __name__ == "__main__":
    print(json.dumps(asdict(measure_product_rates())))
