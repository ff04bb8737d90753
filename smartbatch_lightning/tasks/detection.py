"""Inferring the task from the labels."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from smartbatch_lightning.tasks.source import LabelColumns, as_numbers, flattened


def detect_problem_type(columns: LabelColumns) -> str:
    """The `problem_type` of a split's labels.

    Several numeric columns mean regression, unless they contain only 0 and 1. Several other columns, lists, or texts
    with a delimiter mean multi-label. Floats, alone or in lists, mean regression. Everything else means single-label.
    """
    if columns.delimiter is not None:
        return "multi_label_classification"
    if len(columns.names) > 1:
        numbers = [as_numbers(values) for values in columns.by_name.values()]
        found = [set(np.unique(_finite(each))) for each in numbers if each is not None]
        regression = len(found) == len(numbers) and not all(values <= {0, 1} for values in found)
        return "regression" if regression else "multi_label_classification"
    if columns.are_lists:
        return "regression" if _has_fractions(flattened(columns.values)) else "multi_label_classification"
    return "regression" if _has_fractions(columns.values) else "single_label_classification"


def _has_fractions(values: pa.ChunkedArray) -> bool:
    if not pa.types.is_floating(values.type):
        return False
    numbers = _finite(as_numbers(values))
    return bool((numbers != np.floor(numbers)).any())


def _finite(numbers: pa.ChunkedArray) -> NDArray[np.float64]:
    finite: NDArray[np.float64] = np.asarray(numbers.drop_null())
    return finite[np.isfinite(finite)]
