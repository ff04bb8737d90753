"""The interface through which data modules and models use a task."""

from abc import abstractmethod
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
    multi-label tasks, and floats for regression. A class that inherits from this one has to define only what has no
    default.

    Attributes:
        label_names: Names of the model's outputs, in order.
    """

    @property
    @abstractmethod
    def label_names(self) -> list[str]:
        """Names of the model's outputs, in order."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The task, in words."""

    @classmethod
    @abstractmethod
    def from_columns(cls, columns: LabelColumns) -> "Task":
        """The task for the labels of a training split.

        Raises:
            ValueError: The labels cannot be learnt.
        """

    @classmethod
    @abstractmethod
    def from_names(cls, names: Sequence[str], source: LabelSource = ONE_COLUMN) -> "Task":
        """The task for label names given by the user, for the labels of a source."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: PretrainedConfig) -> "Task | None":
        """The task that a model was trained for; None if its configuration does not say."""

    @abstractmethod
    def aligned_with(self, trained: "Task") -> "Task":
        """The same task with labels in the order of a model trained for them.

        Raises:
            ValueError: The model was trained for other labels.
        """

    @abstractmethod
    def config_fields(self) -> dict[str, Any]:
        """The task as fields of a model configuration, as arguments of `from_pretrained`."""

    @abstractmethod
    def encode(self, columns: LabelColumns) -> NDArray[Any]:
        """Encodes the labels of a split as numbers. The first dimension is the samples.

        Raises:
            ValueError: A label is missing or unknown; the message names the row.
        """

    @abstractmethod
    def decode(self, labels: NDArray[Any]) -> pa.Array:
        """Turns encoded labels, (num_samples, ...), back into labels as written in the data."""

    @abstractmethod
    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Groups by which a validation split is stratified. Shape (num_samples,)."""

    @abstractmethod
    def label_counts(self, labels: NDArray[Any]) -> dict[str, int]:
        """Number of samples by label, for a report."""

    @abstractmethod
    def with_loss(self, options: LossOptions) -> "Task":
        """The same task with the given loss options.

        Raises:
            ValueError: They do not fit the task, or name an unknown label.
        """

    @abstractmethod
    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted mean loss over the samples of a batch, a scalar; `logits` are (batch, num_labels)."""

    def sample_weights(self, labels: Tensor) -> Tensor | None:
        """Weight of each sample in the mean loss, (batch,); None, the default, if all are equal."""
        return None

    @abstractmethod
    def scores(self, logits: Tensor) -> Tensor:
        """Input of the metrics, at least float32: probabilities (batch, num_labels), or values in original units."""

    def metric_labels(self, labels: Tensor) -> Tensor:
        """Labels in the form that metrics expect; by default as encoded."""
        return labels

    @abstractmethod
    def configure_metrics(self) -> MetricCollection:
        """Metrics of scores and labels."""

    @property
    @abstractmethod
    def monitored(self) -> str:
        """The one of these metrics that decides which weights are best."""

    @property
    def names_with_threshold(self) -> list[str]:
        """Labels that are predicted if their probability is above a threshold; none by default."""
        return []

    @abstractmethod
    def predict_labels(self, scores: NDArray[Any], thresholds: Mapping[str, float] | None = None) -> NDArray[Any]:
        """Predicted labels, as input for `decode`.

        Args:
            scores: As returned by `scores`.
            thresholds: Thresholds by label, instead of the default decision.
        """

    def predict(self, logits: Tensor) -> dict[str, Tensor]:
        """Predictions for each sample, by name; the first dimension is the batch. By default the probabilities."""
        return {"probabilities": self.scores(logits).float()}

    def prediction_columns(self, predicted: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """The results of `predict` as table columns: `prediction`, and by default `probability_NAME` for each label."""
        probabilities = predicted["probabilities"]
        return {
            "prediction": self.decode(self.predict_labels(probabilities)),
            **{f"probability_{name}": probabilities[:, number] for number, name in enumerate(self.label_names)},
        }
