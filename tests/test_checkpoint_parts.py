"""Checkpoints that several processes write, each its part: whole or not there, and read by any number of processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from onecurve.training.recovery.manifest import find_fault
from tests.conftest import TINY, Launch, Run
from tests.messages import names
from tests.tensors import load_tensors
from tools.jobs import Job, cut_short, without_time, write_script

Settings = dict[str, Any]
Train = Callable[[Mapping[str, Any]], Run]

LONG = {"max_train_steps": 30, "checkpointing_steps": 10, "dropout": 0.1, "eval_steps": 1000}
PARTS = {f"{kind}-0000{part}-of-00002.safetensors" for kind in ("model", "optimizer") for part in (1, 2)}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, news: Path, tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Run:
    """A run of two processes under FSDP2."""
    settings = {
        "model_name_or_path": str(tiny_model),
        "train_file": str(news / "train.jsonl"),
        "validation_file": str(news / "validation.jsonl"),
        "output_dir": str(tmp_path_factory.mktemp("whole") / "run"),
        **TINY,
        **LONG,
    }
    run = launch(settings, topology="fsdp", num_processes=2)
    assert run.exit_code == 0, run.stderr
    return run


def test_each_process_has_written_its_share(whole: Run) -> None:
    checkpoint = whole.path / "checkpoints" / "step_00000030"
    assert {path.name for path in checkpoint.iterdir()} >= PARTS
    assert set(json.loads((checkpoint / "manifest.json").read_text())["files"]) == {
        path.name for path in checkpoint.iterdir() if path.name != "manifest.json"
    }
    largest = max(tensor.nbytes for tensor in load_tensors(checkpoint / "model.safetensors").values())
    sizes = [
        sum(tensor.nbytes for path in checkpoint.glob(f"*-0000{part}-of-*") for tensor in load_file(path).values())
        for part in (1, 2)
    ]
    assert max(sizes) <= sum(sizes) / 2 + largest
    final = load_file(whole.path / "final" / "model.safetensors")
    saved = AutoModelForSequenceClassification.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in final.items())


@pytest.mark.slow
def test_replicas_write_each_tensor_once(recipe: Settings, launch: Launch) -> None:
    """Two groups of two processes, each of which holds all weights between them."""
    run = launch({**recipe, "max_train_steps": 2, "checkpointing_steps": 2}, topology="hsdp", num_processes=4)
    assert run.exit_code == 0, run.stderr
    checkpoint = run.path / "checkpoints" / "step_00000002"
    sizes, largest = dict.fromkeys((1, 2, 3, 4), 0), 0
    for kind in ("model", "optimizer"):
        held = []
        for part in sizes:
            path = checkpoint / f"{kind}-0000{part}-of-00004.safetensors"
            tensors = load_file(path) if path.exists() else {}  # The one with the embeddings has no moments.
            held += list(tensors)
            sizes[part] += sum(tensor.nbytes for tensor in tensors.values())
            largest = max([largest, *(tensor.nbytes for tensor in tensors.values())])
        assert sorted(held) == sorted(load_tensors(checkpoint / f"{kind}.safetensors"))
    assert min(sizes.values()) > 0
    assert max(sizes.values()) <= sum(sizes.values()) / 4 + largest


def test_one_process_goes_on_from_two_files(whole: Run, recipe: Settings, train: Train, tmp_path: Path) -> None:
    folder = cut_short(whole, 20, tmp_path / "cut")
    resumed = train({**recipe, **LONG, "output_dir": str(folder)})
    assert resumed.exit_code == 0, resumed.stderr
    assert "(step 20)" in resumed.stdout
    assert resumed.losses[:20] == whole.losses[:20]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "optimizer.safetensors.index.json"])
def test_a_damaged_part_is_named(whole: Run, tmp_path: Path, damage: Callable[[Path], None], file: str) -> None:
    copy = shutil.copytree(whole.path / "checkpoints" / "step_00000030", tmp_path / "copy")
    assert find_fault(copy) is None
    damage(copy / file)
    assert names(find_fault(copy), file)


@pytest.mark.slow
def test_two_processes_pass_over_a_damaged_part(whole: Run, recipe: Settings, launch: Launch, tmp_path: Path) -> None:
    folder = cut_short(whole, 30, tmp_path / "cut")
    flip(folder / "checkpoints" / "step_00000030" / "optimizer-00002-of-00002.safetensors")
    resumed = launch({**recipe, **LONG, "output_dir": str(folder)}, topology="fsdp", num_processes=2)
    assert resumed.exit_code == 0, resumed.stderr
    assert names(resumed.stdout, "step_00000030", "optimizer-00002-of-00002.safetensors")
    assert "(step 20)" in resumed.stdout
    assert without_time(resumed.lines) == without_time(whole.lines)


@pytest.mark.slow
def test_a_checkpoint_of_the_first_format_is_read_by_two_processes(
    recipe: Settings, train: Train, launch: Launch, tmp_path: Path
) -> None:
    settings = {**recipe, **LONG, "dropout": 0.0}
    alone = train(settings)
    folder = cut_short(alone, 20, tmp_path / "cut")
    manifest = folder / "checkpoints" / "step_00000020" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 1}))
    resumed = launch({**settings, "output_dir": str(folder)}, topology="fsdp", num_processes=2)
    assert resumed.exit_code == 0, resumed.stderr
    assert "(step 20)" in resumed.stdout
    assert resumed.losses == pytest.approx(alone.losses, rel=1e-5)


FAILING = """
import signal
from onecurve.training.recovery import parts

