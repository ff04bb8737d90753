"""Which task a data set has, by its labels."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from smartbatch_lightning.tasks.labels import LabelSource, flattened, is_list

if TYPE_CHECKING:
    from datasets import Dataset


def detect_problem_type(dataset: "Dataset", source: LabelSource, split: str) -> str:
    """The `problem_type` of a split's labels.

    Several columns that hold 0 and 1 alone, lists, or texts with a delimiter are several labels a sample; numbers with
    a fraction, in one column or in several, are a regression; everything else is one label a sample.

    Raises:
        ValueError: A column is not there.
    """
    columns = source.read(dataset, split)
    if source.delimiter is not None:
        return "multi_label_classification"
    if len(columns) > 1:
        indicators = all(_is_number(column.type) and set(np.unique(_finite(column))) <= {0, 1} for column in columns)
        return "multi_label_classification" if indicators else "regression"
    [column] = columns
    if is_list(column.type):
        return "regression" if _has_fractions(flattened(column)) else "multi_label_classification"
    return "regression" if _has_fractions(column) else "single_label_classification"


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
