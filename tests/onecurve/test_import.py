"""`import onecurve` costs a notebook nothing before something is used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

import onecurve
from tests.conftest import ROOT

MAX_IMPORT_SECONDS = 0.05

HEAVY = {"accelerate", "datasets", "numpy", "pandas", "torch", "transformers"}


def run_python(code: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_the_import_is_light() -> None:
    code = (
        "import sys, time; started = time.perf_counter(); import onecurve\n"
        "print(time.perf_counter() - started, *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    runs = [run_python(code) for _ in range(3)]  # The best of three: the machine may do other work.
    assert min(float(words[0]) for words in runs) < MAX_IMPORT_SECONDS
    assert not {*HEAVY, "pydantic", "yaml", "typer", "rich"}.intersection(runs[0])


def test_every_public_name_can_be_used_without_torch() -> None:
    code = (
        "import sys, onecurve\n"
        "for name in onecurve.__all__: getattr(onecurve, name)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    modules = run_python(code)
    assert "onecurve" in modules
    assert not HEAVY.intersection(modules)


def test_public_names_are_listed_and_others_are_refused() -> None:
    assert {"train", "evaluate", "predict", "plan", "load_run", "Run", "RecipeError"} <= set(dir(onecurve))
    with pytest.raises(AttributeError, match="tran"):
        onecurve.tran  # noqa: B018


@pytest.mark.parametrize("home", ["onecurve.launcher.errors", "onecurve.training.errors"])
def test_every_exception_is_public(home: str) -> None:
    """An error that a call may raise can be caught by the name that `onecurve` gives it."""
    names = run_python(
        f"import {home} as home\n"
        "print(*(n for n, c in vars(home).items() if isinstance(c, type) and issubclass(c, Exception)))"
    )
    assert "BadInput" in names or "UsageError" in names
    assert set(names) <= set(onecurve.__all__)


def test_the_guide_uses_public_names_only() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "onecurve"}
    assert {"train", "load_run", "Preempted"} <= used <= set(onecurve.__all__)
    of_run = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "run"}
    assert {"metrics", "evaluate", "predict"} <= of_run <= set(dir(onecurve.Run))
