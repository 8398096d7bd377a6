"""A recipe is compared with the one of a run directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from onecurve.training.errors import BadInput
from onecurve.training.recipe_comparison import find_differing_keys
from onecurve.training.recovery.run_creation import create_run
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.run_directory import RunDirectory
from tests.messages import naming
from tests.training.conftest import resolve


def test_differing_keys_are_named_with_both_values(tmp_path: Path) -> None:
    here = resolve(tmp_path)
    run = RunDirectory.of(here.recipe)
    with RunLock(run) as lock:
        create_run(run, lock, here, {})
    other = resolve(tmp_path, seed="7", learning_rate="0.1", report_to="wandb")
    assert find_differing_keys(run, here.recipe, frozenset()) == []
    assert find_differing_keys(run, other.recipe, frozenset({"report_to"})) == [
        "learning_rate: 5e-05 -> 0.1",
        "seed: 42 -> 7",
    ]
    assert "report_to: 'none' -> 'wandb'" in find_differing_keys(run, other.recipe, frozenset())


def test_a_run_of_an_earlier_version_had_the_masks_of_its_processes(tmp_path: Path) -> None:
    """It goes on with torch's masks, is refused with others, and may have any where nothing is dropped."""
    (tmp_path / "config.yaml").write_text("model_name_or_path: m\ntrain_file: t.csv\ndropout_masks: bytes\n")

    def compare(**flags: str) -> list[str]:
        return find_differing_keys(RunDirectory(tmp_path), resolve(tmp_path, **flags).recipe, frozenset({"output_dir"}))

    assert compare(dropout_masks="torch") == []
    assert compare() == ["dropout_masks: 'torch' -> 'by_example'"]
    assert compare(dropout="0") == ["dropout: None -> 0.0"]


def test_an_invalid_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: -1\n")
    with pytest.raises(BadInput, match=naming("config.yaml", "seed")):
        find_differing_keys(RunDirectory(tmp_path), resolve(tmp_path).recipe, frozenset())
