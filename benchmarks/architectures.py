"""Which families of models can be fine-tuned: each default config of transformers' sequence classifiers, made small.

    python -m benchmarks.architectures            writes docs/ARCHITECTURES.md
    python -m benchmarks.architectures bert t5    prints the lines of some

Each is trained for three steps, evaluated, used to predict, resumed from its second step (the weights must be the same to
the last bit) and planned, in this process. What can't be trained must be refused with one line.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.trainings import ROOT, to_flags

PAGE = ROOT / "docs" / "ARCHITECTURES.md"

_WORDS = ("<pad>", "<s>", "</s>", "<unk>", *(f"word{number}" for number in range(60)))
_NUM_DEEDS = 5  # Trains, evaluates, predicts, resumes, plans.
_LARGEST = 300_000_000  # Parameters of what can't be made smaller by the names of its keys.

# Keys by what they measure, and the small value for each.
_SMALL = (
    (r"(num_)?(hidden_|encoder_|decoder_|encoder_hidden_)?layers|n_layers?|num_(encoder|decoder|hidden)_layers", 2),
    (r"num_hidden_groups|n_group|topk_group|num_buckets", 1),
    (r"(num_|n_)?(encoder_|decoder_|attention_|key_value_|kv_)*heads?", 2),
    (r"head_dim|d_kv|attention_head_size|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|d_head", 16),
    (r"hidden_size|d_model|n_embd|dim|embedding_size|d_embed|word_embed_proj_dim", 32),
    (r"\w*intermediate_size|\w*ffn_dim|ffn_size|hidden_dim|d_ff|n_inner|d_inner|ffn_hidden_size", 64),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k", 2),
    (r"rotary_dim|coordinate_size", 4),
    (r"shape_size", 8),
    (r"\w*_layer_period", 2),
    (r"\w*_layer_offset", 1),
    (r"vocab_size", len(_WORDS)),
    (r"max_position_embeddings|n_positions", 128),
)  # fmt: skip


# Of some families the keys depend on each other, or the defaults lack what they need.
_OWN: dict[str, dict[str, Any]] = {
    "lilt": {"hidden_size": 48},
    "mistral4": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "esm": {"vocab_size": 64},
    "perceiver": {"num_latents": 4, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 1},
    "flaubert": {"emb_dim": 32, "n_words": 64},
    "xlm": {"emb_dim": 32, "n_words": 64},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 32},
}


@dataclass(frozen=True)
class Result:
    """What became of a family: each of `done` works, and `line` says why no more does."""

    family: str
    num_parameters: int
    done: tuple[str, ...]
    line: str
    seconds: float

    @property
    def is_refused(self) -> bool:
        """Whether the training refused it in one line, with exit code 2."""
        return not self.done and self.line.startswith("onecurve: ")


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config with small values, inner configs as well."""
    small: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and (name.endswith("_config") or "model_type" in value):
            small[name] = shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in _SMALL if re.fullmatch(pattern, name)), None)
            if size is not None and value > size:
                small[name] = size
        elif value is None and name in ("head_dim", "num_key_value_heads"):
            small[name] = 16 if name == "head_dim" else 2
        elif isinstance(value, list) and name in ("layer_types", "block_types", "layers_block_type"):
            kinds = list(dict.fromkeys(value))
            small[name] = [kinds[0], kinds[-1]]
    return small


