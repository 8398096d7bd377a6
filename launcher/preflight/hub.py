"""Models and data sets that are not local paths: are they in the hub's cache, or can they be downloaded?

The hub is asked only for what is not in the cache, and only for its description.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub import constants

from onecurve.launcher.preflight.findings import Finding, error, warning

if TYPE_CHECKING:
    from onecurve.training.config import Recipe

_TIMEOUT_SECONDS = 5.0
_WITHOUT_NETWORK = "run `onecurve fetch` on a machine with a network, then set HF_HUB_OFFLINE=1; or give a folder"


def check_hub(recipe: Recipe) -> list[Finding]:
    """Which of model, tokenizer and data set are neither on this machine nor on the hub."""
    findings = []
    named: list[tuple[str, Literal["model", "dataset"], str | None]] = [
        ("model_name_or_path", "model", recipe.model_name_or_path),
        ("tokenizer_name", "model", recipe.tokenizer_name),
        ("dataset_name", "dataset", recipe.dataset_name),
    ]
    for key, kind, name in named:
        if name is None or Path(name).exists():
            continue
        if looks_like_path(name):
            if key != "model_name_or_path":  # model.py checks the model's folder.
                findings.append(error(f"{key}: {name!r} does not exist"))
            continue
        # model_revision is the model's; a tokenizer in another repository has other revisions.
        revision = None if kind == "dataset" else recipe.model_revision if name == recipe.model_name_or_path else "main"
        if not _is_cached(key, kind, name, revision):
            findings += _ask(key, kind, name, revision if key == "model_name_or_path" else None)
    return findings


def check_reachability() -> list[Finding]:
    """Whether the hub can be reached, unless HF_HUB_OFFLINE is set."""
    if constants.HF_HUB_OFFLINE:
        return []
    from huggingface_hub import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
    except Exception as problem:  # The HTTP library, and so its errors, changes with huggingface_hub's version.
        return [
            warning(
                f"the hub can't be reached ({problem}): recipes need local or cached models and data; set HF_HUB_OFFLINE=1 "
                "to skip the attempts"
            )
        ]
    return []


def looks_like_path(name: str) -> bool:
    """Whether a name that is not a file on this machine can't be a name on the hub either."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _is_cached(key: str, kind: Literal["model", "dataset"], name: str, revision: str | None) -> bool:
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    snapshot = "*" if revision is None else _find_commit(folder, revision)
    files = [path.name for path in folder.glob(f"snapshots/{snapshot}/*")]
    if key == "model_name_or_path":  # Only a config is cached after the model was inspected.
        return any(name.endswith((".safetensors", ".bin")) for name in files)
    if files:
        return True
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    return kind == "dataset" and (prepared / name.replace("/", "___")).exists()


def _find_commit(folder: Path, revision: str) -> str:
    """The commit of a branch or tag when it was downloaded; a commit itself is returned as it is."""
    try:
        return (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:
        return revision


def _ask(key: str, kind: Literal["model", "dataset"], name: str, revision: str | None) -> list[Finding]:
    at = f" at revision {revision!r}" if revision not in (None, "main") else ""
    if constants.HF_HUB_OFFLINE:
        return [
            error(
                f"{key}: {name!r}{at} is not in the hub's cache and HF_HUB_OFFLINE is set; run `onecurve fetch` on a machine "
                "with a network, or give a folder"
            )
        ]
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_SECONDS)
    except HFValidationError:
        return [error(f"{key}: {name!r} is neither a local folder nor a valid name on the hub")]
    except RevisionNotFoundError:
        return [error(f"model_revision: {revision!r} is not a branch, tag or commit of {name!r}")]
    except RepositoryNotFoundError:
        return [error(f"{key}: the hub has no {kind} {name!r}, or it is private: log in with `hf auth login`")]
    except HfHubHTTPError as problem:
        return [warning(f"{key}: the hub could not describe {name!r}: {problem}")]
    except Exception as problem:  # The HTTP library, and so its errors, changes with huggingface_hub's version.
        return [
            error(
                f"{key}: {name!r} is not on this machine and the hub can't be reached ({problem}); {_WITHOUT_NETWORK}"
            )
        ]
    if found.gated and get_token() is None:
        return [error(f"{key}: {name!r} is gated: accept its terms on the hub, then log in with `hf auth login`")]
    return [warning(f"{key}: {name!r} is not on this machine and will be downloaded from the hub at the start")]
