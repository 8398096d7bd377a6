"""Names on the hub: found in the cache, asked for where there is a network, refused where they can't be had."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launcher.conftest import Onecurve
from tests.messages import names

_ANSWERS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "/api/models/bert/base": (200, "", {"id": "bert/base", "gated": False}),
    "/api/models/bert/gated": (200, "", {"id": "bert/gated", "gated": "manual"}),
    "/api/models/bert/base/revision/v9": (404, "RevisionNotFound", {}),
    "/api/datasets/good/reviews": (200, "", {"id": "good/reviews", "gated": False}),
    "/api/models/bert/broken": (500, "", {}),
}


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, code, content = _ANSWERS.get(
            self.path.partition("?")[0].removesuffix("/revision/main"), (404, "RepoNotFound", {})
        )
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment whose hub is a server of this test, with an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "HF_TOKEN": "",
        "no_proxy": "127.0.0.1",
    }
    server.shutdown()
    server.server_close()


def _check(onecurve: Onecurve, recipe_file: Path, environment: dict[str, str], **changed: object) -> tuple[int, str]:
    content = {**yaml.safe_load(recipe_file.read_text(encoding="utf-8")), **changed}
    recipe_file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}), encoding="utf-8")
    result = onecurve("check", recipe_file, environment=environment)
    assert "Traceback" not in result.stderr
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    ("changed", "exit_code", "needed"),
    [
        ({"model_name_or_path": "bert/base"}, 0, ("warning", "'bert/base'")),
        ({"model_name_or_path": "bert/bsae"}, 2, ("model_name_or_path", "'bert/bsae'")),
        ({"model_name_or_path": "bert/gated"}, 2, ("'bert/gated'", "gated")),
        ({"model_name_or_path": "bert/base", "model_revision": "v9"}, 2, ("'v9'", "branch", "tag", "commit")),
        ({"model_name_or_path": "bert/broken"}, 0, ("warning", "'bert/broken'")),
        ({"model_name_or_path": "be rt"}, 2, ("error", "'be rt'")),
        ({"tokenizer_name": "bert/none"}, 2, ("tokenizer_name", "'bert/none'")),
        (
            {"dataset_name": "good/reviews", "train_file": None, "validation_file": None},
            0,
            ("warning", "dataset_name", "'good/reviews'"),
        ),
    ],
)  # fmt: skip
def test_what_is_not_here_is_asked_for(
    changed: dict[str, Any],
    exit_code: int,
    needed: tuple[str, ...],
    hub: dict[str, str],
    recipe_file: Path,
    onecurve: Onecurve,
) -> None:
    code, told = _check(onecurve, recipe_file, hub, **changed)
    assert names(told, *needed)
    assert code == exit_code


def _keep(hub: dict[str, str], name: str, commit: str) -> Path:
    """A snapshot in the cache, which `main` stands for."""
    folder = Path(hub["HF_HOME"]) / "hub" / name
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit, encoding="utf-8")
    return folder / "snapshots" / commit


def test_another_revision_than_that_in_the_cache_is_missed(
    hub: dict[str, str], recipe_file: Path, tiny_model: Path, onecurve: Onecurve
) -> None:
    model, tokenizer = _keep(hub, "models--bert--one", "a1"), _keep(hub, "models--bert--words", "b2")
    shutil.copytree(tiny_model, model, dirs_exist_ok=True)
    shutil.copy(tiny_model / "tokenizer.json", tokenizer)
    offline = {**hub, "HF_HUB_OFFLINE": "1"}
    named = {"model_name_or_path": "bert/one", "tokenizer_name": "bert/words"}
    for revision, expected in (("main", 0), ("a1", 0), ("v2", 2)):
        code, told = _check(onecurve, recipe_file, offline, **named, model_revision=revision)
        assert code == expected, told
        assert "tokenizer_name" not in told, "the revision is the model's"
    assert names(told, "model_name_or_path", "'bert/one'", "'v2'", "cache")


def test_without_a_network_the_cache_decides(hub: dict[str, str], recipe_file: Path, onecurve: Onecurve) -> None:
    nowhere = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}
    code, told = _check(onecurve, recipe_file, nowhere, model_name_or_path="bert/kept")
    assert code == 2
    assert names(told, "hub", "model_name_or_path")
    assert "set HF_HUB_OFFLINE=1" in told
    snapshot = _keep(hub, "models--bert--kept", "1")
    config = {"model_type": "bert", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 1, "vocab_size": 9}
    (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code, told = _check(onecurve, recipe_file, {**nowhere, "HF_HUB_OFFLINE": "1"})
    assert code == 2, "a config without weights is not enough"
    (snapshot / "model.safetensors").touch()
    for offline in ("0", "1"):
        code, told = _check(onecurve, recipe_file, {**nowhere, "HF_HUB_OFFLINE": offline})
        assert code == 0, told


def test_the_doctor_says_whether_the_hub_answers(hub: dict[str, str], onecurve: Onecurve) -> None:
    assert "hub" not in onecurve("check", environment=hub).stdout
    assert (
        "the hub can't be reached" in onecurve("check", environment={**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}).stdout
    )
    assert "hub" not in onecurve("check", environment={"HF_HUB_OFFLINE": "1"}).stdout
