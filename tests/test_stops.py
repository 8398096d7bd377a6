"""Stopped and started again, a run goes on as if nothing had happened."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from onecurve.training.tasks.text_classification import TextClassification
from tests.conftest import Launch, Run, to_flags
from tests.messages import names
from tools.jobs import Job, cut_short, read_status, without_time, write_held_task, write_script
from tools.launches import LaunchServer, ServedLauncher, build_environment

Settings = dict[str, Any]
Train = Callable[[Mapping[str, Any]], Run]
Start = Callable[..., "Alone"]

# Dropout is on: its random numbers must come back as well.
LONG = {"max_train_steps": 40, "dropout": 0.1, "checkpointing_steps": 10, "eval_steps": 15}


def final_weights(run: Run) -> bytes:
    return (run.path / "final" / "model.safetensors").read_bytes()


@pytest.fixture
def whole(recipe: Settings, train: Train) -> Run:
    run = train({**recipe, **LONG})
    assert run.exit_code == 0, run.stderr
    return run


@pytest.mark.parametrize("step", [10, 30])
def test_a_resumed_run_has_the_same_bits(recipe: Settings, train: Train, whole: Run, tmp_path: Path, step: int) -> None:
    resumed = train({**recipe, **LONG, "output_dir": str(cut_short(whole, step, tmp_path / "cut"))})
    assert resumed.exit_code == 0, resumed.stderr
    assert f"(step {step})" in resumed.stdout
    assert without_time(resumed.lines) == without_time(whole.lines), (
        "no step twice, none missing, each the same to the last bit"
    )
    assert final_weights(resumed) == final_weights(whole)


def test_a_damaged_checkpoint_is_passed_over_and_named(
    recipe: Settings, train: Train, whole: Run, tmp_path: Path
) -> None:
    folder = cut_short(whole, 30, tmp_path / "cut")
    weights = folder / "checkpoints" / "step_00000030" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed = train({**recipe, **LONG, "output_dir": str(folder)})
    assert resumed.exit_code == 0, resumed.stderr
    assert names(resumed.stdout, "step_00000030", "model.safetensors", "checksum")
    assert "(step 20)" in resumed.stdout
    assert without_time(resumed.lines) == without_time(whole.lines)


@pytest.mark.parametrize(
    ("topology", "num_processes"),
    [("multi_cpu", 2), ("multi_cpu", 3), ("fsdp", 2), ("deepspeed_zero1", 2), ("deepspeed_zero3", 2)],
)
@pytest.mark.slow
def test_another_topology_goes_on_with_the_same_curve(
    recipe: Settings, train: Train, launch: Launch, tmp_path: Path, topology: str, num_processes: int
) -> None:
    settings = {**recipe, **LONG, "dropout": 0.0}
    whole = train(settings)
    resumed = launch(
        {**settings, "output_dir": str(cut_short(whole, 20, tmp_path / "cut")), "per_device_batch_size": 3},
        topology=topology,
        num_processes=num_processes,
    )
    assert resumed.exit_code == 0, resumed.stderr
    assert [(line["step"], line["tokens"]) for line in resumed.steps] == [
        (line["step"], line["tokens"]) for line in whole.steps
    ]
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-5)
    back = launch({**settings, "output_dir": str(cut_short(resumed, 30, tmp_path / "back"))})
    assert back.exit_code == 0, back.stderr
    assert back.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.slow
def test_tensorboard_shows_no_step_twice_after_a_kill(recipe: Settings, train: Train, tmp_path: Path) -> None:
    settings = {**recipe, **LONG, "report_to": "tensorboard"}
    first = train(settings)
    resumed = train({**settings, "output_dir": str(cut_short(first, 20, tmp_path / "cut"))})
    assert resumed.exit_code == 0, resumed.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed.path / "onecurve"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 41))
    assert [event.step for event in events.Scalars("eval_loss")] == [15, 30, 40]


def test_a_finished_run_prints_its_result_and_writes_nothing(recipe: Settings, train: Train, whole: Run) -> None:
    kept = {path: path.read_bytes() for path in whole.path.rglob("*") if path.is_file()}
    again = train({**recipe, **LONG})
    assert again.exit_code == 0
    assert names(again.stdout, "finished", "step 40", "eval_loss")
    assert {path: path.read_bytes() for path in whole.path.rglob("*") if path.is_file()} == kept


@pytest.mark.slow
def test_more_epochs_of_a_finished_run_are_refused_with_a_way(recipe: Settings, train: Train, whole: Run) -> None:
    again = train({**recipe, **LONG, "max_train_steps": 80})
    assert again.exit_code == 2
    assert f"--model_name_or_path {whole.path / 'final'}" in again.stderr


def test_resume_names_a_checkpoint_of_the_same_recipe(
    recipe: Settings, train: Train, whole: Run, tmp_path: Path
) -> None:
    checkpoint = whole.path / "checkpoints" / "step_00000020"
    settings = {**recipe, **LONG, "resume": str(checkpoint), "output_dir": str(tmp_path / "second")}
    other = train({**settings, "learning_rate": 2e-3})
    assert other.exit_code == 2
    assert "learning_rate: 0.001 -> 0.002" in other.stderr
    resumed = train(settings)
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.losses == whole.losses[20:]


@pytest.mark.slow
def test_a_run_that_began_at_a_named_checkpoint_goes_on_from_its_own(
    recipe: Settings, train: Train, whole: Run, tmp_path: Path
) -> None:
    """As under Slurm, which starts the same command again and again."""
    checkpoint = whole.path / "checkpoints" / "step_00000010"
    settings = {**recipe, **LONG, "resume": str(checkpoint), "output_dir": str(tmp_path / "second")}
    second = train(settings)
    assert second.exit_code == 0, second.stderr
    early = cut_short(second, 10, tmp_path / "early")  # It has no checkpoint of its own yet.
    resumed = train({**settings, "output_dir": str(early)})
    assert names(resumed.stdout, str(checkpoint))
    late = cut_short(second, 30, tmp_path / "late")
    shutil.rmtree(checkpoint)
    resumed = train({**settings, "output_dir": str(late)})
    assert resumed.exit_code == 0, resumed.stderr
    assert names(resumed.stdout, str(late / "checkpoints" / "step_00000030"))
    assert without_time(resumed.lines) == without_time(second.lines)


@pytest.mark.slow
def test_going_back_within_a_run_is_refused_with_a_way(
    recipe: Settings, train: Train, whole: Run, tmp_path: Path
) -> None:
    folder = cut_short(whole, 30, tmp_path / "cut") / "checkpoints"
    settings = {**recipe, **LONG, "output_dir": str(folder.parent)}
    refused = train({**settings, "resume": str(folder / "step_00000020")})
    assert refused.exit_code == 2
    assert names(refused.stderr, "resume", "step_00000020", "output_dir")
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000010", "step_00000020", "step_00000030"]
    resumed = train({**settings, "resume": str(folder / "step_00000030")})
    assert resumed.exit_code == 0, resumed.stderr
    assert without_time(resumed.lines) == without_time(whole.lines)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_that_changed_are_refused(recipe: Settings, train: Train, tmp_path: Path, split: str) -> None:
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("train", "validation")}
    for name, path in paths.items():
        shutil.copy(recipe[f"{name}_file"], path)
    settings = {**recipe, **LONG, **{f"{name}_file": str(path) for name, path in paths.items()}}
    first = train(settings)
    folder = cut_short(first, 20, tmp_path / "cut")
    settings["output_dir"] = str(folder)
    rows = paths[split].read_text(encoding="utf-8")
    paths[split].write_text(rows + rows.splitlines()[0] + "\n", encoding="utf-8")
    refused = train(settings)
    assert refused.exit_code == 2
    assert names(refused.stderr, str(paths[split]), split, str(folder / "checkpoints" / "step_00000020"))
    paths[split].write_text(rows, encoding="utf-8")
    resumed = train(settings)
    assert resumed.exit_code == 0, resumed.stderr
    assert without_time(resumed.lines) == without_time(first.lines)


@dataclass(frozen=True)
class Alone:
    """One training as a process of its own, without a launcher, and the files that it prints to."""

    process: ServedLauncher | subprocess.Popen[str]
    stdout: Path
    stderr: Path

    def finish(self, seconds: float) -> tuple[int, str]:
        """Wait for its end; returns the exit code, and what it has said on stderr."""
        return self.process.wait(seconds), self.stderr.read_text(encoding="utf-8")


@pytest.fixture
def start(launch_server: LaunchServer, tmp_path: Path) -> Iterator[Start]:
    """Start one training in the background: start(settings, environment, script)."""
    started: list[Alone] = []

    def run(
        settings: Mapping[str, Any], environment: Mapping[str, str] | None = None, script: str = "training/run.py"
    ) -> Alone:
        files = [tmp_path / f"alone{len(started)}.{name}" for name in ("stdout", "stderr")]
        words, variables = [script, *to_flags(settings)], build_environment(environment)
        with files[0].open("w") as stdout, files[1].open("w") as stderr:
            alone = Alone(launch_server.start_script(words, variables, stdout, stderr), *files)
        started.append(alone)
        return alone

    yield run
    for alone in started:
        alone.process.kill()


WAYS = ["SIGTERM", "SIGINT", "SIGUSR1", "STOP", "ONECURVE_STOP_FILE"]


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if way == "SIGTERM" else pytest.mark.slow) for way in WAYS])
def test_a_stop_writes_a_checkpoint_and_the_next_start_goes_on(
    recipe: Settings, train: Train, start: Start, tmp_path: Path, way: str
) -> None:
    settings = {**recipe, **LONG, "checkpointing_steps": 1000}
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})
    stop_file, held = tmp_path / "please-stop", write_held_task(tmp_path, step=20)
    settings["task"] = held.task
    alone = start(settings, {"ONECURVE_STOP_FILE": str(stop_file)})
    folder = Path(recipe["output_dir"])
    held.wait_until_reached(alone.process)
    if way.startswith("SIG"):
        alone.process.send_signal(getattr(signal, way))
    elif way == "STOP":
        (folder / "STOP").touch()
    else:
        stop_file.touch()
    exit_code, stderr = alone.finish(120)
    assert exit_code == 75, stderr
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert names(stderr, f"step {status['step']}")
    assert "Traceback" not in stderr
    assert not (folder / "STOP").exists()
    assert 20 < status["step"] < 30
    stop_file.unlink(missing_ok=True)
    resumed = train(settings)
    assert resumed.exit_code == 0, resumed.stderr
    assert without_time(resumed.lines) == without_time(whole.lines)
    assert final_weights(resumed) == final_weights(whole)


@pytest.mark.slow
def test_stopped_between_epochs_in_two_evaluations_in_a_row(
    recipe: Settings, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = 13  # 203 examples, 16 a step.
    settings = {**recipe, **LONG, "max_train_steps": 3 * epoch, "eval_steps": epoch, "checkpointing_steps": 1000}
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})
    predict, stop = TextClassification.read_logits, Path(recipe["output_dir"]) / "STOP"

    def predict_once(task: TextClassification, logits: Any, **others: Any) -> Any:
        stop.touch()
        return predict(task, logits, **others)

    for evaluation in (1, 1, 2):  # The first one twice: the next start makes it again, and is stopped again.
        with monkeypatch.context() as patch:
            patch.setattr(TextClassification, "read_logits", predict_once)
            if evaluation == 2:  # Let the first evaluation pass.
                patch.setattr(TextClassification, "read_logits", predict_after(61, predict, stop))
            stopped = train(settings)
        assert stopped.exit_code == 75, stopped.stderr
        assert stopped.read("status.json")["step"] == evaluation * epoch
        assert [line["step"] for line in stopped.evaluations] == [epoch] * (evaluation - 1)
    resumed = train(settings)
    assert resumed.exit_code == 0, resumed.stderr
    assert without_time(resumed.lines) == without_time(whole.lines)
    assert final_weights(resumed) == final_weights(whole)


@pytest.mark.parametrize(
    "stop_in", [pytest.param("the exhausting evaluation", marks=pytest.mark.slow), "the evaluation of the test data"]
)
def test_a_run_that_stopped_early_makes_no_step_more(
    recipe: Settings, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_in: str
) -> None:
    settings: Settings = {**recipe, **LONG, "eval_steps": 5, "checkpointing_steps": 1000, "learning_rate": 0.05}
    settings.update(metric_for_best_model="loss", early_stopping_patience=2, test_file=recipe["validation_file"])
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})
    assert whole.exit_code == 0, whole.stderr
    assert len(whole.steps) < 40, "patience ended"
    stop = Path(recipe["output_dir"]) / "STOP"
    num_before = len(whole.evaluations) - (stop_in == "the exhausting evaluation")
    with monkeypatch.context() as patch:
        predict = TextClassification.read_logits
        patch.setattr(TextClassification, "read_logits", predict_after(61 * num_before, predict, stop))
        stopped = train(settings)
    assert stopped.exit_code == 75, stopped.stderr
    assert len(stopped.evaluations) == num_before
    resumed = train(settings)
    assert resumed.exit_code == 0, resumed.stderr
    assert without_time(resumed.lines) == without_time(whole.lines)
    assert final_weights(resumed) == final_weights(whole)


def predict_after(num_examples: int, predict: Any, stop: Path) -> Any:
    """Ask for a stop in the evaluation after the one of so many examples."""
    seen = 0

    def predict_and_count(task: TextClassification, logits: Any, **others: Any) -> Any:
        nonlocal seen
        if seen >= num_examples:
            stop.touch()
        seen += len(logits)
        return predict(task, logits, **others)

    return predict_and_count


# Held by itself, in native code that no signal ends, as a collective is that waits for a dead process.
STUCK = """
import ctypes
from onecurve.training.recovery import watchdog
from onecurve.training.tasks.text_classification import TextClassification

