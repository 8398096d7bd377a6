"""Which task data is for: every task of the project judges the columns, and what speaks clearest for one of them is taken."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from onecurve.launcher.errors import Undecided, UsageError
from onecurve.training.config import Recipe, known_keys
from onecurve.training.recipe_yaml import parse_flag
from onecurve.training.survey import Survey
from onecurve.training.tasks import TASKS, find_task, is_outside
from onecurve.training.tasks.fits import LIKELY, POSSIBLE, Fit

# A task whose own check refuses more of the rows can't be meant.
_MOST_BAD_ROWS = 0.1
_MOST_SHOWN = 8


@dataclass(frozen=True)
class Candidate:
    """A task, and one way in which it could read the data.

    Attributes:
        num_bad: of the survey's rows, those that the task refuses.
        problem: what it says of the first of them.
    """

    task: str
    fit: Fit
    num_bad: int = 0
    problem: str = ""


def choose(survey: Survey, flags: Mapping[str, str], model_kind: str | None = None) -> Candidate:
    """The task and the columns that the data is for.

    Args:
        flags: recipe keys that the user gave; those that name columns decide.
        model_kind: what kind of transformer the user's model is, where its files say.

    Raises:
        Undecided: several fit as well, or none fits well enough to be taken without being asked for.
        UsageError: --task names none of the project's.
    """
    asked = _find_asked(flags)
    names = [name for name in TASKS if asked in (None, name) and _reads(name, flags)]
    everything = [Candidate(name, fit) for name in names for fit in find_task(name).find_fits(survey)]
    suited = [each for each in everything if model_kind is None or model_kind in find_task(each.task).model_kinds]
    chosen_keys = {key for each in everything for key in each.fit.keys} & flags.keys()
    matching = [each for each in suited if all(_says(each, key, flags[key]) for key in chosen_keys)]
    if not matching and asked is not None and chosen_keys:
        matching = [_follow(each, flags, chosen_keys) for each in suited[:1]]
    matching = [check_rows(each, survey, flags) for each in matching]
    good = [each for each in matching if each.num_bad <= _MOST_BAD_ROWS * max(1, len(survey.rows))]
    needed = POSSIBLE if asked is not None or chosen_keys else LIKELY
    best = max((each.fit.certainty for each in good), default=0)
    found = [each for each in good if each.fit.certainty == best]
    if best < needed or len(found) != 1:
        raise _describe_choice(survey, good, [each for each in matching if each not in good])
    return found[0]


def _find_asked(flags: Mapping[str, str]) -> str | None:
    task = flags.get("task")
    if task is None:
        return None
    if is_outside(task):
        raise UsageError(f"--task {task}: init knows the tasks of the project only: {', '.join(TASKS)}")
    find_task(task)
    return task.replace("-", "_")


def _reads(name: str, flags: Mapping[str, str]) -> bool:
    """Whether a task reads each of the user's keys that any other task reads."""
    own = known_keys(find_task(name))
    return all(key in own or not _is_of_some_task(key) for key in flags)


def _is_of_some_task(key: str) -> bool:
    return any(key in known_keys(find_task(name)) for name in TASKS)


def check_rows(candidate: Candidate, survey: Survey, flags: Mapping[str, str]) -> Candidate:
    """The candidate with what its task says of the survey's rows; nothing where they are not complete.

    Args:
        flags: the user's, of which the task's own may matter to it.
    """
    if not survey.is_complete:
        return candidate
    task = find_task(candidate.task)
    given = {
        key: parse_flag(task.recipe_class, key, flag)
        for key, flag in flags.items()
        if key in task.recipe_class.model_fields and key not in Recipe.model_fields
    }
    try:
        reader = task(_build_recipe(candidate, given))
    except ValueError:  # A flag that can't be; it is refused with all others.
        reader = task(_build_recipe(candidate))
    problems = [problem for row in survey.rows if (problem := reader.find_row_problem(row)) is not None]
    return replace(candidate, num_bad=len(problems), problem=problems[0] if problems else "")


def _build_recipe(candidate: Candidate, given: Mapping[str, Any] | None = None) -> Recipe:
    """Only what the columns say, and what is given."""
    keys = {"task": candidate.task, "model_name_or_path": "any", **candidate.fit.keys, **(given or {})}
    return find_task(candidate.task).recipe_class(**keys)


def _says(candidate: Candidate, key: str, flag: str) -> bool:
    """Whether a fit has the value of a flag for a key."""
    recipe_class = find_task(candidate.task).recipe_class
    wanted = parse_flag(recipe_class, key, flag)
    default = recipe_class.model_fields[key].default
    return bool(_to_list(candidate.fit.keys.get(key, default)) == _to_list(wanted))


def _to_list(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else [value]


def _follow(candidate: Candidate, flags: Mapping[str, str], keys: set[str]) -> Candidate:
    """A candidate that reads other columns than it would by itself, as the flags say."""
    recipe_class = find_task(candidate.task).recipe_class
    changed = {key: parse_flag(recipe_class, key, flags[key]) for key in keys}
    said = ", ".join(f"{key}: {value}" for key, value in changed.items())
    return replace(
        candidate,
        fit=replace(
            candidate.fit, keys={**candidate.fit.keys, **changed}, certainty=POSSIBLE, reason=f"as the flags say: {said}",
            remarks=(), facts={},
        ),
    )  # fmt: skip


def _describe_choice(survey: Survey, good: Sequence[Candidate], refused: Sequence[Candidate]) -> Undecided:
    """What the data could be, each with the flags that decide it; and what it can't be, and why."""
    columns = ", ".join(f"{column.name} ({column.describe()})" for column in survey.columns) or "no columns"
    best = max((each.fit.certainty for each in good), default=0)
    likeliest = [each for each in good if each.fit.certainty == best]
    has_tasks = len({each.task for each in likeliest}) > 1
    shown = _first_of_each_task(likeliest) if best == POSSIBLE and has_tasks else likeliest[:_MOST_SHOWN]
    problems = [f"{write_flags(each, likeliest)}   {each.fit.reason}" for each in shown]
    problems += [f"not {each.task}: {each.problem}" for each in _first_of_each_task(refused)]
    return Undecided(columns, problems, [each.task for each in shown])


def _first_of_each_task(candidates: Sequence[Candidate]) -> list[Candidate]:
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.task, candidate)
    return list(found.values())


def write_flags(candidate: Candidate, others: Sequence[Candidate]) -> str:
    """The flags that decide for a candidate among others."""
    words = [f"--task {candidate.task}"] if any(each.task != candidate.task for each in others) else []
    same = [each.fit.keys for each in others if each.task == candidate.task]
    columns = find_task(candidate.task).columns(_build_recipe(candidate))
    for key, value in candidate.fit.keys.items():
        if key in columns and any(keys.get(key) != value for keys in same):
            text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).strip()
            words.append(f"--{key} {shlex.quote(text)}")
    return " ".join(words) or f"--task {candidate.task}"
