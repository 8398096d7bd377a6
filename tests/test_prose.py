"""Tests assert keys, codes and values: a message may be worded anew without a test that fails."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

MIN_LENGTH = 25

# Three words in a row, in lower case: a sentence or a part of one, and no command, table, number or YAML.
_SENTENCE = re.compile(r"(?<![\w{}-])[a-z']{2,}[,;:]? [a-z']{1,}[,;:]? [a-z']{2,}(?![\w{}-])")

# Python's own words.
_TRACEBACK = "Traceback (most recent call last)"

# What matches text: operators beside these calls and this argument.
_MATCHERS = {"search", "match", "fullmatch", "findall", "startswith", "endswith", "count", "escape", "names", "naming"}


def to_prose(node: ast.AST) -> str | None:
    """The text of a string that is long and holds a sentence."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or len(node.value) < MIN_LENGTH:
        return None
    return node.value.strip() if _SENTENCE.search(node.value.replace(_TRACEBACK, "")) else None


def find_expectations(function: ast.AST) -> Iterator[ast.AST]:
    """Whatever text is compared with or looked for in an assertion of a function, or where an error is expected."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            for part in ast.walk(node.test):
                if isinstance(part, ast.Compare):
                    operands = (part.left, *part.comparators)
                elif isinstance(part, ast.Call) and _name(part.func) in _MATCHERS:
                    operands = tuple(part.args)
                else:
                    continue
                for operand in operands:
                    yield from _find_literals(operand)
        elif isinstance(node, ast.keyword) and node.arg == "match":
            yield from _find_literals(node.value)


def _find_literals(node: ast.AST) -> Iterator[ast.AST]:
    """Strings and names in an operand; what is given to other functions is none of what is expected."""
    if isinstance(node, ast.Constant | ast.Name):
        yield node
    elif isinstance(node, ast.Subscript):
        yield from _find_literals(node.value)
    elif isinstance(node, ast.JoinedStr | ast.List | ast.Tuple | ast.Set | ast.Dict | ast.BinOp | ast.Starred):
        for child in ast.iter_child_nodes(node):
            yield from _find_literals(child)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def find_prose(source: str) -> Iterator[str]:
    """Sentences that a test expects: written in the assertion, given by `parametrize`, or by a loop or a mapping."""
    tree = ast.parse(source)
    values = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict | ast.List | ast.Tuple)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    expected: list[ast.AST] = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        direct = list(find_expectations(function))
        used = {node.id for node in direct if isinstance(node, ast.Name)}
        expected += [*direct, *(values[name] for name in used & values.keys())]
        for decorator in function.decorator_list:
            expected += _find_parameters(decorator, used)
        for node in ast.walk(function):
            if isinstance(node, ast.For | ast.comprehension):
                rows = values.get(node.iter.id) if isinstance(node.iter, ast.Name) else node.iter
                expected += _pick(node.target, rows, used) if rows is not None else []
    found = {part: text for node in expected for part in ast.walk(node) if (text := to_prose(part)) is not None}
    for text in sorted(set(found.values())):
        is_own = source.count(text) > sum(text in other for other in found.values())
        if not is_own:  # Not what the test itself has raised, printed or written.
            yield text


def _find_parameters(decorator: ast.expr, used: set[str]) -> list[ast.AST]:
    """The values of `parametrize` for the arguments that are expected somewhere."""
    if not isinstance(decorator, ast.Call) or _name(decorator.func) != "parametrize" or len(decorator.args) != 2:
        return []
    given = decorator.args[0]
    if isinstance(given, ast.Constant):
        names = [ast.Name(name.strip()) for name in str(given.value).split(",")]
        target: ast.expr = names[0] if len(names) == 1 else ast.Tuple(list(names))
    else:
        elements = given.elts if isinstance(given, ast.Tuple | ast.List) else []
        target = ast.Tuple([ast.Name(str(element.value)) for element in elements if isinstance(element, ast.Constant)])
    return _pick(target, decorator.args[1], used)


def _pick(target: ast.expr, values: ast.expr, used: set[str]) -> list[ast.AST]:
    """Of the rows in `values`, what is bound to the names of `target` that are used."""
    rows = values.elts if isinstance(values, ast.List | ast.Tuple | ast.Set) else []
    if isinstance(target, ast.Name):
        return list(rows) if target.id in used else []
    picked: list[ast.AST] = []
    for row in rows:
        parts = row.args if isinstance(row, ast.Call) else getattr(row, "elts", [])
        if isinstance(target, ast.Tuple):
            pairs = zip(target.elts, parts, strict=False)
            picked += [part for name, part in pairs if isinstance(name, ast.Name) and name.id in used]
    return picked


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_test_expects_a_sentence(path: Path) -> None:
    if path == Path(__file__):
        return
    assert list(find_prose(path.read_text(encoding="utf-8"))) == [], (
        "use tests.messages.names: which key, file, number?"
    )


@pytest.mark.parametrize(
    "source",
    [
        'assert "row 7 is empty, every row needs a label" in run.stderr',
        'assert f"{path}: every row of it needs a label" in run.stderr',
        'assert found == "the row is empty; fill or remove it"',
        'assert any(line.startswith("every row of it needs a label") for line in told)',
        'with pytest.raises(ValueError, match="every row of it needs a label"): pass',
        'for told in ("every row of it needs a label", "x"):\n        assert told in run.stderr',
        'assert names(told, "every row of it needs a label")',
    ],
)
def test_a_sentence_is_found_where_it_is_expected(source: str) -> None:
    assert len(list(find_prose(f"def test():\n    {source}\n"))) == 1


def test_a_sentence_is_found_where_it_is_given() -> None:
    values = '[("every row of it needs a label", 1), ("each of the rows has its label", 2)]'
    test = "def test(given, told):\n    assert told in run({told})\n"
    for names, count in (('("told", "number")', 2), ('"told, number"', 2), ('("number", "told")', 0)):
        assert len(list(find_prose(f"@pytest.mark.parametrize({names}, {values})\n{test}"))) == count
    mapping = 'CASES = {1: "every row of it needs a label"}\ndef test(case):\n    assert CASES[case] in told\n'
    assert len(list(find_prose(mapping))) == 1


def test_what_is_no_sentence_is_not_found() -> None:
    for source in (
        'assert names(told, "row 7", "\'label\'")',
        'assert "--array=0-3%2 --nodes=1 --gpus-per-node=1" in told',
        'assert told == "| plain | 93.00% | 90.0% to 96.0% |"',
        'assert found, "every row of it needs a label"',
    ):
        assert list(find_prose(f"def test():\n    {source}\n")) == []
