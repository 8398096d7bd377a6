"""A login node fetches, a compute node without a network trains; the hub is a server of this machine that speaks its protocol."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.messages import names

_NAME = "some-team/tiny-bert"
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[str]:
    """The address of a hub with one model."""
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    files["pytorch_model.bin"] = b"pickled weights, which nobody asked for"

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            body, kind = None, "application/json"
            if path in (f"/api/models/{_NAME}", f"/api/models/{_NAME}/revision/main"):
                siblings = [{"rfilename": name} for name in files]
                body = json.dumps(
                    {"id": _NAME, "modelId": _NAME, "sha": _COMMIT, "siblings": siblings, "tags": []}
                ).encode()
            elif path.startswith((f"/api/models/{_NAME}/tree/main", f"/api/models/{_NAME}/tree/{_COMMIT}")):
                rows = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                body = json.dumps(rows).encode()
            elif path.startswith(f"/{_NAME}/resolve/") and path.rpartition("/")[2] in files:
                body, kind = files[path.rpartition("/")[2]], "application/octet-stream"
            self.send_response(404 if body is None else 200)
            body = body or b"{}"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", _COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def onecurve(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line with caches of its own."""

    def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        caches = {
            "HF_HOME": str(tmp_path / "hub"),
            "ONECURVE_CACHE": str(tmp_path / "prepared"),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, "-m", "onecurve", *map(str, words)],
            cwd=ROOT,
            env={**os.environ, **caches, **variables},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.mark.slow
def test_what_was_fetched_trains_without_a_network(
    onecurve: Callable[..., subprocess.CompletedProcess[str]], recipe: dict[str, Any], hub: str, tmp_path: Path
) -> None:
    path = tmp_path / "hub.yaml"
    path.write_text(yaml.safe_dump({**recipe, "model_name_or_path": _NAME}), encoding="utf-8")
    before = onecurve("run", path, HF_HUB_OFFLINE="1")
    assert before.returncode == 2
    assert names(before.stderr, "model_name_or_path", "HF_HUB_OFFLINE", "onecurve fetch")

    # The variable that jobs are told by does not hold fetch back.
    fetched = onecurve("fetch", path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert fetched.returncode == 0, fetched.stderr
    assert f"model_name_or_path: {_NAME} is in" in fetched.stdout
    assert "train: 203 rows" in fetched.stdout
    assert not list((tmp_path / "hub").rglob("*.bin"))

    # An address where nobody answers: whatever asks the network fails.
    trained = onecurve("run", path, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))["state"] == "finished"


@pytest.mark.slow
def test_what_can_not_be_fetched_is_told(
    onecurve: Callable[..., subprocess.CompletedProcess[str]], recipe: dict[str, Any], hub: str, tmp_path: Path
) -> None:
    path = tmp_path / "hub.yaml"
    path.write_text(yaml.safe_dump({**recipe, "model_name_or_path": "some-team/other"}), encoding="utf-8")
    missing = onecurve("fetch", path, HF_ENDPOINT=hub)
    assert missing.returncode == 2
    assert names(missing.stderr, "model_name_or_path", "'some-team/other'")
    assert "Traceback" not in missing.stderr
    assert not (tmp_path / "run").exists()
