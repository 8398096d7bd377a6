"""bf16 is measured beside float32 before a training starts, and refused where it is far slower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from onecurve.training.parallel import launch
from onecurve.training.parallel.product_timing import measure_product_rates
from onecurve.training.product_rates import MAX_SLOWDOWN, ProductRates
from tests.conftest import Run
from tests.messages import names

AVX2 = ProductRates(164e9, 0.98e9)
Train = Callable[[dict[str, Any]], Run]


class Processor:
    """Its time passes only while it multiplies: so many operations a second, and 20 microseconds for each call."""

    def __init__(self, float32: float, bf16: float, num_stolen: int = 0) -> None:
        self.now = 0.0
        self._rates = {"float32": float32, "bf16": bf16}
        self._num_stolen = num_stolen

    def build_product(self, precision: str, num_rows: int) -> Callable[[], None]:
        def multiply() -> None:
            self.now += 20e-6 + 2 * num_rows * 768**2 / self._rates[precision]
            if precision == "bf16" and self._num_stolen:
                self._num_stolen -= 1
                self.now += 0.1

        return multiply

    def measure(self) -> ProductRates:
        return measure_product_rates(self.build_product, lambda: self.now)


@pytest.mark.parametrize(
    ("float32", "bf16"), [(164e9, 0.98e9), (200e9, 430e9), (350e9, 3100e9), (2e9, 1e9), (20e12, 60e12)]
)
def test_rates_are_those_of_the_processor(float32: float, bf16: float) -> None:
    """From a slow core to hundreds of fast ones; a call's own time counts for little."""
    rates = Processor(float32, bf16).measure()
    assert rates.float32 == pytest.approx(float32, rel=0.05)
    assert rates.bf16 == pytest.approx(bf16, rel=0.15)
    assert rates.slowdown == pytest.approx(float32 / bf16, rel=0.2)


def test_it_takes_little_time() -> None:
    for float32, bf16, limit in ((200e9, 430e9, 0.1), (164e9, 0.98e9, 0.4)):
        processor = Processor(float32, bf16)
        processor.measure()
        assert processor.now < limit


def test_other_work_does_not_make_a_processor_slow() -> None:
    """A core that was taken away until the first measurement is over."""
    assert Processor(200e9, 430e9, num_stolen=4).measure().slowdown < 1


@pytest.mark.parametrize(("slowdown", "is_refused"), [(MAX_SLOWDOWN * 1.01, True), (MAX_SLOWDOWN * 0.99, False)])
def test_beyond_the_limit_is_a_problem(slowdown: float, is_refused: bool) -> None:
    problem = ProductRates(100e9, 100e9 / slowdown).find_problem()
    assert (problem is not None) is is_refused


def test_a_problem_says_the_ratio_and_both_ways_out() -> None:
    problem = AVX2.find_problem()
    assert problem is not None
    assert names(problem, "mixed_precision", "167", "0.98", "164", "allow_slow_bf16", "--yes")


def test_a_slow_processor_refuses_before_anything_is_written(
    train: Train, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "measure_product_rates", lambda: AVX2)
    refused = train({**recipe, "mixed_precision": "bf16", "allow_slow_bf16": False})
    assert refused.exit_code == 2
    assert names(refused.stderr, "mixed_precision", "167", "allow_slow_bf16")
    assert not refused.path.exists()
    allowed = train({**recipe, "mixed_precision": "bf16", "allow_slow_bf16": True, "max_train_steps": 1})
    assert allowed.exit_code == 0, allowed.stderr
    assert names(allowed.stdout, "bf16", "167")


def test_float32_is_not_measured(train: Train, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure() -> ProductRates:
        raise AssertionError

    monkeypatch.setattr(launch, "measure_product_rates", measure)
    assert train({**recipe, "max_train_steps": 1}).exit_code == 0


def test_the_launchers_script_measures_this_processor() -> None:
    from onecurve.launcher.facts.product_rates import measure_product_rates as measure_in_a_process

    rates = measure_in_a_process()
    assert rates is not None
    assert rates.float32 > 1e8
    assert rates.bf16 > 1e8
