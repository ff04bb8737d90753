"""A data set by name, or as a Python object -> `DatasetDict`."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    get_dataset_config_names,
    load_dataset_builder,
    load_from_disk,
)
from lightning.pytorch.utilities import rank_zero_warn

from smartbatch_lightning import demo
from smartbatch_lightning.data import csv_files
from smartbatch_lightning.data.files import FORMATS, ending_of, is_file_name, read_files
from smartbatch_lightning.errors import UsageError, join_quoted, root_cause_message
from smartbatch_lightning.hub import hub_or_cache
from smartbatch_lightning.tasks.source import ONE_COLUMN, LabelSource

_MAX_FILES_NAMED = 5
# Text that looks like a mapping or a list, but was not read as one because it is not valid YAML.
_LOOKS_LIKE_YAML = re.compile(r"\{.*|\[.*\]", re.DOTALL)
_YAML_REMEDY = (
    "Give a name, a file, or files by split, as in '{train: a.csv, test: [b.csv, c.csv]}', with a space after each "
    "colon and quotes around names with brackets, commas or colons."
)


def normalized_source(dataset: Any) -> Any:
    """A name, files by split, or an object, with paths as strings, and `~` in them as the home folder.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(dataset, str | os.PathLike):
        name = os.path.expanduser(os.fspath(dataset))
        if not name or (_LOOKS_LIKE_YAML.fullmatch(name) and not Path(name).exists()):
            raise UsageError(f"dataset is {name!r}, which is neither a name nor a file. {_YAML_REMEDY}")
        return name
    if isinstance(dataset, Mapping) and not isinstance(dataset, DatasetDict | IterableDatasetDict):
        if not dataset or any(isinstance(value, dict | int | float | None) for value in dataset.values()):
            raise UsageError(f"dataset is {dataset!r}. {_YAML_REMEDY}")
        return {str(split): normalized_source(value) for split, value in dataset.items()}
    if isinstance(dataset, list | tuple) and dataset and all(isinstance(one, str | os.PathLike) for one in dataset):
        return [os.path.expanduser(os.fspath(one)) for one in dataset]
    if not _is_table(dataset):
        raise UsageError(
            f"dataset is {_describe(dataset)}; give a name, files, a Dataset, a DatasetDict, a pandas or polars "
            "DataFrame, an Arrow table, a list of dicts, or a dict of these by split."
        )
    return dataset


def is_named(dataset: Any) -> bool:
    """Whether a data set is given by a name, files, or files by split, rather than as an object."""
    return all(isinstance(one, str) for one in _flat(dataset))


