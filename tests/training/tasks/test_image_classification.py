"""Image classification: pixels and losses of plain transformers, augmentations of the example alone, bad images by row."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, classification_report

from onecurve.launcher.views.report import write_report
from onecurve.training.outcome import report_outcome
from tests.conftest import Launch, Run, to_flags
from tests.messages import names
from tests.training.conftest import assert_refused, stop_and_resume
from tools.images import CLASSES, build_vit, write_image

Settings = dict[str, Any]
Train = Callable[[Settings], Run]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vit(tmp_path_factory.mktemp("model") / "vit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and validation/ with a folder for each class; names in another order than numbers."""
    folder = tmp_path_factory.mktemp("images")
    for split, numbers in (("train", range(48)), ("validation", range(100, 118))):
        for number in numbers:
            write_image(folder / split / CLASSES[number % 3] / f"{number * 7 % 61}_{number}.png", number)
    return folder


@pytest.fixture
def images(vit: Path, folders: Path, tmp_path: Path) -> Settings:
    """Settings of a training that takes a second."""
    return {
        "task": "image_classification",
        "model_name_or_path": str(vit),
        "train_file": str(folders / "train"),
        "validation_file": str(folders / "validation"),
        "output_dir": str(tmp_path / "run"),
        "train_batch_size": 16,
        "per_device_batch_size": 8,
        "learning_rate": 1e-3,
        "max_train_steps": 6,
        "dropout": 0.0,
    }


def list_images(folder: Path) -> Rows:
    """Rows of a folder, as its classes and names are sorted."""
    return [
        {"image": str(path), "label": inner.name}
        for inner in sorted(folder.iterdir())
        for path in sorted(inner.iterdir())
    ]