loss_sum = TextClassification.loss_sum

def hang(self, model, batch):
    hang.calls += 1
    if hang.calls > 4:
        native, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
        native.pthread_mutex_init(mutex, None)
        native.pthread_mutex_lock(mutex)
        print("stuck", flush=True)
        native.pthread_mutex_lock(mutex)
    return loss_sum(self, model, batch)

hang.calls = 0
TextClassification.loss_sum = hang
watchdog._SECONDS_AFTER_SIGTERM = 1.0
"""


@pytest.fixture
def stuck(recipe: Settings, start: Start, tmp_path: Path) -> Alone:
    """A training whose main thread will not run Python again."""
    alone = start(recipe, script=write_script(tmp_path / "stuck.py", STUCK))
    while "stuck\n" not in alone.stdout.read_text(encoding="utf-8"):
        assert alone.process.poll() is None, "it ended"
        time.sleep(0.02)
    return alone


@pytest.mark.parametrize("first", ["SIGINT", "SIGUSR1"])
def test_a_second_interrupt_ends_at_once(stuck: Alone, first: str) -> None:
    for name in ("SIGINT",) if first == "SIGINT" else (first, "SIGINT"):
        stuck.process.send_signal(getattr(signal, name))
        with pytest.raises(subprocess.TimeoutExpired):  # Another signal before it doesn't make it the second.
            stuck.process.wait(1)
    stuck.process.send_signal(signal.SIGINT)
    exit_code, stderr = stuck.finish(10)
    assert exit_code == 1
    assert stderr.startswith("onecurve: ")
    assert stderr.count("\n") == 1


def test_told_to_end_a_process_that_is_stuck_ends_within_seconds(stuck: Alone) -> None:
    stuck.process.send_signal(signal.SIGTERM)
    exit_code, stderr = stuck.finish(30)
    assert exit_code == 1
    assert re.search(r"rank 0 [a-z ]*\S+\.py:\d+ ", stderr)


@pytest.mark.slow
def test_a_stop_reaches_ranks_that_have_loader_workers(recipe: Settings, tmp_path: Path, jobs: list[Job]) -> None:
    held = write_held_task(tmp_path, step=20)
    settings = {**recipe, **LONG, "checkpointing_steps": 1000, "task": held.task}
    job = Job({**settings, "dataloader_num_workers": 1}, "multi_cpu", 2)
    jobs.append(job)
    job.wait_until(held.reached.exists)
    job.process.terminate()  # torch's agent passes it on to each rank and its workers.
    job.wait_for_end()
    assert read_status(job.path)["exit_code"] == 75, job.output
    assert "DataLoader worker" not in job.output
    assert 20 < read_status(job.path)["step"] < 30
    with_workers = Job({**settings, "dataloader_num_workers": 1}, "multi_cpu", 2).finish()
    assert with_workers.exit_code == 0, with_workers.stderr
    without = Job({**settings, "output_dir": str(tmp_path / "without")}, "multi_cpu", 2).finish()
    assert without_time(with_workers.lines) == without_time(without.lines), "workers only save time"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ONECURVE_STOP_FILE", "SIGUSR1", "no launcher"])
def test_an_evaluation_alone_stops_as_well(
    recipe: Settings, train: Train, tmp_path: Path, jobs: list[Job], way: str
) -> None:
    trained = train({**recipe, "max_train_steps": 2})
    (trained.path / "STOP").touch()  # This one is for a training.
    big, stop_file, status = tmp_path / "big.jsonl", tmp_path / "please-stop", tmp_path / "status.json"
    big.write_text(Path(recipe["validation_file"]).read_text(encoding="utf-8") * 1000, encoding="utf-8")
    script = write_script(tmp_path / "evaluating.py", EVALUATING.replace("{begun}", str(tmp_path / "begun")))
    variables = {"ONECURVE_STOP_FILE": str(stop_file), "ONECURVE_STATUS_FILE": str(status)}
    settings = {**recipe, "max_train_steps": 2, "test_file": str(big), "eval_only": True}
    job = Job(settings, "multi_cpu", 2, script=script, environment=variables)
    jobs.append(job)
    job.wait_until((tmp_path / "begun").exists)
    if way == "ONECURVE_STOP_FILE":
        stop_file.touch()
    elif way == "SIGUSR1":
        job.ranks()[1].send_signal(signal.SIGUSR1)
    else:
        job.strike("launcher")
    assert job.wait_for_end() < 15
    assert json.loads(status.read_text(encoding="utf-8"))["exit_code"] == 75, job.output
    assert names(job.output, "stopped", "nothing")
    assert not (trained.path / "test_report.json").exists()


EVALUATING = """
from onecurve.training.tasks.text_classification import TextClassification

