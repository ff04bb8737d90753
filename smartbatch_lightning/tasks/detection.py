"""Which task a data set has, by its labels."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from smartbatch_lightning.tasks.source import LabelColumns, flattened


def detect_problem_type(columns: LabelColumns) -> str:
    """The `problem_type` of a split's labels.

    Several columns that hold 0 and 1 alone, lists, or texts with a delimiter are several labels a sample; numbers with
    a fraction, in one column or in several, are a regression; everything else is one label a sample.
    """
    if columns.delimiter is not None:
        return "multi_label_classification"
    if len(columns.names) > 1:
        several = columns.by_name.values()
        indicators = all(_is_number(values.type) and set(np.unique(_finite(values))) <= {0, 1} for values in several)
        return "multi_label_classification" if indicators else "regression"
    if columns.are_lists:
        return "regression" if _has_fractions(flattened(columns.values)) else "multi_label_classification"
    return "regression" if _has_fractions(columns.values) else "single_label_classification"


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _has_fractions(column: pa.ChunkedArray) -> bool:
    if not pa.types.is_floating(column.type):
        return False
    numbers = _finite(column)
    return bool((numbers != np.floor(numbers)).any())


def _finite(column: pa.ChunkedArray) -> NDArray[np.float64]:
    numbers: NDArray[np.float64] = np.asarray(column.drop_null().cast(pa.float64()))
    return numbers[np.isfinite(numbers)]
