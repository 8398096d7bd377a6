"""A SkyPilot task, to be run as a managed job. Checked against the schema of SkyPilot 0.14.1."""

from __future__ import annotations

import shlex
from typing import Any

import onecurve
from onecurve.launcher.cluster.elsewhere import (
    SECONDS_FOR_CHECKPOINT,
    STOPPED_BY_PLATFORM,
    JobFile,
    Place,
    check_request,
    dump,
    name_job,
    render_script,
)
from onecurve.launcher.cluster.request import Request
from onecurve.launcher.errors import UsageError

_COMMENT = """Written by `onecurve submit --to skypilot`; edit it as you like. Submit it from the project's folder with
sky jobs launch, which starts it again after a preemption or a lost machine; it continues from its newest checkpoint.
Exit codes: 0 finished, 2 bad input, 3 diverged, 75 stopped by the platform, 76 stopped by a file STOP, 1 anything else."""

_HEADER = """[ ! -d ~/onecurve-environment ] || export PATH=~/onecurve-environment/bin:$PATH
export ONECURVE_NUM_NODES=$SKYPILOT_NUM_NODES
export ONECURVE_NODE_RANK=$SKYPILOT_NODE_RANK
export ONECURVE_HEAD_ADDRESS=${SKYPILOT_NODE_IPS%%$'\\n'*}
export ONECURVE_GPUS_PER_NODE=${SKYPILOT_NUM_GPUS_PER_NODE-0}"""


def render_skypilot(request: Request, place: Place, output_dir: str) -> JobFile:
    """The task file of one training.

    Args:
        output_dir: the recipe's. The run directory lies under `place.mount` by the same path, because the project's folder is
            copied to each node and does not outlive it.

    Raises:
        UsageError: an option is missing or wrong.
    """
    check_request(request, place)
    if request.gpus_per_node and place.gpu is None:
        raise UsageError(
            "--gpus-per-node: SkyPilot must know which: add --gpu H100, or another name that `sky show-gpus` lists"
        )
    is_bucket = "://" in place.volume
    if is_bucket and request.num_nodes > 1:
        raise UsageError(
            f"--volume {place.volume}: nodes cache a bucket, so they would not see each other's files; with --nodes "
            f"{request.num_nodes} use a volume (sky volumes apply)"
        )
    run = output_dir if output_dir.startswith(f"{place.mount}/") else f"{place.mount}/{output_dir.lstrip('/')}"
    script = render_script(request, place, _HEADER, {**request.overrides, "output_dir": run})
    bucket = {"source": place.volume, "mode": "MOUNT_CACHED"}
    task: dict[str, Any] = {
        "name": name_job(request),
        "num_nodes": request.num_nodes,
        "workdir": ".",
        "resources": _name_resources(request, place),
        **({"file_mounts": {place.mount: bucket}} if is_bucket else {"volumes": {place.mount: place.volume}}),
        **({} if place.image is not None else {"setup": _install()}),
        "run": script,
        "config": {"hooks": [_hook(request, place)]},
    }
    return JobFile(dump(_COMMENT, task), ("sky", "jobs", "launch"))


def _name_resources(request: Request, place: Place) -> dict[str, Any]:
    cpus = request.cpus_per_node or 4 * max(1, request.gpus_per_node)
    resources: dict[str, Any] = {"cpus": f"{cpus}+"}
    if request.gpus_per_node:
        resources["accelerators"] = f"{place.gpu}:{request.gpus_per_node}"
    if place.image is not None:
        resources["image_id"] = f"docker:{place.image}"
    # Preemptions and lost machines start the job again anyway. This is for a checkpoint that was written just in time.
    resources["job_recovery"] = {"recover_on_exit_codes": [STOPPED_BY_PLATFORM]}
    return resources


def _install() -> str:
    wanted = shlex.quote(f"onecurve=={onecurve.__version__}")
    return (
        "set -e\n"
        "export PATH=~/.local/bin:$PATH\n"
        "[ -d ~/onecurve-environment ] || uv venv --python 3.12 ~/onecurve-environment\n"
        "# In a checkout of Onecurve that checkout is installed, else the version that wrote this file.\n"
        f"if [ -f training/run.py ]; then wanted=.; else wanted={wanted}; fi\n"
        'uv pip install --python ~/onecurve-environment/bin/python "$wanted"\n'
    )


def _hook(request: Request, place: Place) -> dict[str, Any]:
    """On Kubernetes SkyPilot runs this before an eviction: it asks for a checkpoint and waits for it."""
    control = shlex.quote(f"{place.mount}/.onecurve-{name_job(request)}")
    wait = (
        f"touch {control}/STOP\n"
        f"for _ in $(seq {SECONDS_FOR_CHECKPOINT - 10}); do\n"
        f'    grep -q \'"state": "running"\' {control}/status.json 2>/dev/null || break\n'
        "    sleep 1\n"
        "done\n"
    )
    return {"run": wait, "events": ["preemption"], "timeout": SECONDS_FOR_CHECKPOINT}
