"""Text classification: one label, several labels, or a number for each text or pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from onecurve.training.config import Recipe, find_nearest
from onecurve.training.errors import BadInput
from onecurve.training.tasks.metrics import build_metrics, metric_names

Array = NDArray[Any]


class TextClassification:
    """Columns -> features, the loss of each example, and the metrics of text classification.

    Attributes:
        label_names: name of each class, in the order of the model's outputs; empty for regression.
        class_weights: [num_labels] weight of each class in the loss, or None.
    """

    model_class = AutoModelForSequenceClassification
    main_metrics = ("loss", "accuracy", "f1_macro", "matthews_correlation", "mse", "mae", "pearson")

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.problem_type = recipe.problem_type
        self.text_columns = [recipe.text_column] + ([recipe.text_pair_column] if recipe.text_pair_column else [])
        self.label_columns = (
            [recipe.label_column] if isinstance(recipe.label_column, str) else list(recipe.label_column)
        )
        self.label_names: list[str] = []
        self.class_weights: Array | None = None
        self._check_recipe()

    def _check_recipe(self) -> None:
        single = self.problem_type == "single_label_classification"
        if len(self.label_columns) > 1 and self.problem_type != "multi_label_classification":
            raise BadInput("label_column: several columns need problem_type: multi_label_classification")
        if self.recipe.class_weights is not None and not single:
            raise BadInput("class_weights: only single_label_classification has them")
        if self.recipe.label_smoothing_factor and not single:
            raise BadInput("label_smoothing_factor: only single_label_classification has it")
        wanted = self.recipe.metric_for_best_model
        if wanted is None or wanted.removeprefix("eval_") == "loss":
            return
        names = ["loss", *metric_names(self.problem_type)]
        if wanted.removeprefix("eval_") not in names:
            nearest = find_nearest(wanted.removeprefix("eval_"), names)
            raise BadInput(
                f"metric_for_best_model: {wanted} is not measured; there are {', '.join(f'eval_{name}' for name in names)}"
                + (f"; did you mean eval_{nearest}?" if nearest else "")
            )

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head."""
        return 1 if self.problem_type == "regression" else len(self.label_names)

    # Columns -> features ------------------------------------------------------------------------------------------

    def find_label_names(self, table: pa.Table, feature_names: Sequence[str] | None, origin: str) -> list[str]:
        """The classes of the training data, in the order of the model's outputs.

        Args:
            table: the training data.
            feature_names: names that the data set itself declares (datasets.ClassLabel), if any.
            origin: the file or split, for messages.
        """
        if self.problem_type == "regression":
            return []
        if len(self.label_columns) > 1:
            return self.label_columns
        column = table.column(self.label_columns[0])
        if self.problem_type == "multi_label_classification":
            if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
                raise BadInput(
                    f"{origin}: label_column {self.label_columns[0]!r} must hold a list of labels in each row, "
                    "or name several columns of 0 and 1"
                )
            column = pc.list_flatten(column)
        if feature_names is not None:
            return list(feature_names)
        values = pc.unique(column).drop_null().to_pylist()
        self._check_label_type(column.type, origin)
        if len(values) < 2:
            raise BadInput(f"{origin}: column {self.label_columns[0]!r} holds only the label {values}; two are needed")
        return [_to_name(value) for value in sorted(values)]

    def _check_label_type(self, kind: pa.DataType, origin: str) -> None:
        if pa.types.is_floating(kind):
            raise BadInput(
                f"{origin}: column {self.label_columns[0]!r} holds decimal numbers or has empty cells; classes are "
                "integers or strings. For numbers as targets set problem_type: regression"
            )
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_string(kind)):
            raise BadInput(f"{origin}: column {self.label_columns[0]!r} holds {kind}; labels are integers or strings")

    def encode_labels(self, table: pa.Table, feature_names: Sequence[str] | None, origin: str) -> Array:
        """Labels as the loss takes them.

        Returns:
            [rows] int64 class numbers; [rows, num_labels] float32 of 0/1 for multi-label; [rows] float32 for regression.

        Raises:
            BadInput: naming the first row whose label is missing, unknown or no number.
        """
        if self.problem_type == "regression":
            return self._encode_numbers(table, origin)
        if len(self.label_columns) > 1:
            return self._encode_indicators(table, origin)
        column = table.column(self.label_columns[0]).combine_chunks()
        if self.problem_type == "single_label_classification":
            self._check_nulls(column, self.label_columns[0], origin)
            return self._encode_classes(column, feature_names, np.arange(len(column)), origin)
        self._check_nulls(column, self.label_columns[0], origin)
        rows = np.repeat(np.arange(len(column)), pc.list_value_length(column).to_numpy(zero_copy_only=False))
        classes = self._encode_classes(column.flatten(), feature_names, rows, origin)
        labels = np.zeros((len(column), self.num_labels), dtype=np.float32)
        labels[rows, classes] = 1.0
        return labels

    def _encode_classes(self, values: pa.Array, feature_names: Sequence[str] | None, rows: Array, origin: str) -> Array:
        if feature_names is not None:
            classes = values.cast(pa.int64())
            known = pc.fill_null(pc.and_(pc.greater_equal(classes, 0), pc.less(classes, self.num_labels)), False)
            classes = pc.if_else(known, classes, pa.scalar(None, pa.int64()))
        else:
            self._check_label_type(values.type, origin)
            text = values.cast(pa.string())
            classes = pc.index_in(text, value_set=pa.array(self.label_names, pa.string())).cast(pa.int64())
        if classes.null_count:
            position = int(pc.index(pc.is_null(classes), True).as_py())
            value = values[position].as_py()
            nearest = find_nearest(str(value), self.label_names)
            hint = f"; did you mean {nearest!r}?" if nearest else ""
            raise BadInput(
                f"{origin}, row {rows[position] + 1}: label {value!r} is not one of the {self.num_labels} labels of the "
                f"training data, {_shorten(self.label_names)}{hint}"
            )
        return np.asarray(classes.to_numpy(zero_copy_only=False), dtype=np.int64)

    def _encode_indicators(self, table: pa.Table, origin: str) -> Array:
        columns = []
        for name in self.label_columns:
            column = table.column(name).combine_chunks()
            self._check_nulls(column, name, origin)
            if not (
                pa.types.is_integer(column.type)
                or pa.types.is_boolean(column.type)
                or pa.types.is_floating(column.type)
            ):
                raise BadInput(f"{origin}: column {name!r} must hold 0 and 1, it holds {column.type}")
            values = np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float32)
            wrong = np.flatnonzero((values != 0) & (values != 1))
            if wrong.size:
                raise BadInput(
                    f"{origin}, row {wrong[0] + 1}: column {name!r} must be 0 or 1, got {values[wrong[0]]:g}"
                )
            columns.append(values)
        return np.stack(columns, axis=1)

    def _encode_numbers(self, table: pa.Table, origin: str) -> Array:
        name = self.label_columns[0]
        column = table.column(name).combine_chunks()
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise BadInput(f"{origin}: column {name!r} must hold numbers for regression, it holds {column.type}")
        self._check_nulls(column, name, origin)
        values = np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float32)
        wrong = np.flatnonzero(~np.isfinite(values))
        if wrong.size:
            raise BadInput(
                f"{origin}, row {wrong[0] + 1}: column {name!r} must be a finite number, got {values[wrong[0]]}"
            )
        return values

    def _check_nulls(self, column: pa.Array, name: str, origin: str) -> None:
        if column.null_count:
            row = int(pc.index(pc.is_null(column), True).as_py()) + 1
            raise BadInput(f"{origin}, row {row}: column {name!r} is empty; every row needs a label")

    def strata(self, labels: Array) -> Array | None:
        """[rows] groups whose shares a split keeps; None where a random split is meant."""
        return labels if self.problem_type == "single_label_classification" else None

    def tokenize(self, tokenizer: Any, columns: Mapping[str, list[str]]) -> dict[str, list[list[int]]]:
        """Tokens of a batch of rows, cut to `max_length`, not padded."""
        texts = [columns[name] for name in self.text_columns]
        names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None and set(names) <= {"input_ids", "token_type_ids"}:
            # What transformers does in its call, without the offsets and masks that nobody reads.
            backend.no_padding()
            backend.enable_truncation(self.recipe.max_length, direction=tokenizer.truncation_side)
            encodings = backend.encode_batch_fast(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)))
            found = {"input_ids": [encoding.ids for encoding in encodings]}
            if "token_type_ids" in names:
                found["token_type_ids"] = [encoding.type_ids for encoding in encodings]
            return found
        encoded = tokenizer(*texts, truncation=True, max_length=self.recipe.max_length, padding=False)
        # The mask of an unpadded text is all ones; the collator makes it again.
        return {name: values for name, values in encoded.items() if name != "attention_mask"}

    def set_class_weights(self, labels: Array) -> None:
        """Resolve the recipe's class weights on the training labels.

        `balanced` is num_examples / (num_classes * examples of the class), scikit-learn's definition.
        """
        wanted = self.recipe.class_weights
        if wanted is None:
            return
        if wanted == "balanced":
            examples_per_class = np.bincount(labels, minlength=self.num_labels)
            self.class_weights = len(labels) / (self.num_labels * np.maximum(examples_per_class, 1))
            return
        unknown = [name for name in wanted if name not in self.label_names]
        missing = [name for name in self.label_names if name not in wanted]
        if unknown or missing:
            raise BadInput(
                f"class_weights: must name each label once; unknown {unknown}, missing {missing}, "
                f"labels are {_shorten(self.label_names)}"
            )
        self.class_weights = np.array([wanted[name] for name in self.label_names])

    def example_counts(self, labels: Array) -> Array | None:
        """[rows] what each example adds to the count that its step's loss is divided by; None means 1 each."""
        return None if self.class_weights is None else self.class_weights[labels]

    # Model and loss -----------------------------------------------------------------------------------------------

    def configure(self, config: Any) -> None:
        """Give the model's config the head that this task needs."""
        config.num_labels = self.num_labels
        config.problem_type = self.problem_type
        if self.label_names:
            config.id2label = dict(enumerate(self.label_names))
            config.label2id = {name: number for number, name in enumerate(self.label_names)}

    def example_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[examples] loss of each example, not averaged, in float32 or wider.

        Args:
            logits: [examples, num_labels] outputs of the model.
            labels: [examples] or [examples, num_labels], as `encode_labels` made them.
        """
        logits = logits.float() if logits.dtype != torch.float64 else logits
        if self.problem_type == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")
        if self.problem_type == "multi_label_classification":
            losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
            return losses.mean(dim=-1)
        weight = None
        if self.class_weights is not None:
            weight = torch.as_tensor(self.class_weights, dtype=logits.dtype, device=logits.device)
        return F.cross_entropy(
            logits, labels, weight=weight, label_smoothing=self.recipe.label_smoothing_factor, reduction="none"
        )

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the losses of a micro-batch; divide by the count of the whole step."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self.example_losses(model(**inputs).logits, batch["labels"]).sum()

    # Metrics ------------------------------------------------------------------------------------------------------

    def predict(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions and scores.

        Returns:
            The class and its probabilities [examples, num_labels]; for multi-label 0/1 [examples, num_labels] (probability
            above one half) and probabilities; for regression the number twice.
        """
        logits = logits.float() if logits.dtype != torch.float64 else logits
        if self.problem_type == "regression":
            return logits.squeeze(-1), logits.squeeze(-1)
        if self.problem_type == "multi_label_classification":
            return (logits > 0).long(), torch.sigmoid(logits)
        return logits.argmax(dim=-1), torch.softmax(logits, dim=-1)

    def build_metrics(self) -> list[Any]:
        """Local `evaluate` modules for this kind of label."""
        return build_metrics(self.problem_type, self.num_labels)

    def report(self, labels: Array, predictions: Array) -> dict[str, Any]:
        """Precision, recall and F1 of each class, and the confusion matrix: row is the label, column the prediction.

        For several labels the matrix of each is [[true negative, false positive], [false negative, true positive]];
        regression has neither.
        """
        if self.problem_type == "regression":
            return {}
        from sklearn.metrics import classification_report, confusion_matrix, multilabel_confusion_matrix

        classes = range(self.num_labels)
        report = classification_report(
            labels, predictions, labels=classes, target_names=self.label_names, output_dict=True, zero_division=0
        )
        if self.problem_type == "multi_label_classification":
            matrices = multilabel_confusion_matrix(labels, predictions)
            matrix: Any = {name: table.tolist() for name, table in zip(self.label_names, matrices, strict=True)}
        else:
            matrix = confusion_matrix(labels, predictions, labels=classes).tolist()
        return {
            "per_class": {name: report[name] for name in self.label_names},
            "labels": self.label_names,
            "confusion_matrix": matrix,
        }

    def describe_prediction(self, label: Any, prediction: Any, score: Any) -> dict[str, Any]:
        """One line of eval_predictions.jsonl: names instead of numbers, score of what was predicted."""
        if self.problem_type == "regression":
            return {"label": float(label), "prediction": float(prediction), "score": float(score)}
        if self.problem_type == "multi_label_classification":
            return {
                "label": [name for name, is_on in zip(self.label_names, label, strict=True) if is_on],
                "prediction": [name for name, is_on in zip(self.label_names, prediction, strict=True) if is_on],
                "score": [float(value) for value in score],
            }
        return {
            "label": self.label_names[int(label)],
            "prediction": self.label_names[int(prediction)],
            "score": float(score[int(prediction)]),
        }


def _to_name(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown if len(names) <= 8 else f"{shown}, ... ({len(names)} in all)"
