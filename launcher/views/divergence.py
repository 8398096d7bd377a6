"""`onecurve compare RUN RUN --assert`: whether two curves agree, and if not, what made them part, most likely cause first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecurve.launcher.facts.divergence import Sign, find_divergence
from onecurve.launcher.facts.history import History
from onecurve.launcher.facts.run_differences import Difference, Effect, find_differences
from onecurve.launcher.units import format_setting
from onecurve.launcher.views.compare import name_runs

if TYPE_CHECKING:
    from rich.console import Console

# What brings about what a curve shows, the most likely first.
_CAUSES_OF: dict[Sign, tuple[Effect, ...]] = {
    "examples": ("examples",),
    "forward": ("forward", "examples", "rounding"),
    "rate": ("rate", "evaluation"),
    "later": ("update", "forward", "rounding", "examples"),
    "evaluation": ("evaluation", "rounding", "forward"),
    "length": ("length", "rate", "evaluation"),
}

_MEANING: dict[Sign, str] = {
    "examples": "a step has other examples",
    "forward": "the first loss differs on the same examples",
    "rate": "the learning rate differs",
    "later": "the first loss is the same, and later ones are not",
    "evaluation": "the training is the same, and an evaluation differs",
    "length": "one run ends before the other, and they agree until there",
}


def build_divergence(one: History, other: History, tolerance: float) -> dict[str, Any]:
    """Whether two curves agree, where they part, and in what the runs differ, most likely cause first.

    Args:
        tolerance: as `find_divergence` takes it.

    Raises:
        UsageError: the runs have no step in common.
    """
    found = find_divergence(one, other, tolerance)
    parting = found.parting
    last_step = max(one.steps[-1]["step"], other.steps[-1]["step"]) if parting is None else parting.step
    differences = find_differences(one, other, last_step)
    causes = [(each, _explain(each, found.signs)) for each in differences]
    causes.sort(key=lambda pair: _rank(pair[0], found.signs))
    return {
        "runs": [str(one.path), str(other.path)],
        "states": [one.state, other.state],
        "tolerance": tolerance,
        "agree": parting is None,
        "steps": found.num_steps,
        "evaluations": found.num_evaluations,
        "largest_deviations": dict(found.largest),
        "parting": parting
        and {
            "step": parting.step,
            "quantity": parting.quantity,
            "values": list(parting.values),
            "deviation": parting.deviation,
            "allowed": parting.allowed,
        },
        "examples": {"steps_recorded": found.num_with_digests, "first_other": found.first_other_examples},
        "signs": list(found.signs),
        "other_metrics": [[step, name, list(values)] for step, name, values in found.other_metrics],
        "differences": [
            {
                "category": each.category,
                "name": each.name,
                "values": list(each.values),
                "from_step": each.step,
                "explains": sign,
            }
            for each, sign in causes
        ],
    }


def _rank(difference: Difference, signs: Sequence[Sign]) -> tuple[int, int]:
    """How well a difference explains the curves: a sign's own causes before possible ones, the earliest sign first."""
    places = [
        (_CAUSES_OF[sign].index(effect), number)
        for number, sign in enumerate(signs)
        for effect in _CAUSES_OF[sign]
        if effect in difference.effects
    ]
    return min(places, default=(len(_CAUSES_OF), 0))


def _explain(difference: Difference, signs: Sequence[Sign]) -> Sign | None:
    place, number = _rank(difference, signs)
    return signs[number] if place < len(_CAUSES_OF) else None


def print_divergence(console: Console, content: dict[str, Any]) -> None:
    """Print the verdict, and a table of what differs."""
    for line in describe_divergence(content):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if content["differences"]:
        from rich.table import Table

        table = Table()
        names = name_runs([Path(run) for run in content["runs"]])
        for title in ("what differs", *names, *(["it explains that"] if content["signs"] else [])):
            table.add_column(title, overflow="fold")
        for each in content["differences"]:
            meaning = [_MEANING[each["explains"]] if each["explains"] else "-"] if content["signs"] else []
            since = f" (from step {each['from_step']})" if each["from_step"] > 1 else ""
            values = [_escape(_shorten(value)) for value in each["values"]]
            table.add_row(f"{each['category']}: {_escape(each['name'])}{since}", *values, *meaning)
        console.print(table)


def describe_divergence(content: dict[str, Any]) -> list[str]:
    """The verdict, in lines."""
    if content["agree"]:
        largest = ", ".join(f"{name} {value:.1e}" for name, value in content["largest_deviations"].items())
        lines = [
            f"The curves agree within {content['tolerance']:g} over {content['steps']} steps and their "
            f"evaluations. Largest relative differences: {largest}."
        ]
        if content["examples"]["first_other"] is not None:
            lines.append(f"Yet from step {content['examples']['first_other']} on they have not seen the same examples.")
    else:
        lines = [_describe_parting(content), _describe_examples(content), _describe_cause(content)]
    for step, name, values in content["other_metrics"]:
        lines.append(f"{name} after step {step} is {values[0]:g} and {values[1]:g}, although the losses there agree.")
    return lines


def _describe_parting(content: dict[str, Any]) -> str:
    parting = content["parting"]
    one, other = parting["values"]
    if parting["quantity"] == "steps":
        states = " and ".join(content["states"])
        return f"The curves agree until step {parting['step'] - 1}, where one ends: {one} and {other} steps ({states})."
    place = "after step" if parting["quantity"].startswith(("eval_", "test_")) else "at step"
    return (
        f"The curves part {place} {parting['step']}: {parting['quantity']} {one:.8g} and {other:.8g}, a relative difference of "
        f"{parting['deviation']:.1e} where {parting['allowed']:g} is allowed."
    )


def _describe_examples(content: dict[str, Any]) -> str:
    first, parting = content["examples"]["first_other"], content["parting"]["step"]
    if first is not None and first <= parting:
        return f"Step {first} is the first whose examples differ."
    if not content["examples"]["steps_recorded"]:
        return "Which examples they saw is not recorded: one of them is a run of an earlier version."
    return f"Until step {min(parting, content['steps'])} both saw the same examples."


def _describe_cause(content: dict[str, Any]) -> str:
    if not content["differences"]:
        return (
            "Nothing that a run directory records differs. On a GPU some algorithms add in another order each time: see whether "
            "two runs with deterministic: true agree. Code that is not committed is not recorded."
        )
    first = content["differences"][0]
    if first["explains"] is None:
        return "None of the differences below explains it: look for code that was changed and not committed."
    one, other = map(_shorten, first["values"])
    return (
        f"Most likely cause: {first['category']}, {first['name']} ({one} and {other}). It explains that "
        f"{_MEANING[first['explains']]}."
    )


def _shorten(value: object) -> str:
    text = format_setting(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def _escape(text: str) -> str:
    return text.replace("[", "\\[")  # rich would read [a] as a style
