"""The committed list of accelerate's keys is the installed accelerate's."""

from __future__ import annotations

from pathlib import Path

import pytest

from onecurve.launcher.planning.configs import find_configs
from onecurve.launcher.preflight.accelerate_yaml import check_yaml
from tests.launcher.conftest import ROOT
from tests.launcher.facts.generate_accelerate_keys import TARGET, render


def test_the_list_is_accelerates_own() -> None:
    message = "accelerate has other keys now: python -m tests.launcher.facts.generate_accelerate_keys"
    assert TARGET.read_text(encoding="utf-8") == render(), message


@pytest.mark.parametrize("path", find_configs(ROOT).values(), ids=lambda path: path.stem)
def test_every_yaml_of_the_project_passes(path: Path) -> None:
    assert check_yaml(path) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distributed_type: FSDP\nfsdp_config: {fsdp_versoin: 2}", "did you mean fsdp_version?"),
        ("distributed_type: FSDP\nfsdp_config: {}\nfsdp_conifg: {}", "fsdp_conifg: unknown key"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "takes FSDP1"),
        ("distributed_type: MULTI_CPU\nnum_processes: 2", "starts one process without a word"),
        ("distributed_type: MULTI_GPU\ndeepspeed_config: {zero_stage: 2}", "deepspeed_config is ignored"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {gradient_accumulation_steps: 4}", "belongs to the recipe"),
        ("distributed_type: MULTI_GPU\nmixed_precision: bf16", "mixed_precision is mathematics"),
        ("distributed_type: FSDP\nfsdp_config: [1]", "must be a mapping"),
        ("- a list", "must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_yaml_that_would_not_do_what_it_says_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    messages = [finding.message for finding in check_yaml(path)]
    assert any(expected in message for message in messages), messages
