"""The command line as a user meets it: quick, one message for each mistake, exit codes that mean something."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from onecurve.launcher.launching.command import Command
from tests.conftest import Run
from tests.launcher.conftest import ROOT, Onecurve
from tests.messages import names
from tests.training.tasks.templates import CHATML
from tools.decoders import build_decoder
from tools.jobs import write_held_task

COMMANDS = (
    "init", "run", "check", "plan", "compare", "watch", "report", "resume", "predict", "chat", "submit", "cancel", "fetch",
)  # fmt: skip
HEAVY = ("torch", "transformers", "accelerate", "datasets")


def test_help_imports_little() -> None:
    """So it answers at once; by the clock: benchmarks/start.md."""
    words = [sys.executable, "-X", "importtime", "-m", "onecurve", "--help"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, check=True, text=True, timeout=120)
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "onecurve.launcher.cli" in imported
    assert not imported & {*HEAVY, "numpy", "rich.console", "pydantic"}
    assert len(imported) < 300  # Those of `accelerate launch --help` are more than 1,200.


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, onecurve: Onecurve) -> None:
    result = onecurve(command, "--help")
    assert result.returncode == 0
    assert "Usage: onecurve " + command in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        *([command, "--help"] for command in COMMANDS),
        ["init", "build/demo/validation.jsonl", "--output", "NEW"],
        ["run", "RECIPE", "--dry-run"],
        ["check", "RECIPE"],
        ["plan", "RECIPE"],
        ["submit", "RECIPE", "--dry-run"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(words: list[str], recipe_file: Path, tmp_path: Path) -> None:
    sbatch = tmp_path / "bin" / "sbatch"  # submit --dry-run asks Slurm what it thinks of the request.
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 'sbatch: Job 1 to start at now' >&2\n", encoding="utf-8")
    sbatch.chmod(0o755)
    files = {"RECIPE": str(recipe_file), "NEW": str(tmp_path / "new.yaml")}
    words = [files.get(word, word) for word in words]
    code = (
        "import sys; from onecurve.launcher.cli import run_command_line; code = run_command_line(sys.argv[1:]); "
        f"loaded = [name for name in {HEAVY} if name in sys.modules]; assert not loaded, loaded; sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PATH": f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_completion_is_offered(onecurve: Onecurve) -> None:
    for shell in ("bash", "zsh", "fish"):
        result = onecurve("--show-completion", shell, environment={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
        assert "_ONECURVE_COMPLETE" in result.stdout, shell


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("onecurve re", {"resume", "report"}),
        ("onecurve run --max", {"--max-restarts", "--max_restarts"}),
        ("onecurve predict RUN --bat", {"--batch_size", "--batch-size"}),
    ],
)
def test_bash_completes(words: str, expected: set[str], tmp_path: Path, onecurve: Onecurve) -> None:
    script = onecurve(
        "--show-completion", "bash", environment={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ).stdout
    program = tmp_path / "onecurve"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m onecurve "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    asked = f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _onecurve_completion {program}"
    result = subprocess.run(
        ["bash", "-c", f'{script}\n{asked}\necho "${{COMPREPLY[@]}}"'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert set(result.stdout.split()) == expected, result.stderr


# What the message has to name: the option or the key, its value, and what is near to it or there instead.
WRONG: list[tuple[list[str], tuple[str, ...]]] = [
    (["run", "RECIPE", "--topolgy", "cpu"], ("--topolgy", "--topology")),
    (["run", "RECIPE", "--max-restart", "3"], ("--max-restart",)),
    (["run", "RECIPE", "--dry-rum"], ("--dry-rum",)),
    (["plan", "RECIPE", "--device", "8xH100"], ("--device", "--devices")),
    (["rum", "RECIPE"], ("'rum'", "'run'")),
    (["run"], ("'RECIPE'",)),
    (["run", "nowhere.yaml"], ("nowhere.yaml",)),
    (["run", "RECIPE", "--learning_rat", "1e-3"], ("learning_rat", "learning_rate")),
    (["run", "RECIPE", "--learning_rate", "fast"], ("learning_rate", "'fast'")),
    (["run", "RECIPE", "--learning_rate"], ("--learning_rate", "value")),
    (["run", "RECIPE", "--seed", "1", "--seed", "2"], ("--seed",)),
    (["run", "RECIPE", "stray"], ("'stray'", "--key value")),
    (["run", "RECIPE", "--topology", "multi_gup"], ("multi_gup", "multi_gpu")),
    (["run", "RECIPE", "--topology", "cpu", "--num_processes", "2"], ("cpu.yaml", "one process")),
    (["run", "RECIPE", "--num_processes", "0"], ("num_processes", "1")),
    (["run", "RECIPE", "--max-restarts", "-1"], ("--max-restarts", "0")),
    (["run", "RECIPE", "--max_length", "4096", "--dry-run"], ("max_length", "4096", "128")),
    (["run", "RECIPE", "--train_file", "nowhere.jsonl", "--dry-run"], ("train_file", "'nowhere.jsonl'")),
    (["run", "RECIPE", "--train_file", "none*.jsonl", "--dry-run"], ("train_file", "'none*.jsonl'")),
    (
        ["run", "RECIPE", "--label_column", "labels", "--dry-run"],
        ("label_column", "'labels'", "text", "label"),
    ),
    (["run", "RECIPE", "--text_column", "body", "--dry-run"], ("text_column", "'body'")),
    (["run", "RECIPE", "--model_name_or_path", "./nowhere", "--dry-run"], ("model_name_or_path", "'./nowhere'")),
    (
        ["run", "RECIPE", "--model_name_or_path", "pyproject.toml", "--dry-run"],
        ("model_name_or_path", "'pyproject.toml'", "file"),
    ),
    (["run", "RECIPE", "--model_name_or_path", "docs", "--dry-run"], ("model_name_or_path", "'docs'", "config.json")),
    (
        ["run", "RECIPE", "--model_name_or_path", "someone/model", "--dry-run"],
        ("model_name_or_path", "'someone/model'", "HF_HUB_OFFLINE"),
    ),
    (["run", "RECIPE", "--output_dir", "pyproject.toml/run", "--dry-run"], ("output_dir", "pyproject.toml")),
    (["run", "RECIPE", "--mixed_precision", "fp16", "--dry-run"], ("mixed_precision", "fp16", "GPU")),
    (
        ["run", "RECIPE", "--attn_implementation", "flash_attention_2", "--dry-run"],
        ("attn_implementation", "flash_attention_2", "sdpa"),
    ),
    (["run", "RECIPE", "--resume", "step_9", "--dry-run"], ("resume", "'step_9'")),
    (["plan", "RECIPE", "--devices", "8x"], ("COUNTxNAME-MEMORYGB",)),
    (["plan", "RECIPE", "--devices", "8xQ9"], ("Q9", "8xQ9-24GB")),
    (["plan", "RECIPE", "--devices", "0xH100"], ("COUNTxNAME-MEMORYGB",)),
    (["plan", "RECIPE", "--model_name_or_path", "someone/model"], ("config.json", "'someone/model'")),
    (["compare", "docs"], ("two",)),
    (["compare", "docs", "tests"], ("docs", "config.yaml")),
    (["watch", "nowhere"], ("'nowhere'",)),
    (["report", "docs"], ("docs", "config.yaml")),
    (["resume", "docs"], ("docs", "config.yaml")),
    (["predict", "docs", "--input", "a.csv", "--output", "b.csv"], ("docs", "config.yaml")),
    (["predict", "docs"], ("'--input'",)),
    (["check", "RECIPE", "--nope"], ("--nope", "value")),
]


def test_thirty_wrong_inputs_each_give_one_message(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onecurve.launcher.cli import run_command_line

    monkeypatch.chdir(ROOT)
    assert len(WRONG) >= 30
    for words, needed in WRONG:
        code = run_command_line([str(recipe_file) if word == "RECIPE" else word for word in words])
        captured = capsys.readouterr()
        assert code == 2, (words, captured)
        assert names(captured.err + captured.out, *needed), (words, captured)
        assert "Traceback" not in captured.err, words
        assert len(re.findall("^onecurve: ", captured.err, flags=re.MULTILINE)) == 1, (words, captured.err)


def test_without_a_word_it_explains_itself(onecurve: Onecurve) -> None:
    result = onecurve()
    assert (result.returncode, result.stderr) == (2, "")
    assert result.stdout == onecurve("--help").stdout


def test_underscores_are_as_good_as_hyphens(recipe_file: Path, onecurve: Onecurve) -> None:
    assert onecurve("run", recipe_file, "--dry_run", "--max_restarts", "1").returncode == 0


def test_a_program_reads_errors_as_json(recipe_file: Path, onecurve: Onecurve) -> None:
    result = onecurve("run", recipe_file, "--train_file", "nowhere.jsonl", "--max_length", "4096", "--json")
    told = json.loads(result.stdout)
    assert result.returncode == told["exit_code"] == 2
    assert len(told["problems"]) == 2
    assert all(problem in result.stderr for problem in told["problems"])
    told = json.loads(onecurve("plan", recipe_file, "--learning_rat", "1", "--json").stdout)
    assert [names(problem, "learning_rat", "learning_rate") for problem in told["problems"]] == [True]
    assert names(json.loads(onecurve("watch", "nowhere", "--json").stdout)["message"], "'nowhere'")


def test_debug_shows_the_traceback(recipe_file: Path, onecurve: Onecurve) -> None:
    result = onecurve("run", recipe_file, "--topology", "nowhere", "--debug")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_dry_run_is_a_command_that_can_be_copied(recipe_file: Path, onecurve: Onecurve) -> None:
    result = onecurve("run", recipe_file, "--topology", "multi_cpu", "--seed", "7", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    launch = json.loads(result.stdout)
    assert launch["topology"] == "multi_cpu"
    assert launch["num_processes"] == 2
    assert launch["command"][1:3] == ["launch", "--quiet"]
    assert launch["command"][-2:] == ["--seed", "7"]
    assert not launch["findings"]
    shown = onecurve("run", recipe_file, "--topology", "multi_cpu", "--seed", "7", "--dry-run")
    words = shlex.split(shown.stdout)  # The port is any that is free.
    assert (words[-4:], "because" in shown.stdout) == (launch["command"][-4:], False), "stdout is the command alone"


def test_a_value_that_looks_like_a_flag_stays_a_value(recipe_file: Path, onecurve: Onecurve) -> None:
    launch = json.loads(onecurve("run", recipe_file, "--output_dir=--odd", "--dry-run", "--json").stdout)
    assert launch["command"][-1] == "--output_dir=--odd"


def test_a_training_runs_and_is_known_afterwards(recipe_file: Path, recipe: dict[str, Any], onecurve: Onecurve) -> None:
    run = recipe["output_dir"]
    result = onecurve("run", recipe_file, "--max_train_steps", "3", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"exit_code": 0, "run": run, "message": ""}
    assert "step 3" in result.stderr, "what the training says is not lost"
    shown = onecurve("watch", run, "--once")
    assert "finished" in shown.stdout
    assert "step 3 of 3" in shown.stdout
    other = onecurve("run", recipe_file, "--max_train_steps", "3", "--learning_rate", "1")
    assert other.returncode == 2
    assert names(other.stderr, run, "learning_rate")
    predictions = Path(run) / "eval_predictions.jsonl"
    before = predictions.read_bytes()
    predictions.unlink()
    evaluated = onecurve("run", recipe_file, "--max_train_steps", "3", "--eval_only")
    assert evaluated.returncode == 0, evaluated.stderr
    assert predictions.read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_is_resumed_by_saying_so(
    recipe: dict[str, Any], train: Callable[[dict[str, Any]], Run], onecurve: Onecurve
) -> None:
    assert train({**recipe, "max_train_steps": 3}).exit_code == 0
    again = onecurve("resume", recipe["output_dir"])
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout


def test_a_training_is_told_how_often_it_will_be_started_again(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onecurve.launcher.cli import run_command_line
    from onecurve.launcher.launching.ending import Ending

    told: list[str] = []

    def crash(command: Command, *_: object, **__: object) -> Ending:
        told.append(command.environment["ONECURVE_RESTARTS_LEFT"])
        return Ending(1)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("onecurve.launcher.launching.supervise.supervise", crash)
    assert run_command_line(["run", str(recipe_file), "--max-restarts", "2"]) == 1
    assert told == ["2", "1", "0"]


@pytest.mark.parametrize(("value", "restart"), [("CHECKPOINT", "CHECKPOINT"), ("never", "auto"), ("auto", "auto")])
def test_a_restart_keeps_the_checkpoint_that_is_named(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, restart: str
) -> None:
    """A crash before the run has a checkpoint of its own must not make it begin at the pretrained model."""
    from onecurve.launcher.cli import run_command_line
    from onecurve.launcher.launching import supervise
    from onecurve.launcher.launching.ending import Ending

    checkpoint = tmp_path / "other" / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    commands: list[str] = []

    def crash(command: Any, *others: Any, **options: Any) -> Ending:
        commands.append(command.to_shell())
        return Ending(1, "crashed")

    monkeypatch.setattr(supervise, "supervise", crash)
    value, restart = (str(checkpoint) if word == "CHECKPOINT" else word for word in (value, restart))
    words = ["run", str(recipe_file), "--topology", "cpu", "--resume", value, "--max-restarts", "1"]
    assert run_command_line(words) == 1
    assert len(commands) == 2
    assert f"--resume {value}" in commands[0]
    assert f"--resume {restart}" in commands[1]


def test_resume_keeps_the_checkpoint_that_a_run_began_at(
    recipe: dict[str, Any], recipe_file: Path, tmp_path: Path, onecurve: Onecurve
) -> None:
    run = Path(recipe["output_dir"])
    run.mkdir()
    (run / "config.yaml").write_text(
        recipe_file.read_text(encoding="utf-8") + f"resume: {tmp_path / 'gone'}\n", encoding="utf-8"
    )
    refused = onecurve("resume", run, "--dry-run")
    assert refused.returncode == 2
    assert names(refused.stderr, "resume", str(tmp_path / "gone"))
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert onecurve("resume", run, "--dry-run").returncode == 0, "it has one of its own"


@pytest.mark.parametrize("is_real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "real"])
def test_two_processes_that_fail_leave_one_message_and_their_exit_code(
    recipe_file: Path, onecurve: Onecurve, is_real: bool
) -> None:
    words = ("run", recipe_file, "--topology", "multi_cpu", "--learning_rate", "1e30", "--max-restarts", "3")
    result = onecurve(*words, is_real=is_real)
    assert result.returncode == 3, result.stderr
    told = result.stderr.splitlines()
    assert [line for line in told if line.startswith("onecurve: ")] == told[4:], result.stderr
    assert names(told[4], "loss")


def _wait_for_steps(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size:
            return
        time.sleep(0.1)
    raise AssertionError("no step was made")


@pytest.mark.slow
def test_a_second_signal_ends_every_process(recipe_file: Path, recipe: dict[str, Any]) -> None:
    words = ["run", str(recipe_file), "--topology", "multi_cpu", "--max_train_steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "onecurve", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        _wait_for_steps(Path(recipe["output_dir"]), process)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (1, 75), told
    assert names(told, "SIGTERM", "checkpoint")
    assert "Traceback" not in told
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(recipe_file) not in listing


ENDING = """
import atexit, os, signal
from onecurve.launcher.cli import app as cli

