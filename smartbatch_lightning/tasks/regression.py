"""Regression: every sample has one or more numbers."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import (
    MeanAbsoluteError,
    MeanSquaredError,
    Metric,
    MetricCollection,
    PearsonCorrCoef,
    SpearmanCorrCoef,
)
from transformers import PretrainedConfig

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.tasks.config import check_problem_type, label_names_from_config, names_in_config
from smartbatch_lightning.tasks.losses import LossOptions, check_shape
from smartbatch_lightning.tasks.source import (
    ONE_COLUMN,
    LabelColumns,
    LabelSource,
    as_numbers,
    first_true,
    flattened,
    is_text,
    order_of,
)
from smartbatch_lightning.tasks.standardization import STANDARDIZATION_FIELDS, Standardization
from smartbatch_lightning.tasks.task import Task

_PROBLEM_TYPE = "regression"
_STRATA = 10


@dataclass(frozen=True)
class Regression(Task):
    """One or more targets per sample, in one column each or in a column of lists.

    If targets are standardized, so are encoded labels, logits and the loss; scores, metrics and predictions are in the
    data's unit.

    Attributes:
        names: Target names in the order of the logits.
        standardization: Mean and deviation of the targets; None if they are not standardized.
    """

    names: tuple[str, ...]
    standardization: Standardization | None = None

    @property
    def label_names(self) -> list[str]:
        """Target names in the order of the logits."""
        return list(self.names)

    @property
    def description(self) -> str:
        """The target names, in words."""
        how = "" if self.standardization is None else ", standardized in training, predicted in the original units"
        return f"{len(self.names):,} target{'s' if len(self.names) > 1 else ''}: {join_quoted(self.names)}{how}"

    @classmethod
    def from_columns(cls, columns: LabelColumns) -> "Regression":
        """Creates the task from a training split, with column names as target names."""
        targets = _read_targets(columns)
        if len(targets) and (targets == targets[0]).all():
            raise UsageError(
                f"all targets of the split {columns.split!r} are {targets[0].tolist()}; there is nothing to learn. Set "
                "--data.label_column."
            )
        names = columns.names
        if len(names) == 1 and targets.shape[1] > 1:
            names = tuple(f"{names[0]}_{number}" for number in range(targets.shape[1]))
        return cls(names)

    @classmethod
    def from_names(cls, names: Sequence[str], source: LabelSource = ONE_COLUMN) -> "Regression":
        """Creates the task from target names."""
        texts = tuple(str(name) for name in names)
        if not texts or len(set(texts)) < len(texts):
            raise UsageError(f"label_names is {join_quoted(texts) or 'empty'}; give the name of each target once.")
        return cls(texts)

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "Regression":
        """Creates the task that a model was trained for.

        Raises:
            ValueError: It was trained for another task.
        """
        check_problem_type(config, _PROBLEM_TYPE)
        return cls(tuple(label_names_from_config(config)), Standardization.from_fields(config.to_dict()))

    def standardized(self, columns: LabelColumns, rows: NDArray[np.int64] | None = None) -> "Regression":
        """The task with targets standardized by their mean and deviation in a split.

        Args:
            columns: The split's targets.
            rows: Rows of the split to use; by default all.

        Raises:
            ValueError: All values of a target are equal.
        """
        targets = self._ordered_targets(columns)
        trained = targets if rows is None else targets[rows]
        return replace(self, standardization=Standardization.from_targets(trained, self.names))

    def aligned_with(self, trained: Task) -> "Regression":
        """The task with a model's target names and standardization, if the number of targets is the same."""
        names = trained.label_names
        if len(names) != len(self.names):
            raise UsageError(
                f"the model has {len(names)} targets, {join_quoted(names)}, but the data has {len(self.names)}: "
                f"{join_quoted(self.names)}. Use the data it was trained for, or set --data.label_column."
            )
        if sorted(names) == sorted(self.names) and tuple(names) != self.names:
            raise UsageError(
                f"the model's targets are {join_quoted(names)}, in this order; give columns with these names in "
                "--data.label_column, and leave out --data.label_names."
            )
        assert isinstance(trained, Regression)
        return replace(self, names=tuple(names), standardization=trained.standardization)

    def config_fields(self) -> dict[str, Any]:
        """Target names in both directions, `problem_type`, and the standardization."""
        fields = dict.fromkeys(STANDARDIZATION_FIELDS) if self.standardization is None else self.standardization.fields
        return {**names_in_config(self.names), "problem_type": _PROBLEM_TYPE, **fields}

    def encode(self, columns: LabelColumns) -> NDArray[np.float32]:
        """Targets of each sample, standardized if the task is.

        Shape (num_samples,), or (num_samples, num_targets) for several.
        """
        targets = self._ordered_targets(columns)
        if self.standardization is not None:
            targets = self.standardization.standardize(targets)
        encoded = targets.astype(np.float32)
        return encoded[:, 0] if len(self.names) == 1 else encoded

    def _ordered_targets(self, columns: LabelColumns) -> NDArray[np.float64]:
        """Targets in the original units and the order of the logits. Shape (num_samples, num_targets)."""
        targets = _read_targets(columns)
        if targets.shape[1] != len(self.names):
            raise UsageError(
                f"the split {columns.split!r} has {targets.shape[1]} targets, but there are {len(self.names)}: "
                f"{join_quoted(self.names)}. Set --data.label_column."
            )
        if len(targets) > 1 and (targets == -1).all():
            raise UsageError(
                f"all targets of the split {columns.split!r} are -1, as in test sets with hidden targets. Name another "
                "split, or use predict, which needs no labels."
            )
        return targets[:, order_of(self.names, columns.names)] if len(columns.names) > 1 else targets

    def decode(self, labels: NDArray[Any]) -> pa.Array:
        """The targets as numbers, or as lists for several targets."""
        return _as_column(self._in_unit(labels))

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Tenths of the samples by target, or by the mean of the standardized targets if there are several."""
        values = np.asarray(labels, np.float64)
        if values.ndim == 2:
            values = ((values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-12)).mean(axis=1)
        ranks = np.empty(len(values), np.int64)
        ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
        return ranks * min(_STRATA, max(1, len(values) // 2)) // max(1, len(values))

    def label_counts(self, labels: NDArray[Any]) -> dict[str, int]:
        """Number of samples in each fifth of the target's range; empty for several targets."""
        values = self._in_unit(labels).astype(np.float64)
        if values.ndim == 2 or not len(values):
            return {}
        counts, edges = np.histogram(values, bins=5)
        ranges: list[str] = []
        for digits in range(3, 18):
            if len(set(ranges)) < len(counts):
                ranges = [f"{low:.{digits}g} to {high:.{digits}g}" for low, high in itertools.pairwise(edges)]
        return dict(zip(ranges, counts.tolist(), strict=True))

    def with_loss(self, options: LossOptions) -> "Regression":
        """The same task: regression has no loss options."""
        options.check_supported(_PROBLEM_TYPE)
        return self

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error over samples and targets; in squared standard deviations if targets are standardized."""
        outputs = self._outputs(logits)
        check_shape(labels, outputs.shape)
        return F.mse_loss(outputs, labels.to(logits.dtype))

    def scores(self, logits: Tensor) -> Tensor:
        """Predicted targets in the original units, (batch,), or (batch, num_targets) for several; at least float32."""
        outputs = self._outputs(logits)
        return outputs if self.standardization is None else self.standardization.restore_tensor(outputs)

    def configure_metrics(self) -> MetricCollection:
        """Mean squared and mean absolute error; for a single target also Pearson and Spearman correlation."""
        metrics: dict[str, Metric | MetricCollection] = {"mse": MeanSquaredError(), "mae": MeanAbsoluteError()}
        if len(self.names) > 1:
            return MetricCollection(metrics)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all")  # 8 bytes per sample
            return MetricCollection({**metrics, "pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()})

    @property
    def monitored(self) -> str:
        """Spearman correlation; for several targets the mean squared error."""
        return "spearman" if len(self.names) == 1 else "mse"

    def metric_labels(self, labels: Tensor) -> Tensor:
        """Labels as floats in the original units."""
        return labels.float() if self.standardization is None else self.standardization.restore_tensor(labels)

    def predict_labels(self, scores: NDArray[Any], thresholds: Mapping[str, float] | None = None) -> NDArray[Any]:
        """The scores."""
        return scores

    def predict(self, logits: Tensor) -> dict[str, Tensor]:
        """Predicted targets, as `predictions`."""
        return {"predictions": self.scores(logits)}

    def prediction_columns(self, predicted: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """Predicted targets; for several, a list in their order."""
        return {"prediction": _as_column(predicted["predictions"])}

    def _outputs(self, logits: Tensor) -> Tensor:
        return logits[:, 0] if len(self.names) == 1 else logits

    def _in_unit(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Encoded labels in the original units."""
        return np.asarray(labels) if self.standardization is None else self.standardization.restore(labels)


