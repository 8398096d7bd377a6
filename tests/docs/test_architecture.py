"""ARCHITECTURE.md's table of layers is what the imports are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

TRAINING = ROOT / "training"


def documented_layers() -> dict[str, int]:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name: int(layer) for layer, modules in rows for name in re.findall(r"`(\w+)`", modules)}


def module_name(path: Path) -> str:
    """The module of `training` that a file belongs to; a folder is one."""
    return path.relative_to(TRAINING).parts[0].removesuffix(".py")


def find_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "training":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [name.name for name in node.names]


def test_modules_import_only_from_layers_above_them() -> None:
    layers = documented_layers()
    files = [
        path
        for path in TRAINING.rglob("*.py")
        if "recipes" not in path.parts and path.parent.joinpath("__init__.py").exists()
    ]
    names = {module_name(path) for path in files} - {"__init__"}
    assert names == set(layers), "ARCHITECTURE.md has each module of training/ in one layer"
    for path in files:
        name = module_name(path)
        for imported in set(find_imports(path)) - {name}:
            assert layers[imported] < layers[name], f"{path.name} imports {imported}, which is not in a layer above"
