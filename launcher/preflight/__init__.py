"""Finds problems before a training starts and holds a device: all at once, errors first, each with its fix.

One module per subject; `check_recipe` and `check_machine` run them all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onecurve.launcher.facts.machine import Machine
from onecurve.launcher.planning.configs import find_configs
from onecurve.launcher.planning.topology import Topology
from onecurve.launcher.preflight.accelerate_yaml import check_yaml
from onecurve.launcher.preflight.data import check_data
from onecurve.launcher.preflight.devices import check_devices, check_launch, check_memory, check_port, check_processes
from onecurve.launcher.preflight.dropout import check_dropout
from onecurve.launcher.preflight.findings import Finding
from onecurve.launcher.preflight.hub import check_hub, check_reachability
from onecurve.launcher.preflight.model import check_model, describe_model
from onecurve.launcher.preflight.output import check_disk, check_folders, check_output
from onecurve.launcher.preflight.packages import check_packages, check_torch, check_versions

if TYPE_CHECKING:
    from onecurve.training.config import Recipe

__all__ = ["Finding", "check_inputs", "check_machine", "check_recipe", "describe_model"]


def check_recipe(
    recipe: Recipe, topology: Topology | None, machine: Machine, is_evaluation: bool = False
) -> list[Finding]:
    """Problems of a recipe on a topology on this machine, errors first; without a topology, checks that need one are skipped.

    Args:
        is_evaluation: nothing is trained (--eval_only): the run that is evaluated may differ, as in its test_file.
    """
    shape, findings = check_model(recipe)
    findings += check_data(recipe)
    findings += check_hub(recipe)
    findings += check_output(recipe, is_evaluation)
    findings += check_folders(recipe)
    findings += check_versions()
    if shape is not None:
        findings += check_disk(recipe, shape)
    if topology is not None:
        findings += check_yaml(topology.path)
        findings += check_packages(recipe, topology, machine)
        findings += check_processes(recipe, topology, machine)
        findings += check_launch(topology, machine)
        if not topology.uses_cpu:
            findings += check_torch(machine)
            findings += check_devices(machine, topology.num_local_processes)
        if shape is not None:
            findings += check_memory(recipe, topology, machine, shape)
            findings += check_dropout(recipe, topology, shape)
    return sorted(findings, key=lambda finding: finding.severity)


def check_inputs(recipe: Recipe) -> list[Finding]:
    """Problems that do not depend on the machine: of the model, the data, the run directory. Errors first."""
    findings = [*check_model(recipe)[1], *check_data(recipe), *check_hub(recipe), *check_output(recipe)]
    return sorted(findings, key=lambda finding: finding.severity)


def check_machine(root: Path, machine: Machine) -> list[Finding]:
    """Problems of this machine and this installation, without a recipe."""
    findings = check_versions()
    findings += check_torch(machine)
    for path in find_configs(root).values():
        findings += check_yaml(path)
    findings += check_devices(machine, len(machine.devices))
    findings += check_port()
    findings += check_folders()
    findings += check_reachability()
    return sorted(findings, key=lambda finding: finding.severity)
