"""A recipe for some data: looked at, judged, filled with values, written, and read again as a training would read it."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onecurve
from onecurve.launcher.errors import UsageError
from onecurve.launcher.facts.machine import Machine
from onecurve.launcher.facts.recipes import find_columns, load_recipe
from onecurve.launcher.starting.choice import Candidate, choose
from onecurve.launcher.starting.data import Data
from onecurve.launcher.starting.recipe_text import write_recipe
from onecurve.launcher.starting.values import Values, choose_values, read_config
from onecurve.training.architectures import find_kind
from onecurve.training.atomic_files import write_atomically
from onecurve.training.config import RecipeError, build_recipe, known_keys
from onecurve.training.recipe_yaml import parse_flag
from onecurve.training.survey import Survey
from onecurve.training.tasks import find_task
from onecurve.training.tasks.fits import CERTAINTIES

_MOST_COLUMNS_SHOWN = 20


@dataclass(frozen=True)
class Beginning:
    """A recipe to begin with.

    Attributes:
        path: where it belongs.
        text: of the file.
        keys: its values.
        lines: what was found, for people: a word, then what it is.
    """

    path: Path
    text: str
    keys: Mapping[str, Any]
    data: Data
    candidate: Candidate
    values: Values
    lines: Sequence[tuple[str, str]]

    @property
    def commands(self) -> list[str]:
        """What to type next."""
        name = shlex.quote(str(self.path))
        return [f"onecurve check {name} --deep", f"onecurve run {name}"]

    def write(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            UsageError: it can't be written.
        """
        try:
            write_atomically(self.path, self.text)
        except OSError as error:
            raise UsageError(f"{str(self.path)!r} can't be written: {error.strerror}") from None

    def to_json(self) -> dict[str, Any]:
        """The same for a program."""
        fit, survey = self.candidate.fit, self.data.survey
        return {
            "recipe": str(self.path),
            "task": self.candidate.task,
            "certainty": CERTAINTIES[fit.certainty],
            "reason": fit.reason,
            "data": self.data.found,
            "num_rows": survey.num_rows,
            "splits": dict(self.data.splits),
            "columns": {column.name: column.describe() for column in survey.columns},
            "facts": dict(fit.facts),
            "lengths": {
                key: {
                    "mean": round(each.mean, 1),
                    "p99": each.quantile,
                    "most": each.most,
                    "is_counted": each.is_counted,
                }
                for key, each in self.values.lengths.items()
            },
            "remarks": _list_remarks(self.candidate, survey),
            "keys": dict(self.keys),
            "commands": self.commands,
        }


def begin(data: Data, flags: Mapping[str, str], machine: Machine, path: Path, words: Sequence[str]) -> Beginning:
    """Choose the task and all values; nothing is written.

    Args:
        flags: recipe keys that the user gave; they overrule whatever is found.
        path: where the recipe belongs.
        words: of the command line, for the head of the file.

    Raises:
        Undecided, UsageError: as `choose`.
        RecipeError: the flags make no recipe.
    """
    asked_model = flags.get("model_name_or_path")
    kind = None if asked_model is None else find_kind(read_config(asked_model))
    candidate = choose(data.survey, flags, kind)
    fit, recipe_class = candidate.fit, find_task(candidate.task).recipe_class
    model = asked_model or (fit.models.for_gpu if machine.devices else fit.models.for_cpu)
    num_rows = data.splits.get(str(data.keys.get("train_split", "train")), data.survey.num_rows)
    given = {key: parse_flag(recipe_class, key, flag) for key, flag in flags.items() if key != "task"}
    named = {"task": candidate.task, "model_name_or_path": model, **data.keys, **fit.keys}
    _check_given({**named, **given})
    values = choose_values(candidate.task, fit, named, given, num_rows, machine)
    always = {"seed": 42, "eval_steps": "epoch", "output_dir": f"runs/{data.name}"}
    keys: dict[str, Any] = {**named, **always, **values.keys, **given}
    read = known_keys(find_task(candidate.task))
    keys = {key: value for key, value in keys.items() if value is not None and (key in read or key in given)}
    _add_test(keys, data)
    comments = {**values.comments, **dict.fromkeys(given, "as the command line says")}
    if asked_model is None:
        other = fit.models.for_cpu if machine.devices else fit.models.for_gpu
        where = "a CPU" if machine.devices else "a GPU"
        comments["model_name_or_path"] = f"to begin with; on {where} rather {other}; --model names any other one"
    optional = {key: value for key, value in fit.optional.items() if key not in keys}
    lines = _describe(data, candidate, values, model)
    head = [f"Written by onecurve {onecurve.__version__}: onecurve init {shlex.join(words)}",
            "docs/recipes.md lists every key. Paths are relative to where the command runs.", "",
            *(f"{word:<10}{text}" for word, text in lines)]  # fmt: skip
    text = write_recipe(head, keys, comments, optional)
    _read_again(text, path)
    return Beginning(path, text, keys, data, candidate, values, lines)


