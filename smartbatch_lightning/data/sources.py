"""A data set by its name: the demo, a Hub name, files or folders -> `DatasetDict`."""

from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk

from smartbatch_lightning import demo
from smartbatch_lightning.errors import UsageError, cause, listed

_FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_dataset(dataset: str | dict[str, str], config: str | None = None, *, label_column: str) -> DatasetDict:
    """Reads a data set.

    Args:
        dataset: As `SmartBatchDataModule` takes it.
        config: Configuration of a data set on the Hub.
        label_column: In a CSV file an empty field of this column is a missing label; elsewhere it is an empty text,
            and words such as "None" are words.

    Raises:
        ValueError: There is no such data set, or it cannot be read.
    """
    if dataset == "demo":
        dataset = str(demo.data_dir())
    if isinstance(dataset, dict):
        return _read_files(dataset, label_column)
    path = Path(dataset).expanduser()
    if path.is_file() or path.suffix in _FILE_FORMATS:
        return _read_files({"train": dataset}, label_column)
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
                f"the folder {dataset} cannot be read as a data set: {cause(error)} Check that its files are whole "
                "and not empty."
            ) from error
        raise UsageError(
            f"the data set {dataset!r} is no file or folder here, and it cannot be had from the Hub: {cause(error)} "
            "Check the name and the network, or set --data.dataset to a local CSV, JSON lines or Parquet file, or to "
            "a folder written by save_to_disk."
        ) from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _read_files(files: dict[str, str], label_column: str) -> DatasetDict:
    suffixes = sorted({Path(file).suffix for file in files.values()})
    if len(suffixes) != 1 or suffixes[0] not in _FILE_FORMATS:
        raise UsageError(
            f"{listed(files.values())} end in {listed(suffixes)}; give files of one format, ending in one of "
            f"{listed(_FILE_FORMATS)}."
        )
    paths = {split: Path(file).expanduser() for split, file in files.items()}
    for path in paths.values():
        if not path.is_file():
            raise UsageError(f"the file {path} is not there. Set --data.dataset to files that are.")
    file_format = _FILE_FORMATS[suffixes[0]]
    options: dict[str, Any] = {}
    if file_format == "csv":
        options = {"keep_default_na": False, "na_values": {label_column: [""]}}
        options["sep"] = "\t" if suffixes[0] == ".tsv" else ","
    try:
        loaded = load_dataset(file_format, data_files={split: str(path) for split, path in paths.items()}, **options)
    except Exception as error:  # datasets raises dozens of kinds, all of them about these files
        raise UsageError(
            f"{listed(files.values())} cannot be read as {file_format}: {cause(error)} Check that the file is whole, "
            "not empty, and of the format that its ending tells."
        ) from error
    assert isinstance(loaded, DatasetDict)
    return loaded