def build_model(family: str, folder: Path) -> int:
    """Write a small model of a family with random weights, and a tokenizer of a few words; returns its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    default = AutoConfig.for_model(family)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    small = {**shrink(default.to_dict()), **_OWN.get(family, {})}
    no_heads = {name: value for name, value in small.items() if name not in ("head_dim", "num_key_value_heads")}
    for keys in (small, no_heads, {"vocab_size": len(_WORDS)}, {}):
        try:
            config = AutoConfig.for_model(family, **{**keys, **ids})
            with torch.device("meta"):
                meta = AutoModelForSequenceClassification.from_config(config)
            break
        except Exception as error:  # Whatever a model raises at sizes that do not suit each other.
            problem = error
    else:
        raise problem
    num_parameters: int = sum(parameter.numel() for parameter in meta.parameters())
    if num_parameters > _LARGEST:
        raise ValueError(f"{num_parameters / 1e6:.0f} M parameters at its smallest here")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    _build_tokenizer().save_pretrained(folder)
    return num_parameters


def _build_tokenizer() -> Any:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def try_family(family: str, folder: Path) -> Result:
    """Do everything with one family, as far as it goes."""
    began = time.perf_counter()
    folder.mkdir(parents=True)
    done: list[str] = []
    num_parameters, line = 0, ""
    try:
        num_parameters = build_model(family, folder / "model")
    except Exception as error:
        line = f"not tried, transformers can't build a small one: {type(error).__name__}: {error}"
    else:
        try:
            line = _try_all(folder, done)
        except Exception as error:
            line = f"{type(error).__name__}: {error}"
    line = " ".join(line.replace(str(folder), "").split())
    return Result(family, num_parameters, tuple(done), line[:160], time.perf_counter() - began)


def _try_all(folder: Path, done: list[str]) -> str:
    """Add to `done` what works; returns why the rest does not."""
    from onecurve.training.predict import main as predict
    from onecurve.training.run import main as train

    rows = [{"text": " ".join(_WORDS[4 + number : 9 + 2 * number]), "label": "ab"[number % 2]} for number in range(24)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = folder / "run"
    keys = {
        "model_name_or_path": str(folder / "model"), "train_file": str(data), "validation_fraction": 0.25, "max_length": 32,
        "train_batch_size": 4, "per_device_batch_size": 4, "learning_rate": 1e-3, "max_train_steps": 3,
        "checkpointing_steps": 2, "output_dir": str(run),
    }  # fmt: skip
    code, said = _call(train, to_flags(keys))
    if code != 0:
        return said
    done += ["trains", "evaluates"]
    code, said = _call(predict, ["--run", str(run), "--input", str(data), "--output", str(folder / "labelled.jsonl")])
    if code != 0:
        return said
    done.append("predicts")
    (run / "status.json").unlink()
    whole = (run / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "final")
    code, said = _call(train, to_flags(keys))
    if code != 0:
        return said
    if (run / "final" / "model.safetensors").read_bytes() != whole:
        return "the weights of the resumed run differ"
    done.append("resumes")
    _plan(keys)
    done.append("plans")
    return ""


def _plan(keys: Mapping[str, Any]) -> None:
    """As `onecurve plan` does, with the model described in this process."""
    from onecurve.launcher.facts import shape as module
    from onecurve.launcher.planning.data_estimate import estimate_data
    from onecurve.launcher.planning.devices import Cluster, parse_devices
    from onecurve.launcher.planning.plan import build_plan
    from onecurve.training.config import build_recipe
    from onecurve.training.describe_model import describe_or_explain

    recipe = build_recipe(keys)
    shape: Any = module
    kept, shape.describe_without_weights = shape.describe_without_weights, describe_or_explain
    try:
        found = shape.load_shape(recipe.model_name_or_path)
    finally:
        shape.describe_without_weights = kept
    cluster = Cluster(devices=parse_devices("8xH100-80GB"), num_nodes=1, host_bytes=1 << 40, mfu=0.4)
    assert build_plan(recipe, found, estimate_data(recipe), cluster).recommended is not None


def _call(main: Any, words: Sequence[str]) -> tuple[int, str]:
    """Run a script's main here; returns its exit code and the last line of what it says on stderr."""
    from onecurve.training import run
    from onecurve.training.outcome import report_outcome
    from onecurve.training.parallel.accelerator import forget_state

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = report_outcome(main, words)
    finally:
        for session in run._KEPT:
            session.stop_flag.close()
        run._KEPT.clear()
        forget_state()
    return code, errors.getvalue().strip().rpartition("\n")[2]


def format_page(results: Sequence[Result], commit: str) -> str:
    """docs/ARCHITECTURES.md, for results of a commit."""
    import transformers

    whole = sum(len(result.done) == _NUM_DEEDS for result in results)
    lines = [
        "# Families of models",
        "",
        f"Each default config that `AutoModelForSequenceClassification` of transformers {transformers.__version__} maps, made",
        f"small. {whole} of {len(results)} train, evaluate, predict, resume to the same bits and are planned. Written by",
        f"`python -m benchmarks.architectures` at {commit}.",
        "",
        "| family | parameters here | works | what is said of the rest |",
        "|---|---|---|---|",
    ]
    for each in results:
        works = "refused" if each.is_refused else ", ".join(each.done) or "nothing"
        works = "all" if len(each.done) == _NUM_DEEDS else works
        line = each.line.replace("|", "\\|")
        lines.append(f"| {each.family} | {each.num_parameters / 1e6:.2f} M | {works} | {line} |")
    return "\n".join(lines) + "\n"


def main(families: Sequence[str]) -> None:
    """Try all families and write the page, or some and print what became of them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="architectures-") as folder:
        for family in families or MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            results.append(try_family(family, Path(folder) / family))
            last = results[-1]
            print(
                f"{family:<24} {last.num_parameters / 1e6:8.2f} M {last.seconds:5.1f} s  {','.join(last.done)}  {last.line}",
                flush=True,
            )
            shutil.rmtree(Path(folder) / family)
    if not families:
        PAGE.write_text(format_page(results, head.stdout.strip()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
