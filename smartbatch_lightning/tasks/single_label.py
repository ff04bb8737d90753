"""Single-label classification: every sample is of one class."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import PretrainedConfig

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.tasks.labels import LabelEncoder, LabelType
from smartbatch_lightning.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

_PROBLEM_TYPE = "single_label_classification"
_LABEL_TYPE = "label_type"  # of a model's configuration, beside `id2label`


@dataclass(frozen=True)
class SingleLabelClassification:
    """One class a sample, matched by name across splits, files and checkpoints.

    Attributes:
        labels: Names and numbers of the classes.
    """

    labels: LabelEncoder

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return list(self.labels.names)

    @classmethod
    def from_dataset(cls, dataset: "Dataset", column: str, split: str) -> "SingleLabelClassification":
        """The classes of a training split."""
        return cls(LabelEncoder.from_dataset(dataset, column, split))

    @classmethod
    def from_names(cls, names: Sequence[str]) -> "SingleLabelClassification":
        """The classes of given names."""
        return cls(LabelEncoder.from_names(names))

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "SingleLabelClassification | None":
        """The classes that a model was trained for; None where its names are `LABEL_0`, `LABEL_1` and so on.

        Raises:
            ValueError: It was trained for another task.
        """
        names = label_names_from_config(config)
        if config.problem_type not in (None, _PROBLEM_TYPE) or len(names) < 2:
            raise UsageError(
                f"the model was trained for {config.problem_type or 'regression'}, not for {_PROBLEM_TYPE}. Give a "
                "model that was, or one that is not fine-tuned."
            )
        if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
            return None
        label_type: LabelType = getattr(config, _LABEL_TYPE, "text")
        return cls(LabelEncoder(tuple(names), label_type))

    def aligned_with(self, trained: Task) -> "SingleLabelClassification":
        """The classes in the order of a model that was trained for the same."""
        names = trained.label_names
        if sorted(names) != sorted(self.label_names):
            raise UsageError(
                f"the model classifies into {join_quoted(names)}, but the data has {join_quoted(self.label_names)}. "
                "Use the data it was trained for, or a checkpoint trained for these; where only the names differ, set "
                "--data.label_names to the model's."
            )
        return replace(self, labels=self.labels.aligned_with(names))

    def config_fields(self) -> dict[str, Any]:
        """Names both ways, `problem_type`, and how labels stand in the data."""
        return {
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: number for number, name in enumerate(self.label_names)},
            "problem_type": _PROBLEM_TYPE,
            _LABEL_TYPE: self.labels.label_type,
        }

    def encode(self, dataset: "Dataset", column: str, split: str) -> NDArray[np.int64]:
        """Number of each sample's class. Shape (num_samples,)."""
        return self.labels.encode(dataset, column, split)

    def decode(self, labels: NDArray[Any]) -> pa.Array:
        """Classes of numbers, as they stood in the data."""
        return self.labels.decode(labels)

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """The classes themselves."""
        return np.asarray(labels, np.int64)

    def label_counts(self, labels: NDArray[Any]) -> dict[str, int]:
        """Samples of each class."""
        counts = np.bincount(labels, minlength=len(self.label_names))
        return dict(zip(self.label_names, counts.tolist(), strict=True))

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits, labels)

    def configure_metrics(self) -> MetricCollection:
        """Accuracy and macro F1."""
        num_labels = len(self.label_names)
        accuracy = MulticlassAccuracy(num_labels, average="micro")
        return MetricCollection({"accuracy": accuracy, "f1": MulticlassF1Score(num_labels, average="macro")})

    def predict(self, logits: Tensor) -> dict[str, Tensor]:
        """Probabilities of the classes, (batch, num_labels)."""
        return {"probabilities": logits.float().softmax(-1)}

    def prediction_columns(self, predicted: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """The likeliest class as it stands in the data, and each one's probability."""
        probabilities = predicted["probabilities"]
        return {
            "label": self.decode(probabilities.argmax(axis=1)),
            **{f"probability_{name}": probabilities[:, number] for number, name in enumerate(self.label_names)},
        }


def label_names_from_config(config: PretrainedConfig) -> list[str]:
    """Names of a model's outputs, in their order."""
    return [name for _, name in sorted((int(number), str(name)) for number, name in (config.id2label or {}).items())]