def write_csv(path: Path, rows: Rows) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def read(path: Path | str) -> Rows:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def compute_logits(folder: Path, paths: Sequence[str]) -> torch.Tensor:
    """[images, classes] by plain transformers."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    opened = [Image.open(path).convert("RGB") for path in paths]
    with torch.no_grad():
        logits: torch.Tensor = model(**processor(opened, return_tensors="pt")).logits
    return logits


def predict(run: Run, source: Path | str, target: Path) -> int:
    from onecurve.training import predict

    return report_outcome(predict.main, ["--run", str(run.path), "--input", str(source), "--output", str(target)])


def test_it_learns_and_its_report_is_that_of_scikit_learn(images: Settings, train: Train, folders: Path) -> None:
    run = train({**images, "max_train_steps": 30})
    assert run.exit_code == 0, run.stderr
    lines = read(run.path / "eval_predictions.jsonl")
    labels, predictions = ([line[name] for line in lines] for name in ("label", "prediction"))
    assert labels == [row["label"] for row in list_images(folders / "validation")]
    report = run.read("eval_report.json")
    assert report["metrics"]["eval_accuracy"] == accuracy_score(labels, predictions) > 0.9
    expected = classification_report(labels, predictions, output_dict=True, zero_division=0.0)
    assert report["per_class"]["red"]["f1-score"] == expected["red"]["f1-score"]
    assert "pipeline_tag: image-classification" in (run.path / "final" / "README.md").read_text(encoding="utf-8")
    page = write_report([run.path]).read_text(encoding="utf-8")
    assert page.count("<dt>prediction</dt>") == len(report["hardest"]) > 0, (
        "an example without a text is listed as well"
    )


def test_the_loss_is_that_of_transformers(images: Settings, train: Train, folders: Path, tmp_path: Path) -> None:
    """Of all validation images, by the model of final/ and the whole processor."""
    run = train(images)
    rows = list_images(folders / "validation")
    logits = compute_logits(run.path / "final", [row["image"] for row in rows])
    labels = torch.tensor([CLASSES.index(row["label"]) for row in rows])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert run.evaluations[-1]["eval_loss"] == pytest.approx(loss, rel=1e-6)


def write_each_way(folders: Path, target: Path, split: str) -> dict[str, Settings]:
    """The keys that read a split from where `write_each_way` has put it, by how it is kept."""
    import datasets

    rows = list_images(folders / split)
    relative = [{**row, "image": os.path.relpath(row["image"], folders)} for row in rows]
    labels = [row["label"] for row in rows]
    contents = [Path(row["image"]).read_bytes() for row in rows]
    of_datasets = [{"bytes": content, "path": None} for content in contents]
    write_csv(target / f"{split}.csv", relative)
    (target / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, values in (("bytes", contents), ("pairs", of_datasets)):
        pyarrow.parquet.write_table(pa.table({"image": values, "label": labels}), target / f"{split}_{name}.parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    saved = datasets.Dataset.from_dict({"image": [row["image"] for row in rows], "label": labels}, features=features)
    saved.save_to_disk(str(target / f"{split}_saved"))
    return {
        "paths in a table": {"train_file": str(target / f"{split}.csv"), "image_folder": str(folders)},
        "whole paths": {"train_file": str(target / f"{split}.jsonl")},
        "bytes": {"train_file": str(target / f"{split}_bytes.parquet")},
        "bytes as datasets keeps them": {"train_file": str(target / f"{split}_pairs.parquet")},
        "a saved data set": {"dataset_name": str(target / f"{split}_saved"), "train_file": None},
    }


def test_images_are_the_same_wherever_they_are(
    images: Settings, train: Train, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train({**images, "max_train_steps": 2}).losses
    for number, (kept, keys) in enumerate(write_each_way(folders, tmp_path, "train").items()):
        settings = {**images, **keys, "max_train_steps": 2, "output_dir": str(tmp_path / f"{number}")}
        if "image_folder" in keys:  # Validation paths are whole: a folder before them changes nothing.
            settings["image_folder"] = str(folders)
        run = train({name: value for name, value in settings.items() if value is not None})
        assert run.exit_code == 0, run.stderr
        assert run.losses == expected, kept


AUGMENTED = {"random_crop_area": 0.5, "random_flip": 0.5}


def test_augmentations_are_of_the_example_and_the_epoch(images: Settings, train: Train, tmp_path: Path) -> None:
    """The same for other micro-batches and after a stop; others in each epoch; none in an evaluation."""
    whole = train({**images, **AUGMENTED, "per_device_batch_size": 16, "output_dir": str(tmp_path / "whole")})
    assert whole.exit_code == 0, whole.stderr
    resumed = stop_and_resume(train, {**images, **AUGMENTED, "per_device_batch_size": 16}, tmp_path)
    assert resumed.losses == whole.losses
    small = train({**images, **AUGMENTED, "per_device_batch_size": 3, "output_dir": str(tmp_path / "small")})
    assert small.losses == pytest.approx(whole.losses, rel=1e-5)
    plain = train({**images, "output_dir": str(tmp_path / "plain")})
    assert abs(plain.losses[0] - whole.losses[0]) > 1e-4
    # What is not trained shows every epoch's images to the same weights.
    frozen = {**images, **AUGMENTED, "train_batch_size": 48, "freeze": ["vit.*"], "learning_rate": 1e-30}
    still = train({**frozen, "max_train_steps": 3, "output_dir": str(tmp_path / "still")})
    assert len({round(loss, 7) for loss in still.losses}) == 3
    assert len({line["eval_loss"] for line in still.evaluations}) == 1


def test_dropout_is_that_of_the_image_whatever_the_micro_batches_are(
    images: Settings, train: Train, tmp_path: Path
) -> None:
    del images["dropout"]
    runs = [
        train({**images, "per_device_batch_size": size, "output_dir": str(tmp_path / f"by_{size}")}) for size in (16, 3)
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
    assert "statistically" not in runs[0].stdout + runs[0].stderr
    still = train({**images, "dropout": 0.0, "output_dir": str(tmp_path / "still")})
    assert still.losses[0] != pytest.approx(runs[0].losses[0], rel=1e-5), "it is on"


def test_it_predicts_what_transformers_does(images: Settings, train: Train, folders: Path, tmp_path: Path) -> None:
    run = train({**images, "max_train_steps": 12})
    paths = [row["image"] for row in list_images(folders / "validation")]
    expected = compute_logits(run.path / "final", paths).softmax(-1)
    assert predict(run, write_csv(tmp_path / "in.csv", [{"image": path} for path in paths]), tmp_path / "out.csv") == 0
    with (tmp_path / "out.csv").open(encoding="utf-8") as file:
        of_paths = list(csv.DictReader(file))
    assert [row["image"] for row in of_paths] == paths
    contents = pa.table({"image": [Path(path).read_bytes() for path in paths], "number": range(len(paths))})
    pyarrow.parquet.write_table(contents, tmp_path / "in.parquet")
    assert predict(run, tmp_path / "in.parquet", tmp_path / "out.parquet") == 0
    of_bytes = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert of_bytes.select(["image", "number"]) == contents
    for labelled in (of_paths, of_bytes.to_pylist()):
        assert [row["prediction"] for row in labelled] == [CLASSES[place] for place in expected.argmax(-1)]
        found = [[float(row[f"probability_{name}"]) for name in CLASSES] for row in labelled]
        assert np.array(found) == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_folder_of_images_is_predicted_as_a_table_of_them(
    images: Settings, train: Train, folders: Path, tmp_path: Path
) -> None:
    """With classes or without, whatever the run's own data called the column of images and wherever its paths led from."""
    split = folders / "train"
    table = write_csv(
        tmp_path / "train.csv", [{"photo": row["image"], "label": row["label"]} for row in list_images(split)]
    )
    keys = {"image_column": "photo", "image_folder": str(tmp_path), "train_file": table, "validation_file": table}
    run = train({**images, **keys, "max_train_steps": 1})
    rows = list_images(folders / "validation")
    source = write_csv(tmp_path / "in.csv", [{"photo": row["image"]} for row in rows])
    assert predict(run, source, tmp_path / "table.jsonl") == 0
    expected = read(tmp_path / "table.jsonl")
    assert predict(run, folders / "validation", tmp_path / "classes.jsonl") == 0
    classes = read(tmp_path / "classes.jsonl")
    assert [row.pop("label") for row in classes] == [row["label"] for row in rows]
    assert classes == expected
    (flat := tmp_path / "flat").mkdir()
    for number, row in enumerate(reversed(rows)):
        shutil.copy(row["image"], flat / f"{number:02d}.png")
    assert predict(run, flat, tmp_path / "flat.jsonl") == 0
    found = read(tmp_path / "flat.jsonl")
    assert [row.pop("photo") for row in found] == [str(flat / f"{number:02d}.png") for number in range(len(rows))]
    by_number = [{name: value for name, value in row.items() if name != "photo"} for row in reversed(expected)]
    assert [row["prediction"] for row in found] == [row["prediction"] for row in by_number]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in by_number], rel=1e-5)


