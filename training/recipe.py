"""The recipe's keys: every setting that all tasks share, typed, with its bounds and its description.

The keys of one task stand in its file (training/tasks), as a subclass of `Recipe`. How a recipe is read from a file and
flags is in config.py.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# More examples in one step than any published fine-tuning run; beyond it a number is a typing mistake.
MAX_TRAIN_BATCH_SIZE = 1_000_000


class RecipeError(ValueError):
    """A recipe that can't be trained.

    Attributes:
        problems: one line for each fault, all of them.
        remainder: the recipe of the keys that are valid, if they make one, so that `check` can look at what they name.
    """

    def __init__(self, origin: str, problems: Sequence[str], remainder: Recipe | None = None) -> None:
        self.origin = origin
        self.problems = list(problems)
        self.remainder = remainder
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  ".join([f"{count} in {origin}:", *self.problems]))


def _reject_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, got a boolean")
    return value


def _reject_non_finite(value: object) -> object:
    _reject_bool(value)
    if isinstance(value, str):
        try:  # YAML 1.1 reads 5e-5 (no dot) as text.
            value = float(value)
        except ValueError:
            raise ValueError(f"must be a number, got {value!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {value}")
    return value


def _to_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _expand_path(value: object) -> object:
    """`~` and variables, as a shell would put them in; a variable that is not set is an error."""
    if not isinstance(value, str):
        return value
    expanded = os.path.expanduser(os.path.expandvars(value))
    unset = re.findall(r"\$\{?(\w+)", expanded)
    if unset and "$" in value:
        raise ValueError(f"must be a path; the variable {unset[0]} in {value!r} is not set")
    return expanded


def _to_precision(value: object) -> object:
    return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false.


def _to_masks(value: object) -> object:
    return "torch" if value == "bytes" else value  # Of earlier versions: drawn for each process.


def _to_task_name(value: object) -> object:
    return value.replace("-", "_") if isinstance(value, str) and ":" not in value else value


Integer = Annotated[int, BeforeValidator(_reject_bool)]
Number = Annotated[float, BeforeValidator(_reject_non_finite)]
PathText = Annotated[str, BeforeValidator(_expand_path)]
Files = Annotated[tuple[str, ...], BeforeValidator(_to_list)]
Names = Annotated[tuple[str, ...], BeforeValidator(_to_list)]

SCHEDULER_TYPES = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True)


class ModelKeys(_Keys):
    """Which model is trained, and for what."""

    task: Annotated[str, BeforeValidator(_to_task_name)] = Field(
        default="text_classification",
        min_length=1,
        description="what the model learns to do; or `path/to/my_task.py:MyTask`",
    )
    model_name_or_path: PathText = Field(min_length=1, description="a local model folder or a hub name")
    model_revision: str = Field(default="main", description="the model's branch, tag or commit on the hub")
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the model; off unless you say so"
    )
    tokenizer_name: PathText | None = Field(default=None, description="a tokenizer other than the model's own")
    dropout: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        default=None, description="sets every dropout probability of the model; none keeps the model's own"
    )


class AdapterKeys(_Keys):
    """Which of the model's weights are trained. The names are PEFT's."""

    adapter: Literal["none", "lora"] = Field(
        default="none", description="lora trains small matrices beside the model's own weights, which stay as they are"
    )
    lora_r: Annotated[Integer, Field(ge=1)] = Field(default=8, description="rank of the matrices")
    lora_alpha: Annotated[Number, Field(gt=0)] = Field(
        default=16,
        description="their product is scaled by lora_alpha / lora_r; with use_rslora by lora_alpha / sqrt(lora_r)",
    )
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(default=0.0, description="dropout of what they read")
    lora_target_modules: Literal["all-linear"] | Names = Field(
        default="all-linear",
        description="ends of the names of the layers that get them; all-linear is every linear layer but the head",
    )
    use_dora: bool = Field(
        default=False, description="DoRA: a trained magnitude for each output as well (Liu et al. 2024)"
    )
    use_rslora: bool = Field(default=False, description="scaling that suits large ranks (Kalajdzievski 2023)")
    modules_to_save: Names = Field(
        default=(), description="modules that are trained whole; a new head is one of them by itself"
    )
    adapter_name_or_path: PathText | None = Field(
        default=None,
        description="an adapter to go on with: a folder with adapter_config.json; its own lora_ settings hold",
    )
    base_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type of the weights that are not trained; bfloat16 halves their memory"
    )
    quantization: Literal["none", "nf4"] = Field(
        default="none",
        description="nf4 holds the linear layers beside the adapter in 4 bits (QLoRA); one process and DDP, with bitsandbytes",
    )
    freeze: Names = Field(
        default=(),
        description="without an adapter: patterns of names of parameters that are not trained, such as bert.embeddings.*",
    )


# Keys that only adapters read.
ADAPTER_KEYS = (
    *(name for name in AdapterKeys.model_fields if name not in ("adapter", "freeze")),
    "merge_adapter",
)


class DataKeys(_Keys):
    """Which data it is trained on. Prepared data is kept by the values of these, of the seed and of the task's own keys."""

    dataset_name: PathText | None = Field(
        default=None, description="a data set's name on the hub, or a save_to_disk folder"
    )
    dataset_config_name: str | None = Field(
        default=None, description="the data set's configuration, such as 'cola' of glue"
    )
    train_file: Files | None = Field(
        default=None,
        description="CSV, TSV, JSON Lines, Parquet or CoNLL files, globs allowed; or a folder that holds a folder of images for "
        "each class",
    )
    validation_file: Files | None = Field(default=None, description="as train_file; none splits the training data")
    test_file: Files | None = Field(default=None, description="as train_file; evaluated once, at the end")
    train_split: str = Field(
        default="train", min_length=1, description="name of the split of a hub data set to train on"
    )
    validation_split: str | None = Field(
        default=None, description="name of the hub split to evaluate on; none splits the training data"
    )
    max_length: Annotated[Integer, Field(ge=2)] = Field(default=512, description="tokens an example is cut to")
    validation_fraction: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=0.1,
        description="share of the training data held out when there is no validation data; stratified by label",
    )
    max_train_samples: Annotated[Integer, Field(ge=1)] | None = Field(
        default=None, description="a seeded subset of the training data"
    )
    max_eval_samples: Annotated[Integer, Field(ge=1)] | None = Field(
        default=None, description="a seeded subset of the validation data"
    )


