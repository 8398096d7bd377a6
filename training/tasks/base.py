"""The contract of a task: all that training, evaluation, prediction and the launcher must know of what a model learns.

A task is one class in one file. Nothing outside that file knows a task's keys, labels or metrics. A file of a task imports
torch and transformers inside functions only, so that the launcher knows its keys and columns at once.

The life of a task::

    task = MyTask(recipe)
    task.read_config(config)                    the pretrained model's config: labels that it already knows
    task.facts = task.learn(rows)               once, on the training data: names of classes, ...
    task.encode(rows, processor)                rows -> examples: features, targets; kept on disk
    task.conclude(examples)                     facts that need the chosen training examples: class weights, ...
    task.counts(examples)                       what each example adds to the number that its step's loss is divided by
    task.draw(features, numbers, epoch)         what an epoch changes of some examples: masks, crops
    task.configure(config)                      the head
    task.forward(model, batch)                  one forward for training, evaluation and prediction
    task.compute_metrics(results)
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from onecurve.training.recipe import Recipe
from onecurve.training.tasks.example_random import EVALUATION_EPOCH, build_generator
from onecurve.training.tasks.forward import NO_TARGET, Forward, pick_example, sum_by_example, to_float32
from onecurve.training.tasks.processors import TOKENIZER, ProcessorKind
from onecurve.training.tasks.rows import Rows
from onecurve.training.tasks.token_counter import TokenCounter, estimate_text

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from rich.table import Table

    from onecurve.training.survey import Survey
    from onecurve.training.tasks.fits.fit import Fit

    Array = NDArray[Any]

# What a task needs comes from here, so that a task of your own has one import.
__all__ = [
    "EVALUATION_EPOCH", "NO_TARGET", "Forward", "Rows", "Task", "TokenCounter", "build_generator", "estimate_text",
    "pick_example", "sum_by_example", "to_float32",
]  # fmt: skip

_NUM_TOKENS_SHOWN = 12


class Task(ABC):
    """What a model learns to do.

    Attributes:
        recipe_class: the recipe with this task's own keys.
        unread_keys: keys of every recipe that this task does not read; a recipe that sets one is refused. Only tasks with a
            loss for each token read loss_chunk_tokens, and hand it to training/tasks/token_losses.py.
        main_metrics: those that people look at first, without prefix.
        pipeline_tag: the hub's name for the task, in the model card.
        auto_class: the class of transformers that loads the model, by name.
        processor_kind: what makes of a row what the model reads. `processor` is one of that kind everywhere: a tokenizer where
            the task says nothing else.
        input_feature: the feature that holds what the model reads. Two examples in which it is the same are the same.
        rows_at_once: rows that `encode` gets at once when data is prepared: all that they give is in memory together.
        batches_take_long: whether a core makes batches more slowly than a GPU takes them: then processes beside the training's
            make them where a GPU waits (dataloader_num_workers).
        peft_task_type: PEFT's name for the task.
        has_new_head: whether the model's head is trained for the task, and so is not in most pretrained models.
        ragged_results: results with a value for each token of an example.
        unbatched_features: features of prepared examples that no batch carries; `draw` gets them, and they stand beside the
            results. What joins the windows of a text again is one, such as where its tokens stand in it.
        converses: whether `answer` answers messages.
        predicts_tokens: whether the model has an output for each word of its vocabulary at each token, and losses come from
            training/tasks/token_losses.py.
        model_kinds: what kinds of transformer can learn it.
        one_example_a_row: whether each row gives one example. Where it does not, their number is known when they are prepared.
        packs: whether `forward` takes packed batches as well. Its model must be causal and give `logits` for each token.
        facts: what was learned from the training data; plain values, kept with the prepared data.
        notes: lines for the user about the data, each by a word for what it is about; kept with the prepared data.
        model_facts: what the pretrained model's config says of this task, such as its labels; plain values.
    """

    recipe_class: ClassVar[type[Recipe]] = Recipe
    unread_keys: ClassVar[frozenset[str]] = frozenset({"loss_chunk_tokens"})
    main_metrics: ClassVar[tuple[str, ...]] = ("loss",)
    pipeline_tag: ClassVar[str] = ""
    auto_class: ClassVar[str] = "AutoModel"
    processor_kind: ClassVar[ProcessorKind] = TOKENIZER
    input_feature: ClassVar[str] = "input_ids"
    rows_at_once: ClassVar[int] = 2_000
    batches_take_long: ClassVar[bool] = False
    peft_task_type: ClassVar[str | None] = None
    has_new_head: ClassVar[bool] = True
    ragged_results: ClassVar[frozenset[str]] = frozenset()
    unbatched_features: ClassVar[frozenset[str]] = frozenset({"row"})
    model_kinds: ClassVar[frozenset[str]] = frozenset({"encoder", "decoder", "encoder-decoder"})
    converses: ClassVar[bool] = False
    one_example_a_row: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    predicts_tokens: ClassVar[bool] = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.facts: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        self.model_facts: dict[str, Any] = {}

    # Declarations ---------------------------------------------------------------------------------------------------

    @classmethod
    def find_contradictions(cls, recipe: Any) -> list[str]:
        """Problems between keys that are each valid alone, one line each.

        Args:
            recipe: a `recipe_class`.
        """
        return []

    @classmethod
    @abstractmethod
    def columns(cls, recipe: Any, with_targets: bool = True) -> dict[str, list[str]]:
        """Names of the columns that are read, by the recipe key that names them.

        Args:
            recipe: a `recipe_class`.
            with_targets: whether those of labels are among them; a file to predict has none.
        """

    @abstractmethod
    def metric_names(self) -> list[str]:
        """What `compute_metrics` finds, without prefix; the loss is always found."""

    @classmethod
    def find_fits(cls, table: Survey) -> list[Fit]:
        """Ways in which this task could read a table, the likeliest first; `onecurve init` asks every task of the project."""
        return []

    def find_row_problem(self, row: Mapping[str, Any], with_targets: bool = True) -> str | None:
        """What is wrong with a row of a file, as far as can be seen without the other rows; None where nothing is.

        `onecurve check` asks this of the first rows of a file, and `onecurve predict` of all of them.
        """
        return None

    def estimate_examples(self, row: Mapping[str, Any], counter: TokenCounter) -> list[list[int]]:
        """For each example of a row the tokens of each of its sequences, as far as they are known before it is prepared.

        `onecurve plan` asks this of the first rows of a file.
        """
        names = chain.from_iterable(self.columns(self.recipe, with_targets=False).values())
        return estimate_text([row.get(name) for name in names], counter, self.recipe.max_length)

    def named_files(self) -> Mapping[str, Path]:
        """The columns whose texts are paths of files, and the folder from which these lead. Prepared data is kept by such files
        too."""
        return {}

    # Rows -> examples -----------------------------------------------------------------------------------------------

    def read_config(self, config: Any) -> None:
        """Note in `model_facts` what the pretrained model's config says of this task. Prepared data is kept by it."""

    def fingerprint(self) -> str:
        """Changes whenever the file of a task outside the project does. Prepared data is kept by it."""
        name = self.recipe.task
        return "" if ":" not in name else hashlib.sha256(Path(inspect.getfile(type(self))).read_bytes()).hexdigest()

    def learn(self, rows: Rows) -> dict[str, Any]:
        """Facts of the training data that encoding needs, such as the names of classes.

        Raises:
            BadInput: naming the first row, or the column, at fault.
        """
        return {}

    def check(self, rows: Rows) -> None:
        """Refuse what `encode` would refuse, as far as that is quickly found; asked of each split before encoding.

        Raises:
            BadInput: naming the first row at fault.
        """

    def strata(self, rows: Rows) -> Array | None:
        """[rows] groups whose shares a split keeps; None splits at random."""
        return None

    @abstractmethod
    def encode(self, rows: Rows, processor: Any, with_targets: bool = True) -> dict[str, Any]:
        """Examples of some rows.

        Returns:
            By the name of the feature an array [examples, ...], or a list of integer or float lists of any length, one for
            each example, or one of bytes, such as texts in UTF-8. "row" gives the position among `rows` that each example
            comes from, where examples are not rows: a long text may become several windows. Without targets each row has
            at least one example, and those of a row follow each other.
        """

    def conclude(self, examples: Mapping[str, Any]) -> None:
        """Add to `facts` what needs the chosen training examples, such as class weights."""

    def lengths(self, examples: Mapping[str, Any]) -> Array:
        """[examples] tokens of each example: its cost, by which batches are planned."""
        lengths: Array = examples["input_ids"].lengths
        return lengths

    def measure(self, encoded: Mapping[str, Any]) -> Array:
        """[examples] tokens of each example that `encode` has just returned, by which a prediction's batches are planned."""
        import numpy as np

        return np.array([len(tokens) for tokens in encoded["input_ids"]])

    def counts(self, examples: Mapping[str, Any]) -> Array:
        """[examples] what each adds to the number that its step's loss is divided by: 1, a weight, its targets.

        Where that changes from epoch to epoch, it is that of EVALUATION_EPOCH.
        """
        import numpy as np

        return np.ones(len(next(iter(examples.values()))))

    def draw_counts(self, examples: Mapping[str, Any], numbers: Array, epoch: int) -> Array | None:
        """[numbers] counts of some examples in an epoch, where `draw` changes them; None where they are those of `counts`.

        Every process asks this for all examples of each step.
        """
        return None

    # Examples -> batches --------------------------------------------------------------------------------------------

    def draw(self, features: Mapping[str, Any], numbers: Array, epoch: int) -> Mapping[str, Any]:
        """Some examples as an epoch shows them: with its masks, or its crops of images. By default as they were encoded.

        A pure function of the recipe, each example and the epoch, or topologies and resumed runs would differ: random numbers
        come from `build_generator`. Called on the host, possibly in a worker of the loader; not for a prediction.

        Args:
            features: of a micro-batch, memory-mapped: arrays [examples, ...] or lists of arrays. They must not be changed.
            numbers: [examples] of these in their split.
            epoch: from 0, or EVALUATION_EPOCH.
        """
        return features

    def configure_processor(self, processor: Any) -> None:
        """Give the processor what the recipe says of it, such as a chat template; it is saved beside the model.

        By default a tokenizer reads special tokens in texts as plain text.

        Raises:
            BadInput: the recipe names what the processor can't have.
        """
        from onecurve.training.tasks.special_tokens import split_special_tokens

        split_special_tokens(processor)

    def padding_side(self, processor: Any) -> str:
        """Where shorter examples of a batch are padded: "left" or "right"."""
        side: str = processor.padding_side
        return side

    def pad_values(self, processor: Any) -> dict[str, int]:
        """What stands in padded places of each feature; 0 where none is named."""
        return {"input_ids": processor.pad_token_id, "labels": NO_TARGET}

    def add_to_batch(self, batch: dict[str, Any]) -> None:
        """Add to a collated batch what `forward` would have to wait for a GPU to find, such as where targets are.

        Called on the host; tensors that are added go to the device with the others.
        """

    def sequence_lengths(self, features: Mapping[str, Any]) -> Sequence[Sequence[int]] | None:
        """[examples] tokens of each sequence of an example; None where each example is one sequence.

        Dropout masks are by example: they need to know which rows of the model's tensors are whose.

        Args:
            features: of some examples, before they are collated.
        """
        return None

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What a batch gives to the model: all but targets, and what only the task reads."""
        return {name: values for name, values in batch.items() if name != "labels"}

    # Model ----------------------------------------------------------------------------------------------------------

    def configure(self, config: Any) -> None:
        """Give the model's config the head that this task needs."""

    def describe_head(self, config: Any) -> str | None:
        """What the user should know of the head before it is trained, such as that it is new; None for nothing.

        Args:
            config: as it was loaded, before `configure`.
        """
        return None

    def check_head(self, config: Any) -> None:
        """Refuse to evaluate a model whose head was not trained for this task.

        Raises:
            BadInput: it has none, or one for something else.
        """

    @abstractmethod
    def forward(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], wants_results: bool = False
    ) -> Forward:
        """Losses of a batch and, if wanted, what metrics and predictions need.

        Args:
            batch: padded features [examples, longest] int64 or dense ones [examples, ...]; "labels" only where there are
                targets. "attention_mask" is None where the model needs none.

                A task that packs also gets batches whose ragged features lie one behind the other, [1, tokens], and no
                mask, but "position_ids" [1, tokens] that begin anew with each sequence, "sequence_lengths" (integers of
                the host) and "sequence_offsets" [examples + 1] int32, where each begins and the last ends. All of them
                go to the model, whose attention keeps the sequences apart. `sum_by_example` adds up losses in either case.
        """

    def configure_model(self, model: Any, processor: Any) -> None:
        """Set what is saved beside the weights and is not part of the config, such as generation settings."""

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What `describe_predictions` needs of a batch without targets: by default the results of a forward."""
        return self.forward(model, batch, wants_results=True).results

    @property
    def generates(self) -> bool:
        """Whether an evaluation asks `generate` for each of its batches."""
        return False

    def generate(
        self, model: Any, batch: Mapping[str, torch.Tensor], is_sharded: bool = False
    ) -> Mapping[str, torch.Tensor]:
        """What the model writes for a batch of an evaluation: stands among the results, beside those of its forward.

        Args:
            model: without the wrapper of DDP or DeepSpeed, in evaluation mode, with an attention of transformers.
            is_sharded: whether all processes must run the same number of forwards.

        Returns:
            [examples, ...] tensors by name, of the same width in every batch.
        """
        raise NotImplementedError

    @property
    def num_samples(self) -> int:
        """Validation examples that `sample` lets the model continue at each evaluation."""
        return 0

    def sample(
        self, model: Any, examples: Mapping[str, Any], processor: Any, is_sharded: bool = False
    ) -> list[dict[str, Any]]:
        """Lines of samples.jsonl: what the model makes of a few validation examples, the same ones each time.

        Args:
            model: without the wrapper of DDP or DeepSpeed, in evaluation mode.
            examples: prepared validation examples.
            is_sharded: whether all processes must run the same number of forwards; all are asked for the same samples.
        """
        return []

    def answer(
        self,
        model: Any,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int | None,
        write: Callable[[str], None],
    ) -> str:
        """What the model answers to messages, each with "role" and "content"; only of a task that converses.

        Args:
            max_new_tokens: most tokens of the answer; None for what the recipe says.
            write: gets the answer's parts as they come.

        Raises:
            BadInput: the messages are too long for the model, or its chat template refuses them.
        """
        raise NotImplementedError

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the losses of a micro-batch; divide by the count of the whole step."""
        losses = self.forward(model, batch).losses
        assert losses is not None, "training data has targets"
        return losses.sum()

    # Results --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def compute_metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Metrics of an evaluation, without prefix.

        Args:
            results: by name, in the order of the data: an array [examples, ...], or for ragged results a list of arrays;
                and the unbatched features of the examples, as an array or a list of sequences.
        """

    @abstractmethod
    def describe_predictions(self, results: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """A line of eval_predictions.jsonl for each example, or for each row: plain values, names instead of numbers.

        Targets are among the results only in an evaluation. `onecurve predict` adds the entries as columns: without
        targets there must be a line for each row.
        """

    @abstractmethod
    def prediction_example(self) -> dict[str, Any]:
        """A line of `describe_predictions` without targets, with a typical value of each kind: the columns of a labelled file."""

    def report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The content of eval_report.json; plain values.

        `onecurve report` draws what it finds by these names, of any task: "per_class", by name "precision", "recall",
        "f1-score" and "support"; "labels" and "confusion_matrix", row is the label, column the prediction; "calibration", as
        training/tasks/metrics/calibration.py builds it.
        """
        return {}

    def show_example(
        self, examples: Mapping[str, Any], number: int, results: Mapping[str, Any], processor: Any
    ) -> dict[str, str]:
        """An evaluated example as people read it: by name what they see, such as "text", "label" and "prediction".

        Args:
            examples: prepared ones.
            number: of the example.
            results: as `compute_metrics` gets them, of all examples.
        """
        if "input_ids" not in examples:
            return {}
        return {"text": processor.decode(examples["input_ids"][[number]][0], skip_special_tokens=True)}

    def build_table(self, results: Mapping[str, Any]) -> Table | None:
        """A table that is printed at the end; None prints none."""
        return None

    def describe_left_out(self) -> str | None:
        """What the user should know of rows that gave no example, or only a part of one; None for nothing."""
        return None

    def describe_facts(self) -> list[str]:
        """Lines of `onecurve check --deep` about what was learned from the data: a word of 10 places, then what it is."""
        return []

    def describe_sample(self, examples: Mapping[str, Any], processor: Any) -> str:
        """How the first example begins, as the model reads it, in a line of `onecurve check --deep`."""
        first = examples["input_ids"][[0]][0][:_NUM_TOKENS_SHOWN].tolist()
        return f"{' '.join(processor.convert_ids_to_tokens(first))} ..."

    def describe_example(self, examples: Mapping[str, Any], processor: Any) -> Sequence[tuple[str, bool]] | None:
        """The first example as pieces of text, and which of them are targets; None for tasks whose targets are no tokens.

        `onecurve check --deep` prints it.
        """
        return None

    def describe_card(self) -> str:
        """Lines of the model card about labels and the like, in Markdown."""
        return ""
