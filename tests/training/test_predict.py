"""Labelling a file: every row as it came, whatever its format; one message for what is wrong, nothing left behind."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from tests.conftest import ROOT, TINY, to_flags
from tests.messages import names
from tests.training.conftest import Predict
from tools.launches import LaunchServer, build_environment

NUM_ROWS = 10_100  # Ten chunks.


@pytest.fixture(scope="module")
def trained(tiny_model: Path, news: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    from onecurve.training.outcome import report_outcome
    from onecurve.training.parallel.accelerator import forget_state
    from onecurve.training.run import main

    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = {
        "model_name_or_path": str(tiny_model),
        "train_file": str(news / "train.jsonl"),
        "validation_file": str(news / "validation.jsonl"),
        "output_dir": str(folder),
        **TINY,
        "max_train_steps": 2,
    }
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        assert report_outcome(main, to_flags(settings)) == 0
    finally:
        forget_state()
        for number, handler in kept.items():
            signal.signal(number, handler)
    return folder


def build_rows() -> list[dict[str, Any]]:
    """Rows that a guess would spoil: numbers with zeros in front, words that mean a gap, gaps late in the file."""
    return [
        {
            "id": f"{number:06d}",
            "text": f'row {number} says\n"so", twice\t{"word " * (number % 7)}',
            "word": ("NA", "null", "1.0", "2020-01-01", "a\rb", "")[number % 6],
            "count": number if number % 1_500 else None,
            "late": {"kind": "x"} if number >= 5_000 else None,
        }
        for number in range(NUM_ROWS)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        schema = pa.schema(
            [
                ("id", pa.string()), ("text", pa.large_string()), ("word", pa.string()), ("count", pa.int32()),
                ("late", pa.struct([("kind", pa.string())])),
            ]
        )  # fmt: skip
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), path)
    elif path.suffix == ".jsonl":
        text = "".join(
            json.dumps({name: value for name, value in row.items() if value is not None}) + "\n" for row in rows
        )
        path.write_text(text, encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", quoting=csv.QUOTE_ALL)
            writer.writerow(rows[0])
            writer.writerows([to_cell(value) for value in row.values()] for row in rows)
    return path


def to_cell(value: Any) -> str:
    return "" if value is None else json.dumps(value) if isinstance(value, dict) else str(value)


def read_back(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))


FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


@pytest.mark.slow
@pytest.mark.parametrize("source", FORMATS)
def test_every_column_comes_out_as_it_went_in(source: str, trained: Path, tmp_path: Path, predict: Predict) -> None:
    rows = build_rows()
    path = write_rows(tmp_path / f"texts{source}", rows)
    columns = list(rows[0])
    added: list[Any] = []
    for target in FORMATS:
        output = tmp_path / f"labelled{target}"
        code, said = predict(trained, path, output, "--batch_size", "512")
        assert code == 0, said
        labelled = read_back(output)
        assert len(labelled) == NUM_ROWS
        for row, found in zip(rows, labelled, strict=True):
            if source in (".csv", ".tsv") or target in (".csv", ".tsv"):
                assert {name: to_cell(found[name]) for name in columns} == {
                    name: to_cell(value) for name, value in row.items()
                }
            else:  # A key that a row of JSON Lines lacks is a gap elsewhere.
                assert {name: found.get(name) for name in columns} == row
            if (source, target) == (".jsonl", ".jsonl"):
                assert ("late" in found) == (row["late"] is not None)
            assert list(found)[-7:-5] == ["prediction", "score"]
        added.append([(row["prediction"], float(row["score"])) for row in labelled])
    assert added[0] == added[1] == added[2] == added[3]


@pytest.mark.slow
def test_parquet_keeps_its_types(trained: Path, tmp_path: Path, predict: Predict) -> None:
    path = write_rows(tmp_path / "texts.parquet", build_rows()[:2_000])
    code, said = predict(trained, path, tmp_path / "labelled.parquet", "--batch_size", "512")
    assert code == 0, said
    before = pyarrow.parquet.read_schema(path)
    assert pyarrow.parquet.read_schema(tmp_path / "labelled.parquet").names[: len(before)] == before.names
    assert (
        pyarrow.parquet.read_table(tmp_path / "labelled.parquet")
        .select(before.names)
        .equals(pyarrow.parquet.read_table(path))
    )


@pytest.mark.parametrize(
    ("name", "text", "needed"),
    [
        ("a.csv", "text,id\nx,1\n,2\n", ("row 2", "'text'")),
        ("a.csv", "text,text\nx,1\n", ("'text'",)),
        ("a.csv", "text,id\nx,1\nx,y,2\n", ("line 3", "3 fields", "2")),
        ("a.csv", 'text\n"x\n', ("line 2", "quote")),
        ("a.csv", "text,score\nx,1\n", ("score",)),
        ("a.csv", "text\n", ("rows",)),
        ("a.jsonl", '{"body": "x"}\n', ("'text'", "body")),
        ("a.jsonl", '{"text": "x"}\n{"text": 5}\n', ("row 2", "'text'", "5")),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', ("line 2", "JSON")),
        ("a.jsonl", '{"text": "\\ud83d\\ude00"}\n{"text": "x", "id": "\\ud83d"}\n', ("line 2",)),
        ("a.jsonl", '{"text": "x"}\n["x"]\n', ("line 2", "JSON", "list")),
        ("a.jsonl", '{"text": "x"}\n{"text": "x", "score": 1}\n', ("score",)),
        ("a.json", '[{"text": "x"}, {"text": ""}]', ("row 2", "'text'")),
        ("a.parquet", "no table", ()),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    name: str, text: str, needed: tuple[str, ...], trained: Path, tmp_path: Path, predict: Predict
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    code, said = predict(trained, path, tmp_path / "out" / "labelled.csv")
    assert names(said, str(path), *needed)
    assert (code, said.count("\n")) == (2, 1)
    assert not list((tmp_path / "out").iterdir())


def test_what_parquet_cannot_keep_is_refused_before_the_work(trained: Path, tmp_path: Path, predict: Predict) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": "x", "id": number if number < 1_100 else "none"} for number in range(1_200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, said = predict(trained, path, tmp_path / "labelled.parquet")
    assert code == 2
    assert names(said, "rows 1,025 to 1,200", "'id'")
    assert names(said, "--output", ".jsonl")


def test_an_output_that_cannot_be_written_is_told_before_the_work(
    trained: Path, news: Path, tmp_path: Path, predict: Predict
) -> None:
    (tmp_path / "file").touch()
    code, said = predict(trained, news / "validation.jsonl", tmp_path / "file" / "labelled.csv")
    assert (code, said.count("\n")) == (2, 1)
    assert names(said, str(tmp_path / "file"), "File exists")
    (tmp_path / "folder.csv").mkdir()
    code, said = predict(trained, news / "validation.jsonl", tmp_path / "folder.csv")
    assert code == 2
    assert names(said, str(tmp_path / "folder.csv"))


def test_a_folder_is_refused_by_a_task_that_reads_no_images(trained: Path, tmp_path: Path, predict: Predict) -> None:
    (tmp_path / "images").mkdir()
    code, said = predict(trained, tmp_path / "images", tmp_path / "labelled.csv")
    assert (code, said.count("\n")) == (2, 1)
    assert names(said, "--input", "images", "text_classification")
    assert not (tmp_path / "labelled.csv").exists()


def test_an_output_that_exists_is_replaced_only_if_asked(
    trained: Path, news: Path, tmp_path: Path, predict: Predict
) -> None:
    target = tmp_path / "labelled.jsonl"
    target.write_text("mine")
    code, said = predict(trained, news / "validation.jsonl", target)
    assert (code, said.count("\n"), target.read_text()) == (2, 1, "mine")
    assert names(said, str(target), "--overwrite")
    assert predict(trained, news / "validation.jsonl", target, "--overwrite", "true")[0] == 0
    assert len(read_back(target)) == 61


@pytest.mark.parametrize("name", ["step_00000009", "9", "..", "", "final/", "x"])
def test_a_checkpoint_that_is_not_there_is_refused(
    trained: Path, news: Path, tmp_path: Path, predict: Predict, name: str
) -> None:
    code, said = predict(trained, news / "validation.jsonl", tmp_path / "labelled.jsonl", f"--checkpoint={name}")
    assert (code, said.count("\n")) == (2, 1)
    assert names(said, "--checkpoint", "final")


def change_config(run: Path, target: Path, **settings: Any) -> Path:
    """A copy of a finished run, as far as labelling looks at it, with other settings."""
    shutil.copytree(run / "final", target / "final")
    content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    (target / "config.yaml").write_text(yaml.safe_dump({**content, **settings}), encoding="utf-8")
    return target


def test_labelling_needs_nothing_that_only_training_needs(
    trained: Path, news: Path, tmp_path: Path, predict: Predict
) -> None:
    plain, other = tmp_path / "plain.jsonl", tmp_path / "other.jsonl"
    run = change_config(trained, tmp_path / "run", mixed_precision="fp16", report_to="mlflow", train_file="gone.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onecurve.training.parallel.launch.get_available_trackers", list)
        code, said = predict(run, news / "validation.jsonl", other)
    assert code == 0, said
    assert names(said, "float32", "mixed_precision", "fp16")
    assert predict(trained, news / "validation.jsonl", plain)[0] == 0
    assert other.read_bytes() == plain.read_bytes()


def test_a_model_with_code_of_its_own_runs_it(trained: Path, news: Path, tmp_path: Path, predict: Predict) -> None:
    run = change_config(trained, tmp_path / "run", trust_remote_code=True)
    code = (
        "from transformers import BertForSequenceClassification\n"
        "class Own(BertForSequenceClassification):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        found = super().forward(*args, **kwargs)\n"
        "        found.logits[:, 3] += 1000\n"
        "        return found\n"
    )
    (run / "final" / "modeling_own.py").write_text(code, encoding="utf-8")
    config = json.loads((run / "final" / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_own.Own"}
    (run / "final" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    target = tmp_path / "labelled.jsonl"
    exit_code, said = predict(run, news / "validation.jsonl", target)
    assert exit_code == 0, said
    assert {row["prediction"] for row in read_back(target)} == {config["id2label"]["3"]}


# In real processes --------------------------------------------------------------------------------------------


def write_texts(path: Path, count: int, empty: int | None = None) -> Path:
    rows = [{"text": f"the text of row {number}" if number != empty else " "} for number in range(1, count + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_bad_row_of_another_process_is_told_at_once(
    trained: Path, tmp_path: Path, launch_server: LaunchServer
) -> None:
    """Row 1500 is in the second chunk, which the second process labels."""
    source = write_texts(tmp_path / "texts.jsonl", 1_600, empty=1_500)
    words = ["--input", source, "--output", tmp_path / "labelled.jsonl", "--num_processes", 2]
    began = time.monotonic()  # Forked: a start that imports everything may take as long as what is excluded.
    found = launch_server.run_script(
        ["-m", "onecurve", "predict", *map(str, [trained, *words])], build_environment(), 300
    )
    assert found.returncode == 2, found.stderr
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("onecurve: ")]
    assert names(line, str(source), "row 1500", "'text'")
    assert time.monotonic() - began < 55, "nobody waits for a word that does not come"
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def wait_for_first_chunk(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list(folder.glob(".labelled.jsonl.*/0*")):
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"nothing was labelled: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "num_processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_stop_is_obeyed_and_leaves_nothing(
    number: signal.Signals, num_processes: int, trained: Path, tmp_path: Path
) -> None:
    source = write_texts(tmp_path / "texts.jsonl", 200_000)
    words = ["--input", source, "--output", tmp_path / "labelled.jsonl", "--num_processes", num_processes]
    with start("-m", "onecurve", "predict", trained, *words, "--batch_size", "4") as process:
        wait_for_first_chunk(tmp_path, process)
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert names(told, number.name, str(tmp_path / "labelled.jsonl"))
    assert "checkpoint" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.mark.slow
def test_a_process_that_is_ended_at_once_clears_up(trained: Path, tmp_path: Path) -> None:
    source = write_texts(tmp_path / "texts.jsonl", 200_000)
    words = ["--run", trained, "--input", source, "--output", tmp_path / "labelled.jsonl", "--batch_size", "4"]
    with start("training/predict.py", *words) as process:
        wait_for_first_chunk(tmp_path, process)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 1, told
    (line,) = told.splitlines()
    assert line.startswith("onecurve: ")
    assert names(line, str(tmp_path / "labelled.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what a process has loaded is read from /proc")
@pytest.mark.parametrize(("topology", "num_processes"), [("cpu", 1), ("multi_cpu", 2)])
def test_a_launcher_that_dies_while_its_ranks_load_torch_is_missed(
    trained: Path, tmp_path: Path, topology: str, num_processes: int
) -> None:
    source = write_texts(tmp_path / "texts.jsonl", 200_000)
    words: list[object] = ["--config_file", f"accelerate_configs/{topology}.yaml", "--num_processes", num_processes]
    words += ["--main_process_port", 0, "training/predict.py", "--run", trained]
    words += ["--input", source, "--output", tmp_path / "labelled.jsonl", "--batch_size", 4]
    ranks: list[psutil.Process] = []
    with start("-m", "accelerate.commands.launch", *words) as process:
        try:
            while len(ranks) < num_processes or not any("libtorch" in loaded.path for loaded in ranks[0].memory_maps()):
                time.sleep(0.02)
                assert process.poll() is None
                ranks = psutil.Process(process.pid).children()
            process.kill()
            _, told = process.communicate(timeout=60)  # The ranks hold the pipes open until they end.
        finally:
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()
    assert names(told, "stopped") or names(told, "launcher")
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_another_device_than_the_launcher_chose_for_is_refused(
    trained: Path, predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONECURVE_DEVICE", "mps")
    (tmp_path / "in.csv").write_text("text\nwords\n", encoding="utf-8")
    code, told = predict(trained, tmp_path / "in.csv", tmp_path / "out.csv")
    assert code == 2
    assert names(told, "mps", "--topology cpu")
    assert not (tmp_path / "out.csv").exists()
