"""CSV and TSV files: how to read them, with every row checked, and whether their labels are numbers or words."""

import codecs
import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from smartbatch_lightning.errors import QUOTE_NAMES, UsageError, check_at_least, join_quoted

OPTIONS = (
    "sep", "delimiter", "names", "column_names", "header", "encoding", "encoding_errors", "quoting", "quotechar",
    "doublequote", "escapechar", "skipinitialspace", "skiprows", "nrows", "na_values", "keep_default_na",
)  # fmt: skip
# Numbers with a fraction as written in CSV files, and values that are not numbers.
_NUMBER = r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
_NOT_FINITE = "-?(nan|NaN|inf|Infinity)"
# A field with a quote in it, as written by a writer that quotes fields.
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
_MAX_LINES_QUOTED = 10  # lines of one field; quotes farther apart belong to two texts
_MAX_FIELD_LENGTH = 2**31 - 1
_SEPARATORS = ",;\t|"


@dataclass(frozen=True)
class _Format:
    """How a file is read, with the names of pandas' arguments; `header` is either 0 or None.

    Attributes:
        unquoted_by_ending: Whether fields are not quoted because of the file's extension, not because the user said so.
    """

    sep: str
    names: tuple[str, ...] | None
    header: int | None
    encoding: str
    encoding_errors: str
    quoting: int
    unquoted_by_ending: bool
    quotechar: str
    doublequote: bool
    escapechar: str | None
    skipinitialspace: bool
    skiprows: int
    nrows: int | None

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, tabs: bool) -> "_Format":
        """The format specified by a user's options.

        Args:
            options: Some of `OPTIONS`.
            tabs: Whether, by the file's extension, fields are separated by tabs and not quoted.

        Raises:
            ValueError: An option has a value that cannot be checked.
        """
        sep = options.get("sep") or options.get("delimiter") or ("\t" if tabs else ",")
        names = options.get("names") or options.get("column_names")
        header = options.get("header", "infer")
        sep = "\t" if sep == r"\t" else sep  # as it is written in a shell
        if not isinstance(sep, str) or len(sep) != 1:
            raise UsageError(f"sep is {sep!r} in reader_kwargs; give one character.")
        if names is not None and (
            not isinstance(names, list | tuple)
            or not all(type(name) in (str, int) for name in names)
            or len(set(map(str, names))) < len(names)
        ):
            raise UsageError(
                f"names is {names!r} in reader_kwargs; give a list with a name for each column, each once. "
                f"{QUOTE_NAMES}"
            )
        if header not in ("infer", 0, None) or (header is None and names is None):
            raise UsageError(
                f"header is {header!r} in reader_kwargs; give 0 if the first line names the columns, else set names to "
                "a list with a name for each column."
            )
        skiprows, nrows = options.get("skiprows") or 0, options.get("nrows")
        check_at_least(0, skiprows=skiprows, **({} if nrows is None else {"nrows": nrows}))
        encoding = options.get("encoding") or "utf-8"
        if codecs.lookup(encoding).name == "utf-8":
            encoding = "utf-8-sig"  # since such a file may begin with a byte order mark
        return cls(
            sep=sep,
            names=None if names is None else tuple(map(str, names)),
            header=(0 if names is None else None) if header == "infer" else header,
            encoding=encoding,
            encoding_errors=options.get("encoding_errors") or "strict",
            quoting=int(options.get("quoting", csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)),
            unquoted_by_ending=tabs and "quoting" not in options,
            quotechar=options.get("quotechar", '"'),
            doublequote=bool(options.get("doublequote", True)),
            escapechar=options.get("escapechar"),
            skipinitialspace=bool(options.get("skipinitialspace", False)),
            skiprows=skiprows,
            nrows=nrows,
        )

    def rows(self, lines: Iterator[str]) -> Any:
        """Rows of a file as lists of fields; unpaired quotes are an error."""
        return csv.reader(
            lines,
            delimiter=self.sep,
            quotechar=self.quotechar,
            quoting=csv.QUOTE_NONE if self.quoting == csv.QUOTE_NONE else csv.QUOTE_MINIMAL,
            doublequote=self.doublequote,
            escapechar=self.escapechar,
            skipinitialspace=self.skipinitialspace,
            strict=True,
        )


