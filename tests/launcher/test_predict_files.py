"""What `onecurve predict` refuses before it starts anything."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from onecurve.launcher.cli.predict import PredictOptions, _check_files
from onecurve.launcher.errors import UsageError
from tests.messages import naming
from tests.training.conftest import make_run
from tests.training.recovery.conftest import make_checkpoint


@pytest.fixture
def options(tmp_path: Path) -> PredictOptions:
    run = make_run(tmp_path / "run")
    run.final.mkdir()
    make_checkpoint(run.checkpoints, 5)
    (tmp_path / "in.csv").write_text("text\na\n")
    return PredictOptions(run=run.path, input_file=tmp_path / "in.csv", output_file=tmp_path / "out.csv")


def change(options: PredictOptions, **values: object) -> PredictOptions:
    return PredictOptions(**{**vars(options), **values})


def test_an_output_that_exists_needs_overwrite(options: PredictOptions) -> None:
    _check_files(options)
    options.output_file.write_text("mine")
    with pytest.raises(UsageError, match=naming("out.csv", "--overwrite")):
        _check_files(options)
    _check_files(change(options, overwrite=True))


def test_a_checkpoint_is_named_by_name_or_step(options: PredictOptions) -> None:
    for name in ("final", "step_00000005", "5", "0005"):
        _check_files(change(options, checkpoint=name))
    for name in ("best", "6", "", "step_5", "../run", "\u00b2"):
        with pytest.raises(UsageError, match=naming("--checkpoint", "final", "step_00000005")):
            _check_files(change(options, checkpoint=name))
    shutil.rmtree(options.run / "final")
    _check_files(change(options, checkpoint="5"))
    with pytest.raises(UsageError, match=naming("final/", "step_00000005")):
        _check_files(options)


def test_a_folder_is_read_whatever_its_name_and_holds_no_output(options: PredictOptions, tmp_path: Path) -> None:
    (folder := tmp_path / "photos.d").mkdir()
    _check_files(change(options, input_file=folder))
    with pytest.raises(UsageError, match=naming("--output", "out.csv")):
        _check_files(change(options, input_file=folder, output_file=folder / "inner" / "out.csv"))
    with pytest.raises(UsageError, match=naming("--input", "photos")):
        _check_files(change(options, input_file=tmp_path / "photos"))
