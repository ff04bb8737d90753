"""Labels by name: read from a column, numbered, and written again as they stood in the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from smartbatch_lightning.errors import UsageError, join_quoted

if TYPE_CHECKING:
    from datasets import Dataset

LabelType = Literal["text", "integer", "boolean"]


@dataclass(frozen=True)
class LabelEncoder:
    """Numbers of classes for their names, and back.

    Attributes:
        names: Name of each class, in the order of their numbers.
        label_type: How labels stand in the data.
        numbers_are_ids: Whole numbers in the data are the classes' numbers, since names were given that are no numbers.
    """

    names: tuple[str, ...]
    label_type: LabelType = "text"
    numbers_are_ids: bool = False

    @classmethod
    def from_dataset(cls, dataset: "Dataset", column: str, split: str) -> "LabelEncoder":
        """The names of a `ClassLabel`, in its order; else the distinct labels, numbers by value and text by letter.

        Raises:
            ValueError: As `read_labels`, or all labels are the same.
        """
        labels, label_type = read_labels(dataset, column, split)
        feature = dataset.features.get(column)
        if is_class_label(feature):
            names = list(feature.names)
        else:
            names = pc.unique(labels).to_pylist()
            names.sort(key=(lambda name: int(name)) if all(map(_is_whole_number, names)) else str)
        if len(names) < 2:
            raise UsageError(
                f"all labels of the split {split!r} are {names[0]!r}; there is nothing to tell apart. Give data "
                "with two classes or more, or set --data.label_column."
            )
        _warn_of_near_duplicates(names)
        return cls(tuple(names), label_type)

    @classmethod
    def from_names(cls, names: Sequence[str]) -> "LabelEncoder":
        """Names that a user gives; where none of them is a number, whole numbers in the data number them.

        Raises:
            ValueError: There are fewer than two names, or one stands twice.
        """
        texts = [str(name) for name in names]
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise UsageError(
                f"label_names is {join_quoted(texts) or 'empty'}; give the names of two classes or more, each once."
            )
        numbers = any(map(_is_whole_number, texts))
        return cls(tuple(texts), "integer" if all(map(_is_whole_number, texts)) else "text", not numbers)

    def encode(self, dataset: "Dataset", column: str, split: str) -> NDArray[np.int64]:
        """Number of each label's class. Shape (num_samples,).

        Raises:
            ValueError: As `read_labels`, or a label is of none of the classes.
        """
        labels, label_type = read_labels(dataset, column, split)
        are_ids = self._are_ids(label_type, dataset, column)
        known = [str(number) for number in range(len(self.names))] if are_ids else list(self.names)
        numbers = pc.index_in(labels, value_set=pa.array(known, pa.string()))
        if numbers.null_count:
            row = _first(numbers.is_null())
            hint = ""
            if are_ids:
                hint = (
                    f" Whole numbers count the classes here, from 0 to {len(known) - 1}; give a name for each number."
                )
            elif label_type == "integer" and not any(map(_is_whole_number, self.names)):
                hint = " If whole numbers count the classes, set --data.label_names to the names in that order."
            raise UsageError(
                f"row {row} (counted from 0) of the split {split!r} has the label "
                f"{join_quoted([labels[row].as_py()])}, which is none of the {len(self.names):,} classes: "
                f"{join_quoted(self.names)}. Correct it, drop such rows, or use predict, which needs no labels.{hint}"
            )
        return np.asarray(numbers, np.int64)

    def decode(self, numbers: NDArray[np.integer]) -> pa.Array:
        """Labels of numbers, as they stood in the data. Shape (num_samples,)."""
        values = pa.array(self.names, pa.string())
        if self.label_type == "integer":
            values = values.cast(pa.int64())
        elif self.label_type == "boolean":
            values = pc.equal(values, "True")
        return values.take(pa.array(numbers))

    def aligned_with(self, names: Sequence[str]) -> "LabelEncoder":
        """The same with the names in another order; the names must be the same."""
        assert sorted(names) == sorted(self.names)
        return LabelEncoder(tuple(names), self.label_type, self.numbers_are_ids and tuple(names) == self.names)

    def _are_ids(self, label_type: LabelType, dataset: "Dataset", column: str) -> bool:
        return self.numbers_are_ids and label_type == "integer" and not is_class_label(dataset.features.get(column))


def read_labels(dataset: "Dataset", column: str, split: str) -> tuple[pa.ChunkedArray, LabelType]:
    """A split's labels by name, and how they stand in the data: the name of a `ClassLabel`'s id, else what is there.

    Raises:
        ValueError: There is no such column, it holds no labels, or a label is missing.
    """
    if column not in dataset.column_names:
        raise UsageError(
            f"the label column {column!r} is not in the split {split!r}, which has "
            f"{join_quoted(dataset.column_names)}. Set --data.label_column."
        )
    labels = dataset.select_columns(column).with_format("arrow")[:].column(column)
    kind, feature = labels.type, dataset.features.get(column)
    if is_class_label(feature):
        known = pc.and_(pc.greater_equal(labels, 0), pc.less(labels, len(feature.names)))
        labels = pa.chunked_array([pa.array(feature.names, pa.string())]).take(pc.if_else(known, labels, None))
    if labels.null_count:
        raise UsageError(
            f"row {_first(labels.is_null())} (counted from 0) of the split {split!r} has no label in "
            f"{column!r}. Drop such rows, or give them a label."
        )
    if is_class_label(feature):
        return labels.cast(pa.string()), _type_of_names(feature.names)
    if pa.types.is_floating(kind) and pc.all(_is_exact_integer(labels)).as_py():
        labels, kind = labels.cast(pa.int64()), pa.int64()
    if pa.types.is_boolean(kind):
        return pc.if_else(labels, "True", "False").cast(pa.string()), "boolean"
    if pa.types.is_integer(kind):
        fits = len(labels) == 0 or pc.max(labels).as_py() < 2**63  # as which they are written again
        return labels.cast(pa.string()), "integer" if fits else "text"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return labels.cast(pa.string()), "text"
    raise UsageError(
        f"the label column {column!r} of the split {split!r} holds {kind}; labels are whole numbers, strings or "
        "booleans. Set --data.label_column, or turn them into classes."
    )


def _is_exact_integer(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether floats are whole numbers that floats of that size still tell apart."""
    return pc.and_(pc.equal(labels, pc.floor(labels)), pc.less(pc.abs(labels), 2.0**53))


def _type_of_names(names: list[str]) -> LabelType:
    """A `ClassLabel` stands for its names."""
    return "integer" if all(map(_is_whole_number, names)) else "text"


def _is_whole_number(name: str) -> bool:
    """Whether a name is a number as `str` writes it: "07" and "+7" are words."""
    return name.removeprefix("-").isdecimal() and name == str(int(name))


def _warn_of_near_duplicates(names: list[str]) -> None:
    by_folded: dict[str, list[str]] = {}
    for name in names:
        by_folded.setdefault(name.strip().casefold(), []).append(name)
    for alike in by_folded.values():
        if len(alike) > 1:
            rank_zero_warn(
                f"The classes {join_quoted(alike)} differ in case or spaces alone, and are trained as different "
                "classes. If they are one, write them alike in the data."
            )


def _first(flags: pa.ChunkedArray) -> int:
    return int(pc.index(flags, True).as_py())


def is_class_label(feature: Any) -> bool:
    """Whether a column of a data set is a `ClassLabel`."""
    from datasets import ClassLabel  # by now loaded; a model without a data set does without the library

    return isinstance(feature, ClassLabel)