def _as_column(values: NDArray[Any]) -> pa.Array:
    return pa.array(values if values.ndim == 1 else values.tolist())


def _read_targets(columns: LabelColumns) -> NDArray[np.float64]:
    """Targets of a split. Shape (num_samples, num_targets)."""
    if columns.delimiter is not None:
        raise UsageError(
            f"label_delimiter is given, but problem_type is {_PROBLEM_TYPE!r}, which has numbers. Leave it out."
        )
    if columns.are_lists:
        return _read_lists(columns)
    return np.stack([_numbers(columns, name, values) for name, values in columns.by_name.items()], axis=1)


def _read_lists(columns: LabelColumns) -> NDArray[np.float64]:
    [name], lengths = columns.names, pc.list_value_length(columns.values)
    width = lengths[0].as_py() if len(lengths) else 0
    if not width:
        raise UsageError(f"{columns.row(0)} has no target in {name!r}. Give every row the same number of targets.")
    even = pc.fill_null(pc.equal(lengths, width), False)
    if not pc.all(even).as_py():
        raise UsageError(
            f"{columns.row(first_true(pc.invert(even)))} does not have {width} targets in {name!r}, as the first row "
            "does. Give every row the same number."
        )
    return _numbers(columns, name, flattened(columns.values), width).reshape(-1, width)