def csv_reader_kwargs(
    path: str, name: str, digest: str, options: Mapping[str, Any], *, tabs: bool
) -> tuple[dict[str, Any], int]:
    """Checks that every row of a file has the right number of fields, and returns how to read it.

    pandas, which `datasets` uses, takes the first of too many fields for an index, fills up missing ones, and reads on
    after an unclosed quote.

    Args:
        path: Path of the file.
        name: Name of the file, for messages.
        digest: Hash of its content; a file with the same hash is not checked again.
        options: The user's options, some of `OPTIONS`.
        tabs: Whether, by the file's extension, fields are separated by tabs and not quoted.

    Returns:
        Arguments of `datasets.load_dataset` with which all columns are text exactly as in the file, and the number of
        rows.

    Raises:
        ValueError: A row or an option is not usable.
    """
    try:
        form = _Format.from_options(options, tabs=tabs)
        form.rows(iter(()))
        codecs.lookup_error(form.encoding_errors)
    except UsageError:
        raise
    except (TypeError, ValueError, LookupError) as error:  # raised by Python's csv module, codecs and int
        raise UsageError(
            f"reader_kwargs is {dict(options)}, which has an invalid value: {error}. Correct it."
        ) from error
    columns, num_rows = _checked(path, name, digest, form)
    given = {option: options[option] for option in ("na_values", "keep_default_na") if option in options}
    as_checked = {option: value for option, value in vars(form).items() if option != "unquoted_by_ending"}
    return {
        "keep_default_na": False,
        **given,
        **as_checked,
        "names": list(columns),
        "features": Features({column: Value("string") for column in columns}),
    }, num_rows


@lru_cache(maxsize=1024)
def _checked(path: str, name: str, digest: str, form: _Format) -> tuple[tuple[str, ...], int]:
    """Names of the columns, and the number of rows."""
    with open(path, encoding=form.encoding, errors=form.encoding_errors, newline="") as lines, _long_fields():
        for _ in range(form.skiprows):
            next(lines, None)
        rows = _numbered(form.rows(_without_nul(lines)), form.skiprows, name)
        try:
            columns = form.names
            if form.header == 0:
                header = next((row for _, row in rows if row), None)
                if header is None:
                    raise UsageError(f"{name} is empty. Check that the file is complete, with column names and rows.")
                _check_header(header, name, form)
                columns = columns or _column_names(header)
            assert columns is not None
            if form.unquoted_by_ending:
                rows = _without_quoted(rows, name)
            return columns, _count(rows, columns, name, form)
        except UnicodeError as error:
            raise encoding_error(name, "csv", form.encoding, error) from error


def encoding_error(name: str, file_format: str, encoding: str, error: UnicodeError) -> UsageError:
    """The error for a file that is not in an encoding."""
    found = str(error)
    if isinstance(error, UnicodeDecodeError):
        found = f"the byte 0x{error.object[error.start]:02x}"
    return UsageError(
        f"{name} cannot be read as {file_format}: {found} is not {encoding.removesuffix('-sig')}. Check that the file "
        "is complete, and set its encoding, such as latin-1 or utf-16, with --data.reader_kwargs='{encoding: latin-1}'."
    )


def _without_nul(lines: Iterable[str]) -> Iterator[str]:
    """Rejects NUL characters, where pandas ends a field; UTF-16 text read in another encoding is full of them."""
    for line in lines:
        if "\0" in line:
            raise UnicodeError("a character 0x00")
        yield line


