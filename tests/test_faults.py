"""Whatever is killed, hung, full or damaged: the run ends with one message, and the next start loses nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from onecurve.training.recovery.manifest import find_fault
from onecurve.training.tasks.text_classification import TextClassification
from tests.conftest import Run, to_flags
from tests.messages import names
from tools.jobs import Job, read_status, without_time, write_held_task, write_script
from tools.launches import LaunchServer, build_environment

Settings = dict[str, Any]
Train = Callable[[Mapping[str, Any]], Run]

# Dropout is on: what comes after a restart must draw the same random numbers.
LONG = {"max_train_steps": 120, "dropout": 0.1, "checkpointing_steps": 10, "eval_steps": 50, "save_total_limit": 2}


def list_checkpoints(path: Path) -> list[str]:
    return sorted(folder.name for folder in (path / "checkpoints").glob("step_*"))


# Death ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "launcher", "all"])
def test_a_kill_ends_the_others_and_loses_nothing(
    recipe: Settings, tmp_path: Path, jobs: list[Job], victim: str
) -> None:
    settings = {**recipe, **LONG, "max_train_steps": 40}
    whole = Job({**settings, "output_dir": str(tmp_path / "whole")}, "multi_cpu", 2).finish()
    assert whole.exit_code == 0, whole.stderr
    held = write_held_task(tmp_path, step=25)
    settings["task"] = held.task
    job = Job(settings, "multi_cpu", 2)
    jobs.append(job)
    job.wait_until(held.reached.exists)
    job.strike(victim)
    assert job.wait_for_end() < 30
    if victim == "launcher":
        assert read_status(job.path)["exit_code"] == 75, "ranks whose launcher is gone save and stop"
    if victim == "rank 1":
        assert names(job.output, "onecurve: rank 0", "connection")
        assert 'Traceback (most recent call last):\n  File "training' not in job.output
    again = Job(settings, "multi_cpu", 2).finish()
    assert again.exit_code == 0, again.stderr
    assert without_time(again.lines) == without_time(whole.lines)
    final = Path("final", "model.safetensors")
    assert (again.path / final).read_bytes() == (whole.path / final).read_bytes()


@pytest.mark.slow
def test_a_rank_whose_launcher_ends_of_its_signal_saves_and_stops(recipe: Settings, jobs: list[Job]) -> None:
    job = Job({**recipe, **LONG, "max_train_steps": 100_000, "checkpointing_steps": 500, "eval_steps": 20})
    jobs.append(job)
    job.wait_for_step(20)
    job.process.terminate()  # `accelerate launch` of one process dies of it, and leaves its child behind.
    assert job.wait_for_end() < 30
    status = read_status(job.path)
    assert status["exit_code"] == 75
    assert list_checkpoints(job.path) == [f"step_{status['step']:08d}"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what a process has loaded is read from /proc")
def test_a_launcher_that_dies_while_its_rank_loads_torch_is_missed(recipe: Settings, jobs: list[Job]) -> None:
    prepared = Job({**recipe, "output_dir": recipe["output_dir"] + "_before", "max_train_steps": 1}).finish()
    assert prepared.exit_code == 0, "data that are not tokenized yet would end it sooner"
    job = Job({**recipe, **LONG, "max_train_steps": 100_000, "checkpointing_steps": 500, "eval_steps": 20})
    jobs.append(job)

    def loads_torch() -> bool:
        return any("libtorch" in loaded.path for rank in job.ranks() for loaded in rank.memory_maps())

    job.wait_until(loads_torch)
    job.process.kill()
    assert job.wait_for_end() < 60
    assert read_status(job.path)["exit_code"] == 75


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what a process has loaded is read from /proc")
@pytest.mark.parametrize("frozen", [None, 1], ids=["both ranks come late", "one rank waits for a frozen one"])
def test_ranks_whose_launcher_dies_during_the_start_end(recipe: Settings, jobs: list[Job], frozen: int | None) -> None:
    job = Job({**recipe, **LONG, "max_train_steps": 100_000, "checkpointing_steps": 500}, "multi_cpu", 2)
    jobs.append(job)
    job.wait_for_ranks()
    ranks = job.ranks()
    if frozen is None:
        job.wait_until(lambda: any("libtorch" in loaded.path for loaded in ranks[0].memory_maps()))
    else:
        ranks[frozen].suspend()
        # In the store's port, and so past the look at it: what is waited for is the other rank.
        job.wait_until(lambda: any(link.status == "ESTABLISHED" for link in ranks[0].net_connections()))
    job.process.kill()
    job.process.wait()
    if frozen is not None:
        ranks[0].wait(30)
        ranks[frozen].resume()
    assert job.wait_for_end() < 30
    assert not job.path.exists() or not list_checkpoints(job.path)
    if frozen is None:
        assert names(job.output, "launcher", "first step")
    assert Job({**recipe, "max_train_steps": 2}, "multi_cpu", 2).finish().exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "num_processes"), [("cpu", 1), ("multi_cpu", 2)])
def test_ranks_whose_launcher_dies_while_one_tokenizes_end(
    recipe: Settings, tmp_path: Path, jobs: list[Job], topology: str, num_processes: int
) -> None:
    big, cache = tmp_path / "big.jsonl", tmp_path / "cache"
    big.write_text(Path(recipe["train_file"]).read_text(encoding="utf-8") * 1000, encoding="utf-8")
    settings = {**recipe, "train_file": str(big)}
    job = Job(settings, topology, num_processes, environment={"ONECURVE_CACHE": str(cache)})
    jobs.append(job)
    job.wait_until(lambda: any((cache / "prepared").glob(".*/train/input_ids.bin")))
    job.process.kill()
    assert job.wait_for_end() < 15
    assert names(job.output, "launcher", "first step")
    assert [path.suffix for path in (cache / "prepared").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_second_training_on_one_output_dir_is_refused(
    recipe: Settings, jobs: list[Job], launch_server: LaunchServer, tmp_path: Path
) -> None:
    settings = {**recipe, **LONG, "max_train_steps": 100_000, "checkpointing_steps": 500}
    job = Job(settings)
    jobs.append(job)
    job.wait_until(lambda: (job.path / "config.yaml").exists(), what="the first training")
    with (tmp_path / "second").open("w+") as output:
        words = ["training/run.py", *to_flags(settings)]
        second = launch_server.start_script(words, build_environment(), output, output)
        assert second.wait(120) == 2
    told = (tmp_path / "second").read_text(encoding="utf-8")
    assert names(told, str(job.path))
    assert "Traceback" not in told
    assert job.process.poll() is None, "the first one goes on"
    (job.path / "STOP").touch()  # As the message says.
    assert job.wait_for_end() < 60
    assert read_status(job.path)["exit_code"] == 75


# Silence -------------------------------------------------------------------------------------------------------------

HANGING = """
import threading
from onecurve.training.tasks.text_classification import TextClassification

