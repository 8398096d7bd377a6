"""A short soak; the whole one is `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.soak import soak


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_killed_ten_times_has_the_curve_of_one_that_was_not(demo: Path, tmp_path: Path) -> None:
    tally = soak(tmp_path, num_kills=10, num_launched=0, num_steps=300, seed=1)
    assert tally.kills["process"] == 10
    for moment in ("a start", "a save", "final/"):
        assert tally.kills_in["process", moment] >= 1
