"""Labels as they stand in the data -> numbers of classes, with names; a split that keeps the share of each."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset
from numpy.typing import ArrayLike, NDArray

from smartbatch_lightning.batching.arrays import Int64s, argsort
from smartbatch_lightning.errors import UsageError, listed


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        names: Name of each class, in the order of their numbers.
        values: What stands in the training data for each class; None where names stand for themselves, and whole
            numbers are the classes' numbers unless the names are numbers too.
    """

    names: list[str]
    values: pa.Array | None = None

    @classmethod
    def of(cls, dataset: Dataset, column: str, split: str) -> "Classes":
        """Those of a `ClassLabel`, else the distinct labels, sorted.

        Raises:
            ValueError: As `label_values`, or all labels are the same.
        """
        feature = dataset.features.get(column)
        if isinstance(feature, ClassLabel):
            return cls(list(feature.names))
        found = pc.unique(label_values(dataset, column, split))
        found = found.take(pc.sort_indices(found))
        if len(found) == 1:
            raise UsageError(
                f"all labels of the split {split!r} are {found[0].as_py()!r}; there is nothing to tell apart. Give "
                "data with two classes or more, or set --data.label_column."
            )
        return cls([str(value) for value in found.to_pylist()], found)

    def numbers(self, labels: pa.ChunkedArray, split: str) -> NDArray[np.int64]:
        """Number of each label's class. Shape (num_samples,).

        Raises:
            ValueError: A label is of none of the classes.
        """
        if self.values is not None:
            numbers = pc.index_in(labels.cast(pa.string()), value_set=self.values.cast(pa.string()))
        elif _is_text(labels.type) or all(name.lstrip("-").isdigit() for name in self.names):
            numbers = pc.index_in(labels.cast(pa.string()), value_set=pa.array(self.names))
        else:
            whole = labels.cast(pa.int64())
            known = pc.and_(pc.greater_equal(whole, 0), pc.less(whole, len(self.names)))
            numbers = pc.if_else(known, whole, None)
        if numbers.null_count:
            row = _first(numbers.is_null())
            raise UsageError(
                f"row {row} (counted from 0) of the split {split!r} has the label {labels[row].as_py()!r}, which is "
                f"none of the classes of the training split: {listed(self.names)}. Correct it, drop such rows, or use "
                "predict, which needs no labels."
            )
        return np.asarray(numbers, np.int64)


def label_values(dataset: Dataset, column: str, split: str) -> pa.ChunkedArray:
    """A split's labels as they stand in the data.

    Raises:
        ValueError: There is no such column, it holds no labels, or a label is missing.
    """
    if column not in dataset.column_names:
        raise UsageError(
            f"the label column {column!r} is not in the split {split!r}, which has "
            f"{listed(dataset.column_names)}. Set --data.label_column."
        )
    labels = dataset.select_columns(column).with_format("arrow")[:].column(column)
    if labels.null_count:
        raise UsageError(
            f"row {_first(labels.is_null())} (counted from 0) of the split {split!r} has no label in "
            f"{column!r}. Drop such rows, or give them a label."
        )
    kind = labels.type
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_text(kind)):
        raise UsageError(
            f"the label column {column!r} of the split {split!r} holds {kind}; labels are whole numbers, "
            "strings or booleans. Set --data.label_column, or turn them into classes."
        )
    return labels


def _first(flags: pa.ChunkedArray) -> int:
    return int(pc.index(flags, True).as_py())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def stratified_split(labels: ArrayLike, share: float, seed: int = 0) -> tuple[Int64s, Int64s]:
    """Splits samples in two at random, with the same share of every label in the second part, to within one sample.

    Args:
        labels: Label of each sample. Shape (num_samples,), integers.
        share: Share of the samples in the second part, between 0 and 1.
        seed: The split depends on this and the labels alone.

    Returns:
        The samples of the first and of the second part, each in ascending order.

    Raises:
        ValueError: The share is out of range, or leaves one part without a sample.
    """
    classes = np.asarray(labels)
    num_samples = len(classes)
    taken = round(num_samples * share)
    if not 0 < share < 1 or not 0 < taken < num_samples:
        raise UsageError(
            f"a share of {share} of {num_samples} samples leaves one part of the split empty. "
            "Give a share between 0 and 1 that leaves samples in both, or name a split."
        )
    by_label = argsort(classes, np.random.PCG64(np.random.SeedSequence(seed)))
    second = np.zeros(num_samples, bool)
    second[by_label] = np.diff(np.arange(num_samples + 1) * taken // num_samples) > 0
    return np.flatnonzero(~second), np.flatnonzero(second)
