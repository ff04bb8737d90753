"""Where labels are in the data, and reading them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from smartbatch_lightning.errors import UsageError, did_you_mean_columns, join_quoted

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class LabelColumns:
    """The label columns of a split, as in the data.

    Attributes:
        by_name: Values of each column, in the order of the source's columns; decimals become integers or floats, and
            columns without any value become text.
        class_names: Names of the `ClassLabel` of the only column or of the lists in it, if there is one.
        delimiter: Separator for several labels in one text.
        split: Name of the split.
    """

    by_name: dict[str, pa.ChunkedArray]
    class_names: tuple[str, ...] | None
    delimiter: str | None
    split: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.by_name)

    @property
    def values(self) -> pa.ChunkedArray:
        """Values of the only column."""
        [values] = self.by_name.values()
        return values

    @property
    def are_lists(self) -> bool:
        """Whether there is one column, with a list in each row."""
        return len(self.by_name) == 1 and is_list(self.values.type)

    def named(self, ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """Names of a `ClassLabel` for its ids; null for numbers that are not ids."""
        names = pa.array(self.class_names, pa.string())
        known = pc.and_(pc.greater_equal(ids, 0), pc.less(ids, len(names)))
        return pa.chunked_array([names]).take(pc.if_else(known, ids, None))

    def row(self, number: int) -> str:
        """A row, for messages."""
        return f"row {number} (counted from 0) of the split {self.split!r}"


@dataclass(frozen=True)
class LabelSource:
    """Where the labels of a split are.

    Attributes:
        columns: One column; or several, one for each label or target.
        delimiter: Separator for several labels in one text.
    """

    columns: tuple[str, ...] = ("label",)
    delimiter: str | None = None

    @classmethod
    def from_arguments(cls, column: str | Sequence[str], delimiter: str | None) -> "LabelSource":
        """Creates a source from a user's arguments.

        Raises:
            ValueError: There is no column, or one is repeated; or the delimiter is empty, or there are several columns.
        """
        columns = (column,) if isinstance(column, str) else tuple(column or ())
        if not columns or len(set(columns)) < len(columns):
            raise UsageError(f"label_column is {column!r}; give one column or several, each once.")
        if delimiter == "" or (delimiter is not None and len(columns) > 1):
            raise UsageError(
                f"label_delimiter is {delimiter!r} and label_column {column!r}; give a delimiter of one character or "
                "more, and one column."
            )
        return cls(columns, delimiter)

    def is_in(self, dataset: "Dataset") -> bool:
        """Whether a data set has all columns."""
        return set(self.columns) <= set(dataset.column_names)

    def read(self, dataset: "Dataset", split: str) -> LabelColumns:
        """Reads the label columns of a split.

        Raises:
            ValueError: A column is missing.
        """
        for column in self.columns:
            if column not in dataset.column_names:
                raise UsageError(
                    f"the label column {column!r} is not in the split {split!r}, which has "
                    f"{join_quoted(dataset.column_names)}. Set --data.label_column."
                    + did_you_mean_columns(column, dataset.column_names)
                )
        table = dataset.select_columns(list(self.columns)).with_format("arrow")[:]
        only = len(self.columns) == 1 and self.delimiter is None
        names = _class_names(dataset.features[self.columns[0]]) if only else None
        by_name = {name: _with_plain_type(table.column(name)) for name in self.columns}
        return LabelColumns(by_name, names, self.delimiter, split)


ONE_COLUMN = LabelSource()
_FALSE, _TRUE = ("0", "0.0", "false"), ("1", "1.0", "true")


def order_of(names: Sequence[str], columns: Sequence[str], positions: Sequence[str] | None = None) -> list[int]:
    """Index in the data of each model output: by name, or by position if no column has such a name.

    Args:
        names: Names of the outputs, in order.
        columns: Names in the data, in order.
        positions: Names given for the columns, in order; by default `names`.

    Raises:
        ValueError: There are not as many columns as outputs, or only some of the names match.
    """
    if len(columns) != len(names) or (set(columns) & set(names) and set(columns) != set(names)):
        raise UsageError(
            f"label_column names {join_quoted(columns)}, but the labels are {join_quoted(names)}. Give a column for "
            "each in --data.label_column, and leave out --data.label_names."
        )
    named = list(columns) if set(columns) == set(names) else list(positions or names)
    return [named.index(name) for name in names]


def is_text(kind: pa.DataType) -> bool:
    """Whether a column contains text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether a column contains numbers or booleans."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column contains lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def flattened(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values of a column of lists, concatenated."""
    return pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)


def as_numbers(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Numbers, or texts that are numbers apart from surrounding spaces, as floats; None if one is not a number."""
    if is_text(values.type):
        try:
            return pc.utf8_trim_whitespace(values).cast(pa.float64())
        except pa.ArrowInvalid:
            return None
    return values.cast(pa.float64(), safe=False) if is_number(values.type) else None


def as_truth_values(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Booleans for 0 and 1, true and false, and texts of these in any case and with surrounding spaces; else null."""
    if is_text(values.type):
        values = pc.utf8_lower(pc.utf8_trim_whitespace(values))
        no, yes = (pc.is_in(values, value_set=pa.array(words, values.type)) for words in (_FALSE, _TRUE))
    elif is_number(values.type):
        no, yes = (pc.fill_null(pc.equal(as_numbers(values), truth), False) for truth in (0, 1))
    else:
        return pa.chunked_array([pa.nulls(len(values), pa.bool_())])
    return pc.if_else(pc.or_(no, yes), yes, None)


def first_true(flags: pa.ChunkedArray) -> int:
    """Index of the first true value."""
    return int(pc.index(flags, True).as_py())


def _with_plain_type(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values, or lists of values, as a type with which pyarrow can compute."""
    if not is_list(values.type):
        return values.cast(_plain_type(values))
    plain = _plain_type(flattened(values))
    return values if plain == values.type.value_type else values.cast(pa.list_(plain))


def _plain_type(values: pa.ChunkedArray) -> pa.DataType:
    kind = values.type
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_float16(kind):
        return pa.float32()
    if not pa.types.is_decimal(kind):
        return kind
    try:
        values.cast(pa.int64())
    except pa.ArrowInvalid:
        return pa.float64()
    return pa.int64()


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """Names of a `ClassLabel`, or of one inside a list; None without."""
    from datasets import ClassLabel  # already loaded; a model without a data set does not need the library

    feature = getattr(feature, "feature", feature)
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None
