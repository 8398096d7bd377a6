"""What the launcher asks of `datasets`: a data set's splits, and a survey of the one to train on."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from onecurve.launcher.starting.choice import choose
from onecurve.training.describe_data import describe_data
from onecurve.training.survey import Survey
from tools.init_files import NUM_ROWS, write_pictures, write_saved, write_split_folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def test_a_saved_data_set_has_its_splits_and_names_of_classes(tmp_path: Path) -> None:
    write_saved(tmp_path / "saved")
    found = json.loads(json.dumps(describe_data(str(tmp_path / "saved"))))
    assert (found["train"], found["validation"]) == ("train", "validation")
    assert found["splits"] == {"train": NUM_ROWS, "validation": 20, "test": 20}
    label = Survey.from_json(found["survey"]).find("label")
    assert label is not None
    assert (label.class_names, dict(label.counts or ())) == (("bad", "good"), {0: NUM_ROWS // 2, 1: NUM_ROWS // 2})


def test_a_name_is_loaded_as_from_the_hub(tmp_path: Path) -> None:
    """`load_dataset` takes a folder of files for a data set as it takes a repository."""
    write_split_folder(tmp_path / "reviews")
    (tmp_path / "reviews" / "test.csv").unlink()  # It has no labels, which `datasets` refuses beside the others.
    found = describe_data(str(tmp_path / "reviews"))
    assert (found["has_splits"], found["train"], found["validation"]) == (True, "train", "validation")
    assert Survey.from_json(found["survey"]).num_rows == NUM_ROWS


def test_splits_are_known_by_their_names(tmp_path: Path) -> None:
    """Whatever their sizes and order; as MNLI's are called, too."""
    names = {"test": 9, "validation_mismatched": 3, "validation_matched": 2, "train": 5}
    splits = {name: datasets.Dataset.from_dict({"text": ["a"] * count}) for name, count in names.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = describe_data(str(tmp_path / "saved"))
    assert (found["train"], found["validation"]) == ("train", "validation_mismatched")


def test_images_are_told_without_their_bytes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    found = json.dumps(describe_data(str(tmp_path / "pictures")))
    survey = Survey.from_json(json.loads(found)["survey"])
    assert len(found) < 10_000
    assert not survey.is_complete
    candidate = choose(survey, {})
    assert (candidate.task, candidate.fit.facts["labels"]) == (
        "image_classification",
        dict.fromkeys(("dark", "light", "red"), 8),
    )


def test_what_can_not_be_loaded_is_said() -> None:
    assert "no_such_data_set" in describe_data("nobody/no_such_data_set")["problem"]


def test_every_so_many_rows_are_read_of_a_large_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_list([{"number": number} for number in range(2_500)]).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr("onecurve.training.describe_data.MAX_ROWS_READ", 1_000)
    found = describe_data(str(tmp_path / "saved"))
    survey = Survey.from_json(found["survey"])
    assert (found["has_splits"], found["splits"], survey.num_rows) == (False, {"train": 2_500}, 834)
    assert [row["number"] for row in survey.rows] == list(range(0, 2_500, 3))
