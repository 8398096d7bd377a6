"""Models and data sets that are no local paths: in the hub's cache, or to be had from the hub?

What is in the cache is not asked for again. Only for the rest is the hub asked, for its description alone.
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
_WITHOUT_NETWORK = (
    "`onecurve fetch` the recipe on a machine with a network, then set HF_HUB_OFFLINE=1; or give a folder"
)


def check_hub(recipe: Recipe) -> list[Finding]:
    """What can't be had of the model, the tokenizer and the data set that the recipe names."""
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
            if key != "model_name_or_path":  # The model's folder is looked at in model.py.
                findings.append(error(f"{key}: {name!r} does not exist"))
            continue
        # The recipe's revision is the model's; a tokenizer of its own repository has another history.
        revision = None if kind == "dataset" else recipe.model_revision if name == recipe.model_name_or_path else "main"
        if not _is_cached(key, kind, name, revision):
            findings += _ask(key, kind, name, revision if key == "model_name_or_path" else None)
    return findings


def check_reachability() -> list[Finding]:
    """Whether the hub answers, unless it is not to be asked."""
    if constants.HF_HUB_OFFLINE:
        return []
    from huggingface_hub import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
    except Exception as problem:  # The HTTP library, and so its errors, changes with huggingface_hub's version.
        return [
            warning(
                f"the hub can't be reached ({problem}): recipes need local or cached models and data; HF_HUB_OFFLINE=1 "
                "spares the attempts"
            )
        ]
    return []


def looks_like_path(name: str) -> bool:
    """Whether a name that is no file here can't be a name on the hub either."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _is_cached(key: str, kind: Literal["model", "dataset"], name: str, revision: str | None) -> bool:
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    snapshot = "*" if revision is None else _find_commit(folder, revision)
    files = [path.name for path in folder.glob(f"snapshots/{snapshot}/*")]
    if key == "model_name_or_path":  # A config alone is there after a look at the model.
        return any(name.endswith((".safetensors", ".bin")) for name in files)
    if files:
        return True
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    return kind == "dataset" and (prepared / name.replace("/", "___")).exists()


def _find_commit(folder: Path, revision: str) -> str:
    """The commit that a branch or tag stood for when it was fetched; a commit stands for itself."""
    try:
        return (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:
        return revision


def _ask(key: str, kind: Literal["model", "dataset"], name: str, revision: str | None) -> list[Finding]:
    at = f" at revision {revision!r}" if revision not in (None, "main") else ""
    if constants.HF_HUB_OFFLINE:
        return [
            error(
                f"{key}: {name!r}{at} is not in the hub's cache and HF_HUB_OFFLINE is set; `onecurve fetch` the recipe where "
                "there is a network, or give a folder"
            )
        ]
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_SECONDS)
    except HFValidationError:
        return [error(f"{key}: {name!r} is neither a folder here nor a name that the hub could have")]
    except RevisionNotFoundError:
        return [error(f"model_revision: {revision!r} is no branch, tag or commit of {name!r}")]
    except RepositoryNotFoundError:
        return [error(f"{key}: the hub has no {kind} {name!r}, or shows it only to some (hf auth login)")]
    except HfHubHTTPError as problem:
        return [warning(f"{key}: the hub was asked for {name!r} and answered: {problem}")]
    except Exception as problem:  # The HTTP library, and so its errors, changes with huggingface_hub's version.
        return [
            error(
                f"{key}: {name!r} is not on this machine and the hub can't be reached ({problem}); {_WITHOUT_NETWORK}"
            )
        ]
    if found.gated and get_token() is None:
        return [error(f"{key}: {name!r} is gated: accept its terms on the hub, then hf auth login")]
    return [warning(f"{key}: {name!r} is not on this machine and will be fetched from the hub at the start")]
