"""Multi-label classification: every sample has any number of labels, or none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score
from transformers import PretrainedConfig

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.tasks.config import labels_from_config, labels_in_config
from smartbatch_lightning.tasks.labels import (
    LISTS_REMEDY,
    LabelEncoder,
    Labels,
    are_written_lists,
    labels_in,
    whole_numbers,
)
from smartbatch_lightning.tasks.losses import BinaryCrossEntropy, LossOptions
from smartbatch_lightning.tasks.source import (
    ONE_COLUMN,
    LabelColumns,
    LabelSource,
    as_numbers,
    as_truth_values,
    first_true,
    flattened,
    is_number,
    is_text,
    order_of,
)
from smartbatch_lightning.tasks.task import Task

_PROBLEM_TYPE = "multi_label_classification"
_DELIMITER = "label_delimiter"  # field of a model's configuration, next to `id2label`
_INDICATORS = "labels_are_indicators"
_THRESHOLD = 0.5  # labels with a higher probability are predicted


@dataclass(frozen=True)
class MultiLabelClassification(Task):
    """Any number of labels per sample, matched by name across splits, files and checkpoints.

    In the data, they are lists, strings with a delimiter, one 0/1 column per label, or one list of 0 and 1 per sample.

    Attributes:
        labels: The encoder of label names.
        delimiter: Separator with which labels are written again; None for lists.
        positions: Label names in the order of the data's 0/1 values; by default that of the logits.
        indicators: Whether lists in the training split had a 0 or 1 for each label; None if unknown.
        loss: The loss.
    """

    labels: LabelEncoder
    delimiter: str | None = None
    positions: tuple[str, ...] | None = None
    indicators: bool | None = None
    loss: BinaryCrossEntropy = field(default_factory=BinaryCrossEntropy)

    @property
    def label_names(self) -> list[str]:
        """Label names in the order of the logits."""
        return list(self.labels.names)

    @property
    def description(self) -> str:
        """The label names, in words."""
        names = join_quoted(self.label_names)
        return f"{len(self.label_names):,} labels, of which each sample has any number: {names}"

    @classmethod
    def from_columns(cls, columns: LabelColumns) -> "MultiLabelClassification":
        """Creates the task from a training split."""
        if len(columns.names) > 1:
            return cls(_named(columns.names))
        # lists of numbers that may be ids or indicators cannot be learnt
        if are_indicators(columns) is not False:
            names = [str(number) for number in range(pc.list_value_length(columns.values)[0].as_py())]
            return cls(_named(names), positions=tuple(names), indicators=True)
        labels, _ = _read_lists(columns)
        return cls(LabelEncoder.from_labels(labels), columns.delimiter, indicators=False)

    @classmethod
    def from_names(cls, names: Sequence[str], source: LabelSource = ONE_COLUMN) -> "MultiLabelClassification":
        """Creates the task from label names; if the data has a 0 or 1 for each, they are in the order of the names."""
        encoder = LabelEncoder.from_names(names)
        return cls(encoder, source.delimiter, encoder.names)

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "MultiLabelClassification | None":
        """Creates the task that a model was trained for; None if its labels are `LABEL_0`, `LABEL_1` and so on.

        Raises:
            ValueError: It was trained for another task.
        """
        encoder, fields = labels_from_config(config, _PROBLEM_TYPE), config.to_dict()
        return None if encoder is None else cls(encoder, fields.get(_DELIMITER), indicators=fields.get(_INDICATORS))

    def aligned_with(self, trained: Task) -> "MultiLabelClassification":
        """The task with labels in the order of a model trained for them."""
        return replace(self, labels=self.labels.aligned_with(trained.label_names))

    def config_fields(self) -> dict[str, Any]:
        """Label names in both directions, `problem_type`, and how labels are written in the data."""
        return {
            **labels_in_config(self.labels, _PROBLEM_TYPE),
            _DELIMITER: self.delimiter,
            _INDICATORS: self.indicators,
        }

    def encode(self, columns: LabelColumns) -> NDArray[np.bool_]:
        """Which labels each sample has. Shape (num_samples, num_labels)."""
        if len(columns.names) > 1:
            truths = [_truth_values(columns, name, values) for name, values in columns.by_name.items()]
            return np.stack(truths, axis=1)[:, order_of(self.label_names, columns.names, self.positions)]
        if self._has_indicators(columns):
            width = len(flattened(columns.values)) // len(columns.values)
            flat = _truth_values(columns, columns.names[0], flattened(columns.values), width)
            return self._in_order(flat.reshape(-1, width), columns.split)
        labels, lengths = _read_lists(columns)
        encoded = np.zeros((len(lengths), len(self.label_names)), bool)
        encoded[np.repeat(np.arange(len(lengths)), lengths), self.labels.encode(labels)] = True
        return encoded

    def decode(self, labels: NDArray[Any]) -> pa.Array:
        """Names of each sample's labels: lists, or strings with the delimiter."""
        rows, numbers = np.nonzero(labels)
        offsets = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(labels)))))
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), self.labels.decode(numbers))
        if self.delimiter is None:
            return lists
        return pc.binary_join(lists.cast(pa.list_(pa.string())), self.delimiter)

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Strata of samples with the same labels, or, if no other sample has the same, with the same rarest label.

        A sample with a label that at most two samples have is a stratum of its own, which is not split. So is one
        sample of each label that training might otherwise be left without.
        """
        bits = np.packbits(labels, axis=1)  # rows as bytes, which numpy compares fifty times as fast as columns
        sets, stratum, counts = np.unique(
            bits.view(np.dtype((np.void, bits.shape[1]))).reshape(-1), return_inverse=True, return_counts=True
        )
        frequency = np.where(labels, labels.sum(axis=0), len(labels) + 1)
        rarest = np.where(labels.any(axis=1), frequency.argmin(axis=1), labels.shape[1])
        by_set = counts[stratum] > 1
        alone = frequency.min(axis=1) <= 2
        # at least one sample of each stratum is in the first part, and so are the labels that all of its samples have
        kept = labels[by_set | alone].any(axis=0)
        kept[rarest[~by_set & ~alone & labels.any(axis=1)]] = True
        for label in np.flatnonzero(labels.any(axis=0) & ~kept):
            if not kept[label]:
                row = int(labels[:, label].argmax())
                alone[row] = True
                kept |= labels[row]
        strata = np.where(by_set, stratum, len(sets) + rarest)
        return np.where(alone, len(sets) + labels.shape[1] + 1 + np.arange(len(labels)), strata)

    def label_counts(self, labels: NDArray[Any]) -> dict[str, int]:
        """Number of samples with each label."""
        return dict(zip(self.label_names, np.asarray(labels).sum(axis=0).tolist(), strict=True))

    def with_loss(self, options: LossOptions) -> "MultiLabelClassification":
        """The task with positive weights, label smoothing or focal loss."""
        options.check_supported(_PROBLEM_TYPE, "pos_weight", "label_smoothing", "focal_gamma")
        return replace(self, loss=BinaryCrossEntropy.from_options(options, self.label_names))

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, averaged over samples and labels."""
        return self.loss(logits, labels)

    @property
    def monitored(self) -> str:
        """Macro F1."""
        return "f1"

    def scores(self, logits: Tensor) -> Tensor:
        """Probability of each label, (batch, num_labels)."""
        return logits.sigmoid()

    def configure_metrics(self) -> MetricCollection:
        """Macro and micro F1, and the share of samples with all labels right, at a threshold of 0.5."""
        num_labels = len(self.label_names)
        return MetricCollection(
            {
                "f1": MultilabelF1Score(num_labels, _THRESHOLD, average="macro"),
                "f1_micro": MultilabelF1Score(num_labels, _THRESHOLD, average="micro"),
                "exact_match": MultilabelExactMatch(num_labels, _THRESHOLD),
            }
        )

    def metric_labels(self, labels: Tensor) -> Tensor:
        """Labels as integers, (batch, num_labels), as torchmetrics expects."""
        return labels.long()

    @property
    def names_with_threshold(self) -> list[str]:
        """All labels."""
        return self.label_names

    def predict_labels(self, scores: NDArray[Any], thresholds: Mapping[str, float] | None = None) -> NDArray[np.bool_]:
        """Whether each label is predicted, (num_samples, num_labels); by default above 0.5."""
        return np.asarray(scores > [(thresholds or {}).get(name, _THRESHOLD) for name in self.label_names])

    def _has_indicators(self, columns: LabelColumns) -> bool:
        if self.indicators and columns.are_lists and not columns.values.null_count:
            whole = _are_truth_values(columns, len(self.label_names))
            if not whole.all():
                raise _odd_row_error(columns, int(np.argmin(whole)), len(self.label_names), "the training split has")
        indicators = are_indicators(columns)
        if indicators is None:
            indicators = self.indicators
        if indicators is None:
            raise UsageError(
                f"every list of labels in the split {columns.split!r} holds a 0 and a 1, which could be two label ids "
                "or two 0/1 indicators. Use names instead of numbers."
            )
        return indicators

    def _in_order(self, values: NDArray[np.bool_], split: str) -> NDArray[np.bool_]:
        """Booleans (num_samples, num_labels), reordered to match the logits."""
        names = self.positions or self.label_names
        if values.shape[1] != len(names):
            raise UsageError(
                f"the split {split!r} has {values.shape[1]} zeros or ones per sample, but there are {len(names)} "
                f"labels: {join_quoted(self.label_names)}. Give one per label."
            )
        return values[:, order_of(self.label_names, names)]


