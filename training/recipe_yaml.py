"""A recipe's YAML file: a flat mapping, in which a key stands once and text is taken as it is written.

YAML 1.1 reads `yes` as true, `0123` as 83 and `2026-11-25` as a date. Where a key takes text, what is written counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from onecurve.training.recipe import Recipe, RecipeError

Nodes = dict[str, yaml.Node]


def compose_recipe(path: str) -> Nodes:
    """The value of each key, not interpreted yet.

    Raises:
        RecipeError: the file can't be read, is no flat mapping, or has a key twice.
    """
    try:
        root = yaml.compose(Path(path).expanduser().read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise RecipeError(path, ["no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(path, [f"cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise RecipeError(path, ["not valid YAML: " + " ".join(str(error).split())]) from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode) or any(key.tag != "tag:yaml.org,2002:str" for key, _ in root.value):
        raise RecipeError(path, ["must be a flat mapping of keys to values, one `key: value` a line"])
    if problems := list(_find_keys_twice(root)):
        raise RecipeError(path, problems)
    return {key.value: value for key, value in root.value}


def _find_keys_twice(mapping: yaml.MappingNode, inside: str = "") -> Iterator[str]:
    """Keys that stand twice in a mapping, or in one inside it."""
    lines: dict[str, list[int]] = {}
    for key, value in mapping.value:
        name = f"{inside}{key.value}"
        lines.setdefault(name, []).append(key.start_mark.line + 1)
        if isinstance(value, yaml.MappingNode):
            yield from _find_keys_twice(value, f"{name}: ")
    for name, places in lines.items():
        if len(places) > 1:
            yield f"{name}: stands on lines {', '.join(map(str, places))}; keep one"


def construct_values(path: str, nodes: Nodes, kind: type[BaseModel]) -> dict[str, Any]:
    """The values of a recipe's keys.

    Args:
        kind: the recipe of the task, or another model of the file's keys, which says where text is meant.

    Raises:
        RecipeError: a number is written so that YAML takes it for an octal one, or a value can't be read.
    """
    values, problems = {}, []
    for key, node in nodes.items():
        field = kind.model_fields.get(key)
        annotation = None if field is None else field.annotation
        is_number = isinstance(node, yaml.ScalarNode) and node.style is None and node.tag.endswith(":int")
        if is_number and not takes_text(annotation) and re.fullmatch(r"[-+]?0\d+", node.value):
            problems.append(f"{key}: YAML reads {node.value} as an octal number; write it without the leading 0")
            continue
        try:
            values[key] = _construct(node, annotation)
        except (yaml.YAMLError, ValueError) as error:  # A date that does not exist, an unhashable key.
            problems.append(f"{key}: can't be read: {' '.join(str(error).split())}")
    if problems:
        raise RecipeError(path, problems)
    return values


def _construct(node: yaml.Node, annotation: Any) -> Any:
    if takes_text(annotation):
        if isinstance(node, yaml.ScalarNode):
            is_null = node.style is None and node.tag == "tag:yaml.org,2002:null"
            return None if is_null else node.value
        if isinstance(node, yaml.SequenceNode):
            return [_construct(item, str) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {
            key.value if isinstance(key, yaml.ScalarNode) else str(key): _construct(value, None)
            for key, value in node.value
        }
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def takes_text(annotation: Any) -> bool:
    """Whether a key takes free text or a list of texts, and nothing else."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return all(takes_text(kind) for kind in arguments if kind is not type(None))
    if origin is Annotated:
        return takes_text(arguments[0])
    return annotation is str or (origin is tuple and arguments[0] is str)


def parse_flag(kind: type[Recipe], key: str, text: str) -> object:
    """A flag's value, with the type that the same words would have in the recipe; text stays as it is."""
    field = kind.model_fields.get(key)
    if field is not None and takes_text(field.annotation) and not text.lstrip().startswith("["):
        return None if text == "null" else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def find_task(nodes: Mapping[str, yaml.Node]) -> str | None:
    """The task that a recipe file names, if it names one."""
    node = nodes.get("task")
    return str(node.value) if isinstance(node, yaml.ScalarNode) else None
