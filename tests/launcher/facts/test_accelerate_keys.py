"""The committed list of accelerate's keys is the installed accelerate's."""

from __future__ import annotations

from pathlib import Path

import pytest

from onecurve.launcher.planning.configs import find_configs
from onecurve.launcher.preflight.accelerate_yaml import check_yaml
from tests.launcher.conftest import ROOT
from tests.launcher.facts.generate_accelerate_keys import TARGET, render
from tests.messages import names


def test_the_list_is_accelerates_own() -> None:
    message = "accelerate has other keys now: python -m tests.launcher.facts.generate_accelerate_keys"
    assert TARGET.read_text(encoding="utf-8") == render(), message


@pytest.mark.parametrize("path", find_configs(ROOT).values(), ids=lambda path: path.stem)
def test_every_yaml_of_the_project_passes(path: Path) -> None:
    assert check_yaml(path) == []


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("distributed_type: FSDP\nfsdp_config: {fsdp_versoin: 2}", ("fsdp_versoin", "fsdp_version")),
        ("distributed_type: FSDP\nfsdp_config: {}\nfsdp_conifg: {}", ("fsdp_conifg", "fsdp_config")),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", ("fsdp_version", "FSDP1")),
        ("distributed_type: MULTI_CPU\nnum_processes: 2", ("MULTI_CPU", "one process")),
        ("distributed_type: MULTI_GPU\ndeepspeed_config: {zero_stage: 2}", ("deepspeed_config", "MULTI_GPU")),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config: {gradient_accumulation_steps: 4}",
            ("gradient_accumulation_steps", "recipe"),
        ),
        ("distributed_type: MULTI_GPU\nmixed_precision: bf16", ("mixed_precision", "recipe")),
        ("distributed_type: 'NO'\ndynamo_config: {dynamo_backend: INDUCTOR}", ("dynamo_backend", "torch_compile")),
        ("distributed_type: 'NO'\ndynamo_backend: EAGER", ("dynamo_backend", "torch_compile")),
        ("distributed_type: FSDP\nfsdp_config: [1]", ("fsdp_config", "mapping")),
        ("- a list", ("mapping",)),
        ("a: [", ("YAML",)),
    ],
)  # fmt: skip
def test_a_yaml_that_would_not_do_what_it_says_is_refused(text: str, needed: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    messages = [finding.message for finding in check_yaml(path)]
    assert any(names(message, *needed) for message in messages), messages


def test_a_yaml_that_compiles_nothing_passes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: 'NO'\ndynamo_config: {dynamo_backend: 'NO'}", encoding="utf-8")
    assert check_yaml(path) == []