predict = TextClassification.read_logits

def tell(self, logits, **others):
    open("{begun}", "w").close()
    return predict(self, logits, **others)

TextClassification.read_logits = tell
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stop_of_the_agent_is_over_once_the_checkpoint_is_written(
    recipe: Settings, jobs: list[Job], name: str
) -> None:
    job = Job({**recipe, **LONG, "max_train_steps": 100_000, "checkpointing_steps": 100_000}, "multi_cpu", 2)
    jobs.append(job)
    job.wait_for_step(15)
    job.process.send_signal(getattr(signal, name))
    assert job.wait_for_end() < 25, "the agent would kill what is left after 30 seconds"
    assert read_status(job.path)["exit_code"] == 75, job.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_a_signal_to_another_rank_than_the_first_stops_all(recipe: Settings, jobs: list[Job], name: str) -> None:
    job = Job({**recipe, **LONG, "max_train_steps": 100_000, "checkpointing_steps": 100_000}, "multi_cpu", 2)
    jobs.append(job)
    job.wait_for_step(15)
    job.ranks()[1].send_signal(getattr(signal, name))
    job.wait_for_end()
    status = read_status(job.path)
    assert status["exit_code"] == 75, job.output
    assert [folder.name for folder in (job.path / "checkpoints").iterdir()] == [f"step_{status['step']:08d}"]


