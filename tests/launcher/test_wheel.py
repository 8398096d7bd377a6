"""A built wheel holds all that `onecurve` needs outside a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("launcher", "training", "accelerate_configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = f"import setuptools.build_meta as build; build.build_wheel({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    return target


def test_every_file_that_is_read_at_run_time_is_there(installed: Path) -> None:
    for folder, pattern in (
        ("accelerate_configs", "*.yaml"),
        ("training/recipes", "*.yaml"),
        ("launcher", "*.html"),
        ("slurm", "*.sh"),
        ("slurm", "*.yaml"),
    ):
        expected = {path.name for path in (ROOT / folder).glob(pattern)}
        assert expected
        assert {path.name for path in (installed / folder).glob(pattern)} == expected


def _run_elsewhere(installed: Path, folder: Path, *words: object) -> tuple[int, str]:
    folder.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-m", "onecurve", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_onecurve_works_outside_a_checkout(installed: Path, recipe_file: Path, tmp_path: Path) -> None:
    here = tmp_path / "elsewhere"
    code, told = _run_elsewhere(installed, here, "run", recipe_file, "--topology", "multi_cpu", "--dry-run")
    assert code == 0, told
    assert f"{installed}/training/run.py" in told
    assert f"{installed}/accelerate_configs/multi_cpu.yaml" in told
    recipe = installed / "training" / "recipes" / "yelp.yaml"
    assert "yelp_review_full' is not in the hub's cache" in _run_elsewhere(installed, here, "check", recipe)[1]


@pytest.mark.slow
def test_a_training_runs_outside_a_checkout(
    installed: Path, recipe_file: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    code, told = _run_elsewhere(installed, tmp_path / "elsewhere", "run", recipe_file, "--max_train_steps", 1)
    assert code == 0, told
    assert "report.html" in _run_elsewhere(installed, tmp_path / "elsewhere", "report", recipe["output_dir"])[1]
