"""A model that can't read its batch: an error inside of transformers or torch in the first step is told in one line."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from onecurve.training import launch_protocol
from onecurve.training.errors import Fault, has_lost_connection

_PACKAGES = ("/transformers/", "/torch/", "/transformers_modules/")


class UnsuitableModel(Fault):
    """A model raised an error of its own in the first step: it is not made for these inputs, or its config is wrong."""

    exit_code = launch_protocol.BAD_INPUT
    is_of_one_rank = True


@contextlib.contextmanager
def explain_model_errors(name: str, is_first_step: bool) -> Iterator[None]:
    """Name the model in an error that its own code raises in the first step. Later errors and those of tasks stay as they are.

    Args:
        name: the recipe's model_name_or_path.

    Raises:
        UnsuitableModel: the code inside raised an error in a file of the model.
    """
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        is_models_own = any(package in frames[-1].filename.replace("\\", "/") for package in _PACKAGES)
        if not (is_first_step and is_models_own) or "out of memory" in str(error) or has_lost_connection(error):
            raise
        # A model calls torch: the line that says most is the last one in a file of the model.
        frame = next((each for each in reversed(frames) if "modeling_" in each.filename), frames[-1])
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UnsuitableModel(
            f"model_name_or_path: {name!r} can't be trained on these examples, its own code fails at "
            f"{_from_package(frame.filename)}:{frame.lineno}: {reason}. Its config.json does not suit it, or it needs "
            "other inputs"
        ) from error


def _from_package(path: str) -> str:
    """A file of a package, from the package on."""
    return path.replace("\\", "/").rpartition("/site-packages/")[2]