def are_indicators(columns: LabelColumns) -> bool | None:
    """Whether lists of 0 and 1 say for each label whether a sample has it, rather than being label ids.

    Such lists have the same length, and one contains a number twice. None if each list is a 0 and a 1, which may mean
    either. Lists of a `ClassLabel`'s ids are never indicators.

    Raises:
        ValueError: Most lists are indicators, but not all.
    """
    if not columns.are_lists or not len(columns.values) or columns.values.null_count or columns.class_names:
        return False
    flat, lengths = flattened(columns.values), np.asarray(pc.list_value_length(columns.values), np.int64)
    width = int(np.bincount(lengths).argmax())
    if not is_number(flat.type) or width < 2:
        return False
    whole = _are_truth_values(columns, width)
    starts = (np.cumsum(lengths) - lengths)[whole]
    first, second = (np.asarray(as_numbers(flat))[starts + place] for place in range(2))
    twice = pa.types.is_boolean(flat.type) or bool(whole.any() and (width > 2 or (first == second).any()))
    if whole.all():
        return True if twice else None
    if 2 * whole.sum() > len(whole) and (twice or (first > second).any()):  # label ids are usually ascending
        raise _odd_row_error(columns, int(np.argmin(whole)), width, "most rows have")
    return False


def _are_truth_values(columns: LabelColumns, width: int) -> NDArray[np.bool_]:
    """Whether each list has `width` elements, all 0 or 1. Shape (num_samples,)."""
    lengths = np.asarray(pc.list_value_length(columns.values), np.int64)
    other = np.asarray(as_truth_values(flattened(columns.values)).is_null())
    rows = np.repeat(np.arange(len(lengths)), lengths)
    odd = np.bincount(rows[other], minlength=len(lengths)) > 0
    return np.asarray((lengths == width) & ~odd, bool)


