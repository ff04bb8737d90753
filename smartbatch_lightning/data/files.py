"""Files by split, local or remote, compressed or not -> `DatasetDict`."""

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TextIO
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, DownloadConfig, DownloadManager, Features, Value, concatenate_datasets
from datasets.data_files import DataFilesList
from datasets.load import import_main_class
from lightning.pytorch.utilities import rank_zero_warn
from xxhash import xxh3_64, xxh3_128

from smartbatch_lightning.data import csv_files
from smartbatch_lightning.errors import UsageError, join_quoted, root_cause_message
from smartbatch_lightning.tasks.source import LabelSource

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
_READER_OPTIONS: dict[str, tuple[str, ...]] = {  # only the formats that have any
    "csv": csv_files.OPTIONS,
    "json": ("encoding", "field"),
    "parquet": ("filters",),
}
_SPLIT_WORDS = {  # in file names
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BYTES_READ = 1 << 20
_JSON_BYTES_READ = 10 << 20  # block size of datasets


@dataclass(frozen=True)
class _File:
    """A local, uncompressed file.

    Attributes:
        path: Its path.
        name: Its name in messages.
        ending: Its lower-case extension, such as `.csv`.
        digest: Hash of its content.
    """

    path: str
    name: str
    ending: str
    digest: str

    @property
    def format(self) -> str:
        """Its format, according to its extension."""
        return FORMATS[self.ending]


def is_file_name(name: str) -> bool:
    """Whether a name is a URL, a pattern, or that of a file, by its extension or because the file exists."""
    if glob.has_magic(name) or _URL.match(name):
        return True
    path = Path(name)
    return path.is_file() or (not path.is_dir() and (ending_of(name) in FORMATS or _is_compressed(name)))


def read_files(
    files: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    labels: LabelSource,
    text_columns: Sequence[str],
    reader_kwargs: Mapping[str, Any],
) -> DatasetDict:
    """Reads files of one format.

    Columns other than texts and labels are kept if all files of a split have them with the same type.

    Args:
        files: For each split one or more files, URLs or patterns; without splits, the files to train on.
        labels: Where the labels are. In CSV files, an empty field there is a missing label, unless a label delimiter is
            given; in other columns it is an empty text, and words such as "None" are words.
        text_columns: Text columns.
        reader_kwargs: Options of the format's reader.

    Raises:
        ValueError: A file does not exist or cannot be read completely.
    """
    wanted = (*text_columns, *labels.columns)
    given = files if isinstance(files, Mapping) else {"train": files}
    by_split = {split: _expanded([names] if isinstance(names, str) else names) for split, names in given.items()}
    names = [name for of_split in by_split.values() for name in of_split]
    endings = {ending_of(name) for name in names} - {".zip"}
    formats = {FORMATS.get(ending) for ending in endings}
    if len(formats) > 1 or None in formats:
        raise UsageError(
            f"{join_quoted(names)} end in {join_quoted(sorted(endings))}; give files of one format, ending in one of "
            f"{join_quoted(FORMATS)}."
        )
    for file_format in formats:
        _check_reader_kwargs(reader_kwargs, str(file_format))
    loaded = {}
    seen: dict[str, str] = {}
    for split, of_split in by_split.items():
        local = [file for name in of_split for file in _local_files(name)]
        _warn_of_repeated(local, split, seen)
        if given is not files:
            _check_is_one_split(local)
        dataset = _concatenated([(file, _read(file, reader_kwargs, wanted)) for file in local], wanted)
        dataset._fingerprint = _content_fingerprint(local, reader_kwargs, dataset)
        if labels.delimiter is None and all(file.format == "csv" for file in local):
            for column in labels.columns:
                dataset = csv_files.with_typed_labels(dataset, column)
        loaded[split] = dataset
    return DatasetDict(loaded)


def _expanded(names: Sequence[str]) -> list[str]:
    """The files given by names and patterns; URLs and existing files are returned unchanged."""
    found: list[str] = []
    for name in map(_normalized_url, names):
        path = Path(name)
        if _URL.match(name):
            matching = _expanded_url(name) if glob.has_magic(urlsplit(name).path) else [name]
        elif path.is_file():
            matching = [name]
        elif glob.has_magic(name):
            matching = sorted(match for match in glob.glob(name, recursive=True) if Path(match).is_file())
            if not matching:
                raise UsageError(f"no file matches {name}. Set --data.dataset to existing files.")
        else:
            kind = "is a folder; give the files in it, for example by a pattern" if path.is_dir() else "does not exist"
            raise UsageError(f"the file {name} {kind}. Set --data.dataset to existing files.")
        found += matching
    if not found:
        raise UsageError("dataset has a split without files. Set --data.dataset to one or more files for each split.")
    return found


def _normalized_url(name: str) -> str:
    """A URL with a lower-case scheme, or the path that a `file://` URL stands for; other names are unchanged."""
    if not _URL.match(name):
        return name
    scheme, _, rest = name.partition("://")
    if scheme.lower() != "file":
        return f"{scheme.lower()}://{rest}"
    literal, decoded = url2pathname(quote(rest)), url2pathname(rest)
    return literal if Path(literal).exists() else decoded


def _expanded_url(name: str) -> list[str]:
    try:
        return list(DataFilesList.from_patterns([name]))
    except Exception as error:  # it depends on the file system that the scheme names
        raise _fetch_error(name, error) from error


def _fetch_error(name: str, error: Exception) -> UsageError:
    return UsageError(
        f"{name} cannot be fetched: {root_cause_message(error)} Check the address and the network, or set "
        "--data.dataset to local files."
    )


def _suffixes(name: str) -> list[str]:
    """Extensions of a file or URL, in lower case."""
    path = urlsplit(name).path if _URL.match(name) else name
    return [suffix.lower() for suffix in PurePosixPath(path).suffixes]


def _is_compressed(name: str) -> bool:
    return any(suffix in _COMPRESSED for suffix in _suffixes(name)[-1:])


def ending_of(name: str) -> str:
    """The extension of the format, before that of a compression; `.zip` for archives."""
    suffixes = _suffixes(name)
    if suffixes[-1:] == [".zip"]:
        return ".zip"
    if _is_compressed(name):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _check_reader_kwargs(reader_kwargs: Mapping[str, Any], file_format: str) -> None:
    known = _READER_OPTIONS.get(file_format, ())
    if unknown := [option for option in reader_kwargs if option not in known]:
        takes = f"give some of {join_quoted(known)}" if known else "leave reader_kwargs out"
        raise UsageError(f"reader_kwargs has {join_quoted(unknown)}, which {file_format} files do not have; {takes}.")
    if (encoding := reader_kwargs.get("encoding")) is not None:
        try:
            "".encode(encoding)
        except (LookupError, TypeError):
            raise UsageError(
                f"encoding is {encoding!r} in reader_kwargs, which is not a text encoding. Give one such as latin-1."
            ) from None


def _local_files(name: str) -> Iterator[_File]:
    """Fetches and extracts a file; extracted files are cached by the archive's content."""
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "downloads"
    path = name
    if _URL.match(name):
        try:
            path = DownloadManager(download_config=DownloadConfig(cache_dir=str(cache))).download(name)
        except Exception as error:  # it depends on the file system that the scheme names
            raise _fetch_error(name, error) from error
    digest = _digest(path, name)
    if not _is_compressed(name):
        yield _File(str(path), name, ending_of(name), digest)
        return
    manager = DownloadManager(download_config=DownloadConfig(cache_dir=str(cache / digest)))
    try:
        extracted = str(manager.extract(str(path)))
        inner = list(map(str, manager.iter_files(extracted)))
    except Exception as error:  # it depends on the compression
        raise UsageError(
            f"{name} cannot be extracted: {root_cause_message(error)} Check that the file is complete."
        ) from error
    if extracted == str(path):
        raise UsageError(
            f"{name} is not compressed as its extension says. Check that the file is complete, or rename it."
        )
    if not inner:
        raise UsageError(f"{name} has no files in it. Check that the file is complete.")
    archive = ending_of(name) == ".zip"
    for file in inner:
        ending = ending_of(file) if archive else ending_of(name)
        if ending not in FORMATS:
            raise UsageError(
                f"{Path(file).name} in {name} is not of a supported format; pack files ending in "
                f"{join_quoted(FORMATS)}."
            )
        yield _File(file, f"{Path(file).name} in {name}" if archive else name, ending, _digest(file, name))


def _check_is_one_split(files: Sequence[_File]) -> None:
    """Rejects files given without splits if their names indicate different ones, such as training and test."""
    of_split: dict[str, str] = {}
    for file in files:
        words = set(re.findall("[a-z]+", f"{Path(file.path).name} {Path(file.name).name}".lower()))
        named = [split for split, its_words in _SPLIT_WORDS.items() if words & its_words]
        if len(named) == 1:
            of_split.setdefault(named[0], file.name)
    if len(of_split) > 1:
        raise UsageError(
            f"the names of {join_quoted(of_split.values())} indicate different splits, but all files would be trained "
            "on. Give files by split, as in --data.dataset='{train: a.csv, test: b.csv}'."
        )


def _warn_of_repeated(files: Sequence[_File], split: str, seen: dict[str, str]) -> None:
    """Warns of files with the same content as an earlier one, described in `seen` by digest."""
    for file in files:
        described = f"{file.name} of the split {split!r}"
        if (earlier := seen.setdefault(file.digest, described)) is not described:
            rank_zero_warn(
                f"{described} has the same content as {earlier}. Results on samples that are trained on say nothing "
                "about others; unless this is intended, leave one of the files out."
            )


def _digest(path: str, name: str) -> str:
    digest = xxh3_128()
    try:
        with open(path, "rb") as file:
            for content in iter(partial(file.read, _BYTES_READ), b""):
                digest.update(content)
    except OSError as error:
        raise UsageError(
            f"{name} cannot be read: {root_cause_message(error)} Check that it exists and may be read."
        ) from error
    return digest.hexdigest()


def _read(file: _File, reader_kwargs: Mapping[str, Any], wanted: Sequence[str]) -> Dataset:
    _check_reader_kwargs(reader_kwargs, file.format)
    options = dict(reader_kwargs)
    try:
        if file.format == "csv":
            dataset = _read_csv(file, options)
        elif file.format == "json":
            dataset = _read_json(file, options, wanted)
        elif file.format == "parquet":
            dataset = _read_parquet(file, options, wanted)
        else:
            dataset = _read_with_datasets(file, options)
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        raise csv_files.encoding_error(file.name, file.format, options.get("encoding", "utf-8"), error) from error
    except Exception as error:  # datasets raises dozens of kinds, all of them about this file
        cause = (_describe_bad_line(file) if file.format == "json" else None) or root_cause_message(error)
        raise UsageError(
            f"{file.name} cannot be read as {file.format}: {cause} Check that the file is complete, not empty, and of "
            "the format that its extension says."
        ) from error
    mixed = [name for name in wanted if name in dataset.features and "Json(" in repr(dataset.features[name])]
    if mixed:
        raise UsageError(
            f"the column {mixed[0]!r} of {file.name} holds values of several types, such as texts and numbers. Write "
            "them as one type."
        )
    return dataset


def _read_with_datasets(file: _File, options: Mapping[str, Any]) -> Dataset:
    """Reads a file with the reader that `datasets` has for its format, into the cache of `datasets`."""
    # load_dataset would first report its use to a server, and wait for seconds if none answers
    reader: Any = import_main_class(f"datasets.packaged_modules.{file.format}.{file.format}")
    builder = reader(
        # datasets caches by path and time; this adds the content and its own version
        config_name=f"{file.digest}-{datasets.__version__}",
        data_files={"train": glob.escape(file.path)},
        **options,
    )
    builder.download_and_prepare()
    return builder.as_dataset("train")


def _read_parquet(file: _File, reader_kwargs: Mapping[str, Any], wanted: Sequence[str]) -> Dataset:
    """Reads a Parquet file; leaves out columns of types that `datasets` lacks, such as maps, unless they are wanted."""
    schema, known = pq.read_schema(file.path), Features()
    try:
        known = Features.from_arrow_schema(schema)
    except ValueError:
        for field in schema:
            try:
                known.update(Features.from_arrow_schema(pa.schema([field])))
            except ValueError:
                if field.name in wanted:
                    raise
    if not pq.read_metadata(file.path).num_rows:  # datasets rejects it
        return Dataset(pq.read_table(file.path, columns=list(known)))
    options = {"columns": list(known), "features": known} if len(known) < len(schema) else {}
    return _read_with_datasets(file, {**reader_kwargs, **options})


def _read_csv(file: _File, reader_kwargs: Mapping[str, Any]) -> Dataset:
    options, num_rows = csv_files.csv_reader_kwargs(
        file.path, file.name, file.digest, reader_kwargs, tabs=file.ending == ".tsv"
    )
    if num_rows == 0:  # datasets rejects it
        return Dataset.from_dict({name: [] for name in options["names"]}, features=options["features"])
    dataset = _read_with_datasets(file, options)
    if len(dataset) != num_rows:
        raise UsageError(
            f"{file.name} has {num_rows:,} rows, but pandas reads {len(dataset):,}. Remove blank lines with spaces, "
            "and non-printing characters."
        )
    return dataset


def _read_json(file: _File, options: Mapping[str, Any], wanted: Sequence[str]) -> Dataset:
    """Reads a list of rows, possibly under a key, or one row per line.

    The reader of `datasets` mistakes texts for times, and rounds numbers to ten decimals unless the file has a row per
    line and one type per column. In these cases, Python's reader is used, which reads the file into memory.
    """
    encoding = options.get("encoding", "utf-8-sig")
    with open(file.path, encoding=encoding) as content:
        if "field" in options:
            return _dataset_of(_under_key(json.load(content), options["field"], file), file)
        beginning = content.read(_BYTES_READ).lstrip("\ufeff \t\r\n")
        content.seek(0)
        if not beginning:
            raise UsageError(f"{file.name} is empty. Check that the file is complete.")
        if beginning.startswith("["):
            return _dataset_of(json.load(content), file)
        _check_holds_rows(content, file)
        while content.read(_BYTES_READ):  # decodes the whole file, since pyarrow accepts bytes in other encodings
            pass
    try:
        dataset = _read_with_datasets(file, options)
    except Exception:
        size = Path(file.path).stat().st_size
        if size <= _JSON_BYTES_READ:
            raise
        # in one block, since later rows may have other columns or types
        dataset = _read_with_datasets(file, {**options, "chunksize": size})
    kinds = repr([dataset.features.get(name) for name in wanted])
    if "timestamp" in kinds or ("float" in kinds and "Json(" in repr(dataset.features)):
        with open(file.path, encoding=encoding) as lines:
            return _dataset_of([json.loads(line) for line in lines if line.strip()], file)
    return dataset


def _under_key(content: Any, field: Any, file: _File) -> Any:
    keys = list(content) if isinstance(content, dict) else []
    if field not in keys:
        has = f"the keys {join_quoted(keys)}" if keys else "no keys"
        raise UsageError(f"field is {field!r} in reader_kwargs, but {file.name} has {has}. Give one, or leave it out.")
    return content[field]


def _check_holds_rows(content: TextIO, file: _File) -> None:
    """Rejects a single JSON object of columns or tables, which `datasets` would read as one row."""
    first = content.readline()
    if first.strip() == "{":
        first += content.read()
    if not first.lstrip("\ufeff").startswith("{") or content.read(_BYTES_READ).strip():
        return
    try:
        values = list(json.loads(first).values())
    except json.JSONDecodeError:
        return
    if values and all(isinstance(value, dict | list) for value in values):
        raise UsageError(
            f"{file.name} is one JSON object of columns, not rows. Write rows, as pandas does by "
            'to_json(path, orient="records", lines=True); or, if one of its keys holds a list of rows, name that key '
            "with --data.reader_kwargs='{field: KEY}'."
        )


def _dataset_of(rows: Any, file: _File) -> Dataset:
    """JSON objects as a data set, in memory."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{file.name} does not hold a list of JSON objects. Write each row as an object.")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Dataset.from_dict(columns, on_mixed_types="use_json")


def _describe_bad_line(file: _File) -> str | None:
    """The error in the first line that is not JSON; None if the file does not have one row per line."""
    with open(file.path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.strip() in ("{", "[", "[{"):
                return None
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"line {number}: {error.msg}."
            if not isinstance(row, dict):
                return None if number == 1 else f"line {number} is not a JSON object."
    return None


def _concatenated(parts: list[tuple[_File, Dataset]], wanted: Sequence[str]) -> Dataset:
    """Concatenates data sets: the wanted columns, and others that all have with the same type."""
    parts = [part for part in parts if len(part[1])] or parts[:1]
    (first_file, first), *others = parts
    if all(dataset.features == first.features for _, dataset in others):
        return concatenate_datasets([dataset for _, dataset in parts]) if others else first
    features = {}
    for name in dict.fromkeys([*first.features, *wanted]):
        kinds = [dataset.features.get(name) for _, dataset in parts]
        feature = _common_feature(kinds)
        if feature is not None:
            features[name] = feature
        elif name in wanted and any(kinds):
            odd = next(number for number, kind in enumerate(kinds) if kind != kinds[0])
            raise UsageError(
                f"the column {name!r} is {_type_name(kinds[0])} in {first_file.name} and {_type_name(kinds[odd])} in "
                f"{parts[odd][0].name}. Use one type in all files of a split, or leave a file out."
            )
    common = Features(features)
    return concatenate_datasets([dataset.select_columns(list(common)).cast(common) for _, dataset in parts])


def _content_fingerprint(files: list[_File], reader_kwargs: Mapping[str, Any], dataset: Dataset) -> str:
    """Fingerprint for the token cache, from the files' content; that of `datasets` is from paths and times."""
    read_as = [(file.digest, file.ending) for file in files], sorted(reader_kwargs.items()), dataset.features
    return str(xxh3_64(repr(read_as).encode()).hexdigest())


def _common_feature(features: list[Any]) -> Any:
    """A type common to all; None if there is none."""
    if all(feature == features[0] for feature in features):
        return features[0]
    if not all(isinstance(feature, Value) for feature in features):
        return None
    try:
        schemas = [pa.schema([("", feature.pa_type)]) for feature in features]
        return Value(str(pa.unify_schemas(schemas, promote_options="permissive").field(0).type))
    except (pa.ArrowException, ValueError):
        return None


def _type_name(feature: Any) -> str:
    if feature is None:
        return "missing"
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__
