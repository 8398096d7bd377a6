"""A model whose own code fails in the first step is named, with the place; other errors stay as they are."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

from onecurve.training.models.failures import UnsuitableModel, explain_model_errors
from tests.messages import naming


def run_out_of_positions() -> None:
    config = BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=4,
    )  # fmt: skip
    BertModel(config)(torch.ones(1, 9, dtype=torch.long))


def test_an_error_of_the_models_code_names_model_and_place() -> None:
    needed = naming("model_name_or_path", "'my-bert'", "modeling_bert.py", "RuntimeError")
    with pytest.raises(UnsuitableModel, match=needed), explain_model_errors("my-bert", is_first_step=True):
        run_out_of_positions()


def test_a_later_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError), explain_model_errors("my-bert", is_first_step=False):
        run_out_of_positions()


def test_an_error_of_ours_or_of_a_task_stays() -> None:
    with pytest.raises(KeyError), explain_model_errors("my-bert", is_first_step=True):
        dict[str, int]()["label"]


def test_a_lack_of_memory_stays() -> None:
    with pytest.raises(RuntimeError, match="memory"), explain_model_errors("my-bert", is_first_step=True):
        torch.empty(1 << 60)


@pytest.mark.parametrize(
    "message", ["Read error [127.0.0.1]:14058: Connection reset by peer", "NCCL communicator was aborted on rank 0"]
)
def test_another_rank_that_is_gone_is_no_fault_of_the_model(message: str) -> None:
    """Its exit code would say that nothing helps, and a launcher would not start again."""

    def reduce(gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(message)

    weight = torch.ones(1, requires_grad=True)
    weight.register_hook(reduce)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"peer|aborted"), explain_model_errors("my-bert", is_first_step=True):
        weight.sum().backward()  # type: ignore[no-untyped-call]
