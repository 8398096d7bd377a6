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

MAX_FUNCTION_LINES = 60


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


# Each part of `training` imports only parts that stand before it. A part is a folder or a module.
GROUND_FLOOR = (
    "units", "launch_protocol", "atomic_files", "writable", "lasting_output", "recipe", "recipe_yaml", "errors", "process",
    "outcome", "work_progress", "architectures", "cache", "metric_names", "parallel_sizes", "zero_buffers",
    "schedule", "product_rates", "survey",
)  # fmt: skip
DECLARATIONS = ("tasks", "config", "run_directory", "recipe_comparison")
TRAINING_ORDER = (
    *GROUND_FLOOR, *DECLARATIONS, "data", "models", "parallel", "recovery", "record", "session", "run_start", "building",
)  # fmt: skip
# What the launcher may import: the ground floor, what a task declares, and how a file is read. None of it imports torch.
FOR_THE_LAUNCHER = (*GROUND_FLOOR, *DECLARATIONS, "data.sources", "data.tables", "data.predicted_rows")
# These run as scripts: nothing imports them.
SCRIPTS = ("run", "predict", "chat", "merge", "check", "fetch", "describe_recipe", "describe_model", "describe_data",
           "measure_products")  # fmt: skip


def part_of(name: str, package: str) -> str | None:
    """The part of `onecurve.<package>` that a dotted name lies in, if it lies there."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["onecurve", package] and len(parts) > 2 else None


@pytest.mark.parametrize("path", LAUNCHER, ids=show)
def test_the_launcher_imports_only_what_is_light_of_training(path: Path) -> None:
    names = {name.removeprefix("onecurve.training.") for name in imports_of(path) if is_in(name, "onecurve.training")}
    assert all(any(is_in(name, part) for part in FOR_THE_LAUNCHER) for name in names), names


def test_what_the_launcher_imports_needs_no_torch() -> None:
    """Every task's file as well: with torch and transformers blocked, all of it is imported."""
    from onecurve.training.tasks import TASKS

    modules = [f"onecurve.training.{part}" for part in FOR_THE_LAUNCHER] + [module for module, _ in TASKS.values()]
    code = "import importlib, sys; blocked = ('torch', 'transformers', 'accelerate', 'datasets', 'deepspeed')\n"
    code += "sys.modules.update(dict.fromkeys(blocked))\nfor name in sys.argv[1:]: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", TRAINING, ids=show)
def test_training_imports_only_what_stands_before_it(path: Path) -> None:
    own = path.relative_to(ROOT / "training").parts[0].removesuffix(".py")
    if own in ("__init__", "recipes"):
        return
    allowed = TRAINING_ORDER if own in SCRIPTS else TRAINING_ORDER[: TRAINING_ORDER.index(own) + 1]
    assert {part_of(name, "training") for name in imports_of(path)} <= {None, *allowed}


# Each part of `launcher` imports only itself and parts that stand before it.
LAUNCHER_ORDER = (
    "units", "errors", "facts", "planning", "launching", "preflight", "starting", "sweeps", "cluster", "views", "cli",
)  # fmt: skip


@pytest.mark.parametrize("path", LAUNCHER, ids=show)
def test_the_launcher_imports_only_what_stands_before_it(path: Path) -> None:
    own = path.relative_to(ROOT / "launcher").parts[0].removesuffix(".py")
    if own != "__init__":
        allowed = LAUNCHER_ORDER[: LAUNCHER_ORDER.index(own) + 1]
        assert {part_of(name, "launcher") for name in imports_of(path)} <= {None, *allowed}


@pytest.mark.parametrize("path", TRAINING, ids=show)
def test_training_does_not_know_the_launcher(path: Path) -> None:
    assert not {name for name in imports_of(path) if is_in(name, "onecurve.launcher")}


@pytest.mark.parametrize("path", [*TRAINING, *LAUNCHER], ids=show)
def test_modules_have_one_name(path: Path) -> None:
    """`training.config` beside `onecurve.training.config` would be a second module, with other classes."""
    assert not {name for name in imports_of(path) if name.partition(".")[0] in ("training", "launcher")}


REPORTING = [
    path for path in TRAINING if path.stem in SCRIPTS and "report_outcome(" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", REPORTING, ids=show)
def test_a_script_ends_without_freeing_what_native_threads_use(path: Path) -> None:
    """At Python's own end gloo's threads were seen to abort a prediction that was written."""
    last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.body[-1]) == "end_process(report_outcome(main, sys.argv[1:]))"


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
    assert {"config", "data", "run", "tasks"} <= set(names)
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


def test_the_story_shows_each_word_of_the_loop_once() -> None:
    text = (ROOT / "training" / "run.py").read_text(encoding="utf-8")
    for word in ("accelerator.accumulate(", "accelerator.backward(", "optimizer.step()", "save_final("):
        assert text.count(word) == 1, f"{word} stands in plain sight, once"


@pytest.mark.parametrize("path", [*TRAINING, *LAUNCHER], ids=show)
def test_functions_are_short(path: Path) -> None:
    """What does not fit a screen is hard to hold in mind. Decorators and docstrings do not count."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines"
