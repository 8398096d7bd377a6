"""The loss scale of fp16: saved, restored, and the end of a training that it can't help.

Gradients that overflow in fp16 skip their update and halve the scale; a few such steps are how a good scale is found.
Without the saved scale a resumed training would begin with another one, and skip other steps.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from onecurve.training.errors import Diverged
from onecurve.training.parallel.states import count_updates

# What DeepSpeed's scaler counts with.
_DEEPSPEED_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_loss_scale(accelerator: Accelerator, optimizer: Any) -> dict[str, float]:
    """The scaler's state, plain numbers; empty without fp16."""
    if accelerator.mixed_precision != "fp16":
        return {}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        scaler = optimizer.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in _DEEPSPEED_STATE}
    assert accelerator.scaler is not None
    return dict(accelerator.scaler.state_dict())


def restore_loss_scale(accelerator: Accelerator, optimizer: Any, state: dict[str, float]) -> None:
    """Restore what `read_loss_scale` read, and let DeepSpeed's scaler fall without an error; the reporter has its own.

    The state of another strategy's scaler counts with other numbers: of it only the scale is taken.
    """
    if accelerator.mixed_precision != "fp16":
        return
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        scaler = optimizer.optimizer.loss_scaler
        scaler.raise_error_at_min_scale = False
        if "scale" in state:
            state = {"cur_scale": state["scale"]}
        for name, value in state.items():
            setattr(scaler, name, value)
        return
    if not state:
        return
    assert accelerator.scaler is not None
    if "cur_scale" in state:
        state = {**accelerator.scaler.state_dict(), "scale": state["cur_scale"]}
    accelerator.scaler.load_state_dict(state)


def check_updates(accelerator: Accelerator, optimizer: Any) -> None:
    """At the end of a training.

    Raises:
        Diverged: fp16 skipped every step.
    """
    if accelerator.mixed_precision == "fp16" and count_updates(optimizer) == 0:
        raise Diverged(
            "the gradients of every step overflowed in fp16, so nothing was trained: use mixed_precision bf16 or no, or train "
            "for more steps (the loss scale halves with each)"
        )
