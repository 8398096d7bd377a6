"""DeepSpeed on a CPU needs no compiler, and waits for none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import Launch


def test_nothing_is_compiled_without_offload(recipe: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    operators = tmp_path / "operators"
    variables = {"TORCH_EXTENSIONS_DIR": str(operators)}
    run = launch({**recipe, "max_train_steps": 2}, "deepspeed_zero2", 2, environment=variables)
    assert run.exit_code == 0, run.stderr
    assert run.read("environment.json")["topology"]["strategy"] == "ZeRO-2"
    assert not list(operators.rglob("*.so"))
    assert not list(operators.rglob("build.ninja"))