@pytest.mark.slow
def test_two_processes_agree_on_a_stop(recipe: Settings, launch: Launch, tmp_path: Path) -> None:
    settings = {**recipe, **LONG, "checkpointing_steps": 1000}
    whole = launch({**settings, "output_dir": str(tmp_path / "whole")}, "multi_cpu", 2)
    stop_file, status = tmp_path / "please-stop", tmp_path / "status.json"
    stop_file.touch()
    variables = {"ONECURVE_STOP_FILE": str(stop_file), "ONECURVE_STATUS_FILE": str(status)}
    stopped = launch(settings, "multi_cpu", 2, environment=variables)
    assert stopped.exit_code != 0
    assert json.loads(status.read_text())["exit_code"] == 75
    stop_file.unlink()
    resumed = launch(settings, "multi_cpu", 2)
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.losses == whole.losses


def test_a_loss_that_is_not_finite_ends_the_run(recipe: Settings, train: Train) -> None:
    run = train({**recipe, "learning_rate": 1e30, "max_train_steps": 40})
    assert run.exit_code == 3
    assert names(run.stderr, "loss", "nan")
    assert run.read("status.json")["state"] == "failed"
    assert run.read("status.json")["exit_code"] == 3
    assert not (run.path / "final").exists()


APART = """
from onecurve.training.parallel import topology
from onecurve.training.recovery.milestones import Progress
from onecurve.training.recovery.resumption import Start

if os.environ["RANK"] == "1":
    run.find_start = lambda *arguments: Start(None, Progress())
topology._describe_device = lambda device: "device " + os.environ["RANK"]
"""


