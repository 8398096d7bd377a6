"""A job file for a platform that is not Slurm: what all of them share. Nothing is submitted from here.

Each node runs `onecurve run`. It learns its place from $ONECURVE_NUM_NODES and its like, which the file sets from the platform's
own variables; `on_node.sh` maps signals and exit codes to what the platform does next.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from onecurve.launcher.cluster.request import Request
from onecurve.launcher.errors import UsageError
from onecurve.launcher.launching.command import to_arguments

DEFAULT_MOUNT = "/onecurve"
SECONDS_FOR_CHECKPOINT = 120

# Exit codes of on_node.sh: a stop that the platform asked for, and one that a person asked for.
STOPPED_BY_PLATFORM = 75
STOPPED_BY_PERSON = 76

# Names of both platforms, and of the objects that Kubernetes makes of one, whose names are longer.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a job runs, besides its resources.

    Attributes:
        volume: what all nodes see: a volume's name or, for SkyPilot on one node, a bucket's URL.
        mount: the folder where nodes find it.
        gpu: the kind of GPU, as SkyPilot names it.
        image: a container's image that holds Onecurve.
    """

    volume: str
    mount: str = DEFAULT_MOUNT
    gpu: str | None = None
    image: str | None = None


@dataclass(frozen=True)
class JobFile:
    """A rendered file.

    Attributes:
        text: YAML.
        submit: the words of the platform's own command, to which the file's name is appended.
    """

    text: str
    submit: tuple[str, ...]

    def to_shell(self, path: Path) -> str:
        """The command that submits the file."""
        return shlex.join([*self.submit, str(path)])


def check_request(request: Request, place: Place) -> None:
    """Refuse what no other platform than Slurm has, and names that a platform does not take.

    Raises:
        UsageError: an option or a name is wrong.
    """
    slurms = {
        "--time": request.time, "--partition": request.partition, "--dependency": request.dependency,
        "--sbatch": request.options,
    }  # fmt: skip
    if given := [name for name, value in slurms.items() if value not in (None, ())]:
        raise UsageError(f"{', '.join(given)}: only Slurm has this; leave it out, or edit the file that is written")
    if not _NAME.fullmatch(name_job(request)):
        raise UsageError(
            f"--job-name {request.job_name!r}: expected a name such as news-1: a-z, 0-9 and -, at most 40 in all"
        )
    if not place.mount.startswith("/") or PurePosixPath(place.mount) == PurePosixPath("/"):
        raise UsageError(f"--mount {place.mount!r}: expected the absolute path of a folder, such as {DEFAULT_MOUNT}")
    recipe = Path(request.recipe)
    if recipe.is_absolute() or ".." in recipe.parts:
        raise UsageError(
            f"{request.recipe}: on the nodes this folder lies elsewhere; name the recipe relative to the project's folder"
        )
    words = [request.recipe, place.volume, place.mount, *request.overrides.values()]
    for word in [*words, *(value for value in (place.gpu, place.image, request.topology) if value is not None)]:
        if not word.isprintable():
            raise UsageError(f"{word!r} has a control character, which a job file can't hold; remove it")


def name_job(request: Request) -> str:
    """The job's name."""
    return request.job_name or "onecurve"


def render_script(request: Request, place: Place, header: str, overrides: Mapping[str, str]) -> str:
    """The shell script of each node.

    Args:
        header: lines that set ONECURVE_NUM_NODES and its like from the platform's variables.
        overrides: keys of the recipe that the job changes.
    """
    words = ["onecurve", "run", request.recipe]
    options = {"topology": request.topology, "num_processes": request.num_processes}
    words += [f"--{name}={value}" for name, value in options.items() if value is not None]
    control = shlex.quote(f"{place.mount}/.onecurve-{name_job(request)}")
    body = (Path(__file__).parent / "on_node.sh").read_text(encoding="utf-8")
    body = re.sub(r"^ *# shellcheck .*\n", "", body, flags=re.MULTILINE)
    return "\n".join(
        [
            "set -u",
            header.strip(),
            f"control={control}",
            f"train() {{ exec {shlex.join([*words, *to_arguments(overrides)])}; }}",
            "",
            body,
        ]
    )


class _Dumper(yaml.SafeDumper):
    """Scripts as blocks of lines, for people to read and edit."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def dump(comment: str, *documents: Mapping[str, Any]) -> str:
    """YAML documents, after a comment that says what they are."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    bodies = [yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True) for each in documents]
    return lines + "---\n".join(bodies)
