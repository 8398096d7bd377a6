"""Why two runs differ: pairs of real trainings that differ in one thing, or in one that matters and others that don't."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.cli.app import run_command_line
from onecurve.launcher.facts.run_differences import _EFFECTS
from onecurve.training.recipe import Recipe
from tests.conftest import TINY, Launch, Run
from tests.messages import names
from tests.training.conftest import stop_and_resume

Settings = dict[str, Any]
Train = Callable[[Mapping[str, Any]], Run]
Change = Callable[[Settings, Path], Settings]

STEPS = 5

ROW = 6  # First seen at step 3.


@dataclass(frozen=True)
class Pair:
    """Two trainings of the same recipe but for what is named.

    Attributes:
        changes: of the second one: settings, or a function that makes files and returns settings.
        cause: the name of the first difference; None where the curves agree.
        explains: what it explains of the curves.
        step: the step at which they part.
        both: settings of both.
        others: names of differences that are listed after the first.
    """

    changes: Settings | Change
    cause: str | None
    explains: str | None = None
    step: int | None = None
    both: Settings = field(default_factory=dict)
    others: tuple[str, ...] = ()
    tolerance: str = "1e-5"


def read_rows(settings: Settings, key: str) -> list[str]:
    return Path(settings[key]).read_text(encoding="utf-8").splitlines(keepends=True)


def change_row(settings: Settings, folder: Path) -> Settings:
    """Other words, each of one token as before: no example has another length or place."""
    known = set((Path(settings["model_name_or_path"]) / "vocab.txt").read_text(encoding="utf-8").split())
    rows = read_rows(settings, "train_file")
    content = json.loads(rows[ROW])
    content["text"] = " ".join("the" if word.lower() in known else word for word in content["text"].split())
    rows[ROW] = json.dumps(content) + "\n"
    return write(folder, rows)


def change_label(settings: Settings, folder: Path) -> Settings:
    rows = read_rows(settings, "train_file")
    labels = sorted({json.loads(row)["label"] for row in rows})
    content = json.loads(rows[ROW])
    content["label"] = labels[labels.index(content["label"]) - 1]
    rows[ROW] = json.dumps(content) + "\n"
    return write(folder, rows)


def reverse_rows(settings: Settings, folder: Path) -> Settings:
    return write(folder, read_rows(settings, "train_file")[::-1])


def copy_files(settings: Settings, folder: Path) -> Settings:
    return write(folder, read_rows(settings, "train_file"))


def change_validation(settings: Settings, folder: Path) -> Settings:
    return {"validation_file": write(folder, read_rows(settings, "validation_file")[5:])["train_file"]}


def write(folder: Path, rows: list[str]) -> Settings:
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    return {"train_file": str(folder / "rows.jsonl")}


def change_weights(settings: Settings, folder: Path) -> Settings:
    """The same model with one number of one tensor raised."""
    import shutil

    from safetensors.torch import load_file, save_file

    model = folder / "model"
    shutil.copytree(settings["model_name_or_path"], model)
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layer.1.output.LayerNorm.bias"))
    tensors[name][0] += 1.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return {"model_name_or_path": str(model)}


def change_weights_and_rate(settings: Settings, folder: Path) -> Settings:
    return {**change_weights(settings, folder), "learning_rate": 2e-3}


SMALL_MICRO_BATCHES = {"per_device_batch_size": 3}

PAIRS = {
    "nothing": Pair({}, None),
    "copied files": Pair(copy_files, None),
    "micro-batches": Pair(SMALL_MICRO_BATCHES, None),
    "micro-batches with dropout": Pair(SMALL_MICRO_BATCHES, None, both={"dropout": 0.1}),
    "seed": Pair({"seed": 7}, "seed", "examples", 1),
    "seed of a split": Pair({"seed": 7}, "seed", "examples", 1, both={"validation_file": None}),
    "learning rate": Pair({"learning_rate": 2e-3}, "learning_rate", "rate", 1),
    "schedule": Pair({"lr_scheduler_type": "constant"}, "lr_scheduler_type", "rate", 2),
    "steps": Pair({"max_train_steps": 3}, "max_train_steps", "rate", 2),
    "steps of a constant rate": Pair(
        {"max_train_steps": 3}, "max_train_steps", "length", 4, both={"lr_scheduler_type": "constant"}
    ),
    "batch size": Pair({"train_batch_size": 8}, "train_batch_size", "examples", 1),
    "longer texts": Pair({"max_length": 8}, "max_length", "examples", both={"length_window": 1}),
    "a row": Pair(change_row, "content of train_file", "examples", 4, tolerance="0"),
    "a label": Pair(change_label, "content of train_file", "examples", 4),
    "order of rows": Pair(reverse_rows, "order of its examples of train_file", "examples"),
    "validation rows": Pair(change_validation, "content of validation_file", "evaluation", STEPS),
    "rows held out": Pair({"validation_file": None}, "validation_file", "examples", 1),
    "weights": Pair(change_weights, "weights", "forward", 1),
    "dropout": Pair({"dropout": 0.1}, "dropout", "forward", 1),
    "precision": Pair(
        {"mixed_precision": "bf16", "allow_slow_bf16": True}, "mixed_precision", "forward", 1, both={"seed": 3}
    ),
    "decay": Pair({"weight_decay": 10.0}, "weight_decay", "later"),
    "clipping": Pair({"max_grad_norm": 0.01}, "max_grad_norm", "later"),
    "frozen": Pair({"freeze": ["*.embeddings.*"]}, "freeze", "later", 1),
    "a task's own key": Pair({"label_smoothing_factor": 0.1}, "label_smoothing_factor", "forward", 1),
    "masks by process": Pair(
        SMALL_MICRO_BATCHES, "per_device_batch_size", "forward", 1, both={"dropout": 0.1, "dropout_masks": "torch"}
    ),
    "rate beside micro-batches": Pair(
        {"learning_rate": 2e-3, **SMALL_MICRO_BATCHES}, "learning_rate", "rate", 1, others=("per_device_batch_size",)
    ),
    "decay beside micro-batches": Pair(
        {**SMALL_MICRO_BATCHES, "weight_decay": 10.0}, "weight_decay", "later", others=("per_device_batch_size",)
    ),
    "weights beside the rate": Pair(change_weights_and_rate, "weights", "forward", 1, others=("learning_rate",)),
    "seed beside the rate": Pair(
        {"learning_rate": 2e-3, "seed": 7}, "seed", "examples", 1, others=("learning_rate",)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def settings(tiny_model: Path, news: Path) -> Settings:
    return {
        "model_name_or_path": str(tiny_model),
        "train_file": str(news / "train.jsonl"),
        "validation_file": str(news / "validation.jsonl"),
        **TINY,
        "max_train_steps": STEPS,
        "eval_steps": STEPS,
    }


def train_once(train: Train, settings: Settings, output: Path) -> Path:
    """Several pairs share their first run."""
    if not output.exists():
        run = train({"output_dir": str(output), **{key: value for key, value in settings.items() if value is not None}})
        assert run.exit_code == 0, run.stderr
    return output


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any]:
    capsys.readouterr()
    exit_code = run_command_line(["compare", *map(str, words), "--json"])
    return exit_code, json.loads(capsys.readouterr().out)


# What another pair shows too.
SLOW = {
    "micro-batches", "seed of a split", "schedule", "steps", "batch size", "a row", "clipping", "frozen", "seed beside the rate",
    "rate beside micro-batches", "decay", "copied files", "rows held out",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PAIRS])
def test_the_true_cause_is_named_first(
    name: str, train: Train, settings: Settings, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = PAIRS[name]
    settings |= pair.both
    first = train_once(train, settings, folder / ("_".join(map(str, pair.both.items())) or "base"))
    changes = pair.changes if isinstance(pair.changes, dict) else pair.changes(settings, tmp_path)
    second = train_once(train, settings | changes, tmp_path / "second")
    for runs in ((first, second), (second, first)):
        exit_code, found = ask(capsys, *runs, "--assert", pair.tolerance)
        assert found["agree"] == (pair.cause is None) == (exit_code == 0), found
        if pair.cause is None:
            assert found["examples"] == {"steps_recorded": STEPS, "first_other": None}
            continue
        assert exit_code == 1
        names = [each["name"] for each in found["differences"]]
        assert (names[0], found["differences"][0]["explains"]) == (pair.cause, pair.explains), found
        assert set(pair.others) <= set(names[1:])
        assert pair.step in (None, found["parting"]["step"]), found["parting"]
        if pair.explains == "examples":
            assert found["examples"]["first_other"] <= found["parting"]["step"]
        else:
            assert found["examples"]["first_other"] is None


@pytest.mark.slow
def test_another_topology_agrees_and_is_not_blamed(
    train: Train, launch: Launch, settings: Settings, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"dropout": 0.1}
    one = train_once(train, settings, folder / "with dropout")
    two = launch(settings | {"output_dir": str(tmp_path / "two")}, "multi_cpu", 2)
    assert two.exit_code == 0, two.stderr
    exit_code, found = ask(capsys, one, two.path, "--assert", "1e-5")
    assert exit_code == 0
    assert found["examples"] == {"steps_recorded": STEPS, "first_other": None}
    assert "strategy" in [each["name"] for each in found["differences"]]
    other = launch(settings | {"output_dir": str(tmp_path / "other"), "weight_decay": 10.0}, "multi_cpu", 2)
    exit_code, found = ask(capsys, one, other.path, "--assert", "1e-5")
    assert exit_code == 1
    assert found["differences"][0]["name"] == "weight_decay"
    assert {"topology"} == {each["category"] for each in found["differences"][1:]}


def test_a_resumed_run_has_the_digests_of_one_that_was_not_stopped(
    train: Train, settings: Settings, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train_once(train, settings, folder / "base")
    resumed = stop_and_resume(train, settings | {"output_dir": str(tmp_path / "resumed")}, tmp_path)
    exit_code, found = ask(capsys, first, resumed.path, "--assert", "0")
    assert exit_code == 0
    assert found["examples"] == {"steps_recorded": STEPS, "first_other": None}
    (difference,) = found["differences"]
    assert difference["name"] == "restarts after steps"
    assert difference["values"][0] == []
    assert 1 <= difference["values"][1][0] < STEPS


# Run directories as they lie -----------------------------------------------------------------------------------------


def rewrite(run: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change each line of a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    for line in lines:
        change(line)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def drift(line: dict[str, Any]) -> None:
    """Rounding that grows."""
    if line["event"] == "train":
        line["loss"] *= 1 + 1e-7 * 2 ** line["step"]


def set_environment(run: Path, **values: Any) -> Path:
    path = run / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return run


@pytest.mark.parametrize(
    ("environments", "cause"),
    [
        (({"packages": {"torch": "2.1"}}, {"packages": {"torch": "2.2"}}), ("versions", "torch")),
        (({"topology": {"device_name": "A100"}}, {"topology": {"device_name": "H100"}}), ("device", "device_name")),
        (({"topology": {"strategy": "DDP"}}, {"topology": {"strategy": "FSDP2"}}), ("topology", "strategy")),
        (
            ({"git_revision": "a"}, {"git_revision": "b", "topology": {"strategy": "FSDP2"}}),
            ("versions", "git_revision"),
        ),
    ],
)
def test_rounding_that_grows_is_laid_to_what_rounds(
    environments: tuple[dict[str, Any], dict[str, Any]],
    cause: tuple[str, str],
    write_run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [set_environment(write_run(name), **values) for name, values in zip("ab", environments, strict=True)]
    rewrite(runs[1], drift)
    exit_code, found = ask(capsys, *runs, "--assert", "1e-5")
    assert exit_code == 1
    assert found["parting"]["step"] == 7, "1e-7 x 2^7 is the first above 1e-5"
    assert found["signs"] == ["later"]
    assert (found["differences"][0]["category"], found["differences"][0]["name"]) == cause


def test_a_start_in_another_environment_is_suspected_from_its_step_on(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write_run("a"), write_run("b")
    (second / "environments").mkdir()
    for run in (first, second):
        set_environment(run, start_step=0, packages={"torch": "2.1"})
    (second / "environment.json").rename(second / "environments" / "start_0001.json")
    (second / "environment.json").write_text(json.dumps({"start_step": 4, "packages": {"torch": "2.2"}}))

    def change(line: dict[str, Any]) -> None:
        line["loss"] = line.get("loss", 0) * (2 if line["step"] > 10 else 1)

    rewrite(second, change)
    _, found = ask(capsys, first, second, "--assert", "1e-5")
    assert found["parting"]["step"] == 11
    assert [(each["name"], each["from_step"]) for each in found["differences"]] == [
        ("torch", 5),
        ("restarts after steps", 5),
    ]


def test_a_run_of_an_earlier_version_has_no_digests(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What its recipe says is compared, paths too; that other examples were seen shows in how many tokens they had."""
    first = write_run("a", train_file=["a.csv"], weight_decay=0.0)
    second = write_run("b", train_file=["b.csv"], weight_decay=0.1)
    rewrite(second, lambda line: line.update(loss=line.get("loss", 0) * 2, tokens=101 if line["step"] > 3 else 100))
    exit_code, found = ask(capsys, first, second, "--assert", "1e-5")
    assert exit_code == 1
    assert found["examples"] == {"steps_recorded": 0, "first_other": 4}
    assert found["parting"]["step"] == 1
    assert [each["name"] for each in found["differences"]] == ["train_file", "weight_decay"]


