"""A TrainJob of Kubeflow Trainer with its TrainingRuntime. Checked against the models of Kubeflow Trainer 2.3.0.

The runtime is rendered as well, because only it can say how long a pod may take to end, and which exit codes are final.
"""

from __future__ import annotations

import re
from typing import Any

from onecurve.launcher.cluster.elsewhere import (
    SECONDS_FOR_CHECKPOINT,
    STOPPED_BY_PERSON,
    JobFile,
    Place,
    check_request,
    dump,
    name_job,
    render_script,
)
from onecurve.launcher.cluster.request import Request
from onecurve.launcher.errors import UsageError
from onecurve.training.launch_protocol import BAD_INPUT, DIVERGED

API_VERSION = "trainer.kubeflow.org/v1alpha1"
MAX_RESTARTS = 20

_COMMENT = """Written by `onecurve submit --to kubernetes`; edit it as you like. The volume holds the project's folder:
recipe, data and runs. A pod that Kubernetes ends writes a checkpoint; all pods are then started again and continue from it.
To stop a job: kubectl patch trainjob NAME --type merge -p '{"spec": {"suspend": true}}'; with false it continues.
Exit codes: 0 finished, 2 bad input, 3 diverged, 75 stopped by the platform, 76 stopped by a file STOP, 1 anything else."""

# torchrun, which accelerate starts, reads the PET_ variables as well.
_HEADER = """export ONECURVE_NUM_NODES=${PET_NNODES-1}
export ONECURVE_NODE_RANK=${PET_NODE_RANK-0}
export ONECURVE_HEAD_ADDRESS=${PET_MASTER_ADDR-localhost}
export ONECURVE_PORT=${PET_MASTER_PORT-29500}
unset "${!PET_@}"
"""


def render_kubernetes(request: Request, place: Place) -> JobFile:
    """The file of one training: its runtime and its job.

    Raises:
        UsageError: an option is missing or wrong.
    """
    check_request(request, place)
    if place.image is None:
        raise UsageError("--image is missing: Kubernetes needs a container's image that holds Onecurve")
    if "://" in place.volume:
        raise UsageError(f"--volume {place.volume}: expected the name of a PersistentVolumeClaim")
    if place.gpu is not None:
        raise UsageError(
            "--gpu: a TrainJob asks for a number of GPUs only; leave it out, or add a nodeSelector to the file"
        )
    header = f"{_HEADER}export ONECURVE_GPUS_PER_NODE={request.gpus_per_node}"
    script = _escape(render_script(request, place, header, request.overrides))
    resources: dict[str, Any] = {"cpu": str(request.cpus_per_node or 4 * max(1, request.gpus_per_node))}
    if request.gpus_per_node:
        resources["nvidia.com/gpu"] = str(request.gpus_per_node)
    name = name_job(request)
    job = {
        "apiVersion": API_VERSION,
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name},
            "trainer": {
                "image": place.image,
                "command": ["/bin/bash", "-c"],
                "args": [script],
                "numNodes": request.num_nodes,
                "resourcesPerNode": {"limits": resources, "requests": resources.copy()},
            },
        },
    }
    return JobFile(dump(_COMMENT, _render_runtime(name, request, place), job), ("kubectl", "apply", "-f"))


def _render_runtime(name: str, request: Request, place: Place) -> dict[str, Any]:
    pod = {
        "restartPolicy": "Never",  # pods are started again together, by the JobSet
        "terminationGracePeriodSeconds": SECONDS_FOR_CHECKPOINT,
        "containers": [
            {
                "name": "node",
                "image": place.image,
                "workingDir": place.mount,
                "volumeMounts": [
                    {"name": "project", "mountPath": place.mount},
                    {"name": "memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "project", "persistentVolumeClaim": {"claimName": place.volume}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},  # the default of 64 MiB is too little for NCCL
        ],
    }
    final_codes = [BAD_INPUT, DIVERGED, STOPPED_BY_PERSON]
    on_exit_codes = {"containerName": "node", "operator": "In", "values": final_codes}
    job = {
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": on_exit_codes}]},
        "template": {"spec": pod},
    }
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    final = {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainingRuntime",
        "metadata": {"name": name, "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": request.num_nodes, "torch": {}},
            "template": {
                "spec": {
                    "failurePolicy": {"maxRestarts": MAX_RESTARTS, "rules": [final]},
                    "replicatedJobs": [{"name": "node", "template": {"metadata": {"labels": labels}, "spec": job}}],
                }
            },
        },
    }


def _escape(script: str) -> str:
    """Kubernetes reads `$(NAME)` in a container's arguments as a variable, and `$$` as `$`."""
    return re.sub(r"\$(?=[$(])", "$$", script)
