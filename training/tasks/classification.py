"""Classification: what all tasks share that give each row one label, several labels, or a number.

What a row holds beside its label is the business of the task: a text, an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from onecurve.training.architectures import list_heads
from onecurve.training.errors import BadInput
from onecurve.training.recipe import Files, Number, Recipe
from onecurve.training.tasks.base import Forward, Rows, Task, pick_example, to_float32

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from onecurve.training.tasks.base import Array

_MAX_CLASSES_SHOWN = 50
_MAX_LABELS_CHECKED = 12


class ClassificationRecipe(Recipe):
    """The keys of labels."""

    label_column: str | Files = Field(default="label", description="column with the label, or several columns of 0/1")
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = Field(
        default="single_label_classification", description="the kind of label, in transformers' words"
    )
    label_smoothing_factor: Annotated[Number, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the label spread evenly"
    )
    class_weights: Literal["balanced"] | dict[str, Annotated[Number, Field(gt=0)]] | None = Field(
        default=None, description="'balanced', or a weight for each label"
    )


class Classification(Task):
    """Rows -> classes or numbers.

    A task names its inputs in `columns`, looks at them in `find_row_problem` and `check`, and encodes them.

    Facts: "label_names", in the order of the model's outputs; empty for regression. "class_weights", one for each of them.
    """

    recipe: ClassificationRecipe
    recipe_class: ClassVar[type[Recipe]] = ClassificationRecipe
    main_metrics = ("loss", "accuracy", "f1_macro", "matthews_correlation", "mse", "mae", "pearson")

    def __init__(self, recipe: ClassificationRecipe) -> None:
        super().__init__(recipe)
        self.problem_type = recipe.problem_type
        self.label_columns = self.columns(recipe)["label_column"]
        self._kept_weights: tuple[list[float], torch.Tensor] | None = None

    @property
    def label_names(self) -> list[str]:
        """Name of each class; empty for regression."""
        names: list[str] = self.facts.get("label_names", [])
        return names

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head."""
        return 1 if self.problem_type == "regression" else len(self.label_names)

    # Declarations ---------------------------------------------------------------------------------------------------

    @classmethod
    def find_contradictions(cls, recipe: Any) -> list[str]:
        """Keys that only one kind of label has, and a label that is read as an input too."""
        is_single = recipe.problem_type == "single_label_classification"
        problems = []
        labels = cls.name_labels(recipe)["label_column"]
        if len(labels) > 1 and recipe.problem_type != "multi_label_classification":
            problems.append("label_column: several columns need problem_type: multi_label_classification")
        for key, inputs in cls.columns(recipe, with_targets=False).items():
            kind = key.removesuffix("_column")
            problems += [
                f"label_column: {name!r} is read as {kind} as well; the label would be in its own {kind}"
                for name in labels
                if name in inputs
            ]
        if recipe.class_weights is not None and not is_single:
            problems.append("class_weights: only problem_type single_label_classification has them")
        if recipe.label_smoothing_factor and not is_single:
            problems.append("label_smoothing_factor: only problem_type single_label_classification has it")
        return problems

    @staticmethod
    def name_labels(recipe: ClassificationRecipe) -> dict[str, list[str]]:
        """The columns of labels, by the key that names them."""
        names = recipe.label_column
        return {"label_column": [names] if isinstance(names, str) else list(names)}

    def metric_names(self) -> list[str]:
        """What is measured for this kind of label."""
        from onecurve.training.tasks.metrics import metric_names

        return metric_names(self.problem_type)

    def find_label_problem(self, row: Mapping[str, Any]) -> str | None:
        """A label that can't be one."""
        from onecurve.training.tasks.labels import find_label_problem

        is_indicator = len(self.label_columns) > 1
        problems = (
            find_label_problem(row.get(name), name, self.problem_type, is_indicator) for name in self.label_columns
        )
        return next((problem for problem in problems if problem is not None), None)

    # Rows -> examples -----------------------------------------------------------------------------------------------

    def read_config(self, config: Any) -> None:
        """The labels that the model's head already has, if it has one."""
        if _has_head(config) and config.id2label:
            self.model_facts = {"label_names": [config.id2label[number] for number in range(config.num_labels)]}

    def learn(self, rows: Rows) -> dict[str, Any]:
        """Names of the classes: in the model's order where its head has just these, else sorted."""
        from onecurve.training.tasks import labels

        if self.problem_type == "regression":
            return {"label_names": []}
        if len(self.label_columns) > 1:
            return {"label_names": self.label_columns}
        names = labels.find_class_names(rows, self.label_columns[0], self.problem_type == "multi_label_classification")
        if (line := labels.describe_near_duplicates(names)) is not None:
            self.notes["labels"] = f"{rows.origin}: {line}"
        known = self.model_facts.get("label_names", [])
        return {"label_names": known if set(known) == set(names) and len(known) == len(names) else names}

    def check(self, rows: Rows) -> None:
        """Labels of every row."""
        self.encode_labels(rows)

    def encode_labels(self, rows: Rows) -> Array:
        """Labels as the loss takes them.

        Returns:
            [rows] int64 class numbers; [rows, num_labels] float32 of 0/1 for multi-label; [rows] float32 for regression.

        Raises:
            BadInput: naming the first row whose label is missing, unknown or no number.
        """
        from onecurve.training.tasks import labels

        if self.problem_type == "regression":
            return labels.encode_numbers(rows, self.label_columns[0])
        if len(self.label_columns) > 1:
            return labels.encode_indicators(rows, self.label_columns)
        if self.problem_type == "multi_label_classification":
            return labels.encode_lists(rows, self.label_columns[0], self.label_names)
        return labels.encode_classes(rows, self.label_columns[0], self.label_names)

    def strata(self, rows: Rows) -> Array | None:
        """The class of each row, where it has one."""
        return self.encode_labels(rows) if self.problem_type == "single_label_classification" else None

    def conclude(self, examples: Mapping[str, Any]) -> None:
        """Class weights."""
        from onecurve.training.tasks.labels import compute_class_weights

        if self.recipe.class_weights is not None:
            weights = compute_class_weights(self.recipe.class_weights, self.label_names, examples["labels"][:])
            self.facts["class_weights"] = weights

    def counts(self, examples: Mapping[str, Any]) -> Array:
        """1, or the weight of the example's class."""
        import numpy as np

        if "class_weights" not in self.facts:
            return super().counts(examples)
        weights: Array = np.array(self.facts["class_weights"])[examples["labels"][:]]
        return weights

    # Model ----------------------------------------------------------------------------------------------------------

    def configure(self, config: Any) -> None:
        """A head with an output for each class."""
        config.num_labels = self.num_labels
        config.problem_type = self.problem_type
        if self.label_names:
            config.id2label = dict(enumerate(self.label_names))
            config.label2id = {name: number for number, name in enumerate(self.label_names)}

    def describe_head(self, config: Any) -> str | None:
        """A head that is replaced, or whose labels have other names."""
        if not _has_head(config):
            return None
        if config.num_labels != self.num_labels:
            return f"The model's head has {config.num_labels} outputs, this task needs {self.num_labels}: a new head is trained."
        known = self.model_facts.get("label_names")
        if self.label_names and known != self.label_names:
            return f"The model's head had the labels {known}; its outputs are trained on as {self.label_names}."
        return None

    def check_head(self, config: Any) -> None:
        """A head with just these labels, in this order."""
        if not _has_head(config):
            raise BadInput("--eval_only: the model has no classification head; train it first")
        names = [config.id2label[number] for number in range(config.num_labels)]
        if config.num_labels != self.num_labels or (self.label_names and names != self.label_names):
            raise BadInput(
                f"--eval_only: the model's labels are {names}, the data's are {self.label_names or 'numbers'}"
            )

    def forward(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], wants_results: bool = False
    ) -> Forward:
        """Results are "prediction", "score", and "label" in an evaluation or else "probabilities"."""
        logits = to_float32(model(**self.model_inputs(batch)).logits)
        labels = batch.get("labels")
        results = self.read_logits(logits, with_probabilities=labels is None) if wants_results else {}
        if labels is None:
            return Forward(None, results)
        return Forward(self.example_losses(logits, labels), {"label": labels, **results})

    def example_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[examples] loss of each example, in the type of the logits.

        Args:
            logits: [examples, num_labels] outputs of the model, float32 or wider.
            labels: [examples] or [examples, num_labels], as `encode_labels` made them.
        """
        import torch.nn.functional as F

        if self.problem_type == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")
        if self.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=-1)
        weight = self._class_weights_like(logits)
        smoothing = self.recipe.label_smoothing_factor
        return F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing, reduction="none")

    def _class_weights_like(self, logits: torch.Tensor) -> torch.Tensor | None:
        """[num_labels] weights of the classes on the device of the logits; None without weights.

        They are copied once: a copy to a GPU waits for everything that is queued there.
        """
        import torch

        weights, kept = self.facts.get("class_weights"), self._kept_weights
        if weights is None:
            return None
        if kept is None or kept[0] is not weights or (kept[1].dtype, kept[1].device) != (logits.dtype, logits.device):
            kept = (weights, torch.as_tensor(weights, dtype=logits.dtype, device=logits.device))
            self._kept_weights = kept
        return kept[1]

    def read_logits(self, logits: torch.Tensor, with_probabilities: bool) -> dict[str, torch.Tensor]:
        """What the logits [examples, num_labels] say: "prediction", "score" and, if wanted, "probabilities" of one label."""
        import torch

        if self.problem_type == "regression":
            return {"prediction": logits.squeeze(-1), "score": logits.squeeze(-1)}
        if self.problem_type == "multi_label_classification":
            probabilities = torch.sigmoid(logits)
            return {"prediction": (logits > 0).long(), "score": probabilities}
        probabilities = torch.softmax(logits, dim=-1)
        found = {"prediction": logits.argmax(dim=-1), "score": probabilities.amax(dim=-1)}
        return {**found, "probabilities": probabilities} if with_probabilities else found

    # Results --------------------------------------------------------------------------------------------------------

    def compute_metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Accuracy, F1 and kin, or errors and correlations."""
        from onecurve.training.tasks.metrics import build_metrics

        found: dict[str, float] = {}
        for metric in build_metrics(self.problem_type, self.num_labels):
            found.update(metric.compute(predictions=results["prediction"], references=results["label"]))
        return found

    def describe_predictions(self, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """In an evaluation label, prediction and score; else prediction, score and the probability of each class."""
        import numpy as np

        for number, prediction in enumerate(results["prediction"]):
            score = results["score"][number]
            line = {"prediction": self._name(prediction), "score": np.asarray(score, dtype=np.float64).tolist()}
            if "label" in results:
                yield {"label": self._name(results["label"][number]), **line}
                continue
            if self.problem_type != "single_label_classification":
                line.pop("score")
            probabilities = results["probabilities"][number] if "probabilities" in results else np.atleast_1d(score)
            named = zip(self.label_names, probabilities, strict=True) if self.label_names else ()
            yield {**line, **{f"probability_{name}": float(value) for name, value in named}}

    def prediction_example(self) -> dict[str, Any]:
        """A row with the first class, or with all of them where it may have several."""
        import numpy as np

        is_multi, count = self.problem_type == "multi_label_classification", self.num_labels
        results = {"prediction": [np.ones(count) if is_multi else 0], "score": [np.zeros(count) if is_multi else 0.0]}
        if self.problem_type == "single_label_classification":
            results["probabilities"] = [np.zeros(count)]
        return next(self.describe_predictions(results))

    def _name(self, value: Any) -> Any:
        """A label or prediction in the words of the data."""
        if self.problem_type == "regression":
            return float(value)
        if self.problem_type == "multi_label_classification":
            return [name for name, is_on in zip(self.label_names, value, strict=True) if is_on]
        return self.label_names[int(value)]

    def report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Precision, recall and F1 of each class, the confusion matrix (row is the label, column the prediction), calibration.

        For several labels the matrix of each is [[true negative, false positive], [false negative, true positive]];
        regression has none of them.
        """
        from onecurve.training.tasks.metrics.calibration import build_calibration
        from onecurve.training.tasks.metrics.classification import build_report

        if self.problem_type == "regression":
            return {}
        label, prediction, score = results["label"], results["prediction"], results["score"]
        is_multi = self.problem_type == "multi_label_classification"
        report = build_report(label, prediction, self.label_names, is_multi)
        if is_multi:
            return {**report, "calibration": build_calibration(score.ravel(), label.ravel() > 0, "each label")}
        return {**report, "calibration": build_calibration(score, label == prediction, "the predicted label")}

    def show_example(
        self, examples: Mapping[str, Any], number: int, results: Mapping[str, Any], processor: Any
    ) -> dict[str, str]:
        """Label and prediction, and the text if it is one."""
        [line] = self.describe_predictions(pick_example(results, number))
        named = {name: _show_label(line[name]) for name in ("label", "prediction")}
        return {**super().show_example(examples, number, results, processor), **named}

    def build_table(self, results: Mapping[str, Any]) -> Table | None:
        """For one label an example, the accuracy of each class."""
        import numpy as np
        from rich.table import Table
        from rich.text import Text

        if self.problem_type != "single_label_classification":
            return None
        table = Table("label", min_width=60)
        for heading in ("examples", "right", "accuracy"):
            table.add_column(heading, justify="right")
        for number, name in enumerate(self.label_names[:_MAX_CLASSES_SHOWN]):
            of_class = results["label"] == number
            right, count = int(np.sum(results["prediction"][of_class] == number)), int(np.sum(of_class))
            table.add_row(Text(name), str(count), str(right), f"{right / count:.3f}" if count else "-")
        return table

    def describe_facts(self) -> list[str]:
        """The labels."""
        shown = self.label_names[:_MAX_LABELS_CHECKED]
        more = " ..." if len(self.label_names) > len(shown) else ""
        return [f"labels    {', '.join(shown)}{more} ({self.num_labels} outputs)"]

    def describe_card(self) -> str:
        """The labels."""
        return f"Labels: {', '.join(self.label_names)}.\n\n" if self.label_names else ""


def _show_label(value: Any) -> str:
    """A label or prediction of `describe_predictions` in one line."""
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _has_head(config: Any) -> bool:
    return any("Classification" in name for name in list_heads(config))
