"""Single-label classification: every sample has one class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import PretrainedConfig

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.tasks.config import labels_from_config, labels_in_config, missing_problem_type_hint
from smartbatch_lightning.tasks.labels import (
    DELIMITERS,
    LISTS_REMEDY,
    LabelEncoder,
    Labels,
    are_written_lists,
    labels_in,
)
from smartbatch_lightning.tasks.losses import CrossEntropy, LossOptions
from smartbatch_lightning.tasks.source import ONE_COLUMN, LabelColumns, LabelSource
from smartbatch_lightning.tasks.task import Task

_PROBLEM_TYPE = "single_label_classification"
_MANY_CLASSES = 50


@dataclass(frozen=True)
class SingleLabelClassification(Task):
    """One class per sample, matched by name across splits, files and checkpoints.

    Attributes:
        labels: The encoder of class names.
        loss: The loss.
    """

    labels: LabelEncoder
    loss: CrossEntropy = field(default_factory=CrossEntropy)

    @property
    def label_names(self) -> list[str]:
        """Class names in the order of the logits."""
        return list(self.labels.names)

    @property
    def description(self) -> str:
        """The class names, in words."""
        return f"{len(self.label_names):,} classes, of which each sample has one: {join_quoted(self.label_names)}"

    @classmethod
    def from_columns(cls, columns: LabelColumns) -> "SingleLabelClassification":
        """Creates the task from a training split."""
        encoder = LabelEncoder.from_labels(_read_labels(columns))
        if columns.class_names is None:
            _warn_of_classes(encoder.names, len(columns.values))
        return cls(encoder)

    @classmethod
    def from_names(cls, names: Sequence[str], source: LabelSource = ONE_COLUMN) -> "SingleLabelClassification":
        """Creates the task from class names."""
        return cls(LabelEncoder.from_names(names))

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "SingleLabelClassification | None":
        """Creates the task that a model was trained for; None if its classes are `LABEL_0`, `LABEL_1` and so on.

        Raises:
            ValueError: It was trained for another task.
        """
        encoder = labels_from_config(config, _PROBLEM_TYPE)
        return None if encoder is None else cls(encoder)

    def aligned_with(self, trained: Task) -> "SingleLabelClassification":
        """The task with classes in the order of a model trained for them."""
        return replace(self, labels=self.labels.aligned_with(trained.label_names))

    def config_fields(self) -> dict[str, Any]:
        """Class names in both directions, `problem_type`, and how labels are written in the data."""
        return labels_in_config(self.labels, _PROBLEM_TYPE)

    def encode(self, columns: LabelColumns) -> NDArray[np.int64]:
        """Class number of each sample. Shape (num_samples,)."""
        return self.labels.encode(_read_labels(columns))

    def decode(self, labels: NDArray[Any]) -> pa.Array:
        """Classes as written in the data."""
        return self.labels.decode(labels)

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """The classes themselves."""
        return np.asarray(labels, np.int64)

    def label_counts(self, labels: NDArray[Any]) -> dict[str, int]:
        """Number of samples of each class."""
        counts = np.bincount(labels, minlength=len(self.label_names))
        return dict(zip(self.label_names, counts.tolist(), strict=True))

    def with_loss(self, options: LossOptions) -> "SingleLabelClassification":
        """The task with class weights, label smoothing or focal loss."""
        options.check_supported(_PROBLEM_TYPE, "class_weights", "label_smoothing", "focal_gamma")
        return replace(self, loss=CrossEntropy.from_options(options, self.label_names))

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return self.loss(logits, labels)

    def sample_weights(self, labels: Tensor) -> Tensor | None:
        """Class weight of each sample, (batch,); None if all are equal."""
        return self.loss.sample_weights(labels)

    def configure_metrics(self) -> MetricCollection:
        """Accuracy and macro F1, of probabilities."""
        num_labels = len(self.label_names)
        accuracy = MulticlassAccuracy(num_labels, average="micro")
        return MetricCollection({"accuracy": accuracy, "f1": MulticlassF1Score(num_labels, average="macro")})

    @property
    def monitored(self) -> str:
        """Macro F1."""
        return "f1"

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes, (batch, num_labels)."""
        return logits.softmax(-1)

    @property
    def names_with_threshold(self) -> list[str]:
        """The second of two classes; empty if there are more."""
        return self.label_names[1:] if len(self.label_names) == 2 else []

    def predict_labels(self, scores: NDArray[Any], thresholds: Mapping[str, float] | None = None) -> NDArray[np.int64]:
        """Number of the likeliest class, (num_samples,); with a threshold, whether the second class exceeds it."""
        if thresholds:
            return np.asarray(scores[:, 1] > thresholds[self.label_names[1]], np.int64)
        return np.asarray(scores.argmax(axis=1))


def _read_labels(columns: LabelColumns) -> Labels:
    if len(columns.names) > 1 or columns.delimiter is not None or columns.are_lists:
        what = f"label_column is {list(columns.names)}" if len(columns.names) > 1 else "label_delimiter is given"
        if columns.are_lists:
            what = f"the label column {columns.names[0]!r} of the split {columns.split!r} holds lists"
        several = "multi_label_classification"
        raise UsageError(
            f"{what}, but problem_type is {_PROBLEM_TYPE!r}, which has one label per sample. Give one column without a "
            f"delimiter, or set --data.problem_type={several}. {missing_problem_type_hint(several)}"
        )
    return labels_in(columns, columns.values)


def _warn_of_classes(names: Sequence[str], num_samples: int) -> None:
    """Warns of classes that look like several labels in one text, or that hardly ever recur."""
    recur = len(names) <= _MANY_CLASSES or 2 * len(names) <= num_samples
    if are_written_lists(names):
        rank_zero_warn(
            f"The {len(names):,} classes, such as {join_quoted(names[:3])}, are lists written as text, but are trained "
            f"as single classes. If a sample has several labels, {LISTS_REMEDY}."
        )
        return
    numbers = "numbers to predict, write them as in 1234.5 and set --data.problem_type=regression"
    for delimiter in DELIMITERS:
        parts = [part for name in names for part in name.split(delimiter)]
        several = sum(delimiter in name for name in names)
        if 2 * several > len(names) and 2 * len(set(parts)) <= len(parts):
            rank_zero_warn(
                f"Most of the {len(names):,} classes, such as {join_quoted(names[:3])}, look like several labels "
                f"separated by {delimiter!r}, but are trained as single classes. If they are several labels, set "
                f"--data.label_delimiter={delimiter!r}." + ("" if recur else f" If they are {numbers}.")
            )
            return
    if not recur:
        rank_zero_warn(
            f"There are {len(names):,} classes in {num_samples:,} samples, such as {join_quoted(names[:3])}. If they "
            f"are {numbers}; if the labels are in another column, set --data.label_column."
        )