@pytest.mark.slow
def test_what_process_0_finds_in_the_run_directory_holds_for_all(
    recipe: Settings, launch: Launch, tmp_path: Path
) -> None:
    """Process 1 looked while an old process was still writing the newest checkpoint, and its device is another one."""
    settings = {**recipe, **LONG}
    whole = launch(settings, "multi_cpu", 2)
    assert whole.exit_code == 0, whole.stderr
    folder = cut_short(whole, 20, tmp_path / "cut")
    topology = {**whole.read("environment.json")["topology"], "device_name": "device 0"}
    asked = {"per_device_batch_size": 8, "per_device_batch_tokens": None, "gradient_checkpointing": False,
             "is_packed": False, **topology}  # fmt: skip
    (folder / "memory.json").write_text(
        json.dumps({"asked": asked, "found": {"max_examples": 2, "max_tokens": None}}), encoding="utf-8"
    )
    script = write_script(tmp_path / "apart.py", APART)
    job = Job({**settings, "output_dir": str(folder)}, "multi_cpu", 2, script=script)
    resumed = job.finish()
    assert resumed.exit_code == 0, resumed.stderr
    assert re.search(r"\b2 \D+ x 4 \D+ x 2 processes", resumed.stdout)
    assert [line["step"] for line in resumed.steps] == list(range(1, 41))
    assert resumed.losses[:20] == whole.losses[:20]


