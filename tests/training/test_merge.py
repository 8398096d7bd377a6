"""A merged adapter is a plain model with the same outputs, or nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from onecurve.training.config import load_recipe
from onecurve.training.merge import main
from onecurve.training.models.loading import load_trained_model
from onecurve.training.outcome import report_outcome
from onecurve.training.tasks import build_task
from tests.conftest import Run
from tests.messages import names
from tools.decoders import build_decoder

Train = Callable[[dict[str, Any]], Run]

LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "learning_rate": 1e-2}


def merge(run: Run, output: Path) -> int:
    return report_outcome(main, [f"--run={run.path}", f"--output={output}"])


def compute_logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("more", [{}, {"use_dora": True}])
def test_the_whole_model_gives_the_same_logits(recipe: dict[str, Any], train: Train, more: dict[str, Any]) -> None:
    run = train({**recipe, **LORA, **more})
    assert merge(run, run.path / "merged") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(run.path / "merged")
    assert "sports" in merged.config.label2id
    assert AutoTokenizer.from_pretrained(run.path / "merged").is_fast
    assert not [name for name in merged.state_dict() if "lora" in name]
    resolved = load_recipe(str(run.path / "config.yaml")).recipe
    own = load_trained_model(run.path / "final", resolved, build_task(resolved))
    torch.testing.assert_close(compute_logits(merged), compute_logits(own), rtol=1e-4, atol=1e-5)


def test_a_training_merges_by_itself(recipe: dict[str, Any], train: Train, tmp_path: Path) -> None:
    run = train({**recipe, **LORA, "merge_adapter": True})
    assert run.exit_code == 0, run.stderr
    assert names(run.stdout, str(run.path / "merged"))
    assert merge(run, tmp_path / "merged") == 0
    weights = [(path / "model.safetensors").read_bytes() for path in (run.path / "merged", tmp_path / "merged")]
    assert weights[0] == weights[1]
    assert (run.path / "final" / "adapter_model.safetensors").is_file()


def test_a_training_whose_adapter_cannot_be_merged_keeps_it(causal: dict[str, Any], train: Train) -> None:
    run = train({**causal, **LORA, "lora_target_modules": ["q_proj", "lm_head"], "merge_adapter": True})
    assert run.exit_code == 1
    assert names(run.stderr, "deviate")
    assert (run.path / "final" / "adapter_model.safetensors").is_file()
    assert not (run.path / "merged").exists()
    again = train({**causal, **LORA, "lora_target_modules": ["q_proj", "lm_head"]})
    assert again.exit_code == 0, again.stderr


def test_an_adapter_of_a_tied_head_alone_is_refused(
    causal: dict[str, Any], train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged into the head, it would change the embeddings as well."""
    run = train({**causal, **LORA, "lora_target_modules": ["q_proj", "lm_head"]})
    assert run.exit_code == 0, run.stderr
    assert merge(run, tmp_path / "merged") == 1
    assert names(capsys.readouterr().err, "deviate")
    assert not (tmp_path / "merged").exists()


def test_a_causal_model_is_merged(causal: dict[str, Any], train: Train, tmp_path: Path) -> None:
    run = train({**causal, "model_name_or_path": str(build_decoder(tmp_path / "qwen3", "qwen3")), **LORA})
    assert run.exit_code == 0, run.stderr
    assert merge(run, tmp_path / "merged") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]) == 1, (
        "others read it as they are used to"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id is not None


def test_what_cannot_be_merged_is_refused(
    recipe: dict[str, Any], train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(recipe)
    assert merge(whole, tmp_path / "merged") == 2
    assert names(capsys.readouterr().err, "final")
    adapted = train({**recipe, **LORA, "output_dir": str(tmp_path / "adapted")})
    (tmp_path / "there").mkdir()
    assert merge(adapted, tmp_path / "there") == 2
    assert names(capsys.readouterr().err, "--output", "there")
