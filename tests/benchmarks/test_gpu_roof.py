"""The roof of a GPU's step is counted right, on a model small enough to count by hand."""

from __future__ import annotations

import pytest

from benchmarks import gpu_roof
from benchmarks.gpu.parts import TINY_DECODER

TEXTS, TOKENS = 2, 24
HIDDEN, INTERMEDIATE, LAYERS, WORDS = 32, 64, 2, 512


@pytest.fixture(scope="module")
def counts() -> tuple[gpu_roof.Count, gpu_roof.Count]:
    """Of transformers' norms and of torch's."""
    own, exchanged = (gpu_roof.measure(TINY_DECODER, TEXTS, TOKENS, exchanges) for exchanges in (False, True))
    return own, exchanged


def test_products_are_those_of_all_weights(counts: tuple[gpu_roof.Count, gpu_roof.Count]) -> None:
    # Queries and outputs, keys and values of half as many heads, three projections; forward and twice as much backward.
    weights = LAYERS * (2 * HIDDEN**2 + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INTERMEDIATE)
    expected = 3 * 2 * (weights * TOKENS + HIDDEN * WORDS * (TOKENS - TEXTS))
    assert [count.flops for count in counts] == [expected, expected]


def test_every_norm_is_exchanged(counts: tuple[gpu_roof.Count, gpu_roof.Count]) -> None:
    own, exchanged = counts
    num_norms = 2 * LAYERS + 1
    assert (own.kernels["norms"], exchanged.kernels["norms"]) == (0, 4 * num_norms)
    assert own.kernels["rsqrt"] == num_norms
    assert exchanged.kernels["rsqrt"] == 0
    assert own.kernels["attention"] == exchanged.kernels["attention"] == 2 * LAYERS
    assert own.kernels.total() - exchanged.kernels.total() > 10 * num_norms


def test_an_operation_takes_as_long_as_what_limits_it() -> None:
    count = gpu_roof.Count()
    count.add("product", 0, int(gpu_roof.PRODUCTS))
    count.add("copy", int(2 * gpu_roof.MEMORY))
    count.add("small", 1)
    assert dict(count.seconds) == {"product": 1.0, "copy": 2.0, "small": gpu_roof.SMALLEST}


def test_the_table_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_roof.main(["--tiny"])
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()]
    assert {len(row) for row in rows} == {3}
    rates, shares = rows[-2][1:], rows[-1][1:]
    assert float(rates[0].replace(",", "")) < float(rates[1].replace(",", ""))
    assert all(0 <= float(share.strip().rstrip("%")) < 100 for share in shares)
