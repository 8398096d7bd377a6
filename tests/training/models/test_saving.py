"""What lies beside the weights of a saved model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from tests.training.conftest import Predict
from tools.jobs import Job, write_script
from tools.trainings import Run

CODE = """\
from transformers import BertConfig, BertForSequenceClassification

from .scaling import SCALE


class OwnConfig(BertConfig):
    model_type = "own"


class Own(BertForSequenceClassification):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * SCALE
        return found
"""


@pytest.fixture
def own_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model that brings its own code, in two files."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    (folder / "modeling_own.py").write_text(CODE, encoding="utf-8")
    (folder / "scaling.py").write_text("SCALE = 3\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForSequenceClassification": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "own"}), encoding="utf-8")
    return folder


def check_final(run: Run, own_model: Path) -> None:
    """final/ is complete without the folder that the model came from."""
    assert run.exit_code == 0, run.stderr
    shutil.rmtree(own_model)
    final = run.path / "final"
    assert {path.name for path in final.glob("*.py")} == {"modeling_own.py", "scaling.py"}
    loaded = AutoModelForSequenceClassification.from_pretrained(final, trust_remote_code=True)
    assert type(loaded).__name__ == "Own"
    tokens = {"input_ids": torch.tensor([[101, 102]])}
    plain = BertForSequenceClassification.from_pretrained(final)
    torch.testing.assert_close(loaded(**tokens).logits, 3 * plain(**tokens).logits)


def test_a_model_with_its_own_code_is_saved_with_it(
    own_model: Path, recipe: dict[str, Any], train: Callable[[Mapping[str, Any]], Run]
) -> None:
    settings = {**recipe, "model_name_or_path": str(own_model), "trust_remote_code": True}
    refused = train({**settings, "trust_remote_code": False})
    assert refused.exit_code == 2
    check_final(train(settings), own_model)


@pytest.mark.parametrize("keys", [{}, {"adapter": "lora"}], ids=str)
def test_a_run_of_a_model_with_its_own_code_predicts(
    own_model: Path,
    news: Path,
    recipe: dict[str, Any],
    train: Callable[[Mapping[str, Any]], Run],
    tmp_path: Path,
    predict: Predict,
    keys: dict[str, Any],
) -> None:
    """Its class has a name that says nothing of a head."""
    run = train({**recipe, **keys, "model_name_or_path": str(own_model), "trust_remote_code": True})
    assert run.exit_code == 0, run.stderr
    evaluated = [json.loads(line) for line in (run.path / "eval_predictions.jsonl").read_text().splitlines()]
    code, said = predict(run.path, news / "validation.jsonl", tmp_path / "labelled.jsonl")
    assert code == 0, said
    found = [json.loads(line) for line in (tmp_path / "labelled.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in found] == [row["prediction"] for row in evaluated]


@pytest.mark.slow
@pytest.mark.parametrize("file_bytes", [10_000, 10_000_000], ids=["two writers", "one writer"])
def test_fsdp2_saves_the_code_of_the_class_that_it_wraps(
    own_model: Path, recipe: dict[str, Any], tmp_path: Path, file_bytes: int
) -> None:
    changes = f"from onecurve.training.recovery import final_model\nfinal_model.FILE_BYTES = {file_bytes}"
    script = write_script(tmp_path / "small_files.py", changes)
    settings = {**recipe, "model_name_or_path": str(own_model), "trust_remote_code": True}
    run = Job(settings, "fsdp", 2, script=script).finish()
    assert (run.path / "final" / "model.safetensors.index.json").exists() == (file_bytes == 10_000)
    check_final(run, own_model)
