"""Folders that can't be written to are found before the work, with the variable to set for each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.preflight.output import check_folders
from onecurve.training.cache import find_cache, find_hub_cache, find_operators, find_unwritable_folders
from onecurve.training.config import build_recipe
from tests.conftest import Run
from tests.messages import names


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home below a file, and nothing else set."""
    (tmp_path / "file").touch()
    for name in ("ONECURVE_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    return tmp_path / "file"


def test_what_to_set_is_named(nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, hub = find_unwritable_folders(["bert-base-cased"])
    assert names(cache, f"'{nowhere}'", "ONECURVE_CACHE")
    assert names(hub, f"'{nowhere}'", "HF_HOME")
    assert find_unwritable_folders([str(tmp_path), None]) == [cache], "nothing is downloaded"
    monkeypatch.setenv("ONECURVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_unwritable_folders(["bert-base-cased"]) == []
    assert (find_cache(), find_hub_cache()) == (tmp_path / "cache", nowhere / "home" / ".cache" / "huggingface")


def test_without_a_place_for_temporary_files_one_is_asked_for(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONECURVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(nowhere / "tmp")])
    (problem,) = find_unwritable_folders([])
    assert names(problem, "TMPDIR")


def test_a_home_that_is_unknown_makes_no_folder_here(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert find_cache().is_absolute()


def test_environments_do_not_share_compiled_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = find_operators()
    assert here.is_relative_to(find_cache())
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    assert find_operators() != here


def test_training_and_check_say_the_same(
    recipe: dict[str, Any], train: Callable[[Mapping[str, Any]], Run], nowhere: Path
) -> None:
    recipe["metric_for_best_model"] = "accuracy"
    run = train(recipe)
    assert (run.exit_code, run.stderr.count("onecurve: ")) == (2, 1)
    (found,) = check_folders(build_recipe(recipe))
    assert found.message in run.stderr
    assert not run.path.exists()


def test_metrics_need_no_home(
    recipe: dict[str, Any], train: Callable[[Mapping[str, Any]], Run], nowhere: Path, cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import evaluate.config

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(nowhere / "metrics"))
    monkeypatch.setenv("ONECURVE_CACHE", str(cache))
    run = train({**recipe, "max_train_steps": 1})
    assert run.exit_code == 0, run.stderr
