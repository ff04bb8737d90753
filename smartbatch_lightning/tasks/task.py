"""The interface through which data modules and models use a task."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MetricCollection
from transformers import PretrainedConfig

from smartbatch_lightning.tasks.losses import LossOptions
from smartbatch_lightning.tasks.source import ONE_COLUMN, LabelColumns, LabelSource


class Task(Protocol):
    """A task with its labels: how they are read, learnt, measured and written.

    A task is immutable: it is created from data (`from_columns`), from given names (`from_names`) or from a model
    (`from_config`). Labels are `(num_samples,)` integers for single-label tasks, `(num_samples, num_labels)` for
    multi-label tasks, and floats for regression.

    Attributes:
        label_names: Names of the model's outputs, in order.
    """

    @property
    def label_names(self) -> list[str]:
        """Names of the model's outputs, in order."""
        ...

    @property
    def description(self) -> str:
        """The task, in words."""
        ...

    @classmethod
    def from_columns(cls, columns: LabelColumns) -> "Task":
        """The task for the labels of a training split.

        Raises:
            ValueError: The labels cannot be learnt.
        """
        ...

    @classmethod
    def from_names(cls, names: Sequence[str], source: LabelSource = ONE_COLUMN) -> "Task":
        """The task for label names given by the user, for the labels of a source."""
        ...

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "Task | None":
        """The task that a model was trained for; None if its configuration does not say."""
        ...

    def aligned_with(self, trained: "Task") -> "Task":
        """The same task with labels in the order of a model trained for them.

        Raises:
            ValueError: The model was trained for other labels.
        """
        ...

    def config_fields(self) -> dict[str, Any]:
        """The task as fields of a model configuration, as arguments of `from_pretrained`."""
        ...

    def encode(self, columns: LabelColumns) -> NDArray[Any]:
        """Encodes the labels of a split as numbers. The first dimension is the samples.

        Raises:
            ValueError: A label is missing or unknown; the message names the row.
        """
        ...

    def decode(self, labels: NDArray[Any]) -> pa.Array:
        """Turns encoded labels, (num_samples, ...), back into labels as written in the data."""
        ...

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Groups by which a validation split is stratified. Shape (num_samples,)."""
        ...

    def label_counts(self, labels: NDArray[Any]) -> dict[str, int]:
        """Number of samples by label, for a report."""
        ...

    def with_loss(self, options: LossOptions) -> "Task":
        """The same task with the given loss options.

        Raises:
            ValueError: They do not fit the task, or name an unknown label.
        """
        ...

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted mean loss over the samples of a batch, a scalar; `logits` are (batch, num_labels)."""
        ...

    def sample_weights(self, labels: Tensor) -> Tensor | None:
        """Weight of each sample in the mean loss, (batch,); None if all are equal."""
        ...

    def scores(self, logits: Tensor) -> Tensor:
        """Input of the metrics, in float32: probabilities (batch, num_labels), or values in the data's unit."""
        ...

    def metric_labels(self, labels: Tensor) -> Tensor:
        """Labels in the form that metrics expect."""
        ...

    def configure_metrics(self) -> MetricCollection:
        """Metrics of scores and labels."""
        ...

    @property
    def monitored(self) -> str:
        """The one of these metrics that decides which weights are best."""
        ...

    @property
    def names_with_threshold(self) -> list[str]:
        """Labels that are predicted if their probability is above a threshold; may be empty."""
        ...

    def predict_labels(self, scores: NDArray[Any], thresholds: Mapping[str, float] | None = None) -> NDArray[Any]:
        """Predicted labels, as input for `decode`.

        Args:
            scores: As returned by `scores`.
            thresholds: Thresholds by label, instead of the default decision.
        """
        ...

    def predict(self, logits: Tensor) -> dict[str, Tensor]:
        """Predictions for each sample, by name, in float32; the first dimension is the batch."""
        ...

    def prediction_columns(self, predicted: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """The results of `predict` as table columns: `prediction`, and for some tasks `probability_NAME`."""
        ...
