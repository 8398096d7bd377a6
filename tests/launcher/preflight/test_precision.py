"""What `check`, `run` and `plan` say of bf16 on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from onecurve.launcher.facts import product_rates
from onecurve.launcher.facts.shape import load_shape
from onecurve.launcher.planning.data_estimate import estimate_data
from onecurve.launcher.planning.devices import Cluster, describe_devices
from onecurve.launcher.planning.plan import build_plan
from onecurve.launcher.planning.topology import build_topology
from onecurve.launcher.preflight.findings import Finding
from onecurve.launcher.preflight.precision import check_bf16_speed
from onecurve.training.config import build_recipe
from onecurve.training.product_rates import ProductRates
from tests.launcher.conftest import ROOT, machine
from tests.messages import names

AVX2, AVX512, AVX512_BF16 = ProductRates(164e9, 0.98e9), ProductRates(300e9, 150e9), ProductRates(200e9, 430e9)


def check(
    recipe: dict[str, Any], rates: ProductRates | None, monkeypatch: pytest.MonkeyPatch, num_gpus: int = 0
) -> tuple[list[str], list[Finding]]:
    monkeypatch.setattr(product_rates, "measure_product_rates", lambda: rates)
    topology = build_topology(ROOT, machine(num_gpus), "single_gpu" if num_gpus else "cpu", None)
    return check_bf16_speed(build_recipe({**recipe, "mixed_precision": "bf16"}), topology)


def test_far_slower_is_an_error_unless_it_is_allowed(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, (finding,) = check({**recipe, "allow_slow_bf16": False}, AVX2, monkeypatch)
    assert finding.severity == "error"
    assert names(finding.message, "mixed_precision", "167", "--yes", "allow_slow_bf16")
    _, (finding,) = check({**recipe, "allow_slow_bf16": True}, AVX2, monkeypatch)
    assert finding.severity == "warning"
    assert names(finding.message, "167")


def test_a_little_slower_is_a_warning_and_faster_a_fact(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, (finding,) = check(recipe, AVX512, monkeypatch)
    assert (facts, finding.severity) == ([], "warning")
    assert names(finding.message, "2.0")
    (fact,), findings = check(recipe, AVX512_BF16, monkeypatch)
    assert findings == []
    assert names(fact, "2.1", "430", "200")


def test_a_gpu_is_not_measured(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(recipe, AVX2, monkeypatch, num_gpus=1) == ([], [])


def test_what_cannot_be_measured_is_said(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, (finding,) = check(recipe, None, monkeypatch)
    assert finding.severity == "warning"


def test_a_plan_counts_with_the_measured_speed(recipe: dict[str, Any]) -> None:
    """Of each of the machine's eight cores."""

    def plan(precision: str, rates: ProductRates | None) -> float | None:
        settings = build_recipe({**recipe, "mixed_precision": precision})
        devices = describe_devices(machine(), rates)
        nodes = Cluster(devices=devices, num_nodes=1, host_bytes=1 << 34, mfu=0.4)
        result = build_plan(settings, load_shape(settings.model_name_or_path), estimate_data(settings), nodes)
        assert result.flops is not None
        return result.seconds and result.seconds * 0.4 / result.flops

    assert plan("no", AVX2) == pytest.approx(1 / (8 * 164e9))
    assert plan("bf16", AVX2) == pytest.approx(1 / (8 * 0.98e9))
    assert plan("bf16", None) is None
