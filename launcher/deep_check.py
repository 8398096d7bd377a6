"""`onecurve check --deep`: the training's own code prepares data and model, in a process of its own.

What it finds is exactly what a start would find: labels of every row, the tokenizer, weights that do not load. The
prepared data stays in the cache, so the work is not lost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from launcher.preflight import Finding

# Runs as `python -c`: this package must not import what it needs, and a file in training/ would be one more entry point.
_SCRIPT = """
import json, sys
from training.config import load_recipe, parse_arguments
from training.data import prepare_data
from training.faults import report_outcome
from training.model import build_model, count_parameters, load_config, load_tokenizer
from training.reporting import quiet_third_parties
from training.tasks import build_task

def main(arguments, outcome):
    quiet_third_parties()
    recipe = load_recipe(*parse_arguments(arguments)).recipe
    task, config = build_task(recipe), load_config(recipe)
    tokenizer = load_tokenizer(recipe, config)
    data = prepare_data(recipe, task, tokenizer)
    trained, total = count_parameters(build_model(recipe, config, task, tokenizer))
    first = tokenizer.convert_ids_to_tokens(data.train.tokens[0]["input_ids"][:12].tolist())
    for split in (data.train, data.validation):
        lengths = split.lengths
        print(f"data      {len(split)} rows of {split.origin}: {lengths.mean():.0f} tokens on average, {lengths.max()} at most")
    print(f"sample    {' '.join(first)} ...")
    names = list(task.label_names)
    print(f"labels    {', '.join(names[:12])}{' ...' if len(names) > 12 else ''} ({task.num_labels} outputs)")
    print(f"model     {total:,} parameters, {trained:,} trained")

sys.exit(report_outcome(main, sys.argv[1:]))
"""


def check_deeply(recipe: str, overrides: Mapping[str, str], root: Path) -> tuple[list[str], list[Finding]]:
    """Prepare everything that a training needs before its first step.

    Returns:
        Lines about what was found, and the problem that stopped it, if one did.
    """
    words = ["--config", recipe, *(word for key, value in overrides.items() for word in (f"--{key}", value))]
    with tempfile.TemporaryDirectory(prefix="onecurve-") as folder:
        status = Path(folder) / "status.json"
        variables = {**os.environ, "ONECURVE_STATUS_FILE": str(status), "PYTHONPATH": _python_path(root)}
        result = subprocess.run(
            [sys.executable, "-c", _SCRIPT, *words], env=variables, capture_output=True, text=True, check=False
        )
        if result.returncode == 0:
            return result.stdout.splitlines(), []
        try:
            message = json.loads(status.read_text(encoding="utf-8"))["message"]
        except (OSError, ValueError, KeyError):
            message = result.stderr.strip().rpartition("\n")[2] or f"the check ended with exit code {result.returncode}"
    return result.stdout.splitlines(), [Finding("error", message)]


def _python_path(root: Path) -> str:
    return os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
