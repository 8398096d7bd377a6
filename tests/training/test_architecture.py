"""The shape that DESIGN promises: who imports whom, names that shadow nothing, no pickles, a story of one screenful."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

TRAINING = sorted((ROOT / "training").rglob("*.py"))
LAUNCHER = sorted((ROOT / "launcher").rglob("*.py"))


def find_imports(source: str) -> Iterator[str]:
    """Dotted names of all that a file imports, anywhere in it: "a.b" for `import a.b` and for `from a import b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    return set(find_imports(path.read_text(encoding="utf-8")))


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def show(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a.b\ndef f():\n    from c import d, e\nif True:\n    from g.h import i as j\n"
    assert set(find_imports(source)) == {"a.b", "c.d", "c.e", "g.h.i"}


@pytest.mark.parametrize("path", LAUNCHER, ids=show)
def test_the_launcher_knows_nothing_of_training_but_the_recipe(path: Path) -> None:
    strangers = {name for name in imports_of(path) if is_in(name, "training") and not is_in(name, "training.config")}
    assert not strangers


@pytest.mark.parametrize("path", TRAINING, ids=show)
def test_training_does_not_know_the_launcher(path: Path) -> None:
    assert not {name for name in imports_of(path) if is_in(name, "launcher")}


@pytest.mark.parametrize("name", ["config", "sampling"])
def test_the_recipe_and_the_plan_import_no_sibling(name: str) -> None:
    assert not {found for found in imports_of(ROOT / "training" / f"{name}.py") if is_in(found, "training")}


def test_only_the_entry_points_import_run() -> None:
    """Leaves don't import the story that imports them."""
    importing = {path.name for path in TRAINING if any(is_in(name, "training.run") for name in imports_of(path))}
    assert not importing


def find_installed(names: list[str]) -> list[str]:
    """Those of `names` that Python finds without this repository's folders on its path."""
    code = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is not None))"
    # -P leaves the working directory out; the packages of this repository are installed under their own two names.
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, *names], cwd=ROOT / "docs", capture_output=True, text=True, check=True
    )
    return result.stdout.split()


def test_no_module_shadows_an_installed_one() -> None:
    """`training/run.py` runs as a script: its folder comes first on the path, before every installed package."""
    names = sorted(
        {path.stem for path in (ROOT / "training").glob("*.py")}
        | {path.name for path in (ROOT / "training").iterdir() if path.is_dir()}
    )
    names = [name for name in names if not name.startswith("__")]
    assert {"config", "data", "run", "sampling", "tasks"} <= set(names)
    assert find_installed(names) == []
    assert find_installed(["json", "torch", *names]) == ["json", "torch"], "the check sees what is installed"


@pytest.mark.parametrize("path", TRAINING, ids=show)
def test_nothing_is_pickled(path: Path) -> None:
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {name for name in imports_of(path) if name.partition(".")[0] in modules}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            written = ast.unparse(node)
            assert written not in {"torch.load", "torch.save"}, f"line {node.lineno}"
            assert node.attr not in {"save_state", "load_state"}, f"line {node.lineno}: accelerate pickles states"
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "safe_serialization", "use_safetensors"):
            assert ast.unparse(node.value) == str(node.arg != "allow_pickle"), f"line {node.value.lineno}"


def test_the_story_is_read_in_five_minutes() -> None:
    text = (ROOT / "training" / "run.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 190
    for word in ("accelerator.accumulate(", "accelerator.backward(", "optimizer.step()", "save_final("):
        assert text.count(word) == 1, f"{word} stands in plain sight, once"