save_file = parts.save_file

def fail(tensors, path, *more):
    if os.environ["RANK"] != "1" or "step_00000020" not in str(path):
        return save_file(tensors, path, *more)
    HERE

parts.save_file = fail
"""
SMALL_PIECES = "from onecurve.training.recovery import checkpoint_writer; checkpoint_writer.PIECE_BYTES = 20_000"
FULL = "raise OSError(28, 'No space left on device')"
KILLED = 'path.write_bytes(b"half"); os.kill(os.getpid(), signal.SIGKILL)'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "pieces"),
    [(FULL, ""), (KILLED, ""), (FULL, SMALL_PIECES)],
    ids=["full", "killed", "full in a piece"],
)
def test_a_part_that_fails_leaves_the_checkpoint_before(
    whole: Run, recipe: Settings, tmp_path: Path, jobs: list[Job], fault: str, pieces: str
) -> None:
    script = write_script(tmp_path / "failing.py", FAILING.replace("HERE", fault) + pieces)
    job = Job({**recipe, **LONG}, "fsdp", 2, script=script)
    jobs.append(job)
    assert job.wait_for_end() < 60
    if fault != KILLED:
        assert names(job.output, "step_00000020'", "No space left on device")
        assert "Traceback" not in job.output.partition("onecurve: ")[0]
        assert [path.name for path in (job.path / "checkpoints").iterdir()] == ["step_00000010"]
    assert [path.name for path in (job.path / "checkpoints").glob("step_*")] == ["step_00000010"]
    assert find_fault(job.path / "checkpoints" / "step_00000010") is None
    again = Job({**recipe, **LONG}, "fsdp", 2).finish()
    assert again.exit_code == 0, again.stderr
    assert "(step 10)" in again.stdout
    assert without_time(again.lines) == without_time(whole.lines)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["fsdp", "deepspeed_zero3"])
def test_a_part_in_pieces_is_the_same_state(recipe: Settings, train: Train, tmp_path: Path, topology: str) -> None:
    settings = {**recipe, **LONG, "dropout": 0.0}
    run = Job(settings, topology, 2, script=write_script(tmp_path / "pieces.py", SMALL_PIECES)).finish()
    assert run.exit_code == 0, run.stderr
    checkpoint = run.path / "checkpoints" / "step_00000020"
    assert {path.name for path in checkpoint.iterdir()} > PARTS | {"optimizer-00002-of-00002-2.safetensors"}
    for kind in ("model", "optimizer"):
        read = load_tensors(checkpoint / f"{kind}.safetensors")
        files = [load_file(path) for path in checkpoint.glob(f"{kind}-*.safetensors")]
        assert sum(map(len, files)) == len(read)
        largest = max(tensor.nbytes for tensor in read.values())
        assert max(sum(tensor.nbytes for tensor in file.values()) for file in files) <= max(20_000, largest)
    resumed = train({**settings, "output_dir": str(cut_short(run, 20, tmp_path / "cut"))})
    assert resumed.exit_code == 0, resumed.stderr
    assert "(step 20)" in resumed.stdout
    assert resumed.losses == pytest.approx(run.losses, rel=1e-5)


SPLIT = "from onecurve.training.recovery import final_model; final_model.FILE_BYTES = 1"


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["fsdp", "deepspeed_zero3"])
def test_a_large_final_model_is_written_by_all(recipe: Settings, tmp_path: Path, topology: str) -> None:
    script = write_script(tmp_path / "split.py", SPLIT)
    run = Job({**recipe, "checkpointing_steps": 8}, topology, 2, script=script).finish()
    assert run.exit_code == 0, run.stderr
    final = {path.name for path in (run.path / "final").iterdir()}
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} < final
    assert {"model.safetensors.index.json", "config.json", "tokenizer.json", "README.md"} < final
    found = AutoModelForSequenceClassification.from_pretrained(run.path / "final").state_dict()
    trained = load_tensors(run.path / "checkpoints" / "step_00000008" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
