"""What a data module and a model know of a task; everything else about it stays behind this."""

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
    """A form of the task with its labels: how they are read, learnt, measured and written.

    A task is immutable: made from data (`from_columns`), from given names (`from_names`) or from a model
    (`from_config`), and handed on. The shape of labels is the task's own: `(num_samples,)` integers for classes;
    `(num_samples, num_labels)` for several labels a sample; floats for regression.

    Attributes:
        label_names: Names of the model's outputs, in their order.
    """

    @property
    def label_names(self) -> list[str]:
        """Names of the model's outputs, in their order."""
        ...

    @property
    def description(self) -> str:
        """What is learnt, in words."""
        ...

    @classmethod
    def from_columns(cls, columns: LabelColumns) -> "Task":
        """The task of a training split's labels.

        Raises:
            ValueError: The labels cannot be learnt.
        """
        ...

    @classmethod
    def from_names(cls, names: Sequence[str], source: LabelSource = ONE_COLUMN) -> "Task":
        """The task of names that a user gives, for the labels of a source."""
        ...

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "Task | None":
        """The task that a model was trained for; None where its configuration does not say."""
        ...

    def aligned_with(self, trained: "Task") -> "Task":
        """The same labels in the order of a model that was trained for them.

        Raises:
            ValueError: It was trained for others.
        """
        ...

    def config_fields(self) -> dict[str, Any]:
        """What a model's configuration holds of the task, as `from_pretrained` takes it."""
        ...

    def encode(self, columns: LabelColumns) -> NDArray[Any]:
        """Labels of a split as numbers. The first dimension is the samples.

        Raises:
            ValueError: A label is missing or unknown; the message names the row.
        """
        ...

    def decode(self, labels: NDArray[Any]) -> pa.Array:
        """Numbers of labels, (num_samples, ...), as they stood in the data."""
        ...

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """What a validation split keeps the shares of. Shape (num_samples,)."""
        ...

    def label_counts(self, labels: NDArray[Any]) -> dict[str, int]:
        """Samples by label, for a report."""
        ...

    def with_loss(self, options: LossOptions) -> "Task":
        """The same task with the loss that a user asks for.

        Raises:
            ValueError: It does not fit the task, or names a label that is not there.
        """
        ...

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the samples of a batch, by their weights, a scalar; `logits` are (batch, num_labels)."""
        ...

    def sample_weights(self, labels: Tensor) -> Tensor | None:
        """What each sample counts for in the mean loss, (batch,); None where all count alike."""
        ...

    def scores(self, logits: Tensor) -> Tensor:
        """What metrics are computed of, in float32: probabilities (batch, num_labels), or values in the data's unit."""
        ...

    def metric_labels(self, labels: Tensor) -> Tensor:
        """Labels as metrics take them."""
        ...

    def configure_metrics(self) -> MetricCollection:
        """Metrics of scores and labels."""
        ...

    @property
    def monitored(self) -> str:
        """The metric of these that tells which weights are best."""
        ...

    @property
    def names_with_threshold(self) -> list[str]:
        """Labels that are predicted where their probability is above a threshold; there may be none."""
        ...

    def predict_labels(self, scores: NDArray[Any], thresholds: Mapping[str, float] | None = None) -> NDArray[Any]:
        """What is predicted, as `decode` takes it.

        Args:
            scores: As `scores` gives them.
            thresholds: By label, in place of the usual decision.
        """
        ...

    def predict(self, logits: Tensor) -> dict[str, Tensor]:
        """What is predicted for each sample, by name; the first dimension is the batch, in float32."""
        ...

    def prediction_columns(self, predicted: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """What `predict` gave, as the columns of a table: `prediction`, and perhaps `probability_NAME`."""
        ...