class StepKeys(_Keys):
    """The mathematics of a step."""

    train_batch_size: Annotated[Integer, Field(ge=1, le=MAX_TRAIN_BATCH_SIZE)] = Field(
        default=32, description="examples in one step, over all processes (DeepSpeed's word for the global batch)"
    )
    learning_rate: Annotated[Number, Field(gt=0)] = Field(default=5e-5, description="peak learning rate of AdamW")
    layerwise_lr_decay: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="factor of the learning rate from each layer to the one below it: the head has learning_rate, the "
        "embeddings the least; 1 is the same rate for all",
    )
    weight_decay: Annotated[Number, Field(ge=0)] = Field(
        default=0.0, description="decoupled decay; never on biases and norms"
    )
    lr_scheduler_type: SCHEDULER_TYPES = Field(default="linear", description="a name of transformers.get_scheduler")
    num_warmup_steps: Annotated[Integer, Field(ge=0)] = Field(default=0, description="steps of linear warm-up")
    warmup_ratio: Annotated[Number, Field(ge=0, le=1)] = Field(
        default=0.0, description="warm-up as a share of all steps"
    )
    num_train_epochs: Annotated[Number, Field(gt=0)] = Field(default=3.0, description="passes over the training data")
    max_train_steps: Annotated[Integer, Field(ge=1)] | None = Field(
        default=None, description="steps to train; beats num_train_epochs"
    )
    max_grad_norm: Annotated[Number, Field(ge=0)] = Field(
        default=1.0, description="global norm to clip gradients to; 0 is no clipping"
    )
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = Field(default=0.9, description="decay of AdamW's first moment")
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = Field(
        default=0.999, description="decay of AdamW's second moment"
    )
    adam_epsilon: Annotated[Number, Field(gt=0)] = Field(default=1e-8, description="AdamW's epsilon")
    length_window: Annotated[Integer, Field(ge=1)] = Field(
        default=64,
        description="global batches among which shuffled examples of near-equal length meet; 1 is plain random order",
    )
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_to_precision)] = Field(
        default="no", description="autocast of the forward; fp16 may skip steps"
    )
    seed: Annotated[Integer, Field(ge=0, lt=2**63)] = Field(
        default=42, description="of the split, the order, the new head and dropout"
    )
    dropout_masks: Annotated[Literal["by_example", "torch"], BeforeValidator(_to_masks)] = Field(
        default="by_example",
        description="what dropout masks are a function of: by_example is (seed, step, example, place in it), the same on every "
        "topology; torch draws them for each process",
    )