def _check_given(keys: Mapping[str, Any]) -> None:
    """Refuse flags that no recipe of the task could have, before anything is computed from them.

    Keys that contradict each other are judged when all of them are known.

    Raises:
        RecipeError: naming each of them.
    """
    try:
        find_task(str(keys["task"])).recipe_class(**keys)
    except ValueError:
        build_recipe(keys)


def _add_test(keys: dict[str, Any], data: Data) -> None:
    if "test_file" in keys or "train_file" not in keys:
        return
    recipe_class = find_task(str(keys["task"])).recipe_class
    columns = find_columns(recipe_class(**{key: keys[key] for key in keys if key in recipe_class.model_fields}))
    if data.fits_test([name for names in columns.values() for name in names]):
        keys["test_file"] = str(data.test_file)


def _read_again(text: str, path: Path) -> None:
    """Refuse a recipe that a training would refuse: flags that make none.

    Raises:
        RecipeError: naming every problem.
    """
    with tempfile.TemporaryDirectory(prefix="onecurve-") as folder:
        draft = Path(folder) / "recipe.yaml"
        draft.write_text(text, encoding="utf-8")
        try:
            load_recipe(str(draft))
        except RecipeError as error:
            raise RecipeError(f"the recipe {str(path)!r}, which is not written", error.problems) from None


def _describe(data: Data, candidate: Candidate, values: Values, model: str) -> list[tuple[str, str]]:
    """What was found: a word of at most 9 letters, then what it is."""
    fit, survey = candidate.fit, data.survey
    lines = [("data", data.found)]
    for column in survey.columns[:_MOST_COLUMNS_SHOWN]:
        missing = survey.num_rows - column.num_filled
        lines.append(
            ("column", f"{column.name}: {column.describe()}" + (f", empty in {missing:,} rows" * bool(missing)))
        )
    if len(survey.columns) > _MOST_COLUMNS_SHOWN:
        lines.append(("column", f"... {len(survey.columns):,} in all"))
    lines += [("task", candidate.task), ("because", fit.reason)]
    for key, lengths in values.lengths.items():
        lines.append(("length", f"{key}: {lengths.describe()}"))
    lines.append(("model", model))
    lines += [("note", remark) for remark in _list_remarks(candidate, survey)]
    return lines


def _list_remarks(candidate: Candidate, survey: Survey) -> list[str]:
    remarks = list(candidate.fit.remarks)
    if not survey.is_whole:
        remarks.append(
            f"only the first {survey.num_rows:,} rows were read: later ones may hold other labels or longer texts"
        )
    if candidate.num_bad:
        remarks.append(f"{candidate.num_bad} of {len(survey.rows):,} rows that were looked at will be refused, such as one whose "
                       f"{candidate.problem}; onecurve check --deep names them")  # fmt: skip
    return remarks
