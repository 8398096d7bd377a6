"""A dozen families of models: trained, evaluated, used to predict, resumed to the same bits and planned, or refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.architectures import PAGE, Result, format_page, try_family
from tests.messages import names

ALL = ("trains", "evaluates", "predicts", "resumes", "plans")


# One for each thing that a family does in a way of its own: eos heads, relative positions, integer buffers, no table of
# embeddings, inner configs, sparse attention, experts, states instead of attention.
@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "bart",
        "big_bird",
        "canine",
        "deberta-v2",
        "gpt2",
        "llama",
        "mixtral",
        "mra",
        "qwen3_5",
        "roberta",
        "t5gemma",
        "xlnet",
    ],
)
def test_a_family_does_everything(family: str, tmp_path: Path) -> None:
    result = try_family(family, tmp_path / family)
    assert (result.done, result.line) == (ALL, "")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "file"), [("xmod", "modeling_xmod.py"), ("reformer", "modeling_reformer.py")])
def test_a_family_that_needs_other_inputs_is_refused_in_one_line(family: str, file: str, tmp_path: Path) -> None:
    result = try_family(family, tmp_path / family)
    assert result.is_refused
    assert names(result.line, "model_name_or_path", file)


def test_the_page_says_what_works() -> None:
    refused = Result("odd", 1_000_000, (), "onecurve: it has a | in its name", 1.0)
    results = [Result("bert", 2_000_000, ALL, "", 1.0), refused, Result("half", 0, ("trains",), "Error: x", 1.0)]
    page = format_page(results, "c0ffee")
    assert [line.split("|")[3].strip() for line in page.splitlines()[-3:]] == ["all", "refused", "trains"]
    assert names(page, "1 of 3", "bert", "odd", "c0ffee")


def test_the_page_is_there_and_whole() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 120
    assert sum(row.split("|")[3].strip() == "all" for row in rows) >= 124