class MemoryKeys(_Keys):
    """Memory and speed: these may change between machines and starts, and change nothing that is learned."""

    per_device_batch_size: Annotated[Integer, Field(ge=1)] = Field(
        default=16, description="most examples in one micro-batch"
    )
    per_device_batch_tokens: Annotated[Integer, Field(ge=1)] | None = Field(
        default=None, description="most tokens in one micro-batch, padding included"
    )
    layout: Literal["auto", "padded", "packed"] = Field(
        default="auto",
        description="how sequences lie in a micro-batch: in padded rows, or packed, one behind the other and without padding; "
        "auto packs where the task and the model can, and a GPU has a kernel for it",
    )
    dataloader_num_workers: Literal["auto"] | Annotated[Integer, Field(ge=0, le=512)] = Field(
        default="auto",
        description="processes of each rank that make its batches; auto: none for texts, whose batches take less than a "
        "hundredth of a GPU's time, and for images on a GPU as many as each rank has cores, up to 8",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass to save memory"
    )
    torch_compile: bool = Field(default=False, description="compile the model's layers")
    loss_chunk_tokens: Literal["auto"] | Annotated[Integer, Field(ge=1)] = Field(
        default="auto",
        description="of language models: most tokens whose logits are in memory at once; auto: 128 MiB of them",
    )
    allow_slow_bf16: bool = Field(
        default=False,
        description="train in bf16 also where a CPU multiplies matrices more than three times slower in it",
    )
    deterministic: bool = Field(
        default=False,
        description="use only algorithms that give the same bits each time, so that a resumed run on a GPU has them too; "
        "slower. A CPU's are so anyway",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = Field(
        default=None, description="attention kernel; none lets transformers choose"
    )


class EvaluationKeys(_Keys):
    """When to evaluate, and what the best model is."""

    eval_steps: Literal["epoch"] | Annotated[Integer, Field(ge=1)] = Field(
        default="epoch", description="steps between evaluations"
    )
    metric_for_best_model: str | None = Field(
        default=None, description="metric that chooses `best` and the model of final/, such as eval_accuracy"
    )
    early_stopping_patience: Annotated[Integer, Field(ge=1)] | None = Field(
        default=None, description="evaluations without a better metric before training ends"
    )


class OutputKeys(_Keys):
    """Checkpoints and reports: where and how often. These may change between starts."""

    checkpointing_steps: Literal["epoch"] | Annotated[Integer, Field(ge=1)] | None = Field(
        default=None,
        description="steps between checkpoints; none writes them only for the best metric, or when asked to stop",
    )
    save_total_limit: Annotated[Integer, Field(ge=1)] | None = Field(
        default=None, description="checkpoints kept, the best one besides"
    )
    resume: PathText = Field(
        default="auto", min_length=1, description="auto (go on if the run directory can), never, or a checkpoint's path"
    )
    merge_adapter: bool = Field(
        default=False, description="of an adapter: write the whole model to merged/ at the end, as onecurve merge does"
    )
    output_dir: PathText = Field(default="runs/onecurve", min_length=1, description="the run directory")
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = Field(
        default="none", description="tracker to log to as well"
    )
    hang_timeout_seconds: Annotated[Number, Field(gt=0)] = Field(
        default=1800.0,
        description="a silent step longer than this ends the run; start, first step and saves have ten times as long",
    )
    join_timeout_seconds: Annotated[Number, Field(gt=0)] = Field(
        default=300.0,
        description="the longest that processes wait for each other at the start, before the first collective",
    )


# pydantic puts the fields of the last base first.
class Recipe(OutputKeys, EvaluationKeys, MemoryKeys, StepKeys, DataKeys, AdapterKeys, ModelKeys):
    """What is trained. Keys have the names that `transformers` users know; topology is never among them."""


# Keys that decide how fast and where a run goes, not what it learns. A resumed run may change them.
FREE_KEYS = frozenset({*MemoryKeys.model_fields, *OutputKeys.model_fields})


def find_nearest(name: str, names: Sequence[str]) -> str | None:
    """The name that `name` was most likely meant to be, if any is near."""
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return matches[0] if matches else None
