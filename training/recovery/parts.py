"""A checkpoint's files: each process writes the tensors that it keeps, and rank 0 what makes a checkpoint of them.

A process that has written its part, and compared it with what is read back, leaves a receipt in the staging folder: sizes
and checksums of its files. Rank 0 waits for all receipts before it writes the manifest. No message is sent for that, so the
training goes on meanwhile.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from onecurve.training.atomic_files import write_atomically
from onecurve.training.errors import Fault
from onecurve.training.models.tensor_files import write_index
from onecurve.training.parallel.states import Tensors
from onecurve.training.recovery.dealing import Dealing
from onecurve.training.recovery.manifest import FileFacts, describe_file
from onecurve.training.recovery.publishing import sync
from onecurve.training.run_directory import MOMENTS_FILE, WEIGHTS_FILE

_RECEIPT = ".part_{}"
_SECONDS_BETWEEN_LOOKS = 0.05


def write_part(staging: Path, part: int, files: Mapping[str, Tensors], written: Collection[str]) -> None:
    """Write what one process still keeps, verify it, and leave a receipt of all its files.

    Args:
        part: the process's, counted from 0.
        files: tensors by file name.
        written: files that it has written and verified, and not yet synced.

    Raises:
        Fault: what is read back differs. Errors of the disk pass through.
    """
    for name, tensors in files.items():
        save_tensors(tensors, staging / name)
    for name in written:
        sync(staging / name)
    facts = {name: describe_file(staging / name) for name in (*files, *written)}
    write_atomically(staging / _RECEIPT.format(part), json.dumps(facts))


def collect_receipts(staging: Path, num_parts: int, give_up: threading.Event) -> dict[str, FileFacts] | None:
    """Wait until every part is written; returns size and checksum of all files, or None if `give_up` is set before."""
    facts: dict[str, FileFacts] = {}
    for part in range(num_parts):
        receipt = staging / _RECEIPT.format(part)
        while not receipt.exists():
            if give_up.wait(_SECONDS_BETWEEN_LOOKS):
                return None
        facts |= json.loads(receipt.read_text(encoding="utf-8"))
        receipt.unlink()
    return facts


def write_indexes(staging: Path, dealing: Dealing) -> None:
    """Say which part holds which tensor, if there are several."""
    if len(dealing.writers) == 1:
        return
    for file in (WEIGHTS_FILE, MOMENTS_FILE):
        names = {name: dealing.find_file(file, name) for name in dealing.owners.get(file, {})}
        write_index(staging / file, names, dealing.num_bytes.get(file, 0))


def save_tensors(tensors: Tensors, path: Path, syncs: bool = True) -> None:
    """Write a safetensors file, and compare each tensor with what is read back, bit for bit.

    Args:
        syncs: wait until it is on the disk.

    Raises:
        Fault: one differs.
    """
    save_file(tensors, path, {"format": "pt"})
    if syncs:
        sync(path)
    with safe_open(path, "pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                raise Fault(f"{name} differs from what was written when read back")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)  # As numbers, NaN differs from itself.
