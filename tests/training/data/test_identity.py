"""Digests of examples and steps: the same for the same examples, whatever the place, the order and the topology."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onecurve.training.data import identity
from onecurve.training.data.columns import Examples, ExamplesWriter, open_examples
from onecurve.training.data.identity import Identities, digest_contents, digest_step, identify_examples
from onecurve.training.data.plan import Order, TrainingPlan

ROWS: dict[str, Any] = {
    "input_ids": [[1, 2, 3], [4], [], [1, 2, 3], [3, 2, 1]],
    "labels": [[7], [7, 7], [], [7], [7]],
    "text": [b"ab", b"", b"c", b"ab", b"ab"],
    "score": np.array([[0.5, 1.0], [0.5, 1.0], [0.5, 1.0], [0.5, 1.0], [0.5, 1.0]], dtype=np.float32),
}
NUM_ROWS = 5


def write(folder: Path, rows: dict[str, Any]) -> Examples:
    with ExamplesWriter(folder) as writer:
        writer.write(rows)
    return open_examples(folder)


def identify(folder: Path, **changes: Any) -> Identities:
    return identify_examples(write(folder, {**ROWS, **changes}), NUM_ROWS)


def test_examples_of_the_same_content_have_the_same_identity(tmp_path: Path) -> None:
    """Where a row stood in its file is no part of its content."""
    found = identify(tmp_path / "a", row=np.arange(5))
    assert found[0] == found[3]
    assert len(set(found.tolist())) == 4
    assert (found == identify(tmp_path / "b")).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"input_ids": [[1, 2, 4], [4], [], [1, 2, 3], [3, 2, 1]]},
        {"input_ids": [[2, 1, 3], [4], [], [1, 2, 3], [3, 2, 1]]},
        {"input_ids": [[1, 2, 3, 0], [4], [], [1, 2, 3], [3, 2, 1]]},
        {"input_ids": [[1, 2], [4], [], [1, 2, 3], [3, 2, 1]], "labels": [[3, 7], [7, 7], [], [7], [7]]},
        {"text": [b"ba", b"", b"c", b"ab", b"ab"]},
        {"score": np.array([[0.5, 1.5]] + [[0.5, 1.0]] * 4, dtype=np.float32)},
    ],
    ids=["value", "order", "length", "moved to another feature", "bytes", "float"],
)
def test_another_content_is_another_identity(changes: dict[str, Any], tmp_path: Path) -> None:
    before, after = identify(tmp_path / "a"), identify(tmp_path / "b", **changes)
    assert before[0] != after[0]
    assert (before[1:] == after[1:]).all()


def test_identities_do_not_depend_on_how_many_are_looked_at_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = identify(tmp_path / "a")
    monkeypatch.setattr(identity, "_VALUES_AT_ONCE", 8)
    assert (identify(tmp_path / "b") == whole).all()


def test_contents_do_not_depend_on_the_order(tmp_path: Path) -> None:
    found = identify(tmp_path / "a")
    assert digest_contents(found) == digest_contents(found[::-1])
    assert digest_contents(found) != digest_contents(found[[0, 1, 2, 3, 3]]), "how often each is there counts"


def test_a_step_is_its_examples_by_number_and_content_in_any_order() -> None:
    identities = np.array([5, 6, 7, 7], dtype=np.uint64)
    digest = digest_step(np.array([0, 1, 2]), identities)
    assert digest == digest_step(np.array([2, 0, 1]), identities)
    assert len(digest) == 16
    assert digest != digest_step(np.array([0, 1, 3]), identities), "dropout masks are a function of the number"
    assert digest != digest_step(np.array([0, 1, 2]), np.array([5, 6, 8, 7], dtype=np.uint64))
    assert digest != digest_step(np.array([0, 1, 2]), None)


def test_a_step_has_the_same_digest_on_every_topology() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 203)
    order = Order(203, 16, 42, lengths, 64)
    identities = np.random.default_rng(1).integers(0, 2**63, 203).astype(np.uint64)

    def digests(num_processes: int, max_examples: int, start: int = 0, is_packed: bool = False) -> list[set[str]]:
        plan = TrainingPlan(
            order, 26, num_processes, max_examples, start_step=start, is_packed=is_packed, identities=identities
        )
        return [{each.examples_digest for each in plan.micro_batches(step)} for step in range(start, 26)]

    reference = digests(1, 16)
    assert all(len(step) == 1 for step in reference), "every process knows the digest of the whole step"
    assert len(set.union(*reference[:13])) == 13, "no two steps of an epoch are the same"
    for topology in ((2, 16), (3, 1), (8, 5)):
        assert digests(*topology) == reference
    assert digests(2, 3, start=7, is_packed=True) == reference[7:], "a resumed run has those of its steps"
