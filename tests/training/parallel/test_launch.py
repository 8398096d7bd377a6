"""A launch that went wrong is refused before any other work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onecurve.training import launch_protocol
from onecurve.training.config import Recipe
from onecurve.training.errors import BadInput, WrongDevice
from onecurve.training.parallel.launch import Launch, check_launch
from tests.messages import naming
from tools.jobs import Job, write_script


def build_recipe(**settings: Any) -> Recipe:
    return Recipe(model_name_or_path="m", train_file=("t",), **settings)


def find(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(Launch, "find_device_type", lambda launch: device)


@pytest.mark.parametrize(("expected", "found"), [("cuda", "cpu"), ("mps", "cpu"), ("cpu", "cuda"), ("cuda", "xpu")])
def test_another_device_than_the_launcher_chose_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, expected: str, found: str
) -> None:
    find(monkeypatch, found)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv(launch_protocol.DEVICE_KIND, expected)
    with pytest.raises(WrongDevice, match=naming("rank 3", expected, found, "--topology cpu")) as caught:
        check_launch(build_recipe())
    assert (caught.value.exit_code, caught.value.is_of_one_rank) == (2, True)


@pytest.mark.parametrize("expected", [None, "cuda"])
def test_the_device_that_was_chosen_for_is_taken(monkeypatch: pytest.MonkeyPatch, expected: str | None) -> None:
    find(monkeypatch, "cuda" if expected else "cpu")
    monkeypatch.delenv(launch_protocol.DEVICE_KIND, raising=False)
    if expected:
        monkeypatch.setenv(launch_protocol.DEVICE_KIND, expected)
    check_launch(build_recipe())


@pytest.mark.parametrize(
    ("device", "settings", "is_refused"),
    [
        ("mps", {}, True),
        ("mps", {"dropout": 0.1}, True),
        ("mps", {"dropout": 0.0}, False),
        ("mps", {"dropout": 0.0, "lora_dropout": 0.1}, False),
        ("mps", {"dropout": 0.0, "adapter": "lora", "lora_dropout": 0.1}, True),
        ("mps", {"gradient_checkpointing": False}, False),
        ("cpu", {}, False),
        ("cuda", {}, False),
    ],
)
def test_an_apple_gpu_recomputes_no_dropout(
    monkeypatch: pytest.MonkeyPatch, device: str, settings: dict[str, Any], is_refused: bool
) -> None:
    find(monkeypatch, device)
    recipe = build_recipe(**{"gradient_checkpointing": True, **settings})
    if not is_refused:
        check_launch(recipe)
        return
    with pytest.raises(BadInput, match=naming("gradient_checkpointing", "dropout: 0")):
        check_launch(recipe)


LATE = """
import signal

build = building.build_accelerator

def build_late(*arguments):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return build(*arguments)

building.build_accelerator = build_late
"""


@pytest.mark.slow
def test_ranks_that_do_not_find_each_other_end_and_say_what_to_check(recipe: dict[str, Any], tmp_path: Path) -> None:
    # Rank 1 is not watched either, as if its machine had died.
    script = write_script(tmp_path / "late.py", LATE)
    job = Job({**recipe, "join_timeout_seconds": 2}, "multi_cpu", 2, script=script)
    try:
        job.wait_until(lambda: "join_timeout_seconds" in job.output, seconds=120)
    finally:
        job.kill()
    (line,) = [line for line in job.output.splitlines() if "join_timeout_seconds" in line]
    for word in ("1 of 2 ranks", "rank 1 did not", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        assert word in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
