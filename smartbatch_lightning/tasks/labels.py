"""Labels by name: encoding them as numbers, and decoding them as written in the data."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.tasks.source import LabelColumns, first_true, is_text

DELIMITERS = (",", ";", "|")  # searched for between labels

LISTS_REMEDY = "save lists in JSON lines or Parquet, or write 'a,b' and set --data.label_delimiter=','"

_IGNORED = "-100"  # marks what torch's losses leave out, by default
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

LabelType = Literal["text", "integer", "boolean"]


@dataclass(frozen=True)
class Labels:
    """Labels of a split, one after another, by name.

    Attributes:
        names: Name of each label, as text.
        label_type: How labels are written in the data.
        rows: Row of each label in the split, counted from 0; None if each row has exactly one.
        columns: The columns they are from.
    """

    names: pa.ChunkedArray
    label_type: LabelType
    rows: NDArray[np.int64] | None
    columns: LabelColumns

    def row(self, number: int) -> str:
        """The row of a label, for messages."""
        return self.columns.row(number if self.rows is None else int(self.rows[number]))


@dataclass(frozen=True)
class LabelEncoder:
    """Encodes class names as numbers, and decodes them.

    Attributes:
        names: Class names in the order of their numbers.
        label_type: How labels are written in the data.
        id_names: Names by class id, if integers in the data are ids; None if they are names themselves.
    """

    names: tuple[str, ...]
    label_type: LabelType = "text"
    id_names: tuple[str, ...] | None = None

    @classmethod
    def from_labels(cls, labels: Labels) -> "LabelEncoder":
        """Uses the names of a `ClassLabel`, in its order; else the distinct labels, sorted as whole numbers or as text.

        Raises:
            ValueError: All labels are the same, there are none, or one is -100.
        """
        names = list(labels.columns.class_names or ())
        if not names:
            names = pc.unique(labels.names).to_pylist()
            if labels.label_type == "integer" and _IGNORED in names:
                row = labels.row(first_true(pc.equal(labels.names, _IGNORED)))
                raise UsageError(
                    f"{row} has the label -100, which torch's losses ignore. Drop such rows; or if -100 is a class, "
                    "name all classes with --data.label_names."
                )
            names.sort(key=(lambda name: int(name)) if all(map(_is_whole_number, names)) else str)
        if len(names) < 2:
            found = f"the split {labels.columns.split!r} has no label in any row"
            if names:
                found = f"all labels of the split {labels.columns.split!r} are {names[0]!r}"
            raise UsageError(
                f"{found}; there is nothing to classify. Give data with at least two classes, or set "
                "--data.label_column."
            )
        _warn_of_near_duplicates(names)
        return cls(tuple(names), labels.label_type)

    @classmethod
    def from_names(cls, names: Sequence[str]) -> "LabelEncoder":
        """Uses names given by the user; if none of them is a number, integers in the data are indices of these names.

        Raises:
            ValueError: There are fewer than two names, or one appears twice.
        """
        texts = [str(name) for name in names]
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise UsageError(
                f"label_names is {join_quoted(texts) or 'empty'}; give the names of two classes or more, each once. If "
                "the label is a number to predict, set --data.problem_type=regression."
            )
        return cls(tuple(texts), label_type_of(texts), id_names_for(texts))

    def encode(self, labels: Labels) -> NDArray[np.int64]:
        """Class number of each label. Shape (number of labels,).

        Raises:
            ValueError: A label is not a class; the message names the row.
        """
        id_names = self.id_names if labels.label_type == "integer" and labels.columns.class_names is None else None
        known = list(self.names) if id_names is None else [str(number) for number in range(len(id_names))]
        numbers = pc.index_in(labels.names, value_set=pa.array(known, pa.string()))
        if numbers.null_count:
            unknown = first_true(numbers.is_null())
            met, hint = labels.names[unknown].as_py(), ""
            for delimiter in DELIMITERS:
                if delimiter in met and {part.strip() for part in met.split(delimiter)} <= set(self.names):
                    hint = f" If these are several labels, set label_delimiter={delimiter!r}."
            if id_names is not None:
                hint = f" Integers are class ids here, from 0 to {len(known) - 1}; give a name for each id."
            elif labels.label_type == "integer" and not any(map(_is_whole_number, self.names)):
                hint = " If integers are class ids, set --data.label_names to the names in their order."
                if any(map(_NUMBER.fullmatch, self.names)):
                    hint = " Name whole numbers without extra zeros, such as '1' for 1.0 or 01."
            raise UsageError(
                f"{labels.row(unknown)} has the label {join_quoted([met])}, which is not one of "
                f"the {len(self.names):,} classes: {join_quoted(self.names)}. Correct it, drop such rows, or use "
                f"predict, which needs no labels.{hint}"
            )
        encoded = np.asarray(numbers, np.int64)
        if id_names is not None:
            encoded = np.array([self.names.index(name) for name in id_names])[encoded]
        return encoded

    def decode(self, numbers: NDArray[np.integer]) -> pa.Array:
        """Labels for class numbers, as written in the data. Shape (num_samples,)."""
        values = pa.array(self.names, pa.string())
        if self.label_type == "integer":
            values = values.cast(pa.int64())
        elif self.label_type == "boolean":
            values = pc.equal(values, "True")
        return values.take(pa.array(numbers))

    def aligned_with(self, names: Sequence[str]) -> "LabelEncoder":
        """The encoder with the names in another order.

        Raises:
            ValueError: The names differ.
        """
        if sorted(names) != sorted(self.names):
            raise other_labels_error("the model", names, self.names)
        return replace(self, names=tuple(names))


def other_labels_error(source: str, trained: Sequence[str], names: Sequence[str]) -> UsageError:
    """The error for a model that was trained for other labels than those of the data."""
    return UsageError(
        f"{source} classifies into {join_quoted(trained)}, but the data has {join_quoted(names)}. Use the data it was "
        "trained for, or a checkpoint trained for these, loaded with SequenceClassifier.load_from_checkpoint; where "
        "only the names differ, set --data.label_names to the model's."
    )


def id_names_for(names: Sequence[str]) -> tuple[str, ...] | None:
    """Names that integers in the data index, if none of them is a number; otherwise integers are names themselves."""
    return None if any(map(_NUMBER.fullmatch, names)) else tuple(names)


def labels_in(columns: LabelColumns, values: pa.ChunkedArray, rows: NDArray[np.int64] | None = None) -> Labels:
    """Values of the only column as labels: names for the ids of a `ClassLabel`, else the values.

    Args:
        columns: The column.
        values: Its values, or those of its lists.
        rows: Row of each value, unless each row has exactly one.

    Raises:
        ValueError: The values are not labels, or one is missing.
    """
    kind, [name], class_names = values.type, columns.names, columns.class_names
    if class_names is not None:
        values = columns.named(values)

    def labels(names: pa.ChunkedArray, label_type: LabelType) -> Labels:
        return Labels(names.cast(pa.string()), label_type, rows, columns)

    if values.null_count == len(values) > 1:
        raise UsageError(
            f"the split {columns.split!r} has no label in {name!r} in any row, as in test sets with hidden labels. "
            "Name another split, or use predict, which needs no labels."
        )
    if values.null_count:
        missing = first_true(values.is_null())
        raise UsageError(
            f"{columns.row(missing if rows is None else rows[missing])} has no label in {name!r}. Drop such rows, or "
            "give them a label."
        )
    if class_names is not None:
        return labels(values, label_type_of(class_names))
    if pa.types.is_floating(kind) and not pc.all(finite := pc.is_finite(values)).as_py():
        odd = first_true(pc.invert(finite))
        raise UsageError(
            f"{columns.row(odd if rows is None else rows[odd])} has the label {values[odd]} in {name!r}, which is not "
            "a class. Drop such rows, or give them a label."
        )
    if pa.types.is_floating(kind) and pc.all(_is_exact_integer(values)).as_py():
        values, kind = values.cast(pa.int64()), pa.int64()
    if pa.types.is_boolean(kind):
        return labels(pc.if_else(values, "True", "False"), "boolean")
    if pa.types.is_integer(kind):
        fits = len(values) == 0 or pc.max(values).as_py() < 2**63  # they are decoded as int64
        return labels(values, "integer" if fits else "text")
    if is_text(kind):
        return labels(values, "text")
    raise UsageError(
        f"the label column {name!r} of the split {columns.split!r} holds {kind}; labels are whole numbers, strings or "
        "booleans. Set --data.label_column, or turn them into classes."
    )


def _is_exact_integer(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether floats are whole numbers small enough to be exact."""
    return pc.and_(pc.equal(labels, pc.floor(labels)), pc.less(pc.abs(labels), 2.0**53))