def describe_source(dataset: Any) -> str:
    """The data set, as messages name it."""
    every = [one if isinstance(one, str) else f"the given {type(one).__name__}" for one in _flat(dataset)]
    names = list(dict.fromkeys(every))
    more = len(names) - _MAX_FILES_NAMED
    return ", ".join(names[:_MAX_FILES_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _flat(dataset: Any) -> list[Any]:
    """The names and objects of all splits, in one list."""
    by_split = isinstance(dataset, dict) and not isinstance(dataset, DatasetDict)
    values = list(dataset.values()) if by_split else [dataset]
    return [one for value in values for one in (value if _is_list_of_names(value) else [value])]


def read_dataset(
    dataset: Any,
    config: str | None = None,
    labels: LabelSource = ONE_COLUMN,
    text_columns: Sequence[str] = ("text",),
    reader_kwargs: Mapping[str, Any] | None = None,
) -> DatasetDict:
    """Reads a data set.

    Args:
        dataset: As `SmartBatchDataModule` takes it.
        config: Configuration name of a data set that has several.
        labels: Where the labels are.
        text_columns: Text columns.
        reader_kwargs: Options of the file reader.

    Raises:
        ValueError: There is no such data set, or it cannot be read.
    """
    options = dict(reader_kwargs or {})
    saved = isinstance(dataset, str) and _is_saved(dataset)
    if config is not None and (saved or not isinstance(dataset, str) or is_file_name(dataset)):
        raise UsageError(
            f"dataset_config is {config!r}, but dataset is {describe_source(dataset)}, which has no configurations. "
            "Set --data.dataset_config=null."
        )
    if options and (saved or not is_named(dataset)):
        raise UsageError(
            f"reader_kwargs has {join_quoted(options)}, but dataset is {describe_source(dataset)}, which is not "
            "read from files. Leave reader_kwargs out."
        )
    if not is_named(dataset):
        return splits_of(dataset, (*text_columns, *labels.columns))
    if dataset == "demo":
        dataset = demo.files()
    if isinstance(dataset, dict | list) or is_file_name(dataset):
        return read_files(dataset, labels, text_columns, options)
    path = Path(dataset)
    if path.is_absolute() and not path.exists():
        raise UsageError(f"the folder {dataset} does not exist. Set --data.dataset to a file, a folder or a Hub name.")
    name = str(path if path.name else path.resolve()) if path.is_dir() else dataset  # `datasets` needs a name
    try:
        if saved:
            return splits_of(load_from_disk(name))
        with hub_or_cache(name, "dataset"):
            return _read_folder_or_hub(name, config, labels, text_columns, options)
    except UsageError:
        raise
    except Exception as error:  # datasets raises dozens of kinds, all of them about this one name
        raise _read_error(name, config, error) from error


def _read_error(name: str, config: str | None, error: Exception) -> UsageError:
    """The error for a folder or a data set on the Hub with which `datasets` fails."""
    if config is None and "Config name is missing" in str(error):
        return UsageError(
            f"the data set {name} has several configurations: {join_quoted(get_dataset_config_names(name))}. Choose "
            "one with --data.dataset_config."
        )
    if Path(name).is_dir():
        without = f", or leave out its configuration {config!r}, --data.dataset_config=null" if config else ""
        return UsageError(
            f"the folder {name} cannot be read as a data set: {root_cause_message(error)} Check that its files are "
            f"complete and not empty{without}."
        )
    return UsageError(
        f"the data set {name!r} was not found locally or on the Hub: {root_cause_message(error)} Check the name and "
        "the network, or set --data.dataset to a local CSV, JSON lines or Parquet file, or to a folder written by "
        "save_to_disk."
    )


def _is_saved(name: str) -> bool:
    """Whether a name is that of a folder written by `save_to_disk`."""
    return any(Path(name, file).exists() for file in ("dataset_dict.json", "state.json"))


def _read_folder_or_hub(
    name: str, config: str | None, labels: LabelSource, text_columns: Sequence[str], options: dict[str, Any]
) -> DatasetDict:
    """Reads a folder or a Hub data set; `datasets` assigns files to splits by their names or a README.

    Files of a folder, and CSV files on the Hub, are read in the same way as files given by name, since `datasets` would
    guess types and nulls.
    """
    builder = load_dataset_builder(name, config)
    if config is None and Path(name).is_dir() and not Path(name, "README.md").exists():
        _warn_of_unread(Path(name), builder.config.data_files or {})
    files = {str(split): list(map(str, names)) for split, names in (builder.config.data_files or {}).items()}
    formats = {FORMATS.get(ending_of(file)) for of_split in files.values() for file in of_split}
    ours = formats and None not in formats and (Path(name).is_dir() or formats == {"csv"})
    if not ours or builder.info.features is not None:  # typed by its README
        if options:
            builder = load_dataset_builder(name, config, **options)
        builder.download_and_prepare()
        return splits_of(builder.as_dataset())
    defaults = {field.name: field.default for field in fields(builder.config)}
    declared = {
        option: value
        for option in csv_files.OPTIONS
        if option in defaults and (value := getattr(builder.config, option)) != defaults[option]
    }
    guessed = Path(name).is_dir() and not Path(name, "README.md").exists() and list(files) == ["train"]
    return read_files(files["train"] if guessed else files, labels, text_columns, {**declared, **options})


def _warn_of_unread(folder: Path, files: Mapping[Any, Sequence[Any]]) -> None:
    """Warns of data files that `datasets` skips because of their format, or because others are named for splits."""
    read = {Path(file).resolve() for of_split in files.values() for file in of_split}
    endings = set(FORMATS) - {".json"}  # also used by other files, such as a model's configuration
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and ending_of(path.name) in endings]
    if unread := [str(path.relative_to(folder)) for path in found if path.resolve() not in read]:
        rank_zero_warn(
            f"The folder {folder} has files that are not read: {join_quoted(unread)}. To read them too, give files by "
            "split, as in --data.dataset='{train: [a.csv, b.csv], test: c.csv}'."
        )


def splits_of(data: Any, wanted: Sequence[str] = ()) -> DatasetDict:
    """Python objects as a `DatasetDict`: by split, or else as the training split.

    Args:
        data: A `DatasetDict`; a `Dataset`, a pandas or polars DataFrame, an Arrow table or a list of dicts; or a dict
            of these by split.
        wanted: Columns of texts and labels; others are left out if they cannot be read.

    Raises:
        ValueError: It is none of these, or a wanted column has values of several types.
    """
    if isinstance(data, DatasetDict):
        return data
    if isinstance(data, Mapping) and not isinstance(data, IterableDatasetDict):
        return DatasetDict({str(split): _as_dataset(table, wanted) for split, table in data.items()})
    return DatasetDict({"train": _as_dataset(data, wanted)})


def _as_dataset(data: Any, wanted: Sequence[str]) -> Dataset:
    if isinstance(data, IterableDataset | IterableDatasetDict):
        raise UsageError(
            f"the data set is an {type(data).__name__}, whose rows are streamed, but batches are planned from the "
            "whole data set. Load it without streaming, or train on it with StreamDataModule."
        )
    if not _is_table(data) or isinstance(data, DatasetDict):
        raise UsageError(
            f"the data set is {_describe(data)}; give a Dataset, a DatasetDict, a pandas or polars DataFrame, an Arrow "
            "table or a list of dicts, or a dict of these by split."
        )
    try:
        return _converted(data)
    except Exception:  # pyarrow, pandas and polars raise many kinds, all of them about a column
        columns, parts = list(_columns(data)), []
        counts = Counter(name for name, _ in columns)
        for name, column in columns:
            try:
                if counts[name] > 1:
                    raise ValueError(f"there are {counts[name]} columns {name!r}.")
                parts.append(_converted(column))
            except Exception as error:
                if name in wanted or counts.keys().isdisjoint(wanted):
                    raise UsageError(
                        f"the column {name!r} of {describe_source(data)} cannot be read: {root_cause_message(error)} "
                        "Give every column a unique name, and values of one type."
                    ) from error
        return concatenate_datasets(parts, axis=1)


def _converted(data: Any) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if isinstance(data, pa.Table | pa.RecordBatch):
        return Dataset(pa.Table.from_batches([data]) if isinstance(data, pa.RecordBatch) else data)
    if isinstance(data, list):
        return Dataset.from_list(data)
    return Dataset.from_pandas(data, preserve_index=False) if _is_frame(data, "pandas") else Dataset.from_polars(data)


def _columns(data: Any) -> Iterable[tuple[str, Any]]:
    """Names of the columns, each with a table of that column alone."""
    if isinstance(data, list):
        names = dict.fromkeys(name for row in data for name in row)
        return ((name, [{name: row.get(name)} for row in data]) for name in names)
    if isinstance(data, pa.Table | pa.RecordBatch):
        return ((name, data.select([number])) for number, name in enumerate(data.schema.names))
    if _is_frame(data, "pandas"):
        return ((str(name), data.iloc[:, [number]]) for number, name in enumerate(data.columns))
    return ((name, data.select(name)) for name in data.columns)


def _is_table(data: Any) -> bool:
    tables = Dataset | DatasetDict | IterableDataset | IterableDatasetDict | pa.Table | pa.RecordBatch
    rows = isinstance(data, list) and bool(data) and all(isinstance(row, Mapping) for row in data)
    return isinstance(data, tables) or rows or _is_frame(data, "pandas") or _is_frame(data, "polars")


def _is_frame(data: Any, library: str) -> bool:
    """Whether an object is a DataFrame of a library, which need not be installed."""
    return any(kind.__name__ == "DataFrame" and kind.__module__.split(".")[0] == library for kind in type(data).__mro__)


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _describe(data: Any) -> str:
    if odd := [one for one in data if not isinstance(one, str | Mapping)] if isinstance(data, list) else []:
        return f"a list with {odd[0]!r}"
    short = data is None or isinstance(data, int | float | str) or (isinstance(data, list) and not data)
    return f"{data!r}" if short else f"of the type {type(data).__name__}"
