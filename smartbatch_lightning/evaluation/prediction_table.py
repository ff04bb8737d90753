"""Reading tables of predictions written by `predict`, with their labels."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset
from numpy.typing import NDArray

from smartbatch_lightning.data.files import ending_of
from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.evaluation.evaluation import Evaluation
from smartbatch_lightning.evaluation.samples import Lengths, Texts
from smartbatch_lightning.tasks import MultiLabelClassification, Regression, SingleLabelClassification
from smartbatch_lightning.tasks.labels import LabelEncoder, id_names_for, label_type_of, whole_numbers
from smartbatch_lightning.tasks.source import LabelColumns, LabelSource, is_list, is_text
from smartbatch_lightning.tasks.thresholds import read_thresholds

_PROBABILITY, _PREDICTION, _INDEX = "probability_", "prediction", "index"


def read_predictions(
    path: str | Path,
    *,
    label_column: str | list[str] = "label",
    label_delimiter: str | None = None,
    label_names: list[str] | None = None,
    text_column: str | list[str] | None = None,
    thresholds: str | Path | None = None,
    temperature: float | Literal["fit"] | None = None,
    title: str | None = None,
) -> Evaluation:
    """Reads predictions with their labels.

    The table has `prediction`, columns copied from the input, and, except for regression, `probability_NAME` for each
    class or label. With several regression targets, `prediction` is a list in the order of `label_column`.

    Args:
        path: A Parquet, CSV or TSV file, or a folder of Parquet files.
        label_column: Label column; or several, one for each label or target.
        label_delimiter: Separator for several labels in one string.
        label_names: Class names in the order of the integer ids in the label column; needed if the table does not have
            the names of the ids.
        text_column: Text column or columns.
        thresholds: File of decision thresholds; by default, the column `prediction` is used.
        temperature: As in `Evaluation`.
        title: As in `Evaluation`; by default the name of the file.

    Raises:
        ValueError: A column is missing or has the wrong type; the message says what is there.
    """
    source = LabelSource.from_arguments(label_column, label_delimiter)
    texts = [text_column] if isinstance(text_column, str) else list(text_column or [])
    table = _Table.read(Path(path), source, texts, label_names)
    task = table.task()
    labels = task.encode(table.columns(source))
    predicted: NDArray[Any] | None = None
    scores = table.scores(task)
    if thresholds is not None:
        predicted = task.predict_labels(scores, read_thresholds(thresholds, task))
    elif _PREDICTION in table.names and not isinstance(task, Regression):
        predicted = task.encode(table.columns(LabelSource((_PREDICTION,), label_delimiter)))
    return Evaluation(
        task,
        scores,
        labels,
        predicted,
        texts=table.texts(),
        lengths=table.lengths(),
        index=table.index(),
        title=title or Path(path).stem,
        temperature=temperature,
    )


@dataclass(frozen=True)
class _Table:
    """A table of predictions, and its label and text columns."""

    path: Path
    table: pa.Table
    label_source: LabelSource
    text_columns: list[str]
    label_names: list[str] | None

    @classmethod
    def read(cls, path: Path, source: LabelSource, text_columns: list[str], label_names: list[str] | None) -> "_Table":
        try:
            if not path.exists():
                raise FileNotFoundError("there is no such file")
            names = _column_names(path)
            wanted = {_INDEX, _PREDICTION, *source.columns, *text_columns}
            columns = [name for name in names if name in wanted or name.startswith(_PROBABILITY)]
            _check_columns(path, names, source, text_columns)
            if _is_csv(path):
                table = _read_csv(path, columns, source, label_names)
            else:
                table = pyarrow.parquet.read_table(path, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise UsageError(
                f"the predictions {path} cannot be read: {error}. Give a Parquet, CSV or TSV file with predictions."
            ) from error
        if not len(table):
            raise UsageError(f"{path} has no rows. Give predictions of one sample or more.")
        return cls(path, table, source, text_columns, label_names)

    @property
    def names(self) -> list[str]:
        return list(self.table.column_names)

    @property
    def class_names(self) -> list[str]:
        return _class_names(self.names)

    def task(self) -> SingleLabelClassification | MultiLabelClassification | Regression:
        classes = self.class_names
        if not classes:
            return self._regression()
        encoder = LabelEncoder(tuple(classes), label_type_of(classes))
        if self.label_names is not None:
            if sorted(self.label_names) != sorted(classes):
                raise UsageError(
                    f"label_names is {join_quoted(self.label_names)}, but {self.path} has probabilities of "
                    f"{join_quoted(classes)}. Give these names, in the order of their ids."
                )
            encoder = replace(encoder, id_names=id_names_for(self.label_names))
        source = self.label_source
        read = [*source.columns, *([_PREDICTION] if _PREDICTION in self.names else [])]
        several = source.delimiter is not None or len(source.columns) > 1
        if several or any(is_list(self.table.schema.field(name).type) for name in read):
            return MultiLabelClassification(encoder, source.delimiter)
        if len(classes) < 2:
            raise UsageError(
                f"{self.path} has probabilities of {join_quoted(classes)} only. Give a column '{_PROBABILITY}NAME' for "
                "each class."
            )
        if encoder.label_type == "text":
            self._check_ids()
        return SingleLabelClassification(encoder)

    def columns(self, source: LabelSource) -> LabelColumns:
        """The label columns of the table."""
        return source.read(Dataset(self.table.select(list(source.columns))), self.path.name)

    def scores(self, task: SingleLabelClassification | MultiLabelClassification | Regression) -> NDArray[np.float32]:
        """Probabilities, or predicted targets."""
        if isinstance(task, Regression):
            return task.encode(self.columns(LabelSource((_PREDICTION,))))
        scores = np.empty((len(self.table), len(task.label_names)), np.float32)
        for number, name in enumerate(task.label_names):
            values = self.table.column(f"{_PROBABILITY}{name}")
            if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
                raise UsageError(f"the column '{_PROBABILITY}{name}' of {self.path} holds {values.type}; give numbers.")
            scores[:, number] = np.asarray(values.cast(pa.float64()))
            if not (finite := np.isfinite(scores[:, number])).all():
                row = int(finite.argmin())
                raise UsageError(
                    f"row {row} (counted from 0) of {self.path} has {values[row].as_py()} in '{_PROBABILITY}{name}'. "
                    "Give a number."
                )
        return scores

    def texts(self) -> Sequence[str] | None:
        if not self.text_columns:
            return None
        columns = [self.table.column(name) for name in self.text_columns]
        return Texts(len(self.table), lambda sample: (column[sample].as_py() for column in columns))

    def lengths(self) -> Lengths | None:
        """Lengths of the texts in characters; None without texts."""
        if not self.text_columns:
            return None
        characters = np.zeros(len(self.table), np.int64)
        for name in self.text_columns:
            column = self.table.column(name)
            if not is_text(column.type):
                raise UsageError(f"the column {name!r} of {self.path} holds {column.type}, not text. Set text_column.")
            characters += np.asarray(pc.fill_null(pc.utf8_length(column), 0), np.int64)
        return Lengths(characters, "characters")

    def index(self) -> NDArray[np.integer] | None:
        if _INDEX not in self.names or not pa.types.is_integer(self.table.schema.field(_INDEX).type):
            return None
        return np.asarray(self.table.column(_INDEX), np.int64)

    def _regression(self) -> Regression:
        kind = self.table.schema.field(_PREDICTION).type if _PREDICTION in self.names else pa.null()
        if is_list(kind):
            width = pc.list_value_length(self.table.column(_PREDICTION))[0].as_py() or 0
        elif pa.types.is_floating(kind):
            width = 1
        elif pa.types.is_integer(kind):
            raise UsageError(
                f"{self.path} has whole numbers in 'prediction' and no probabilities. For classes, give a column "
                f"'{_PROBABILITY}NAME' for each; for numbers, write at least one with a fraction, as in 1.5, or "
                "give a Parquet file."
            )
        else:
            raise UsageError(
                f"{self.path} has neither a column 'probability_NAME' for each class nor numbers in 'prediction'; it "
                f"has {join_quoted(self.names)}. Give a table written by predict."
            )
        columns = self.label_source.columns
        return Regression(columns if width == len(columns) else tuple(f"{columns[0]}_{one}" for one in range(width)))

    def _check_ids(self) -> None:
        """Rejects integers as labels if classes have names and it is not known which number is which class."""
        [name] = self.label_source.columns
        values = self.table.column(name)
        ids = pa.types.is_integer(values.type)
        if is_text(values.type):  # in a CSV file
            written = pc.all(pc.match_substring_regex(values, r"\A\d+\z")).as_py()
            ids = written and not pc.any(pc.is_in(values, pa.array(self.class_names, values.type))).as_py()
        if self.label_names is not None or not ids:
            return
        if self.columns(self.label_source).class_names is None:
            raise UsageError(
                f"the column {name!r} of {self.path} has integers, but the classes are "
                f"{join_quoted(self.class_names)}. Set label_names to these in the order of their ids."
            )


def _is_csv(path: Path) -> bool:
    return ending_of(path.name) in (".csv", ".tsv")


def _separators(path: Path, **options: Any) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(delimiter="\t" if ending_of(path.name) == ".tsv" else ",", **options)


def _column_names(path: Path) -> list[str]:
    if _is_csv(path):
        with pyarrow.csv.open_csv(path, parse_options=_separators(path)) as reader:
            return list(reader.schema.names)
    return list(pyarrow.parquet.ParquetDataset(path).schema.names)


def _read_csv(path: Path, columns: list[str], source: LabelSource, label_names: list[str] | None) -> pa.Table:
    labels = [name for name in (*source.columns, _PREDICTION) if name in columns]
    as_text = labels if len(source.columns) == 1 and label_names is None and _are_words(columns) else []
    table = pyarrow.csv.read_csv(
        path,
        parse_options=_separators(path, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(as_text, pa.string())
        ),
    )
    for number, name in enumerate(table.column_names):
        column = table.column(name)
        if is_text(column.type):
            # predict adds it so that a spreadsheet does not take the text for a formula
            column = pc.replace_substring_regex(column, r"\A'('*[=+\-@\t\r])", r"\1")
            table = table.set_column(number, name, _lists(column) if name in labels else column)
    return table


def _lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Parses lists written as JSON in a CSV file; other text is returned unchanged."""
    if not pc.all(pc.match_substring_regex(column, r"\A\[.*\]\z")).as_py():
        return column
    try:
        rows = [json.loads(text) for text in column.to_pylist()]
        return pa.chunked_array([pa.array(rows, None if any(rows) else pa.list_(pa.string()))])
    except (ValueError, pa.ArrowException):
        return column


def _class_names(columns: Sequence[str]) -> list[str]:
    return [name.removeprefix(_PROBABILITY) for name in columns if name.startswith(_PROBABILITY)]


def _are_words(columns: Sequence[str]) -> bool:
    """Whether class names are to be read as text: they are neither numbers nor booleans."""
    classes = _class_names(columns)
    return bool(classes) and not whole_numbers(classes) and not set(classes) <= {"True", "False"}


def _check_columns(path: Path, names: Sequence[str], source: LabelSource, text_columns: Sequence[str]) -> None:
    for option, columns in (("label_column", source.columns), ("text_column", text_columns)):
        if missing := [name for name in columns if name not in names]:
            raise UsageError(
                f"{path} has no column {join_quoted(missing)}; it has {join_quoted(names)}. Set {option}, or have "
                "predict copy that column from its input, with --predictions.columns."
            )
