"""Packages that are missing, too old, or built for other devices."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.preflight.packages import check_torch, check_versions
from tests.launcher.conftest import machine, messages
from tests.messages import names


def test_missing_packages_are_named(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = messages({**recipe, "report_to": "wandb"}, machine(), "deepspeed_zero2")
    assert any(names(line, "'onecurve[deepspeed]'") for line in told)
    assert any(names(line, "wandb") for line in told)


@pytest.mark.parametrize(
    ("topology", "needs_compiler"), [("deepspeed_zero3_offload", True), ("deepspeed_zero3", False)]
)
def test_a_compiler_is_needed_for_offload_alone(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, topology: str, needs_compiler: bool
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = [line for line in messages(recipe, machine(), topology, 2) if names(line, "g++")]
    assert len(found) == needs_compiler


def test_versions_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    assert check_versions() == []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "safetensors" else real(name))
    told = [finding.message for finding in check_versions()]
    assert any(names(line, "transformers", "safetensors", "0.1") for line in told), told


@pytest.mark.parametrize(
    ("version_file", "driver", "needed"),
    [
        ("cuda: Optional[str] = None\n", 580, ("CUDA",)),
        ("cuda: Optional[str] = '13.0'\n", 550, ("driver 580", "550")),
        ("cuda: Optional[str] = '13.0'\n", 580, ()),
        ("cuda = '12.4'\n", 550, ()),
        ("cuda = '12.4'\n", 0, ()),
    ],
)
def test_pytorch_fits_the_devices(
    version_file: str, driver: int, needed: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(version_file, encoding="utf-8")
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    told = " ".join(finding.message for finding in check_torch(machine(1, driver=driver)))
    assert names(told, *needed)
    assert bool(needed) == bool(told)


def test_this_pytorch_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert bool(check_torch(machine(1))) == (torch.version.cuda is None)