loss_sum = TextClassification.loss_sum

def hang(self, model, batch):
    hang.calls += 1
    if hang.calls == 12 and os.environ.get("RANK", "0") == "{rank}":
        threading.Event().wait()
    return loss_sum(self, model, batch)

hang.calls = 0
TextClassification.loss_sum = hang
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_silent_process_is_named_and_every_stack_is_kept(
    recipe: Settings, tmp_path: Path, jobs: list[Job], rank: int
) -> None:
    script = write_script(tmp_path / "hanging.py", HANGING.replace("{rank}", str(rank)))
    job = Job({**recipe, **LONG, "hang_timeout_seconds": 2}, "multi_cpu", 2, script=script)
    jobs.append(job)
    assert job.wait_for_end() < 60
    assert "hang_timeout_seconds" in job.output
    assert re.search(rf"rank {rank} [a-z ]*training/run.py:\d+ \(make_steps\)", job.output)
    stacks = [(job.path / "hangs" / f"process_{number:05d}.txt").read_text() for number in (0, 1)]
    assert "in hang" in stacks[rank]
    assert "in hang" not in stacks[1 - rank]
    assert read_status(job.path)["exit_code"] == 1
    assert list_checkpoints(job.path) == ["step_00000010"] or not list_checkpoints(job.path)


ABSENT = """
import threading

build_accelerator = building.build_accelerator

def stay_away(*arguments):
    if os.environ["RANK"] == "1":
        threading.Event().wait()
    return build_accelerator(*arguments)

building.build_accelerator = stay_away
"""


