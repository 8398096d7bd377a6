"""Features come back from their files as they were written, whatever kind of numbers they hold."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from onecurve.training.data.columns import ExamplesWriter, Ragged, open_examples, release


def test_ragged_and_dense_features_come_back(tmp_path: Path) -> None:
    with ExamplesWriter(tmp_path / "a") as writer:
        writer.write({"tokens": [[1, 2, 3], []], "weights": [[1, 0.5], [2]], "label": np.array([7, 8])})
        writer.write({"tokens": [[4]], "weights": [[np.float32(0.25)]], "label": np.array([9])})
    found = open_examples(tmp_path / "a")
    assert [row.tolist() for row in found["tokens"][:]] == [[1, 2, 3], [], [4]]
    assert [row.tolist() for row in found["weights"][:]] == [[1.0, 0.5], [2.0], [0.25]], (
        "no number is cut to a whole one"
    )
    assert np.asarray(found["label"][np.array([2, 0])]).tolist() == [9, 7]
    tokens = found["tokens"]
    assert isinstance(tokens, Ragged)
    assert tokens.lengths.tolist() == [3, 0, 1]


def test_numbers_of_another_kind_in_a_later_batch_are_refused(tmp_path: Path) -> None:
    with ExamplesWriter(tmp_path / "a") as writer:
        writer.write({"tokens": [[1]]})
        with pytest.raises(AssertionError):
            writer.write({"tokens": [[0.5]]})


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), ExamplesWriter(tmp_path / "a") as writer:
        writer.write({"tokens": [[2**31]]})


def test_bytes_come_back(tmp_path: Path) -> None:
    with ExamplesWriter(tmp_path / "a") as writer:
        writer.write({"text": ["é".encode(), b""]})
        writer.write({"text": [b"a"]})
    found = open_examples(tmp_path / "a")["text"]
    assert [bytes(row).decode() for row in found[:]] == ["é", "", "a"]
    assert found.arrays[0].dtype == np.uint8, "a byte for each"


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages of files are counted on Linux")
def test_what_was_read_of_a_file_can_be_let_go(tmp_path: Path) -> None:
    def count_resident_mib() -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:")) // 1024

    with ExamplesWriter(tmp_path / "split") as writer:
        writer.write({"numbers": np.arange(8 << 20, dtype=np.int64)})
    values = open_examples(tmp_path / "split")["numbers"].values
    before = count_resident_mib()
    total = int(values.sum())
    assert count_resident_mib() - before > 60, "64 MiB were read"
    release(values)
    assert count_resident_mib() - before < 4
    assert int(values.sum()) == total
