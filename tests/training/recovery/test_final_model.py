"""final/ in shares: the files that transformers knows, whatever their parameters are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from transformers import AutoModelForCausalLM, MixtralConfig

from onecurve.training.errors import Fault
from onecurve.training.models.tensor_files import TensorFiles, write_index
from onecurve.training.recovery import dealing as dealing_module
from onecurve.training.recovery import final_model
from onecurve.training.recovery.dealing import Dealing, find_writers
from onecurve.training.recovery.final_model import choose_writers, group_converted
from onecurve.training.run_directory import RunDirectory, part_of
from tests.messages import names


@pytest.fixture
def mixtral(tmp_path: Path) -> Any:
    """A tiny model whose files name single experts, read by from_pretrained."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, max_position_embeddings=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixtral")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")


def write_shares(model: Any, folder: Path, num_parts: int) -> Path:
    """What `num_parts` processes write, one after the other."""
    folder.mkdir()
    shared = Dealing(range(num_parts), group_converted(model))
    file_of: dict[str, str] = {}
    shares: list[dict[str, torch.Tensor]] = [{} for _ in range(num_parts)]
    for name, tensor in model.state_dict().items():
        shares[shared.deal("model.safetensors", name, tensor.nbytes)][name] = tensor
    for part, tensors in enumerate(shares):
        path = folder / part_of("model.safetensors", part, num_parts)
        file_of |= dict.fromkeys(final_model._write_share(model, tensors, path), path.name)
    write_index(folder / "model.safetensors", file_of, 1)
    model.config.save_pretrained(folder)
    return folder


def test_shares_of_merged_experts_are_the_files_that_transformers_writes(mixtral: Any, tmp_path: Path) -> None:
    folder = write_shares(mixtral, tmp_path / "shares", 3)
    with (
        TensorFiles(folder / "model.safetensors") as ours,
        safe_open(tmp_path / "mixtral/model.safetensors", "pt") as theirs,
    ):
        assert ours.names() == set(theirs.keys())
        assert any(".experts.2.w1." in name for name in ours.names())
        for name in theirs.keys():  # noqa: SIM118
            assert torch.equal(ours.read(name), theirs.get_tensor(name))
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in mixtral.state_dict().items())


def test_a_weight_that_reads_back_as_another_is_a_fault(mixtral: Any, tmp_path: Path) -> None:
    folder = write_shares(mixtral, tmp_path / "shares", 2)
    weights = dict(mixtral.state_dict())
    final_model._compare_with_folder(mixtral, weights, folder)
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(Fault, match="lm_head"):
        final_model._compare_with_folder(mixtral, weights, folder)


def test_a_small_model_stays_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(10, 10, bias=False)  # 400 bytes
    assert choose_writers(model, (0, 1, 2, 3)) == (0,)
    monkeypatch.setattr(final_model, "FILE_BYTES", 200)
    assert choose_writers(model, (0, 1, 2, 3)) == (0, 1)
    monkeypatch.setattr(final_model, "FILE_BYTES", 1)
    assert choose_writers(model, (0, 1, 2, 3)) == (0, 1, 2, 3)


@pytest.mark.parametrize(("sees", "writers"), [([True, True], (0, 1)), ([True, True, False, False], (0, 1))])
def test_only_processes_that_see_the_run_directory_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees: list[bool], writers: tuple[int, ...]
) -> None:
    """Other machines are played by what is gathered."""
    own: list[bool] = []

    def gather(seen: list[bool]) -> list[bool]:
        own.extend(seen)
        return sees

    monkeypatch.setattr(dealing_module, "gather_object", gather)
    found, line = find_writers(Accelerator(cpu=True), RunDirectory(tmp_path))
    assert own == [True]
    assert found == writers
    assert (line is None) == all(sees)
    assert line is None or names(line, str(tmp_path), "2 of 4")
    assert list(tmp_path.iterdir()) == []