def _numbers(columns: LabelColumns, name: str, values: pa.ChunkedArray, per_row: int = 1) -> NDArray[np.float64]:
    if columns.class_names is not None:
        values = columns.named(values)
    found = as_numbers(values)
    if found is None and is_text(values.type):
        first = next(row for row, text in enumerate(values.to_pylist()) if not _is_number(text))
        raise UsageError(
            f"{columns.row(first // per_row)} has {join_quoted([values[first].as_py()])} in {name!r}, which is not a "
            "number. Write numbers like 1234.5, without units or thousands separators, or drop such rows; or set "
            "--data.label_column or --data.problem_type."
        )
    if found is None:
        raise UsageError(
            f"the label column {name!r} of the split {columns.split!r} holds {values.type}, but {_PROBLEM_TYPE} has "
            "numbers. Set --data.label_column or --data.problem_type."
        )
    numbers = np.asarray(found, np.float64)
    with np.errstate(over="ignore"):
        finite = np.isfinite(numbers.astype(np.float32))  # the dtype of labels
    if not finite.all():
        first = int(np.argmin(finite))
        met = "no target" if values[first].as_py() is None else f"the target {numbers[first]}"
        raise UsageError(
            f"{columns.row(first // per_row)} has {met} in {name!r}. Drop such rows, or give them a finite number."
        )
    return numbers


def _is_number(text: str | None) -> bool:
    return as_numbers(pa.chunked_array([pa.array([text], pa.string())])) is not None
