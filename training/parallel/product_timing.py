"""Times a small matrix product in float32 and in bf16 on the CPU: about 50 ms, before anything else is done.

On one thread: several wait for each other, and on a machine with other work that, not the product, would be measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

from onecurve.training.product_rates import ProductRates

Precision = Literal["float32", "bf16"]

_PRECISIONS: tuple[Precision, Precision] = ("float32", "bf16")
_WIDTH = 768
# Rows grow until one product takes this long: shorter ones measure the call, longer ones are interrupted by other work.
_SECONDS_OF_PRODUCT = 0.0005
_MOST_ROWS = 8192
_SECONDS_OF_MEASUREMENT = 0.05
_MOST_MEASUREMENTS = 3


def multiply(precision: Precision, num_rows: int) -> Callable[[], object]:
    """A product of [num_rows, width] and [width, width], ready to be called."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    left, right = torch.ones(num_rows, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    out = torch.empty(num_rows, _WIDTH, dtype=dtype)
    return lambda: torch.mm(left, right, out=out)


def measure_product_rates(
    build_product: Callable[[Precision, int], Callable[[], object]] = multiply,
    clock: Callable[[], float] = time.perf_counter,
) -> ProductRates:
    """Time products of both precisions in turns, as in a layer with a batch of tokens; the fastest of each counts.

    On a machine with other work most products are interrupted. So they are short, and only what three measurements say is
    too slow.

    Args:
        build_product: gives the product of a precision and a number of rows.
        clock: seconds.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(build_product, clock)
    finally:
        torch.set_num_threads(num_threads)


def _measure(
    build_product: Callable[[Precision, int], Callable[[], object]], clock: Callable[[], float]
) -> ProductRates:
    sized = {name: _choose_product(name, build_product, clock) for name in _PRECISIONS}
    fastest = dict.fromkeys(_PRECISIONS, float("inf"))
    for _ in range(_MOST_MEASUREMENTS):
        began = clock()
        while True:
            for name, (_, product) in sized.items():
                fastest[name] = min(fastest[name], _time(product, clock))
            if clock() - began >= _SECONDS_OF_MEASUREMENT:
                break
        rates = ProductRates(*(2 * sized[name][0] * _WIDTH**2 / fastest[name] for name in _PRECISIONS))
        if not rates.is_too_slow:
            break
    return rates


def _choose_product(
    precision: Precision, build_product: Callable[[Precision, int], Callable[[], object]], clock: Callable[[], float]
) -> tuple[int, Callable[[], object]]:
    """A product, and its number of rows: enough of them that the call itself takes little of its time."""
    num_rows = 32
    while True:
        product = build_product(precision, num_rows)
        product()  # The first call chooses and compiles a kernel.
        if min(_time(product, clock) for _ in range(2)) >= _SECONDS_OF_PRODUCT or num_rows >= _MOST_ROWS:
            return num_rows, product
        num_rows *= 4


def _time(product: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    product()
    return clock() - started
