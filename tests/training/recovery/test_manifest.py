"""A checkpoint is intact, or its fault is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from onecurve.training.recovery import manifest
from onecurve.training.recovery.checkpoints import find_checkpoint
from onecurve.training.recovery.manifest import find_fault
from tests import messages
from tests.training.recovery.conftest import make_checkpoint


def test_an_intact_checkpoint_has_no_fault(tmp_path: Path) -> None:
    assert find_fault(make_checkpoint(tmp_path)) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = make_checkpoint(tmp_path)
    (path / name).unlink()
    assert messages.names(find_fault(path), name)


@pytest.mark.parametrize(("keep", "found"), [(0, 0), (2047, 2047), (2048, 2049)])
def test_a_truncated_or_longer_file_is_named(tmp_path: Path, keep: int, found: int) -> None:
    path = make_checkpoint(tmp_path)
    content = (path / "model.safetensors").read_bytes()[:keep]
    (path / "model.safetensors").write_bytes(content if found == keep else content + b"x")
    assert messages.names(find_fault(path), "model.safetensors", f"{found} bytes", "2048")


@pytest.mark.parametrize("position", [0, 1000, 2047])
def test_one_flipped_bit_is_found(tmp_path: Path, position: int) -> None:
    path = make_checkpoint(tmp_path)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[position] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert messages.names(find_fault(path), "model.safetensors", "checksum")


@pytest.mark.parametrize("number", [1, 2])
def test_checksums_of_earlier_formats_are_compared(tmp_path: Path, number: int) -> None:
    path = make_checkpoint(tmp_path)
    files = {
        name: {"bytes": each["bytes"], "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name, each in json.loads((path / "manifest.json").read_text())["files"].items()
    }
    (path / "manifest.json").write_text(json.dumps({"format": number, "files": files}))
    assert find_fault(path) is None
    content = bytearray((path / "model.safetensors").read_bytes())
    content[7] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert messages.names(find_fault(path), "model.safetensors", "checksum")


@pytest.mark.parametrize("kind", [None, "crc32"])
def test_a_file_without_a_known_checksum_is_not_intact(tmp_path: Path, kind: str | None) -> None:
    path = make_checkpoint(tmp_path)
    content = json.loads((path / "manifest.json").read_text())
    size = content["files"]["model.safetensors"]["bytes"]
    content["files"]["model.safetensors"] = {"bytes": size} if kind is None else {"bytes": size, kind: "0"}
    (path / "manifest.json").write_text(json.dumps(content))
    assert messages.names(find_fault(path), "model.safetensors", "checksum")


def test_without_a_manifest_it_was_never_finished(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "manifest.json").unlink()
    assert messages.names(find_fault(path), "manifest.json")
    assert messages.names(find_fault(tmp_path / "nowhere"), "manifest.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"files": 3}',
        b'{"files": {"model.safetensors": {}, "optimizer.safetensors": {}, "progress.json": {}}}',
        b"\xff",
    ],
)
def test_an_invalid_manifest_is_a_fault(tmp_path: Path, content: bytes) -> None:
    path = make_checkpoint(tmp_path)
    (path / "manifest.json").write_bytes(content)
    assert messages.names(find_fault(path), "manifest.json")


def test_a_manifest_without_the_weights_is_a_fault(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "manifest.json").write_text('{"format": 1, "files": {}}')
    assert find_fault(path) is not None


@pytest.mark.parametrize("rank", [0, 3])
def test_only_rank_0_reads_the_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    make_checkpoint(tmp_path)
    monkeypatch.setenv("RANK", str(rank))
    read: list[str] = []
    describe = manifest.describe_file

    def note(path: Path, kind: str) -> dict[str, Any]:
        read.append(path.name)
        return describe(path, kind)

    monkeypatch.setattr(manifest, "describe_file", note)
    found, faults = find_checkpoint(tmp_path)
    assert (found, faults) == (tmp_path / "step_00000005", {})
    assert bool(read) == (rank == 0)