@pytest.mark.slow
def test_a_process_that_never_joins_the_group_is_named(recipe: Settings, tmp_path: Path, jobs: list[Job]) -> None:
    script = write_script(tmp_path / "absent.py", ABSENT)
    job = Job({**recipe, **LONG, "hang_timeout_seconds": 0.5, "join_timeout_seconds": 5}, "multi_cpu", 2, script=script)
    jobs.append(job)
    assert job.wait_for_end() < 60
    assert re.search(r"rank 1 [a-z ]*training/building.py:\d+ \(\w+\)", job.output)
    assert "in stay_away" in (job.path / "hangs" / "process_00001.txt").read_text()


@pytest.mark.slow
def test_a_frozen_process_is_named_though_it_can_not_answer(recipe: Settings, jobs: list[Job]) -> None:
    settings = {**recipe, "max_train_steps": 100_000, "eval_steps": 10, "checkpointing_steps": 100_000}
    job = Job({**settings, "hang_timeout_seconds": 2}, "multi_cpu", 2)
    jobs.append(job)
    job.wait_for_step(10)
    frozen = job.ranks()[1]
    frozen.suspend()
    job.wait_until(lambda: re.search(r"hang_timeout_seconds.*rank 1\b", job.output) is not None, seconds=90)
    frozen.resume()  # torch's agent would wait for half a minute before it kills what does not answer.
    assert job.wait_for_end() < 60
    assert (job.path / "hangs" / "process_00000.txt").exists()


