"""A built wheel holds all that `onecurve` needs outside a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launcher.conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("launcher", "training", "accelerate_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = f"import setuptools.build_meta as build; build.build_wheel({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    return target


def test_every_file_that_is_read_at_run_time_is_there(installed: Path) -> None:
    for folder, pattern in (("accelerate_configs", "*.yaml"), ("training/recipes", "*.yaml"), ("launcher", "*.html")):
        expected = {path.name for path in (ROOT / folder).glob(pattern)}
        assert expected
        assert {path.name for path in (installed / folder).glob(pattern)} == expected


def test_onecurve_works_outside_a_checkout(installed: Path, recipe_file: Path, tmp_path: Path) -> None:
    here = tmp_path / "elsewhere"
    here.mkdir()
    variables = {**os.environ, "PYTHONPATH": str(installed)}
    for words, expected in (
        (["run", str(recipe_file), "--topology", "multi_cpu", "--dry-run"], f"{installed}/training/run.py"),
        (["check", str(installed / "training" / "recipes" / "yelp.yaml")], "yelp_review_full"),
        (["run", str(recipe_file), "--max_train_steps", "1"], f"{installed}/accelerate_configs/cpu.yaml"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "launcher", *words],
            cwd=here,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert expected in result.stdout + result.stderr, result.stderr
        assert result.returncode == (2 if words[0] == "check" else 0), result.stderr
