"""Packages: installed, in compatible versions, and a PyTorch built for the devices."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from onecurve.launcher.facts.machine import Machine
from onecurve.launcher.planning.topology import Topology
from onecurve.launcher.preflight.findings import Finding, error

if TYPE_CHECKING:
    from onecurve.training.config import Recipe

# Oldest driver branch for each major release of CUDA (NVIDIA, "CUDA Compatibility", minor version compatibility).
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}


def check_packages(recipe: Recipe, topology: Topology, machine: Machine) -> list[Finding]:
    """Whether the packages that the recipe and the topology need are installed."""
    findings = []
    if topology.strategy.startswith("ZeRO"):
        if importlib.util.find_spec("deepspeed") is None:
            findings.append(error(f"{topology.name} needs DeepSpeed: pip install 'onecurve[deepspeed]'"))
        elif topology.strategy.endswith("offload") and shutil.which("g++") is None:
            findings.append(
                error(
                    f"{topology.name} compiles DeepSpeed's Adam for the host, but there is no g++: install a C++ compiler"
                )
            )
    if recipe.report_to != "none" and importlib.util.find_spec(recipe.report_to) is None:
        findings.append(error(f"report_to: {recipe.report_to} is not installed: pip install {recipe.report_to}"))
    flash = recipe.attn_implementation or ""
    if flash.startswith("flash_attention"):
        if machine.kind != "cuda" or topology.uses_cpu:
            findings.append(error(f"attn_implementation: {flash} needs an NVIDIA GPU; use sdpa"))
        elif flash == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            findings.append(
                error("attn_implementation: flash_attention_2 needs the package flash-attn: install it, or use sdpa")
            )
    return findings


def check_torch(machine: Machine) -> list[Finding]:
    """Whether PyTorch was built for these GPUs and their driver; read from its files, without importing it."""
    spec = importlib.util.find_spec("torch")
    if machine.kind != "cuda" or spec is None or spec.origin is None:
        return []
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b.*= '(\d+)(\.\d+)?'", text, re.MULTILINE)
    if match is None:
        version = importlib.metadata.version("torch")
        return [error(f"PyTorch {version} is built without CUDA and can't use the GPUs: install a CUDA build")]
    oldest = _OLDEST_DRIVER.get(match[1], 0)
    driver = machine.devices[0].driver_version
    if driver and driver < oldest:
        return [
            error(
                f"PyTorch for CUDA {match[1]} needs NVIDIA driver {oldest} or newer, {driver} is installed: update it"
            )
        ]
    return []


def check_versions() -> list[Finding]:
    """Whether the installed versions meet the requirements of the main packages."""
    from packaging.requirements import InvalidRequirement, Requirement

    findings = []
    for package in ("onecurve", "accelerate", "transformers", "datasets"):
        try:
            lines = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            findings.append(error(f"{package} is not installed in this environment: pip install {package}"))
            continue
        for line in lines:
            try:
                requirement = Requirement(line)
                if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                    continue
                version = importlib.metadata.version(requirement.name)
            except InvalidRequirement:
                continue
            except importlib.metadata.PackageNotFoundError:
                findings.append(
                    error(f"{package} needs {requirement.name}, which is not installed: pip install '{requirement}'")
                )
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                findings.append(
                    error(f"{package} needs {requirement}, but {version} is installed: pip install '{requirement}'")
                )
    return findings