# The disk ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB, which six checkpoints do not fit on."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_checkpoints_for_which_there_is_no_room_are_refused_before_the_first_step(
    recipe: Settings, train: Train, small_disk: Path
) -> None:
    refused = train({**recipe, **LONG, "save_total_limit": 5, "output_dir": str(small_disk / "run")})
    assert refused.exit_code == 2
    assert names(refused.stderr, "6 checkpoints", "save_total_limit")
    assert list(small_disk.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_the_run_goes_on_once_there_is_room(
    recipe: Settings, train: Train, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**recipe, **LONG, "save_total_limit": 1, "max_train_steps": 40}
    whole = train(settings)
    filler = small_disk / "filler"
    loss_sum = TextClassification.loss_sum
    run = small_disk / "run"

    def fill(task: TextClassification, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if (run / "checkpoints" / "step_00000010").exists() and not filler.exists():
            with filler.open("wb") as file:
                free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
                os.posix_fallocate(file.fileno(), 0, free - (1 << 20))
        for thread in threading.enumerate():  # However slow the machine is, a save fails within a step here.
            if thread.name == "checkpoint":
                thread.join()
        return loss_sum(task, model, batch)

    monkeypatch.setattr(TextClassification, "loss_sum", fill)
    full = train({**settings, "output_dir": str(run)})
    assert full.exit_code == 1
    assert names(full.stderr, "step_00000020'", "GiB", "disk")
    assert "Traceback" not in full.stderr
    assert 20 < read_status(run)["step"] < 25, "the next steps tell of it, not the save after them"
    assert list_checkpoints(run) == ["step_00000010"]
    assert find_fault(run / "checkpoints" / "step_00000010") is None
    monkeypatch.setattr(TextClassification, "loss_sum", loss_sum)
    filler.unlink()
    again = train({**settings, "output_dir": str(run)})
    assert again.exit_code == 0, again.stderr
    assert without_time(again.lines) == without_time(whole.lines)


@pytest.mark.parametrize(
    ("frozen_folder", "needed"),
    [
        ("checkpoints", ("step_00000020'",)),
        (".", ("output_dir", "Operation not permitted")),
    ],
    ids=["only checkpoints", "all of it"],
)
def test_an_output_dir_that_turns_read_only_ends_the_run_with_a_message(
    recipe: Settings, train: Train, monkeypatch: pytest.MonkeyPatch, frozen_folder: str, needed: tuple[str, ...]
) -> None:
    settings = {**recipe, **LONG, "max_train_steps": 40}
    checkpoints = Path(recipe["output_dir"]) / "checkpoints"
    loss_sum = TextClassification.loss_sum

    def set_immutable(flag: str) -> bool:
        command = ["chattr", "-R", flag, str(checkpoints.parent / frozen_folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def freeze(task: TextClassification, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if (checkpoints / "step_00000010").exists() and not set_immutable("+i"):
            pytest.skip("this file system, or this user, can make no folder immutable")
        return loss_sum(task, model, batch)

    monkeypatch.setattr(TextClassification, "loss_sum", freeze)
    try:
        frozen = train(settings)
    finally:
        set_immutable("-i")
    assert frozen.exit_code == 1
    assert names(frozen.stderr, *needed)
    assert "Traceback" not in frozen.stderr
    monkeypatch.setattr(TextClassification, "loss_sum", loss_sum)
    again = train(settings)
    assert again.exit_code == 0, again.stderr
    assert "(step 10)" in again.stdout


# Numbers -------------------------------------------------------------------------------------------------------------


def test_a_divergence_names_step_examples_and_the_last_good_checkpoint(
    recipe: Settings, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_sum = TextClassification.loss_sum
    calls = 0

    def poison(task: TextClassification, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss_sum(task, model, batch) * (float("nan") if calls == 2 * 15 else 1.0)  # Two micro-batches a step.

    monkeypatch.setattr(TextClassification, "loss_sum", poison)
    run = train({**recipe, **LONG})
    assert run.exit_code == 3
    assert names(run.stderr, "loss", "nan", "step 15", str(run.path / "checkpoints" / "step_00000010"))
    found = re.search(r": (\d+(, \d+)+)", run.stderr)
    assert found is not None
    assert len(found[1].split(",")) == 16
    assert find_fault(run.path / "checkpoints" / "step_00000010") is None
    assert read_status(run.path)["exit_code"] == 3
    assert [line["step"] for line in run.steps] == list(range(1, 15)), "what was good is kept"


@pytest.mark.parametrize("problem_type", ["single_label_classification", "regression"])
def test_an_evaluation_that_is_not_a_number_ends_the_run(
    recipe: Settings, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem_type: str
) -> None:
    if problem_type == "regression":
        for split in ("train", "validation"):
            rows = [json.loads(row) for row in Path(recipe[f"{split}_file"]).read_text(encoding="utf-8").splitlines()]
            rows = [{**row, "label": len(row["text"]) / 100} for row in rows]
            recipe[f"{split}_file"] = str(tmp_path / f"{split}.jsonl")
            Path(recipe[f"{split}_file"]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    predict, seen = TextClassification.read_logits, 0

    def poison(task: TextClassification, logits: torch.Tensor, **others: Any) -> Any:
        nonlocal seen
        seen += len(logits)
        if seen > 61:  # The first evaluation is a good one.
            logits.fill_(float("nan"))
        return predict(task, logits, **others)

    monkeypatch.setattr(TextClassification, "read_logits", poison)
    settings = {**recipe, **LONG, "problem_type": problem_type, "metric_for_best_model": "loss"}
    run = train({**settings, "max_train_steps": 40, "eval_steps": 15, "checkpointing_steps": 1000})
    assert run.exit_code == 3, run.stderr
    assert names(run.stderr, "eval_loss", "nan", "step 30", str(run.path / "checkpoints" / "step_00000015"))
    assert [line["step"] for line in run.evaluations] == [15]
    assert [line["step"] for line in run.steps] == list(range(1, 31))


# Memory --------------------------------------------------------------------------------------------------------------


def exhaust(
    monkeypatch: pytest.MonkeyPatch, max_examples: int = 1000, max_tokens: int = 100_000, from_call: int = 0
) -> list[int]:
    """A device whose memory holds so much at once; returns the sizes of all micro-batches that were tried."""
    loss_sum = TextClassification.loss_sum
    sizes: list[int] = []

    def allocate(task: TextClassification, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        sizes.append(len(batch["input_ids"]))
        loss = loss_sum(task, model, batch)
        is_too_large = sizes[-1] > max_examples or batch["input_ids"].numel() > max_tokens
        if is_too_large and len(sizes) > from_call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return loss

    monkeypatch.setattr(TextClassification, "loss_sum", allocate)
    return sizes


@pytest.mark.parametrize("from_call", [0, 20, 21], ids=["the first", "a later one", "the second of a step's four"])
def test_without_memory_micro_batches_shrink_and_the_curve_stays(
    recipe: Settings, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_call: int
) -> None:
    from_step = from_call // 4
    settings = {**recipe, "eval_steps": 4, "per_device_batch_size": 4}
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})
    with monkeypatch.context() as patch:
        sizes = exhaust(patch, max_examples=1, from_call=from_call)
        run = train(settings)
    assert run.exit_code == 0, run.stderr
    assert names(run.stdout, f"step {from_step + 1}", "2 examples", "1 example")
    assert sizes[from_call] == 4
    assert max(sizes[from_call + 2 :]) == 1
    assert [line["step"] for line in run.steps] == list(range(1, 9))
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    with monkeypatch.context() as patch:
        sizes = exhaust(patch, max_examples=3)
        again = train({**settings, "output_dir": str(tmp_path / "whole")})
        assert again.exit_code == 0
        assert not sizes, "it is finished"


def test_an_update_that_found_no_memory_is_not_made_again(
    recipe: Settings, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    run = train(recipe)
    assert run.exit_code == 1
    assert names(run.stderr, "out of memory")
    assert "Traceback" not in run.stderr


def test_what_fits_is_known_to_the_next_start(recipe: Settings, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        exhaust(patch, max_examples=2)
        (Path(recipe["output_dir"])).mkdir()
        (Path(recipe["output_dir"]) / "STOP").touch()
        assert train(recipe).exit_code == 75
    with monkeypatch.context() as patch:
        sizes = exhaust(patch, max_examples=2)
        assert train(recipe).exit_code == 0
        assert max(sizes) == 2
    larger = {**recipe, "per_device_batch_size": 16, "output_dir": recipe["output_dir"] + "2"}
    sizes = exhaust(monkeypatch, max_examples=16)
    assert train(larger).exit_code == 0
    assert max(sizes) == 16, "who asks for another size gets it"


def test_tokens_shrink_where_tokens_are_counted(
    recipe: Settings, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = exhaust(monkeypatch, max_tokens=300)
    run = train({**recipe, "per_device_batch_size": 64, "per_device_batch_tokens": 1024})
    assert run.exit_code == 0, run.stderr
    found = re.findall(r"[Oo]ut of memory at step \d+.* (\d+) tokens", run.stdout)
    assert 64 <= int(found[-1]) <= 300
    assert max(sizes) > 4, "short examples still go together"


def test_an_example_that_never_fits_is_named(recipe: Settings, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    exhaust(monkeypatch, max_examples=0)
    run = train(recipe)
    assert run.exit_code == 1
    assert re.search(r"example \d+ \D*\d+ tokens", run.stderr)
    assert names(run.stderr, "max_length")
    assert "Traceback" not in run.stderr


EXHAUSTED = """
import torch
from onecurve.training.tasks.text_classification import TextClassification

loss_sum = TextClassification.loss_sum

def allocate(self, model, batch):
    if len(batch["input_ids"]) > 4 and os.environ["RANK"] == "RANK_WITHOUT_MEMORY":
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return loss_sum(self, model, batch)

TextClassification.loss_sum = allocate
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "num_processes"),
    [
        ("multi_cpu", 2),
        pytest.param("deepspeed_zero2", 1, id="an engine that keeps gradients where zero_grad does not clear them"),
    ],
)
def test_the_process_without_memory_says_so_and_the_next_start_fits(
    recipe: Settings, tmp_path: Path, jobs: list[Job], topology: str, num_processes: int
) -> None:
    last = num_processes - 1
    script = write_script(tmp_path / "exhausted.py", EXHAUSTED.replace("RANK_WITHOUT_MEMORY", str(last)))
    job = Job(recipe, topology, num_processes, script=script)
    jobs.append(job)
    assert job.wait_for_end() < 60
    assert names(job.output, f"rank {last}", "out of memory", "step 1")
    assert Job(recipe, topology, num_processes, script=script).finish().exit_code == 0


@pytest.mark.slow
def test_what_process_0_refuses_is_told_once(recipe: Settings, small_disk: Path, jobs: list[Job]) -> None:
    settings = {**recipe, **LONG, "save_total_limit": 5, "output_dir": str(small_disk / "run")}
    job = Job(settings, "multi_cpu", 2)
    jobs.append(job)
    job.wait_for_end()
    assert "save_total_limit" in job.output
    assert job.output.count("onecurve: ") == 1
    assert "connection" not in job.output