def _numbered(rows: Any, skipped: int, name: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of their first line."""
    line = skipped + 1
    try:
        for row in rows:
            yield line, row
            line = skipped + rows.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{name} cannot be read as csv: {error}, in the row that begins on line {line}. Check that the file is "
            "complete. If quotes in a field are escaped with a backslash, set --data.reader_kwargs='{escapechar: "
            "\"\\\\\"}'; if quotes are part of the text, '{quoting: 3}'."
        ) from error


def _count(rows: Iterable[tuple[int, list[str]]], columns: tuple[str, ...], name: str, form: _Format) -> int:
    """Number of rows; rejects a row that does not have a field for each column."""
    width, count = len(columns), 0
    for line, row in rows:
        if count == form.nrows:
            break
        if not row:  # skipped by pandas
            continue
        if len(row) != width:
            raise UsageError(
                f"line {line} of {name} has {len(row)} field{'s' * (len(row) > 1)}, but there are {width} columns: "
                f"{join_quoted(columns)}. Put quotes around text that contains {form.sep!r}, and remove anything extra "
                "at the ends of lines; or set sep, names or quoting in --data.reader_kwargs."
            )
        if count == 0 and form.names is not None and form.header is None:
            _check_no_header(row, form.names, name)
        count += 1
    return count


def _without_quoted(rows: Iterable[tuple[int, list[str]]], name: str) -> Iterator[tuple[int, list[str]]]:
    """Rejects fields that look quoted: with doubled quotes in them, or over several lines."""
    opened = -_MAX_LINES_QUOTED
    for line, row in rows:
        for field in row:
            if field[:1] != '"' and field[-1:] != '"':
                continue
            unpaired = field.count('"') % 2 == 1
            closes = unpaired and field[-1] == '"' and line - opened < _MAX_LINES_QUOTED
            if closes or _QUOTED.fullmatch(field):
                raise UsageError(
                    f"line {line} of {name} has a field that looks quoted, but in this format quotes are read as part "
                    "of the text. Set --data.reader_kwargs='{quoting: 0}' to read fields as quoted, or '{quoting: 3}' "
                    "to keep the quotes."
                )
            if unpaired and field[0] == '"':
                opened = line
        yield line, row


def _check_header(header: list[str], name: str, form: _Format) -> None:
    if header[0].startswith("sep="):
        raise UsageError(
            f"the first line of {name} is {form.sep.join(header)!r}, which tells Excel the separator. Set "
            f"--data.reader_kwargs='{{sep: {_quoted((header[0][4:] or form.sep)[0])}, skiprows: 1}}'."
        )
    others = [separator for separator in _SEPARATORS if len(header) == 1 and separator in header[0]]
    if others:
        raise UsageError(
            f"the first line of {name} is a single column, {join_quoted(header)}, with the separator {form.sep!r}. Set "
            f"--data.reader_kwargs='{{sep: {_quoted(others[0])}}}'."
        )
    if form.unquoted_by_ending and all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in header):
        raise UsageError(
            f"the first line of {name} has quoted fields, but quotes are read as part of the text. Set "
            "--data.reader_kwargs='{quoting: 0}' to read them as quoted, or '{quoting: 3}' for names with quotes."
        )


def _quoted(separator: str) -> str:
    return '"\\t"' if separator == "\t" else f'"{separator}"'


def _check_no_header(row: list[str], names: tuple[str, ...], name: str) -> None:
    """Rejects a first row that is a header, in whole or in part, although names are given for a file without one."""
    cells, wanted = ([one.strip().lower() for one in of] for of in (row, names))
    if sorted(cells) == sorted(wanted):
        same = "Add header: 0, or leave names out." if tuple(row) == names else "Leave names out."
        raise UsageError(f"the first line of {name} already has the names given in reader_kwargs. {same}")
    if shared := [one for one, cell, want in zip(row, cells, wanted, strict=True) if cell == want]:
        raise UsageError(
            f"the first line of {name} has {join_quoted(shared)} where reader_kwargs has the same names, so it seems "
            "to be a header. Add header: 0 to replace its names, or leave names out; if it is a row, give other names."
        )


def _column_names(header: list[str]) -> tuple[str, ...]:
    """Column names; columns without a name or with repeated names get their position appended."""
    counts, names = Counter(header), []
    for number, cell in enumerate(header):
        name = cell
        if not cell or counts[cell] > 1:
            name = f"{cell or 'Unnamed'}.{number}"
            while name in counts:
                name += "_"
        names.append(name)
    return tuple(names)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lets the csv module read fields of more than 128 KB."""
    limit = csv.field_size_limit(_MAX_FIELD_LENGTH)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def with_typed_labels(dataset: Dataset, column: str) -> Dataset:
    """Labels of a CSV file as numbers or booleans if all are written that way, else text; empty fields become null."""
    if column not in dataset.column_names or not len(dataset):
        return dataset
    text = dataset.select_columns(column).with_format("arrow")[:].column(column)
    labels = pc.if_else(pc.equal(text, ""), None, text)
    if _all_match(labels, r"^(0|-?[1-9][0-9]{0,17})$"):
        labels = labels.cast(pa.int64())
    elif _all_match(labels, "^(True|False)$"):
        labels = pc.equal(labels, "True")
    elif _are_decimals(labels):
        labels = labels.cast(pa.float64())  # those that are not finite are rejected later
    typed = dataset.remove_columns(column)
    fingerprint = hashlib.sha256(f"{dataset._fingerprint} {column} typed".encode()).hexdigest()[:16]
    return typed.add_column(column, labels.combine_chunks(), new_fingerprint=fingerprint)


def _are_decimals(labels: pa.ChunkedArray) -> bool:
    """Whether all are numbers, some with a fraction; `1e5` and `10e4` are words, and thus two classes."""
    if not _all_match(labels, f"^({_NUMBER}|{_NOT_FINITE})$") or _all_match(labels, f"^([^.eE]+|{_NOT_FINITE})$"):
        return False
    numbers = labels.cast(pa.float64())
    whole = pc.all(pc.equal(numbers, pc.floor(numbers)), skip_nulls=True).as_py()
    return not (whole and pc.any(pc.match_substring(labels, "e", ignore_case=True), skip_nulls=True).as_py())


def _all_match(labels: pa.ChunkedArray, pattern: str) -> bool:
    """Whether there are labels other than null, and all of them match."""
    matching = pc.match_substring_regex(labels, pattern)
    return labels.null_count < len(labels) and bool(pc.all(matching, skip_nulls=True).as_py())
