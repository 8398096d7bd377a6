"""Write docs/recipes.md from the recipe's own definition, so that the page can't fall behind it.

    python docs/build_recipes.py

tests/docs/test_recipes_page.py fails when the page is not what this script writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from onecurve.training.recipe import (
    FREE_KEYS,
    AdapterKeys,
    DataKeys,
    EvaluationKeys,
    MemoryKeys,
    ModelKeys,
    OutputKeys,
    Recipe,
    StepKeys,
)
from onecurve.training.tasks import TASKS, find_task

PAGE = Path(__file__).parent / "recipes.md"

SECTIONS = {
    "Task and model": ModelKeys,
    "What is trained": AdapterKeys,
    "Data": DataKeys,
    "The mathematics of a step": StepKeys,
    "Memory and speed": MemoryKeys,
    "Evaluation": EvaluationKeys,
    "Checkpoints and reports": OutputKeys,
}

_INTRODUCTION = """\
# Recipe keys

<!-- Written by docs/build_recipes.py from training/recipe.py and training/tasks. Edit there, then run the script. -->

A recipe is a flat YAML file: one `key: value` a line, no nesting. It says what is trained. Where it runs is not in it:
that is the accelerate YAML's business ([topologies.md](topologies.md)).

Every key is also a flag of `training/run.py`. A flag beats the recipe, the recipe beats the default, and `config.yaml` in
the run directory says for each value which of the three it was.

```bash
accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/demo.yaml --seed 7
```

An unknown key is an error that names the nearest valid one. All problems of a recipe are reported at once, before
anything large is loaded.

Keys marked *yes* in the last column may differ when a run is resumed: they decide how fast and where a run goes, not what
it learns. With another value of any other key a run directory is refused ([resume.md](resume.md)).
"""

_NOUNS = {int: "integer", float: "number", str: "text", bool: "true or false"}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def build_page() -> str:
    """The whole text of docs/recipes.md."""
    lines = [_INTRODUCTION.rstrip("\n")]
    for title, keys in SECTIONS.items():
        lines += _build_table(title, keys.model_fields)
    for name in TASKS:
        task = find_task(name)
        own = {key: field for key, field in task.recipe_class.model_fields.items() if key not in Recipe.model_fields}
        lines += _build_table(f"task: {name}", own)
    return "\n".join(lines) + "\n"


def _build_table(title: str, fields: Mapping[str, FieldInfo]) -> list[str]:
    heading = [f"\n## {title}\n", "| key | type | default | meaning | free on resume |", "|---|---|---|---|---|"]
    return heading + [_build_row(name, field) for name, field in fields.items()]


def _build_row(name: str, field: FieldInfo) -> str:
    cells = [f"`{name}`", describe_type(field), describe_default(field), str(field.description)]
    cells.append("yes" if name in FREE_KEYS else "-")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def describe_default(field: FieldInfo) -> str:
    """The default as a recipe would write it."""
    if field.is_required():
        return "required"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, float):
        return f"`{field.default:g}`"
    return "none" if field.default is None else f"`{field.default}`"


def describe_type(field: FieldInfo) -> str:
    """What may stand behind a key, with its bounds: "integer, at least 1", "`linear` or `cosine`"."""
    bounds = ", ".join(_find_bounds(field.metadata))
    return _describe(field.annotation) + (f", {bounds}" if bounds else "")


def _describe(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        kinds = [_describe(kind) for kind in arguments if kind is not type(None)]
        if "text or list of texts" in kinds and "text" in kinds:
            kinds.remove("text")
        return " or ".join(kinds)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is Annotated:
        inner, *metadata = arguments
        bounds = ", ".join(_find_bounds(metadata))
        return _describe(inner) + (f", {bounds}" if bounds else "")
    if origin is tuple:
        return "text or list of texts"
    if origin is dict:
        return f"mapping of labels to {_describe(arguments[1])}"
    return _NOUNS[annotation]


def _find_bounds(metadata: list[Any]) -> Iterator[str]:
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            yield from _find_bounds(entry.metadata)
        for name, words in _BOUNDS.items():
            if hasattr(entry, name):
                yield f"{words} {_shorten(getattr(entry, name))}"


def _shorten(bound: float) -> str:
    return "2^63" if bound == 2**63 else f"{bound:,}"


if __name__ == "__main__":
    PAGE.write_text(build_page(), encoding="utf-8")
    print(f"{PAGE.name} is written")
