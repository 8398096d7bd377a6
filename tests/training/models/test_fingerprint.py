"""Digests of a model's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onecurve.training.models import fingerprint
from onecurve.training.models.fingerprint import digest_files, fingerprint_model
from tests.training.conftest import resolve

BLOCK = 2**20


def write_model(folder: Path, weights: bytes = b"w" * 10, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, **config}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def identify(folder: Path) -> dict[str, str]:
    return fingerprint_model(resolve(folder / "run", model_name_or_path=str(folder)).recipe)


def test_a_model_is_known_by_its_content(tmp_path: Path) -> None:
    model = identify(write_model(tmp_path / "a"))
    assert model["weights_read"] == "all"
    assert model == identify(write_model(tmp_path / "b", transformers_version="5.0", _name_or_path="x"))
    other = identify(write_model(tmp_path / "c", hidden_size=9))
    assert (model["config"] != other["config"], model["weights"] == other["weights"]) == (True, True)
    other = identify(write_model(tmp_path / "d", weights=b"w" * 9 + b"v"))
    assert (model["config"] == other["config"], model["weights"] != other["weights"]) == (True, True)


def test_of_large_weights_blocks_are_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(5 * BLOCK + 10)
    path = tmp_path / "weights"

    def digest(changed: int) -> str:
        path.write_bytes(content[:changed] + b"x" + content[changed + 1 :])
        return digest_files([path], most_bytes=2 * BLOCK)

    path.write_bytes(content)
    whole = digest_files([path], most_bytes=2 * BLOCK)
    assert digest(0) != whole
    assert digest(len(content) - 1) != whole
    assert digest(2 * BLOCK) == whole, "between blocks nothing is read"
    monkeypatch.setattr(fingerprint, "MOST_BYTES", 4)
    assert identify(write_model(tmp_path / "a"))["weights_read"] == "a sample"
