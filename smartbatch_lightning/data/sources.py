"""A data set by its name: the demo, a Hub name, files or folders -> `DatasetDict`."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from smartbatch_lightning import demo
from smartbatch_lightning.errors import UsageError, join_quoted, root_cause_message
from smartbatch_lightning.tasks.source import ONE_COLUMN, LabelSource

_FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# As a CSV file writes numbers with a fraction, and what is none.
_NUMBER = r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
_NOT_FINITE = "-?(nan|NaN|inf|Infinity)"


def read_dataset(
    dataset: str | dict[str, str], config: str | None = None, labels: LabelSource = ONE_COLUMN
) -> DatasetDict:
    """Reads a data set.

    Args:
        dataset: As `SmartBatchDataModule` takes it.
        config: Configuration of a data set on the Hub.
        labels: Where labels stand. In a CSV file an empty field there is a missing label, unless a delimiter stands
            between labels; in other columns it is an empty text, and words such as "None" are words.

    Raises:
        ValueError: There is no such data set, or it cannot be read.
    """
    if dataset == "demo":
        dataset = str(demo.data_dir())
    if isinstance(dataset, dict):
        return _read_files(dataset, labels)
    path = Path(dataset).expanduser()
    if path.is_file() or path.suffix in _FILE_FORMATS:
        return _read_files({"train": dataset}, labels)
    if path.is_absolute() and not path.exists():
        raise UsageError(f"the folder {dataset} is not there. Set --data.dataset to a file, a folder or a Hub name.")
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = load_from_disk(str(path))
        else:
            loaded = load_dataset(str(path) if path.is_dir() else dataset, config)
    except Exception as error:  # datasets raises dozens of kinds, all of them about this one name
        if path.is_dir():
            raise UsageError(
                f"the folder {dataset} cannot be read as a data set: {root_cause_message(error)} Check that its "
                "files are whole and not empty."
            ) from error
        raise UsageError(
            f"the data set {dataset!r} was not found locally or on the Hub: {root_cause_message(error)} "
            "Check the name and the network, or set --data.dataset to a local CSV, JSON lines or Parquet file, or to "
            "a folder written by save_to_disk."
        ) from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _read_files(files: dict[str, str], labels: LabelSource) -> DatasetDict:
    suffixes = sorted({Path(file).suffix for file in files.values()})
    if len(suffixes) != 1 or suffixes[0] not in _FILE_FORMATS:
        raise UsageError(
            f"{join_quoted(files.values())} end in {join_quoted(suffixes)}; give files of one format, ending in one of "
            f"{join_quoted(_FILE_FORMATS)}."
        )
    paths = {split: Path(file).expanduser() for split, file in files.items()}
    for path in paths.values():
        if not path.is_file():
            raise UsageError(f"the file {path} is not there. Set --data.dataset to files that are.")
    file_format = _FILE_FORMATS[suffixes[0]]
    options: dict[str, Any] = {}
    if file_format == "csv":
        # labels as text, or chunks of a file would be numbers or words by what stands in each
        options = {"keep_default_na": False, "converters": dict.fromkeys(labels.columns, str)}
        options["sep"] = "\t" if suffixes[0] == ".tsv" else ","
    try:
        loaded = load_dataset(file_format, data_files={split: str(path) for split, path in paths.items()}, **options)
    except Exception as error:  # datasets raises dozens of kinds, all of them about these files
        raise UsageError(
            f"{join_quoted(files.values())} cannot be read as {file_format}: {root_cause_message(error)} Check that "
            "the file is whole, not empty, and of the format that its ending tells."
        ) from error
    assert isinstance(loaded, DatasetDict)
    if file_format == "csv" and labels.delimiter is None:
        for column in labels.columns:
            loaded = DatasetDict({split: _with_typed_labels(read, column) for split, read in loaded.items()})
    return loaded


def _with_typed_labels(dataset: Dataset, column: str) -> Dataset:
    """Labels of a CSV file: numbers or truth values where all are written so, else words; an empty field is none."""
    if column not in dataset.column_names or not len(dataset):
        return dataset
    text = dataset.select_columns(column).with_format("arrow")[:].column(column)
    labels = pc.if_else(pc.equal(text, ""), None, text)
    if _all_match(labels, r"^(0|-?[1-9][0-9]{0,17})$"):
        labels = labels.cast(pa.int64())
    elif _all_match(labels, "^(True|False)$"):
        labels = pc.equal(labels, "True")
    elif _all_match(labels, f"^({_NUMBER}|{_NOT_FINITE})$") and not _all_match(labels, f"^([^.eE]+|{_NOT_FINITE})$"):
        labels = labels.cast(pa.float64())  # of which what is not finite is refused
    typed = dataset.remove_columns(column)
    fingerprint = hashlib.sha256(f"{dataset._fingerprint} {column} typed".encode()).hexdigest()[:16]
    return typed.add_column(column, labels.combine_chunks(), new_fingerprint=fingerprint)


def _all_match(labels: pa.ChunkedArray, pattern: str) -> bool:
    """Whether there are labels, and all that are there match."""
    matching = pc.match_substring_regex(labels, pattern)
    return labels.null_count < len(labels) and bool(pc.all(matching, skip_nulls=True).as_py())