LATE = """
import time
from onecurve.training import run_start

restore = run_start.restore

def restore_late(*arguments):
    time.sleep(3 * (os.environ["RANK"] == "1"))
    restore(*arguments)

run_start.restore = restore_late
"""


@pytest.mark.slow
def test_a_checkpoint_keeps_its_name_until_every_process_has_read_it(
    recipe: Settings, train: Train, tmp_path: Path
) -> None:
    settings = {**recipe, **LONG, "dropout": 0.0, "max_train_steps": 12}
    whole = train(settings)
    folder = cut_short(whole, 10, tmp_path / "cut")
    checkpoint = folder / "checkpoints" / "step_00000010"
    checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.replaced"))  # Killed between two renames.
    script = write_script(tmp_path / "late.py", LATE)
    resumed = Job({**settings, "output_dir": str(folder)}, "multi_cpu", 2, script=script).finish()
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "precision"),
    [("fsdp", "no"), ("deepspeed_zero2", "no"), ("deepspeed_zero2", "bf16"), ("deepspeed_zero3", "bf16")],
)
def test_a_resumed_run_of_a_sharded_model_has_the_same_bits(
    recipe: Settings, launch: Launch, tmp_path: Path, topology: str, precision: str
) -> None:
    settings = {**recipe, **LONG, "mixed_precision": precision}
    whole = launch(settings, topology, 2)
    assert whole.exit_code == 0, whole.stderr
    resumed = launch({**settings, "output_dir": str(cut_short(whole, 20, tmp_path / "cut"))}, topology, 2)
    assert resumed.exit_code == 0, resumed.stderr
    assert "(step 20)" in resumed.stdout
    assert without_time(resumed.lines) == without_time(whole.lines)
    assert final_weights(resumed) == final_weights(whole)
