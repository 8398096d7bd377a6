"""Bring what a recipe names into the caches, so that a machine without a network can train it.

    python training/fetch.py --config training/recipes/yelp.yaml

`onecurve fetch` runs it. A model or tokenizer of the hub goes into the hub's cache ($HF_HOME), data is read, checked and
tokenized into $ONECURVE_CACHE: afterwards a training starts with HF_HUB_OFFLINE=1. Nothing is loaded into memory that a
login node could not hold: weights are files here. What is a local folder already stays where it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

from huggingface_hub import snapshot_download

from onecurve.training.cache import check_folders, find_cache
from onecurve.training.config import Recipe, load_recipe, parse_arguments
from onecurve.training.data.preparation import prepare_data
from onecurve.training.errors import BadInput
from onecurve.training.lasting_output import protect_output
from onecurve.training.models.loading import load_task
from onecurve.training.outcome import Outcome, end_process, report_outcome
from onecurve.training.record.console import quiet_third_parties
from onecurve.training.tasks.processors import find_revision

# What transformers reads of a model here: no pickled weights, no other framework's.
_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_CODE_FILES = ["*.py"]


def main(arguments: Sequence[str], outcome: Outcome) -> None:
    """Fetch the model, then the tokenizer, then the data.

    Raises:
        BadInput: something can't be fetched, or is no model, tokenizer or data that the recipe can use.
    """
    quiet_third_parties()
    recipe = load_recipe(*parse_arguments(arguments)).recipe
    check_folders((recipe.model_name_or_path, recipe.tokenizer_name, recipe.dataset_name))
    code = _CODE_FILES if recipe.trust_remote_code else []
    for key in ("model_name_or_path", "tokenizer_name"):
        name = getattr(recipe, key)
        if name is not None and not Path(name).exists():
            weights = _MODEL_FILES if key == "model_name_or_path" else [
                pattern for pattern in _MODEL_FILES if pattern != "*.safetensors"
            ]  # fmt: skip
            folder = _fetch_repository(key, name, recipe, [*weights, *code])
            if key == "model_name_or_path" and not list(folder.glob("*.safetensors")):
                raise BadInput(f"{key}: {name!r} has no weights as safetensors; choose a model or revision that has")
            outcome.print_once(f"{key}: {name} is in {folder} ({_describe_size(folder)})")
    task, _, processor = load_task(recipe)
    data = prepare_data(recipe, task, processor)
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if split is not None:
            outcome.print_once(f"{name}: {len(split)} rows of {split.origin} are prepared")
    cache = find_cache()
    outcome.print_once(f"ready for machines without a network that see {cache} and the hub's cache")


def _fetch_repository(key: str, name: str, recipe: Recipe, patterns: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=find_revision(name, recipe), allow_patterns=list(patterns)))
    except Exception as error:  # The hub's client has no common error: no network, no such name, no access, ...
        raise BadInput(f"{key}: {name!r} could not be fetched: {' '.join(str(error).split())}") from None


def _describe_size(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:,.0f} MB"


if __name__ == "__main__":
    protect_output()
    end_process(report_outcome(main, sys.argv[1:]))