def spoil_with(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")

    return write


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "no images": (lambda folder: (folder / "0.png").unlink(), "out.csv", ("in",)),
    "another file": (spoil_with("notes.txt"), "out.csv", ("notes.txt", ".png")),
    "images beside classes": (spoil_with("cat/1.png"), "out.csv", ("0.png",)),
    "a broken image": (spoil_with("1.png"), "out.csv", ("row 2", "1.png")),
    "a name that no table can hold": (spoil_with("\udcff.png"), "out.csv", ("in", "UTF-8")),
    "an output in it": (lambda folder: None, "in/out.csv", ("--output", "out.csv")),
}


def test_a_wrong_folder_is_refused_in_one_line(
    images: Settings, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train({**images, "max_train_steps": 1})
    for number, (fault, (spoil, target, needed)) in enumerate(WRONG_FOLDERS.items()):
        folder = tmp_path / f"{number}"
        (folder / "in").mkdir(parents=True)
        write_image(folder / "in" / "0.png", 0)
        spoil(folder / "in")
        capsys.readouterr()
        assert predict(run, folder / "in", folder / target) == 2, fault
        said = capsys.readouterr().err
        assert names(said, *needed), fault
        assert said.count("\n") == 1, fault
        assert not list(folder.rglob("out*")), fault


def test_bytes_are_not_written_as_text(images: Settings, train: Train, folders: Path, tmp_path: Path) -> None:
    run = train({**images, "max_train_steps": 1})
    content = Path(list_images(folders / "validation")[0]["image"]).read_bytes()
    for name, values in (("image", [content]), ("image", [{"bytes": content, "path": None}])):
        pyarrow.parquet.write_table(pa.table({name: values}), tmp_path / "in.parquet")
        assert predict(run, tmp_path / "in.parquet", tmp_path / "out.jsonl") == 2
        assert not (tmp_path / "out.jsonl").exists()


def test_a_bad_image_stops_a_prediction_that_writes_nothing(
    images: Settings, train: Train, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train({**images, "max_train_steps": 1})
    write_image(tmp_path / "0.png", 0)
    write_image(tmp_path / "1.png", 1)
    damage(tmp_path / "1.png")
    source = write_csv(tmp_path / "in.csv", [{"image": str(tmp_path / f"{number}.png")} for number in range(2)])
    assert predict(run, source, tmp_path / "out.csv") == 2
    assert names(capsys.readouterr().err, "in.csv", "row 2", "1.png")
    assert not (tmp_path / "out.csv").exists()


def test_check_knows_the_task(images: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    from onecurve.training import check

    assert report_outcome(check.main, to_flags({**images, "random_flip": 0.5})) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("data") and "48 rows" in line and "16 tokens" in line for line in lines)
    assert any(line.startswith("sample") and "16 x 16" in line and "50%" in line for line in lines)
    assert any(line.startswith("labels") and "dark, light, red" in line for line in lines)


def test_an_image_that_changes_is_prepared_again(images: Settings, train: Train, tmp_path: Path) -> None:
    """Also where only its path stands in the file that is read."""
    rows = [{"image": str(tmp_path / f"{number}.png"), "label": CLASSES[number % 3]} for number in range(12)]
    for number in range(12):
        write_image(tmp_path / f"{number}.png", number)
    settings = {**images, "train_file": write_csv(tmp_path / "rows.csv", rows), "max_train_steps": 1}
    before = train({**settings, "output_dir": str(tmp_path / "before")}).losses
    assert train({**settings, "output_dir": str(tmp_path / "again")}).losses == before
    write_image(tmp_path / "3.png", 4)
    assert train({**settings, "output_dir": str(tmp_path / "after")}).losses != before


def damage(path: Path) -> None:
    """Cut an image's file in its middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_text(path: Path) -> None:
    path.write_text("no image", encoding="utf-8")


def write_wide(path: Path) -> None:
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD_IMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "cut short": (damage, ("5.png", "broken")),
    "no image": (write_text, ("5.png",)),
    "empty": (empty, ("5.png",)),
    "missing": (Path.unlink, ("5.png", "image_folder")),
    "a folder": (replace_by_a_folder, ("5.png",)),
    "of 16 bits": (write_wide, ("5.png", "I;16", "8")),
}


@pytest.mark.parametrize("fault", BAD_IMAGES)
def test_a_bad_image_is_refused_by_its_row(images: Settings, train: Train, tmp_path: Path, fault: str) -> None:
    spoil, needed = BAD_IMAGES[fault]
    rows = [{"image": str(tmp_path / f"{number}.png"), "label": CLASSES[number % 3]} for number in range(9)]
    for number in range(9):
        write_image(tmp_path / f"{number}.png", number)
    spoil(tmp_path / "5.png")
    path = write_csv(tmp_path / "rows.csv", rows)
    assert_refused(train({**images, "train_file": path}), "rows.csv", "row 6", *needed)


BAD_ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no image": ({"image": None}, ("row 6", "'image'")),
    "an empty path": ({"image": ""}, ("row 6", "'image'")),
    "no label": ({"label": None}, ("row 6", "'label'")),
    "a decimal label": ({"label": 0.5}, ("'label'",)),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_refused_by_its_number(
    images: Settings, train: Train, folders: Path, tmp_path: Path, fault: str
) -> None:
    changed, needed = BAD_ROWS[fault]
    rows = list_images(folders / "train")
    rows[5] = {**rows[5], **changed}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert_refused(train({**images, "train_file": str(tmp_path / "rows.jsonl")}), "rows.jsonl", *needed)


BAD_KEYS: dict[str, tuple[Settings, tuple[str, ...]]] = {
    "a crop of nothing": ({"random_crop_area": 0}, ("random_crop_area",)),
    "flips that are no share": ({"random_flip": 2}, ("random_flip",)),
    "the image as its label": ({"label_column": "image"}, ("label_column", "'image'")),
    "no such column": ({"image_column": "picture"}, ("image_column", "image, label")),
    "tokens": ({"max_length": 64}, ("max_length",)),
    "a key of another task": ({"text_column": "image"}, ("text_column", "text_classification")),
    "a head that was not trained": ({"eval_only": True}, ("--eval_only",)),
}


@pytest.mark.parametrize("fault", BAD_KEYS)
def test_a_bad_key_is_refused(images: Settings, train: Train, fault: str) -> None:
    keys, needed = BAD_KEYS[fault]
    assert_refused(train({**images, **keys}), *needed)


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


BAD_MODELS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), ("preprocessor_config.json",)),
    "sizes that differ": (
        lambda folder: change_json(folder / "preprocessor_config.json", size={"shortest_edge": 16}),
        ("row 2", "preprocessor_config.json"),
    ),
    "a model without colors": (lambda folder: change_json(folder / "config.json", num_channels=1), ("1 channels",)),
    "a processor that does more": (
        lambda folder: change_json(
            folder / "preprocessor_config.json",
            image_processor_type="MobileViTImageProcessor",
            do_flip_channel_order=True,
            crop_size={"height": 16, "width": 16},
        ),
        ("model_name_or_path",),
    ),
}


@pytest.mark.parametrize("fault", BAD_MODELS)
def test_a_model_that_does_not_fit_is_refused(
    images: Settings, train: Train, vit: Path, tmp_path: Path, fault: str
) -> None:
    import shutil

    spoil, needed = BAD_MODELS[fault]
    spoil(Path(shutil.copytree(vit, tmp_path / "vit")))
    assert_refused(train({**images, "model_name_or_path": str(tmp_path / "vit")}), *needed)


@pytest.mark.slow
def test_an_adapter_learns_predicts_and_is_merged(
    images: Settings, train: Train, folders: Path, tmp_path: Path
) -> None:
    from onecurve.training import merge

    run = train({**images, "adapter": "lora", "lora_r": 4, "max_train_steps": 30, "learning_rate": 5e-3})
    assert run.exit_code == 0, run.stderr
    assert run.evaluations[-1]["eval_accuracy"] > 0.9
    rows = list_images(folders / "validation")
    source = write_csv(tmp_path / "in.csv", [{"image": row["image"]} for row in rows])
    assert predict(run, source, tmp_path / "out.jsonl") == 0
    lines = read(run.path / "eval_predictions.jsonl")
    assert [row["prediction"] for row in read(tmp_path / "out.jsonl")] == [line["prediction"] for line in lines]
    assert report_outcome(merge.main, [f"--run={run.path}", f"--output={tmp_path / 'merged'}"]) == 0
    logits = compute_logits(tmp_path / "merged", [row["image"] for row in rows])
    assert [CLASSES[place] for place in logits.argmax(-1)] == [line["prediction"] for line in lines]


@pytest.mark.slow
def test_two_processes_write_the_same_predictions(images: Settings, launch: Launch, tmp_path: Path) -> None:
    one = launch({**images, **AUGMENTED, "output_dir": str(tmp_path / "one")})
    two = launch({**images, **AUGMENTED, "output_dir": str(tmp_path / "two")}, "multi_cpu", 2)
    assert two.exit_code == 0, two.stderr
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    found = [
        [(line["label"], line["prediction"]) for line in read(run.path / "eval_predictions.jsonl")]
        for run in (one, two)
    ]
    assert found[0] == found[1]
