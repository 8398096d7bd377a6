"""docs/notebook.ipynb runs from top to bottom in a real Jupyter kernel."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import onecurve
from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def read_outputs(notebook: Any) -> list[tuple[str, str]]:
    """Kind ("stream" for what was printed, "execute_result" for a cell's value) and text of each output."""
    return [
        (output.output_type, output.get("text") or output["data"]["text/plain"])
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


@pytest.fixture(scope="module")
def executed(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The notebook after its run, in a folder that shows it only the project's files."""
    folder = tmp_path_factory.mktemp("notebook")
    for name in ("training", "build"):
        (folder / name).symlink_to(ROOT / name)
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=540, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, **variables})
    return folder, notebook


@pytest.mark.slow
def test_the_notebook_runs_and_learns(executed: tuple[Path, Any]) -> None:
    folder, notebook = executed
    run = onecurve.load_run(folder / "runs" / "notebook")
    assert run.status["state"] == "finished"
    assert [row["step"] for row in run.metrics] == list(range(1, 21))
    outputs = read_outputs(notebook)
    printed = "".join(text for kind, text in outputs if kind == "stream")
    assert "step 20/20" in printed
    assert "\x1b" not in printed, "no terminal's control characters"
    values = [ast.literal_eval(text) for kind, text in outputs if kind == "execute_result" and text.startswith("{")]
    evaluation = next(value for value in values if "eval_loss" in value)
    assert 0.7 < evaluation["eval_accuracy"] <= 1
    assert evaluation["eval_accuracy"] == pytest.approx(run.evaluations[-1]["eval_accuracy"], abs=1e-4)


def test_the_notebook_is_committed_as_executed() -> None:
    """A reader sees the results without running it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert str(ROOT) not in NOTEBOOK.read_text(encoding="utf-8")