cli.run_command_line = lambda arguments: 75
atexit.register(os.kill, os.getpid(), signal.{name})
cli.main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_at_the_very_end_does_not_replace_the_exit_code(name: str) -> None:
    result = subprocess.run([sys.executable, "-c", ENDING.format(name=name)], cwd=ROOT, timeout=60, check=False)
    assert result.returncode == 75


@pytest.mark.slow
def test_a_signal_leaves_a_checkpoint_and_resume_goes_on(
    recipe_file: Path, recipe: dict[str, Any], tmp_path: Path, onecurve: Onecurve
) -> None:
    held = write_held_task(tmp_path, step=3)
    words = ["run", str(recipe_file), "--topology", "multi_cpu", "--max_train_steps", "20", "--task", held.task]
    process = subprocess.Popen(
        [sys.executable, "-m", "onecurve", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        held.wait_until_reached(process)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, told
    result = onecurve("resume", recipe["output_dir"])
    assert result.returncode == 0, result.stderr
    assert "step_000000" in result.stdout
    lines = (Path(recipe["output_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if line["event"] == "train"]
    assert steps == list(range(1, 21))


@pytest.mark.slow
def test_predict_keeps_order_on_any_number_of_processes(
    recipe: dict[str, Any], train: Callable[[dict[str, Any]], Run], news: Path, tmp_path: Path, onecurve: Onecurve
) -> None:
    assert train({**recipe, "max_train_steps": 2}).exit_code == 0
    rows = [json.loads(line) for line in (news / "train.jsonl").read_text(encoding="utf-8").splitlines()] * 6
    source = tmp_path / "texts.jsonl"
    source.write_text(
        "".join(json.dumps({**row, "id": number}) + "\n" for number, row in enumerate(rows)), encoding="utf-8"
    )
    outputs = []
    for count in (1, 2):
        target = tmp_path / f"labelled{count}.jsonl"
        result = onecurve(
            "predict", recipe["output_dir"], "--input", source, "--output", target, "--num_processes", count
        )
        assert result.returncode == 0, result.stderr
        outputs.append(target.read_text(encoding="utf-8"))
    labelled = [json.loads(line) for line in outputs[0].splitlines()]
    assert [row["id"] for row in labelled] == list(range(len(rows)))
    assert outputs[0] == outputs[1]
    for row in labelled[:20]:
        probabilities = {name: value for name, value in row.items() if name.startswith("probability_")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["score"] == max(probabilities.values()) == probabilities[f"probability_{row['prediction']}"]


@pytest.mark.slow
def test_deep_check_describes_the_data(recipe_file: Path, onecurve: Onecurve) -> None:
    good = onecurve("check", recipe_file, "--deep", "--eval_only")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "203 rows" in good.stdout
    assert "labels" in good.stdout


@pytest.mark.slow
def test_a_language_model_is_checked_and_talks(
    demo: Path, tmp_path: Path, onecurve: Onecurve, train: Callable[[dict[str, Any]], Run]
) -> None:
    """One example with its targets marked, for people and for programs; then a conversation over a pipe."""
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "task": "causal_lm",
        "model_name_or_path": str(build_decoder(tmp_path / "model", chat_template=CHATML)),
        "train_file": str(tmp_path / "chats.jsonl"),
        "messages_column": "messages",
        "assistant_only_loss": True,
        "max_length": 64,
        "max_train_steps": 30,
        "learning_rate": 1e-2,
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "chats.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    example = json.loads(onecurve("check", tmp_path / "chats.yaml", "--deep", "--json").stdout)["example"]
    learned = "".join(token["text"] for token in example if token["is_target"])
    assert re.fullmatch(r"It is \d+\.<\|im_end\|>", learned)
    assert train(settings).exit_code == 0
    spoken = subprocess.run(
        [sys.executable, "-m", "onecurve", "chat", str(tmp_path / "run"), "--max_new_tokens", "3"],
        cwd=ROOT,
        input="Say 1\n/clear\nSay 1\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    first, second = spoken.stdout.split("\n")[:2]
    assert first == second == "It is"


@pytest.mark.slow
def test_fetch_takes_what_run_takes(recipe_file: Path, onecurve: Onecurve) -> None:
    result = onecurve("fetch", recipe_file, "--eval_only", "--output_dir=--odd")
    assert result.returncode == 0, result.stderr
    assert "train: 203 rows" in result.stdout


@pytest.mark.slow
def test_deep_check_names_the_row(
    recipe_file: Path, recipe: dict[str, Any], tmp_path: Path, onecurve: Onecurve
) -> None:
    rows = Path(recipe["validation_file"]).read_text(encoding="utf-8").splitlines()
    rows[5] = json.dumps({"text": "a text", "label": "tehc"})
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(rows), encoding="utf-8")
    content = {**yaml.safe_load(recipe_file.read_text(encoding="utf-8")), "validation_file": str(bad)}
    recipe_file.write_text(yaml.safe_dump(content), encoding="utf-8")
    result = onecurve("check", recipe_file, "--deep")
    assert result.returncode == 2
    assert "'tehc'" in result.stdout


def test_a_machine_with_gpus_is_found(
    recipe_file: Path, onecurve: Onecurve, fake_gpus: Callable[..., dict[str, str]]
) -> None:
    report = json.loads(onecurve("check", recipe_file, "--json", environment=fake_gpus(2)).stdout)
    assert report["facts"][1] == "chosen    multi_gpu (DDP)"
    # The GPUs are a script's; the PyTorch of a machine without any is built without CUDA.
    errors = [finding["message"] for finding in report["findings"] if finding["severity"] == "error"]
    assert errors
    assert all(names(message, "CUDA") for message in errors)