def test_a_run_that_ends_before_the_other_does_not_pass(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write_run("a"), write_run("b", state="failed")
    lines = (second / "metrics.jsonl").read_text().splitlines(keepends=True)
    (second / "metrics.jsonl").write_text("".join(lines[:12]))
    exit_code, found = ask(capsys, first, second, "--assert", "1e-5")
    assert exit_code == 1
    assert (found["parting"]["quantity"], found["parting"]["step"], found["parting"]["values"]) == (
        "steps",
        13,
        [20, 12],
    )
    assert found["states"] == ["finished", "failed"]


def test_runs_that_differ_in_nothing_that_is_recorded(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write_run("a"), rewrite(write_run("b"), drift)
    exit_code = run_command_line(["compare", str(first), str(second), "--assert", "1e-5"])
    assert exit_code == 1
    assert names(capsys.readouterr().out, "step 7", "deterministic")


def test_a_metric_that_differs_beside_an_equal_loss_is_told_and_does_not_fail(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    second = rewrite(
        write_run("b"), lambda line: line.update({"eval_accuracy": 0.7} if line["event"] == "eval" else {})
    )
    exit_code, found = ask(capsys, write_run("a"), second, "--assert", "1e-5")
    assert exit_code == 0
    assert found["other_metrics"] == [[10, "eval_accuracy", [0.9, 0.7]], [20, "eval_accuracy", [0.8, 0.7]]]


@pytest.mark.parametrize(
    "words", [("a", "b", "--assert", "-1"), ("a", "b", "--assert", "nan"), ("a", "b", "a", "--assert", "1")]
)
def test_a_tolerance_that_is_none_is_refused(
    words: tuple[str, ...], write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("a"), write_run("b")
    arguments = [str(tmp_path / word) if word in "ab" else word for word in words]
    assert run_command_line(["compare", *arguments]) == 2
    assert names(capsys.readouterr().err, "--assert", words[-1], "1e-5")


def test_a_run_without_a_step_is_refused(write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    second = write_run("b")
    (second / "metrics.jsonl").unlink()
    assert run_command_line(["compare", str(write_run("a")), str(second), "--assert", "1e-5"]) == 2
    assert names(capsys.readouterr().err, str(second), "steps 1 to 20")


def test_every_key_with_an_effect_of_its_own_exists() -> None:
    assert set(_EFFECTS) <= set(Recipe.model_fields)
