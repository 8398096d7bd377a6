"""Launches of the server end as real ones do, and are served although this process has trained meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Launch, Run
from tools.launches import LaunchServer, build_environment


def test_launches_are_served_after_a_training_in_this_process(
    recipe: dict[str, Any], train: Callable[[dict[str, Any]], Run], launch_server: LaunchServer
) -> None:
    assert train({**recipe, "max_train_steps": 1}).exit_code == 0
    assert launch_server.serves(build_environment({"ONECURVE_CACHE": "elsewhere"}))
    assert not launch_server.serves(build_environment({"HF_HUB_OFFLINE": "0"})), "it is read at import"


def test_a_variable_that_a_package_sets_is_taken_back(launch_server: LaunchServer) -> None:
    os.environ["TRITON_CACHE_DIR"] = "somewhere"  # As torch's compiler does.
    assert not launch_server.serves(build_environment())
    launch_server.restore_variables()
    assert "TRITON_CACHE_DIR" not in os.environ
    assert launch_server.serves(build_environment())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"learning_rate": -1.0}, {"learning_rate": 1e30, "max_grad_norm": 0.0}], ids=str)
def test_a_forked_launch_fails_as_a_real_one(recipe: dict[str, Any], launch: Launch, settings: dict[str, Any]) -> None:
    forked, real = (launch({**recipe, **settings}, "multi_cpu", 2, is_real=is_real) for is_real in (False, True))
    assert (forked.exit_code, real.exit_code) == (1, 1)

    def pick(stderr: str) -> list[str]:
        return [line for line in stderr.splitlines() if line.startswith("onecurve:")]

    assert pick(forked.stderr) == pick(real.stderr) != []