def label_type_of(names: Sequence[str]) -> LabelType:
    """How labels with these names are written: as integers or as text."""
    return "integer" if whole_numbers(names) else "text"


def _is_whole_number(name: str) -> bool:
    """Whether a name is an integer as written by `str`: "07" and "+7" are words."""
    return name.removeprefix("-").isdecimal() and name == str(int(name))


def whole_numbers(names: Sequence[str]) -> bool:
    """Whether there are names and all are 64-bit integers as written by `str`."""
    return bool(names) and all(_is_whole_number(name) and -(2**63) <= int(name) < 2**63 for name in names)


def are_written_lists(texts: Sequence[str]) -> bool:
    """Whether all texts are lists as written by Python or JSON, for example by pandas in CSV files."""
    return bool(texts) and all(re.fullmatch(r"\[\s*(['\"0-9-].*)?\]", text, re.DOTALL) for text in texts)


def _warn_of_near_duplicates(names: list[str]) -> None:
    by_folded: dict[str, list[str]] = {}
    for name in names:
        by_folded.setdefault(unicodedata.normalize("NFKC", name).strip().casefold(), []).append(name)
    for alike in by_folded.values():
        if len(alike) > 1:
            rank_zero_warn(
                f"The classes {join_quoted(alike)} differ only in case, spaces or Unicode form, and are trained as "
                "different classes. If they are the same, spell them the same in the data."
            )
