"""What is built and installed: `onecurve` alone, complete, and never mixed with another version's code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import onecurve
from tests.launcher.conftest import ROOT

FOLDERS = ("training", "launcher", "accelerate_configs", "slurm")
OTHER_VERSION, MARKER = "9.9.9", "the other version runs"


def copy_sources(target: Path) -> Path:
    """What a checkout holds of the package, links included."""
    for name in ("onecurve", *FOLDERS):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def pip(*words: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def build_wheel(source: Path, target: Path) -> Path:
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", target, source)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(copy_sources(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", target, wheel)
    return target


@pytest.fixture(scope="module")
def installed_other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that another version was installed into, of which every process prints that it runs."""
    source, target = copy_sources(tmp_path_factory.mktemp("other")), tmp_path_factory.mktemp("installed_other")
    code = f'import sys\n\n__version__ = "{OTHER_VERSION}"\nprint("{MARKER}", file=sys.stderr)\n'
    (source / "onecurve" / "__init__.py").write_text(code, encoding="utf-8")
    pip("install", "--no-deps", "--target", target, build_wheel(source, tmp_path_factory.mktemp("other_wheel")))
    return target


def list_package(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if name.startswith("onecurve/")}


def test_the_wheel_claims_no_name_but_onecurve(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names == {"bin", "onecurve"}
    assert [path.name for path in (installed / "bin").iterdir()] == ["onecurve"]


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    own = {f"onecurve/{path.name}" for path in (ROOT / "onecurve").iterdir() if path.is_file()}
    assert "onecurve/py.typed" in own
    expected = own | {
        f"onecurve/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path(name).suffix for name in expected - own} == {".py", ".yaml", ".css", ".html", ".sh", ".jinja"}
    assert list_package(wheel) == expected
    with zipfile.ZipFile(wheel) as file:
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in file.namelist())


def test_a_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    source = copy_sources(tmp_path / "source")
    code = f"import setuptools.build_meta as build; build.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=120)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        # What `filter="data"` says; Python before 3.11.4 does not know it.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path / "unpacked")
    unpacked = next((tmp_path / "unpacked").iterdir())
    assert not any(path.is_symlink() for path in unpacked.rglob("*"))
    assert not (unpacked / "tests").exists()
    assert list_package(build_wheel(unpacked, tmp_path)) == list_package(wheel)


def run_with(site: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, with an installed version before all others."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def read_version(run: Path) -> str:
    return str(json.loads((run / "environment.json").read_text(encoding="utf-8"))["packages"]["onecurve"])


def test_onecurve_works_outside_a_checkout(installed: Path, recipe_file: Path, tmp_path: Path) -> None:
    here = tmp_path / "elsewhere"
    here.mkdir()
    program = installed / "bin" / "onecurve"
    where = run_with(installed, here, "-c", "import onecurve; print(onecurve.__file__, onecurve.__version__)")
    assert where.stdout.split() == [str(installed / "onecurve" / "__init__.py"), onecurve.__version__]
    dry = run_with(installed, here, program, "run", recipe_file, "--topology", "multi_cpu", "--dry-run", "--json")
    assert (dry.returncode, dry.stderr) == (0, "")
    command = json.loads(dry.stdout)["command"]
    assert str(installed / "onecurve" / "training" / "run.py") in command
    assert str(installed / "onecurve" / "accelerate_configs" / "multi_cpu.yaml") in command
    shipped = installed / "onecurve" / "training" / "recipes" / "yelp.yaml"
    checked = json.loads(run_with(installed, here, program, "check", shipped, "--json").stdout)
    assert any("yelp_review_full" in finding["message"] for finding in checked["findings"])


@pytest.mark.slow
def test_a_training_runs_outside_a_checkout(installed: Path, recipe_file: Path, recipe: dict[str, Any]) -> None:
    here = recipe_file.parent
    program = installed / "bin" / "onecurve"
    trained = run_with(installed, here, program, "run", recipe_file, "--max_train_steps", 1)
    assert trained.returncode == 0, trained.stderr
    run = Path(recipe["output_dir"])
    assert read_version(run) == onecurve.__version__
    report = run_with(installed, here, program, "report", run, "--json")
    assert Path(json.loads(report.stdout)["report"]).is_file()


@pytest.mark.slow
def test_a_checkout_runs_its_own_code_whatever_is_installed(
    installed_other: Path, recipe_file: Path, recipe: dict[str, Any]
) -> None:
    launch = ("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml")
    words = (*launch, "training/run.py", "--config", recipe_file, "--max_train_steps", "1")
    trained = run_with(installed_other, ROOT, *words)
    assert trained.returncode == 0, trained.stderr
    assert MARKER not in trained.stderr
    assert read_version(Path(recipe["output_dir"])) == onecurve.__version__


def test_an_installed_version_runs_its_own_code_in_a_checkout_and_says_so(
    installed_other: Path, recipe_file: Path, recipe: dict[str, Any]
) -> None:
    program = installed_other / "bin" / "onecurve"
    trained = run_with(installed_other, ROOT / "docs", program, "run", recipe_file, "--max_train_steps", 1)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.count(MARKER) > 1, "the launcher and the training"
    assert read_version(Path(recipe["output_dir"])) == OTHER_VERSION
    warnings = [line for line in trained.stderr.splitlines() if line.startswith("onecurve: warning: ")]
    assert len(warnings) == 1
    assert OTHER_VERSION in warnings[0]
    assert str(installed_other / "onecurve") in warnings[0]
    assert str(ROOT) in warnings[0]


def test_a_checkout_runs_its_own_command_line_without_a_warning(installed_other: Path) -> None:
    """`python -m` puts the working directory before what is installed."""
    result = run_with(installed_other, ROOT, "-m", "onecurve", "--help")
    assert (result.returncode, result.stderr) == (0, "")