def _odd_row_error(columns: LabelColumns, row: int, width: int, as_elsewhere: str) -> UsageError:
    return UsageError(
        f"{columns.row(row)} does not have a 0 or 1 for each of the {width} labels in {columns.names[0]!r}, as "
        f"{as_elsewhere}. Correct it, or drop such rows; if the lists hold label ids, use names instead."
    )


def _named(names: Sequence[str]) -> LabelEncoder:
    return replace(LabelEncoder.from_names(names), id_names=None)


def _truth_values(columns: LabelColumns, name: str, values: pa.ChunkedArray, per_row: int = 1) -> NDArray[np.bool_]:
    truths = as_truth_values(values)
    if truths.null_count:
        odd = first_true(truths.is_null())
        value = values[odd].as_py()
        met = "no value" if value is None else f"the value {value!r}"
        raise UsageError(
            f"{columns.row(odd // per_row)} has {met} in {name!r}; give 0 and 1, or true and false, or drop such rows."
        )
    return np.asarray(truths, bool)


def _read_lists(columns: LabelColumns) -> tuple[Labels, NDArray[np.int64]]:
    """The labels of all samples, concatenated, and the number of labels of each sample."""
    [name], lists = columns.names, columns.values
    if lists.null_count:
        raise UsageError(
            f"{columns.row(first_true(lists.is_null()))} is null in {name!r}. Drop such rows, or write an empty list "
            "or text for a sample without labels."
        )
    if not columns.are_lists:
        if columns.delimiter is None:
            raise UsageError(
                f"the label column {name!r} of the split {columns.split!r} holds {lists.type}, but {_PROBLEM_TYPE} "
                "needs lists, strings with a delimiter, or a 0/1 column for each label. Set --data.label_delimiter, or "
                "name several columns with --data.label_column."
            )
        if is_text(lists.type) and are_written_lists(pc.unique(lists).to_pylist()):
            raise UsageError(
                f"the label column {name!r} of the split {columns.split!r} holds lists written as text, such as "
                f"{join_quoted([lists[0].as_py()])}. Instead, {LISTS_REMEDY}."
            )
        lists = _split(lists, columns.delimiter, is_text(lists.type))
    lengths = np.asarray(pc.list_value_length(lists), np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return labels_in(columns, flattened(lists), rows), lengths


def _split(column: pa.ChunkedArray, delimiter: str, text: bool) -> pa.ChunkedArray:
    """Splits texts at the delimiter, and strips spaces around labels; an empty text has no labels."""
    names = [
        [part.strip() for part in value.split(delimiter) if part.strip()]
        for value in (column if text else column.cast(pa.string())).to_pylist()
    ]
    lists = pa.array(names, pa.list_(pa.string()))
    whole = whole_numbers(pc.unique(lists.flatten()).to_pylist())
    return pa.chunked_array([lists.cast(pa.list_(pa.int64())) if whole else lists])
