"""The memory that a process may still take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onecurve.training.recovery import host_memory


def test_memory_is_what_the_machine_and_each_control_group_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    assert host_memory._measure_group(group) == sys.maxsize
    for folder, limit in ((group, "max"), (group.parent, "1000000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("400000\n")
        (folder / "memory.stat").write_text("anon 300000\nactive_file 20000\ninactive_file 30000\n")
    assert host_memory._measure_group(group) == sys.maxsize
    assert host_memory._measure_group(group.parent) == 650_000
    monkeypatch.setattr(host_memory, "_find_own_group", lambda: (group, tmp_path))
    assert host_memory.measure_available_memory() == 650_000
