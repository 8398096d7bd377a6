"""Sizes of accelerate's parallelism_config: check and the start refuse the same ones, with one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from onecurve.launcher.preflight.accelerate_yaml import check_yaml
from onecurve.training.errors import WrongTopology
from onecurve.training.parallel.launch import check_processes
from onecurve.training.parallel_sizes import SIZES, find_problem
from tests.conftest import ROOT
from tests.messages import names, naming

REFUSED = [
    ({"tp_size": 2, "dp_shard_size": 2}, 4, ("tp_size", "docs/topologies.md", "hsdp.yaml")),
    ({"cp_size": 2}, 2, ("cp_size", "docs/topologies.md")),
    ({"sp_size": 2, "dp_shard_size": 2}, 4, ("sp_size", "docs/topologies.md")),
    ({"dp_replicate_size": 4}, 4, ("dp_shard_size", "multi_node.yaml")),
    (
        {"dp_replicate_size": 2, "dp_shard_size": 8},
        32,
        ("16", "32", "--parallelism_config_dp_replicate_size 4", "--parallelism_config_dp_shard_size 8"),
    ),
    (
        {"dp_replicate_size": 2, "dp_shard_size": 8},
        4,
        ("--parallelism_config_dp_replicate_size 1", "--parallelism_config_dp_shard_size 4"),
    ),
]


@pytest.mark.parametrize(("sizes", "num_processes", "needed"), REFUSED)
def test_check_and_the_start_refuse_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], num_processes: int, needed: tuple[str, ...]
) -> None:
    path = tmp_path / "own.yaml"
    lines = [f"  parallelism_config_{name}: {size}" for name, size in sizes.items()]
    head = f"distributed_type: FSDP\nfsdp_config: {{fsdp_version: 2}}\nnum_processes: {num_processes}\nparallelism_config:\n"
    path.write_text(head + "\n".join(lines), encoding="utf-8")
    (finding,) = check_yaml(path)
    assert finding.severity == "error"
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for name in SIZES:
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", str(sizes.get(name, 1)))
    with pytest.raises(WrongTopology, match=naming(*needed)) as caught:
        check_processes()
    assert caught.value.exit_code == 2
    assert finding.message == f"{path}: {caught.value}"


def test_what_is_possible_is_not_refused() -> None:
    assert find_problem({"dp_replicate_size": 2, "dp_shard_size": 8}, 16) is None
    assert find_problem({"dp_shard_size": 4}, 4) is None
    assert check_yaml(ROOT / "accelerate_configs" / "hsdp.yaml") == []


@pytest.mark.parametrize(
    ("text", "key"),
    [("[1]", "parallelism_config"), ("{parallelism_config_dp_shard_size: two}", "parallelism_config_dp_shard_size")],
)
def test_a_size_that_is_no_number_is_named(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"distributed_type: FSDP\nfsdp_config: {{fsdp_version: 2}}\nparallelism_config: {text}\n")
    assert any(names(finding.message, "own.yaml", key) for finding in check_yaml(path))


def test_sharding_needs_fsdp(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("distributed_type: MULTI_GPU\nparallelism_config: {parallelism_config_dp_shard_size: 2}\n")
    assert any(names(finding.message, "parallelism_config", "FSDP", "MULTI_GPU") for finding in check_yaml(path))
