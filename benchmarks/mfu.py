"""Model FLOP utilization of bf16 training: Onecurve beside Trainer at its best, with and without torch.compile.

    python -m benchmarks.mfu --model bert-large --device cuda    on a machine with a GPU
    python -m benchmarks.mfu --model tiny --device cpu           what the tests run

MFU is the FLOP/s of forward and backward on real tokens (benchmarks/speed.py says what is counted) as a share of what the
device can do: the fastest matrix product measured in the same run, or `--peak_tflops` of its data sheet. Flags of the recipe
go to Onecurve: `--attn_implementation flash_attention_2` also leaves padding out of attention.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence

from benchmarks.processor import PRECISION, choose_precision
from benchmarks.speed import Lock, measure
from benchmarks.speed_data import FOLDER, WORKLOADS
from benchmarks.speed_page import describe_spread, name_way

TARGET = 0.5


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["bert-large", "tiny"], default="bert-large")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--peak_tflops", type=float, help="bf16 TFLOP/s of the data sheet, instead of a measured product"
    )
    options, flags = parser.parse_known_args(arguments)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("benchmarks.mfu: no GPU here; --model tiny --device cpu tries the command itself", file=sys.stderr)
            raise SystemExit(2)
    os.environ["BENCHMARK_DEVICE"] = options.device
    precision = os.environ.setdefault(PRECISION, "bf16" if options.device == "cuda" else choose_precision())
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    FOLDER.mkdir(parents=True, exist_ok=True)
    workload = WORKLOADS[options.model]
    result = measure(workload, workload.ways, flags, Lock(None))
    measured = statistics.median(peak["bfloat16" if precision == "bf16" else "float32"] for peak in result["peaks"])
    peak = options.peak_tflops * 1e12 if options.peak_tflops else measured
    print(f"{workload.title}; 100 % are {peak / 1e12:.1f} TFLOP/s")
    for way, turns in result["ways"].items():
        shares = [100 * rate / peak for rate in turns["flops_per_second"]]
        rates = describe_spread(turns["tokens_per_second"], 0)
        print(f"  {name_way(way, precision):75s} MFU {describe_spread(shares)} %  {rates} tokens/s")


if __name__ == "__main__":
    main(sys.argv[1:])
