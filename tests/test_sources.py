"""Tests of sources: files of every kind and objects are read as they stand, or refused in one line before anything long."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict, IterableDataset
from helpers import trainer
from hub import hub_with
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule, demo
from smartbatch_lightning.data.sources import read_dataset
from smartbatch_lightning.tasks.source import LabelSource

ROWS = [("a fine film", "pos"), ("a dull film", "neg"), ('fine, "really" fine', "pos")]
FRAME = pd.DataFrame(ROWS, columns=["text", "label"])
HTTP = pytest.mark.filterwarnings("ignore:unclosed")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def module(dataset: Any, **options) -> SmartBatchDataModule:
    return SmartBatchDataModule(
        dataset, str(demo.model_dir()), **{"max_length": 16, "validation_split": None, **options}
    )


def read(dataset: Any, split: str = "train", **options) -> list[tuple]:
    """Texts and labels of a split, as they are read."""
    found = read_dataset(dataset, **options)[split]
    return list(zip(found["text"], found["label"], strict=True))


def refusal(dataset: Any, **options) -> str:
    """The line with which a run is refused, before it has tokenized anything."""
    data = module(dataset, **options)
    data.tokenize = None  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match=".") as refused:
        data.prepare_data()
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def as_csv(rows: list[tuple], **dialect: Any) -> str:
    written = io.StringIO()
    csv.writer(written, **dialect).writerows([("text", "label"), *rows])
    return written.getvalue()


def as_json_lines(rows: list[tuple]) -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


# --- names of files ---


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("a.csv", bytes), ("a.CSV", bytes), ("a.csv.gz", gzip.compress), ("a.csv.bz2", bz2.compress),
        ("a.csv.xz", lzma.compress), ("a.csv.zst", zstandard.compress),
    ],
)  # fmt: skip
def test_csv_files_are_read_whatever_compresses_them(name: str, packed, write) -> None:
    assert read(write(name, packed(as_csv(ROWS).encode()))) == ROWS


@pytest.mark.parametrize(
    ("name", "packed"),
    [("a.jsonl", bytes), ("a.ndjson", bytes), ("a.JSONL", bytes), ("a.jsonl.zst", zstandard.compress)],
)
def test_json_lines_are_read_whatever_they_are_called(name: str, packed, write) -> None:
    assert read(write(name, packed(as_json_lines(ROWS).encode()))) == ROWS


def test_an_archive_is_read_as_the_files_in_it(tmp_path: Path) -> None:
    for name in ("a.csv.zip", "b.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("in/a.csv", as_csv(ROWS[:2]))
            archive.writestr("in/b.csv", as_csv(ROWS[2:]))
        assert read(str(tmp_path / name)) == ROWS
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("notes.txt", "fine")
    assert "notes.txt in" in refusal(str(tmp_path / "c.zip"))
    zipfile.ZipFile(tmp_path / "d.zip", "w").close()
    assert "d.zip has no files in it" in refusal(str(tmp_path / "d.zip"))


def test_files_that_are_named_for_other_splits_are_not_trained_on_unless_a_split_is_given_for_them(
    write, tmp_path: Path
) -> None:
    paths = [write(f"d/{split}.csv", as_csv(ROWS)) for split in ("train", "Test-1")]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(paths[0], "in/dev.csv")
        archive.write(paths[1], "in/test.csv")
    for split in ("Train", "Test"):  # datasets takes a folder's names for splits only in lower case
        write(f"e/{split}.csv", as_csv(ROWS))
    for dataset in (paths, str(tmp_path / "d" / "*.csv"), str(tmp_path / "a.zip"), str(tmp_path / "e")):
        assert "indicate different splits" in refusal(dataset)
    assert read({"train": paths}) == 2 * ROWS


def test_columns_of_one_name_are_told_apart_by_their_number(write) -> None:
    path = write("a.csv", "text,label,label\nfine,1,pos\ndull,0,neg\n")
    with pytest.raises(ValueError, match="'label' is not in the split 'train', which has 'text', 'label.1', 'label.2'"):
        module(path).setup("fit")
    assert read_dataset(path, labels=LabelSource(("label.2",)))["train"]["label.2"][:] == ["pos", "neg"]


def test_patterns_lists_and_lists_by_split_are_read_in_order(tmp_path: Path) -> None:
    for number in range(3):
        FRAME.iloc[[number]].to_parquet(tmp_path / f"train-{number}.parquet")
    files = [str(tmp_path / f"train-{number}.parquet") for number in range(3)]
    assert read(str(tmp_path / "train-*.parquet")) == read(files) == ROWS
    assert read({"train": files[0], "test": files[1:]}, "test") == ROWS[1:]
    assert read({"test": str(tmp_path / "train-[12].parquet")}, "test") == ROWS[1:]
    assert refusal(str(tmp_path / "test-*.parquet")).startswith("no file matches")
    assert "does not exist" in refusal([files[0], str(tmp_path / "none.parquet")])


def test_a_file_that_is_given_twice_also_under_another_name_is_told(write) -> None:
    first, copy, other = write("a.csv", as_csv(ROWS)), write("b.csv", as_csv(ROWS)), write("c.csv", as_csv(ROWS[:2]))
    with pytest.warns(UserWarning, match="b.csv of the split 'test' has the same content as .*a.csv of .* 'train'"):
        read({"train": [first, other], "test": copy})
    with pytest.warns(UserWarning, match="a.csv of the split 'train' has the same content as .*a.csv of .* 'train'"):
        assert read([first, first]) == ROWS + ROWS


def test_the_working_directory_is_a_folder_of_files(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("train.csv", as_csv(ROWS))
    monkeypatch.chdir(tmp_path)
    assert read(".") == ROWS


def test_a_file_whose_name_is_a_pattern_is_that_file(write) -> None:
    write("part1.csv", as_csv(ROWS[:1]))
    assert read(write("part[1].csv", as_csv(ROWS))) == ROWS


def test_a_path_may_begin_with_the_home_folder(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a/a.csv", as_csv(ROWS))
    for dataset in ("~/a/a.csv", Path("~/a/a.csv"), ["~/a/a.csv"], {"train": "~/a/*.csv"}, "~/a"):
        assert module(dataset).splits["train"]["text"][:] == [text for text, _ in ROWS]


@HTTP
def test_a_url_is_fetched(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    write("a.csv.gz", gzip.compress(as_csv(ROWS).encode()))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert read(f"http://127.0.0.1:{server.server_port}/a.csv.gz?download=1") == ROWS
        message = refusal(f"http://127.0.0.1:{server.server_port}/none.csv")
        server.shutdown()
    assert "/none.csv cannot be fetched: ClientResponseError: 404" in message


@pytest.mark.parametrize("name", ["a b.csv", "a%20b.csv", "ü.csv", "a?.csv"])
def test_a_file_url_is_the_file_that_it_stands_for(name: str, write) -> None:
    path = Path(write(name, as_csv(ROWS)))
    assert read(path.as_uri()) == read(path.as_uri().replace("file:", "FILE:")) == ROWS
    assert read(f"file://{path}") == ROWS  # as it is often written


@pytest.mark.parametrize("name", ["hf://datasets/a/b/*.parquet", "s3://bucket/a.csv", "https://example.org/a.csv"])
def test_a_url_that_cannot_be_reached_is_named(name: str) -> None:
    assert refusal(name).startswith(f"{name} cannot be fetched: ")


def test_a_file_exchanged_under_the_same_name_size_and_time_gives_the_new_rows(write) -> None:
    for ending, packed in (("csv", bytes), ("csv.gz", lambda content: gzip.compress(content, mtime=0))):
        path = write(f"a.{ending}", packed(as_csv([("aaaa", "pos"), ("cccc", "neg")]).encode()))
        before = os.stat(path)
        first = read_dataset(path)["train"]
        write(f"a.{ending}", packed(as_csv([("bbbb", "pos"), ("cccc", "neg")]).encode()))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        second = read_dataset(path)["train"]
        assert second["text"][0] == "bbbb"
        assert first._fingerprint != second._fingerprint
        os.utime(path)
        assert read_dataset(path)["train"]._fingerprint == second._fingerprint


_READ_OFF_LINE = """
import socket, sys
socket.getaddrinfo = lambda *address, **_: sys.exit(f"asked {address}")
from smartbatch_lightning.data.sources import read_dataset
for source in sys.argv[1:]:
    print(read_dataset(source)["train"][0])
"""


@pytest.mark.slow
def test_local_files_of_every_format_are_read_without_asking_a_server(tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "a.csv", index=False)
    FRAME.to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    FRAME.to_parquet(tmp_path / "c.parquet")
    Dataset.from_pandas(FRAME).save_to_disk(tmp_path / "saved")
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    sources = map(str, (tmp_path / "a.csv", tmp_path / "b.jsonl", tmp_path / "c.parquet", arrow, tmp_path / "saved"))
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", _READ_OFF_LINE, *sources]
    read = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert read.stdout.splitlines() == [str(FRAME.iloc[0].to_dict())] * 5, read.stderr


def test_a_folder_of_csv_files_reads_as_the_files_alone(write, tmp_path: Path) -> None:
    rows = [("None", "NA"), ("NA", "null"), ("", "NA"), ("null", "null")]
    path = write("folder/train.csv", as_csv(rows))
    write("folder/test.csv", "text,label,more\n" + "".join(f"{text},{label},1\n" for text, label in rows))
    assert read(path) == read(str(tmp_path / "folder")) == read(str(tmp_path / "folder"), "test") == rows


def test_configurations_of_a_folder_are_named_and_read_with_what_their_readme_says(write, tmp_path: Path) -> None:
    write("folder/a.csv", as_csv(ROWS, delimiter=";"))
    write("folder/b.csv", as_csv(ROWS[:2]))
    write(
        "folder/README.md",
        "---\nconfigs:\n- config_name: one\n  data_files: a.csv\n  sep: ';'\n- config_name: two\n  data_files: b.csv\n---\n",
    )
    folder = str(tmp_path / "folder")
    assert "'one', 'two'. Choose one with --data.dataset_config" in refusal(folder)
    assert "Available: ['one', 'two']" in refusal(folder, dataset_config="three")
    assert read(folder, config="one") == ROWS
    assert read(folder, config="two") == ROWS[:2]


# --- CSV rows ---


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            "text,label\nfine,pos\nNot bad at all, I loved it,pos\n",
            "line 3 of .* has 3 fields, but there are 2 columns",
        ),
        ("text,label\nNot bad at all, I loved it,pos\n", "line 2 of .* has 3 fields"),
        ("text,label\nfine,pos,\ndull,neg,\n", "line 2 of .* has 3 fields.*remove anything extra at the ends"),
        ('text,label\n"two\nlines",pos\nfine\n', "line 4 of .* has 1 field,"),
        ('text,label\n"say \\"hi\\", then",pos\nfine,neg\n', "on line 2[.].*escapechar"),
        ('text,label\n"say \\"hi\\"",pos\n"fine",neg\n', "on line 2[.].*escapechar"),
        (
            'text,label\nfine,pos\n"never closed,neg\nfine,pos\n',
            "unexpected end of data, in the row that begins on line 3",
        ),
        ("text,label\nfi\0ne,pos\n", "character 0x00"),
    ],
)
def test_a_csv_row_that_is_not_whole_is_refused_by_its_line(content: str, line: str, write) -> None:
    message = refusal(write("a.csv", content))
    assert "a.csv" in message
    assert re.search(line, message), message


def test_an_unnamed_column_at_the_end_of_all_lines_plays_no_part(write) -> None:
    assert read(write("a.csv", "text,label,\nfine,pos,\ndull,neg,\n")) == [("fine", "pos"), ("dull", "neg")]


def test_fields_in_quotes_hold_newlines_separators_and_quotes(write) -> None:
    rows = [("two\nlines", "pos"), ("three\r\nlines, in\rall", "neg"), ('a "b" \\c\\', "pos"), ("x" * 200_000, "neg")]
    assert read(write("a.csv", as_csv(rows))) == rows
    assert read(write("b.csv", 'text,label\nsay "hi" there,pos\n')) == [('say "hi" there', "pos")]
    escaped = 'text,label\n"say \\"hi\\", then",pos\n'
    assert read(write("c.csv", escaped), reader_kwargs={"escapechar": "\\"}) == [('say "hi", then', "pos")]


def test_quotes_in_a_tsv_are_part_of_the_text(write) -> None:
    rows = [(f'"film {row}' if row in (300, 590) else f"film {row}", f"l{row % 2}") for row in range(1000)]
    path = write("a.tsv", "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    assert read(path) == rows


def test_a_tsv_that_was_written_in_quotes_is_refused_by_its_line_and_read_on_demand(write) -> None:
    path = write("a.tsv", as_csv(ROWS, delimiter="\t"))
    assert "line 4 of" in refusal(path)
    assert "quoting: 0" in refusal(path)
    assert read(path, reader_kwargs={"quoting": 0}) == ROWS
    assert read(path, reader_kwargs={"quoting": 3})[2] == ('"fine, ""really"" fine"', "pos")
    assert "line 3 of" in refusal(write("c.tsv", as_csv([("film", "a\r\tb")], delimiter="\t")))
    assert "has quoted fields" in refusal(write("b.tsv", as_csv(ROWS[:2], delimiter="\t", quoting=csv.QUOTE_ALL)))


FIELDS = st.text(alphabet="ab\"',;\t\n\r\\ é0", max_size=6) | st.sampled_from(
    ["007", "1e5", "NA", "None", "nan", "1_000"]
)


def check_round_trip(ending: str, rows: list[tuple[str, str]], content: bytes, folder: Path) -> bool:
    """Whether a file is read; it is then read exactly, and else it is refused with the line."""
    path = folder / f"a.{ending}"
    path.write_bytes(content)
    try:
        found = read_dataset(str(path), labels=LabelSource(("label",), "|"))["train"]
    except ValueError as error:
        if "line " not in str(error):
            raise
        return False
    assert list(zip(found["text"], found["label"], strict=True)) == rows
    return True


def random_files(examples: int) -> Callable:
    checks = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks, database=None, derandomize=True)


def try_random_file(data: Any, folder: Path) -> None:
    kind = data.draw(st.sampled_from(["csv", "quoted tsv", "plain tsv", "jsonl", "parquet", "ragged"]))
    rows = data.draw(st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=5))
    written = io.BytesIO()
    if kind == "csv":
        assert check_round_trip("csv", rows, as_csv(rows).encode(), folder)
    elif kind == "quoted tsv":
        content = as_csv(rows, delimiter="\t")
        assert check_round_trip("tsv", rows, content.encode(), folder) == ('"' not in content)
    elif kind == "plain tsv":
        rows = [tuple(field.translate(str.maketrans("\t\n\r", "___")) for field in row) for row in rows]
        content = "text\tlabel\n" + "".join("\t".join(row) + "\n" for row in rows)
        check_round_trip("tsv", rows, content.encode(), folder)
    elif kind == "jsonl":
        assert check_round_trip("jsonl", rows, as_json_lines(rows).encode(), folder)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": [a for a, _ in rows], "label": [b for _, b in rows]}), written)
        assert check_round_trip("parquet", rows, written.getvalue(), folder)
    else:
        lines = data.draw(st.lists(FIELDS, min_size=1, max_size=6))
        content = "text,label\n" + ",".join(lines) + "\n"
        try:
            whole = [tuple(row) for row in csv.reader(io.StringIO(content, newline=""), strict=True) if row]
            is_whole = {len(row) for row in whole} == {2}
        except csv.Error:
            whole, is_whole = [], False
        assert check_round_trip("csv", whole[1:], content.encode(), folder) == is_whole


@random_files(25)
@given(data=st.data())
def test_random_files_are_read_exactly_or_refused_with_the_line(data, tmp_path: Path) -> None:
    try_random_file(data, tmp_path)


@pytest.mark.slow
@random_files(400)
@given(data=st.data())
def test_hundreds_of_random_files_are_read_exactly_or_refused_with_the_line(data, tmp_path: Path) -> None:
    try_random_file(data, tmp_path)


# --- a reader's options, and what a message names ---


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("text,label\ncafé,pos\nthé,neg\n".encode("latin-1"), {"encoding": "latin-1"}),
        ("text,label\ncafé,pos\nthé,neg\n".encode("utf-16"), {"encoding": "utf-16"}),
        ("text,label\ncafé,pos\nthé,neg\n".encode("utf-16-le"), {"encoding": "utf-16-le"}),
        (b"text;label\na, b;pos\nc;neg\n", {"sep": ";"}),
        (b"text\tlabel\na, b\tpos\nc\tneg\n", {"sep": "\t"}),
        (b"1,a title,caf\xc3\xa9\n2,another,th\xc3\xa9\n", {"names": ["label", "title", "text"]}),
        (b"sep=;\ntext;label\na, b;pos\nc;neg\n", {"sep": ";", "skiprows": 1}),
        (b'sep=,\ntext,label\n"a, b",pos\nc,neg\n', {"sep": ",", "skiprows": 1}),
    ],
)
def test_a_message_names_the_option_with_which_the_file_is_read(content: bytes, remedy: dict, write) -> None:
    path = write("a.csv", content)
    message = refusal(path)
    assert all(f"{option}:" in message for option in remedy)
    data = module(path, reader_kwargs=remedy)
    data.prepare_data()
    assert data.splits["train"]["text"][:] in (["café", "thé"], ["a, b", "c"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seperator": ";"}, "reader_kwargs has 'seperator', which csv files do not have; give some of 'sep', "),
        ({"sep": "||"}, r"sep is '\|\|' in reader_kwargs; give one character"),
        ({"header": 3}, "header is 3 in reader_kwargs; give 0"),
        ({"encoding": "latin-99"}, "encoding is 'latin-99' in reader_kwargs, which is not a text encoding"),
        (
            {"names": ["text", "label"]},
            "the first line of .* already has the names given in reader_kwargs. Add header: 0",
        ),
        ({"names": ["text"], "header": 0}, "line 2 of .* has 2 fields, but there are 1 columns"),
        ({"names": "text"}, "give a list with a name for each column"),
        ({"names": 2}, "names is 2 in reader_kwargs; give a list with a name for each column"),
        # as YAML reads [no, text] and [1e3, text]
        ({"names": [False, "text"], "header": 0}, "names is .False, 'text'. in .* In YAML, put quotes around names"),
        ({"names": [1000.0, "text"], "header": 0}, "names is .1000.0, 'text'. in .* In YAML, put quotes around names"),
        ({"quoting": "minimal"}, "reader_kwargs is .* which has an invalid value: .*'minimal'. Correct it"),
        (
            {"quotechar": "''"},
            'reader_kwargs is .* which has an invalid value: "quotechar" must be a 1-character string',
        ),
        ({"encoding": 8}, "encoding is 8 in reader_kwargs, which is not a text encoding"),
        ({"encoding": "rot13"}, "encoding is 'rot13' in reader_kwargs, which is not a text encoding"),
        (
            {"encoding_errors": "drop"},
            "reader_kwargs is .* which has an invalid value: unknown error handler name 'drop'",
        ),
        ({"skiprows": -1}, "skiprows is -1; give 0 or more"),
        ({"nrows": "2"}, "nrows is '2'; give a whole number, 0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str, write) -> None:
    with pytest.raises(ValueError, match=message):
        read(write("a.csv", as_csv(ROWS)), reader_kwargs=options)


@pytest.mark.parametrize("header", ["label,text", "Text,Label", "text, label"])
def test_a_header_in_another_order_or_case_is_not_read_as_a_row(header: str, write) -> None:
    path = write("a.csv", f"{header}\nfine,pos\ndull,neg\n")
    message = refusal(path, reader_kwargs={"names": ["text", "label"]})
    assert message.endswith("already has the names given in reader_kwargs. Leave names out.")


@pytest.mark.parametrize("header", ["text,class", "review,Label", "review, label"])
def test_a_header_with_one_of_the_given_names_is_not_read_as_a_row(header: str, write) -> None:
    path = write("a.csv", f"{header}\nfine,pos\ndull,neg\n")
    message = refusal(path, reader_kwargs={"names": ["text", "label"]})
    assert "so it seems to be a header. Add header: 0" in message
    rows = read(path, reader_kwargs={"names": ["text", "label"], "header": 0})
    assert rows == [("fine", "pos"), ("dull", "neg")]


def test_a_row_that_has_a_given_name_in_another_column_is_a_row(write) -> None:
    rows = read(write("a.csv", "label,pos\ndull,neg\n"), reader_kwargs={"names": ["text", "label"]})
    assert rows == [("label", "pos"), ("dull", "neg")]


def test_options_of_other_formats_and_of_what_is_not_in_files_are_refused(write, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="reader_kwargs has 'sep', which json files do not have; give some of 'encoding'"
    ):
        read(write("a.jsonl", as_json_lines(ROWS)), reader_kwargs={"sep": ";"})
    unknown = refusal(write("a.jsonl", as_json_lines(ROWS)), reader_kwargs={"encoding": "latin-01"})
    assert "encoding is 'latin-01' in reader_kwargs, which is not a text encoding. Give one such as latin-1" in unknown
    assert "the given DataFrame, which is not read from files" in refusal(FRAME, reader_kwargs={"sep": ";"})
    Dataset.from_pandas(FRAME).save_to_disk(tmp_path / "saved")
    assert "saved, which is not read from files" in refusal(str(tmp_path / "saved"), reader_kwargs={"sep": ";"})


def test_a_tab_may_be_given_as_it_is_typed_in_a_shell(write) -> None:
    path = write("a.csv", as_csv(ROWS).replace(",", "\t"))
    assert read(path, reader_kwargs={"sep": "\\t"}) == read(path, reader_kwargs={"sep": "\t"})


def test_a_byte_order_mark_is_no_part_of_the_first_column(write) -> None:
    path = write("a.csv", "\ufeff" + as_csv(ROWS))
    assert read(path) == read(path, reader_kwargs={"encoding": "UTF8"}) == ROWS


# --- JSON and Parquet ---


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", ""), ("a.jsonl", ""), ("a.json", " \n"), ("a.jsonl", "\ufeff")]
)
def test_an_empty_file_is_called_empty(name: str, content: str, write) -> None:
    assert f"{name} is empty. Check that the file is complete" in refusal(write(name, content))


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"orient": "split"}, {"orient": "index"}])
def test_one_json_object_of_columns_is_refused_with_the_way_to_write_rows(options: dict, tmp_path: Path) -> None:
    pd.concat([FRAME] * 1000, ignore_index=True).to_json(tmp_path / "a.json", **options)
    assert 'orient="records", lines=True' in refusal(str(tmp_path / "a.json"))


def test_json_arrays_and_rows_under_a_key_are_read_as_they_stand(write) -> None:
    rows = [{"text": "007", "label": "1e5"}, {"text": "null", "label": "NaN"}]
    expected = [("007", "1e5"), ("null", "NaN")]
    assert read(write("a.json", json.dumps(rows, indent=1))) == expected
    path = write("b.json", json.dumps({"data": rows}))
    assert "{field: KEY}" in refusal(path)
    assert read(path, reader_kwargs={"field": "data"}) == expected
    assert "field is 'rows' in reader_kwargs, but" in refusal(path, reader_kwargs={"field": "rows"})
    assert "has the keys 'data'. Give one" in refusal(path, reader_kwargs={"field": "rows"})
    assert "has no keys" in refusal(write("c.json", json.dumps(rows)), reader_kwargs={"field": "data"})


@pytest.mark.parametrize("kind", ["array", "field", "lines", "lines with a column of several types"])
def test_numbers_and_times_in_json_are_what_stands_there(kind: str, write) -> None:
    rows = [{"text": f"2026-11-0{row}", "label": label} for row, label in enumerate([0.123456789012345, 1.5e-12, 2.0])]
    if kind == "array":
        path, options = write("a.json", json.dumps(rows)), {}
    elif kind == "field":
        path, options = write("a.json", json.dumps({"data": rows})), {"field": "data"}
    else:
        others = [1, 2, 3] if kind == "lines" else [1, "x", {"y": 2}]
        lines = [{**row, "other": other} for row, other in zip(rows, others, strict=True)]
        path, options = write("a.jsonl", "".join(json.dumps(line) + "\n" for line in lines)), {}
    assert read(path, reader_kwargs=options) == [(row["text"], row["label"]) for row in rows]


@pytest.mark.parametrize("content", ['[["fine", "pos"]]', '["fine", "dull"]', '[{"text": "fine"}, null]'])
def test_a_json_list_of_something_else_than_objects_is_refused(content: str, write) -> None:
    assert "does not hold a list of JSON objects. Write each row as an object" in refusal(write("a.json", content))


def test_a_json_line_that_is_not_whole_is_named(write) -> None:
    content = as_json_lines(ROWS) + '{"text": "fi\n'
    assert "line 4: " in refusal(write("a.jsonl", content))
    assert "0xe9 is not utf-8" in refusal(write("b.jsonl", '{"text": "é", "label": 1}\n'.encode("latin-1")))


def test_a_column_of_texts_and_numbers_is_refused_since_json_would_merge_them(write) -> None:
    rows = as_json_lines([("fine", "007"), ("dull", 7)])
    assert "the column 'label' of" in refusal(write("a.jsonl", rows))


def test_texts_of_every_arrow_type_are_texts(tmp_path: Path) -> None:
    kinds = [pa.string(), pa.large_string(), pa.string_view()]
    for kind in [*kinds, pa.dictionary(pa.int32(), pa.string())]:
        columns = {name: pa.array([row[at] for row in ROWS], kind) for at, name in enumerate(("text", "label"))}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        data = module(str(tmp_path / "a.parquet"))
        data.prepare_data()
        data.setup("fit")
        assert data.label_names == ["neg", "pos"]
        assert len(data.train_data) == 3


# --- columns ---


def test_columns_that_nobody_asked_for_play_no_part(write) -> None:
    train = write("a.jsonl", '{"text": "fine", "label": "pos", "id": 1, "x": "s"}\n{"text": "dull", "label": "neg"}\n')
    test = write("b.jsonl", '{"text": "fine", "label": "pos", "id": 1.5, "x": [1], "more": {"a": 1}}\n')
    assert read({"train": train, "test": test}, "test") == [("fine", "pos")]
    both = read_dataset([train, test])["train"]
    assert both["text"][:] == ["fine", "dull", "fine"]
    assert sorted(both.column_names) == ["id", "label", "text"]
    assert both["id"][:] == [1, None, 1.5]


@pytest.mark.parametrize("kind", ["pandas", "dicts", "Arrow", "parquet"])
def test_a_column_that_cannot_be_read_plays_no_part_unless_it_is_the_label(kind: str, tmp_path: Path) -> None:
    data: Any = FRAME.assign(odd=[1, "x", None])
    if kind == "dicts":
        data = data.to_dict("records")
    elif kind != "pandas":
        maps = pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64()))
        data = pa.table({"text": FRAME["text"], "label": FRAME["label"], "odd": maps})
    if kind == "parquet":
        pq.write_table(data, tmp_path / "a.parquet")
        data = str(tmp_path / "a.parquet")
    assert read(data) == ROWS
    assert "cannot be read" in refusal(data, label_column="odd")


@pytest.mark.slow
def test_a_column_that_begins_far_down_plays_no_part(write) -> None:
    row = '{"text": "' + "a fine film " * 20 + '", "label": 1}\n'
    path = write("a.jsonl", row * (11 * 2**20 // len(row)) + '{"text": "dull", "label": 0, "more": 1}\n')
    assert read(path)[-1] == ("dull", 0)


def test_a_wanted_column_of_other_types_in_another_file_is_named_with_both(write) -> None:
    files = [write("a.jsonl", as_json_lines([("fine", 1)])), write("b.jsonl", as_json_lines([("dull", "x")]))]
    assert "the column 'label' is int64 in" in refusal(files)
    files = [write("a.csv", as_csv([("fine", 1)])), write("b.csv", as_csv([("dull", "x")]))]
    assert read(files) == [("fine", "1"), ("dull", "x")]


def test_labels_of_one_file_may_be_numbers_and_of_another_words(write) -> None:
    train = write("a.csv", as_csv([("film", label) for label in (1, 2, 3)]))
    data = module({"train": train, "test": write("b.csv", as_csv([("film", label) for label in (1, 2, "three")]))})
    data.prepare_data()
    with pytest.raises(ValueError, match="row 2 .* of the split 'test' has the label 'three'"):
        data.setup("test")
    path = write("c.csv", as_csv([("film", row % 2) for row in range(10_001)] + [("film", "word")]))
    assert {label for _, label in read(path)} == {"0", "1", "word"}


WORDS = ["007", "1e5", "10e4", "1_000", "NaN", "null", "True", "1.50", "+7", " x"]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_words_that_look_like_something_else_stay_as_texts_and_as_labels(ending: str, tmp_path: Path) -> None:
    rows, path = [(word, word) for word in WORDS], tmp_path / f"a.{ending}"
    if ending == "parquet":
        pd.DataFrame(rows, columns=["text", "label"]).to_parquet(path)
    else:
        separated = as_csv(rows, delimiter="\t" if ending == "tsv" else ",")
        path.write_text(as_json_lines(rows) if ending == "jsonl" else separated)
    assert read(str(path)) == rows


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1e5", "10e4"], ["1e5", "10e4"]),
        (["1e-3", "0.5"], [0.001, 0.5]),
        (["1", "-2"], [1, -2]),
        (["01", "1"], ["01", "1"]),
        (["True", "False"], [True, False]),
        (["TRUE", "true"], ["TRUE", "true"]),
    ],
)
def test_csv_labels_are_numbers_only_where_none_is_merged_with_another(labels, expected, write) -> None:
    assert [label for _, label in read(write("a.csv", as_csv([("film", label) for label in labels])))] == expected


# --- several text columns ---


def test_several_text_columns_are_joined_and_two_without_a_separator_are_pairs(write) -> None:
    path = write("a.csv", "title,body,tag,label\na,fine film,x,1\nthe,dull one,y,0\n")

    def tokens(**options) -> list[str]:
        data = module(path, **options)
        data.setup("fit")
        return [data.tokenizer.decode(data.train_data[0]["input_ids"]), "token_type_ids" in data.train_data[0]]

    tokenizer = module(path).tokenizer
    whole = tokenizer.decode(tokenizer("a fine film x")["input_ids"])
    assert tokens(text_columns=["title", "body", "tag"], text_separator=" ") == [whole, False]
    assert tokens(text_columns=["title", "body"])[1]
    assert not tokens(text_columns=["title", "body"], text_separator=" ")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text_columns": ["text", "text"]},
            r"text_columns is \['text', 'text'\]; give one column, or a list of several",
        ),
        ({"text_columns": "[text, claim"}, r"text_columns is '\[text, claim'; give one column, or a list"),
        ({"text_columns": 5}, "text_columns is 5; give one column, .* In YAML, put quotes around names"),
        ({"text_columns": []}, r"text_columns is \[\]; give one column"),
        ({"text_columns": ["a", "b", "c"]}, "two for pairs of sentences, or set --data.text_separator"),
        ({"text_separator": " "}, "text_separator is ' ', but text_columns is 'text'; give two or more"),
    ],
)
def test_text_columns_that_cannot_be_are_refused_at_once(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module("a.csv", **options)


# --- objects ---

OBJECTS: dict[str, Callable[[pd.DataFrame], Any]] = {
    "Dataset": lambda frame: Dataset.from_pandas(frame, preserve_index=False),
    "pandas": lambda frame: frame,
    "polars": pl.from_pandas,
    "Arrow": lambda frame: pa.Table.from_pandas(frame, preserve_index=False),
    "dicts": lambda frame: frame.to_dict("records"),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_are_taken_where_a_name_is_and_by_split(kind: str, tmp_path: Path) -> None:
    make = OBJECTS[kind]
    assert read(make(FRAME)) == ROWS
    data = module({"train": make(FRAME), "test": make(FRAME.iloc[::-1])})
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert data.train_data.labels.tolist() == [1, 0, 1]
    assert np.array_equal(data.test_data[0].labels, data.train_data.labels[::-1])
    again = module({"train": make(FRAME.copy())}).splits["train"]
    assert again._fingerprint == data.splits["train"]._fingerprint  # so that the token cache is found


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_subclass_may_load_any_object(kind: str) -> None:
    class Own(SmartBatchDataModule):
        def load_dataset(self) -> Any:
            return OBJECTS[kind](FRAME)

    data = Own("mine", str(demo.model_dir()), validation_split=None)
    data.setup("fit")
    assert len(data.train_data) == 3


def test_a_checkpoint_of_an_object_asks_for_it_again(tmp_path: Path) -> None:
    data = module(DatasetDict(train=Dataset.from_pandas(FRAME)), max_length=8)
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(SequenceClassifier(str(demo.model_dir())), data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="dataset is None; give a name, files, a Dataset"):
        SmartBatchDataModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert SmartBatchDataModule.load_from_checkpoint(tmp_path / "a.ckpt", dataset=FRAME).max_length == 8


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "dataset is None; give a name"),
        (5, "dataset is 5; give a name"),
        ([], r"dataset is \[\]; give a name"),
        ({}, r"dataset is \{\}\. Give a name, a file, or files by split"),
        # values that YAML does not read as names, files by split or lists
        ("", "dataset is '', which is neither a name nor a file. Give a name"),
        (
            "{train:a.csv}",
            "dataset is '{train:a.csv}', which is neither a name nor a file.*with a space after each colon",
        ),
        (
            "{train: a[1].csv}",
            r"dataset is '{train: a\[1\].csv}', which is neither a name nor a file.*quotes around names with",
        ),
        ("[a,b].csv, c.csv]", "which is neither a name nor a file"),
        ({"train": None}, r"dataset is {'train': None}\. Give a name, a file, or files by split"),
        ({"train": 1}, r"dataset is {'train': 1}\. Give a name"),
        (["a.csv", None], "dataset is a list with None; give a name"),
        (print, "dataset is of the type builtin_function_or_method; give a name"),
        (np.array(ROWS), "dataset is of the type ndarray; give a name"),
        (FRAME["text"], "dataset is of the type Series; give a name"),
        (pl.LazyFrame({"text": ["fine"]}), "dataset is of the type LazyFrame; give a name"),
        (
            [{"text": "fine", "label": 1}, {"text": "dull", "label": "x"}],
            "'label' of the given list cannot be read: ArrowInvalid",
        ),
        (
            IterableDataset.from_generator(lambda: iter([{"text": "fine"}])),
            "IterableDataset.*Load it without streaming",
        ),
    ],
)
def test_objects_that_are_no_data_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(dataset).prepare_data()


def test_several_columns_without_brackets_are_answered_with_brackets(write) -> None:
    data = module(write("a.csv", "title,text,label\na,fine,pos\nb,dull,neg\n"), text_columns="title, text")
    with pytest.raises(ValueError, match=r"'title, text' is not in .* For several columns, write '\[title, text\]'.$"):
        data.prepare_data()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("Texts,label", "which has 'Texts', 'label'. Set --data.text_columns. Did you mean 'Texts'?"),
        ("text,labels", "which has 'text', 'labels'. Set --data.label_column. Did you mean 'labels'?"),
    ],
)
def test_a_misspelt_column_is_answered_with_the_nearest(columns: str, message: str, write, tmp_path: Path) -> None:
    data = module(write("a.csv", f"{columns}\nfine,pos\ndull,neg\n"))
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        trainer(tmp_path).fit(SequenceClassifier(str(demo.model_dir())), data)


# --- before anything long ---


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("sentence,label\nfine,pos\n", "the text column 'text' is not in the split 'test'"),
        ("a fine film,pos\ndull,neg\n", "names: [text, label]"),
        ("pos,a fine film\nneg,dull\n", "names: [label, text]"),
        ("pos,1,a fine film\nneg,2,dull\n", "names: [label, column_2, text]"),
        ("7,a fine film,neg,pos\n8,dull,pos,neg\n", "names: [label, text, column_3, column_4]"),
        ("a fine film\ndull\n", "names: [text]"),
        ("text,label\nfine,pos\ndull\n", "line 3 of"),
    ],
)
def test_a_test_split_that_cannot_be_read_is_refused_before_the_training_split_is_tokenized(
    test, message, write
) -> None:
    assert message in refusal({"train": write("a.csv", as_csv(ROWS)), "test": write("b.csv", test)})


def test_labels_to_train_and_validate_on_are_checked_before_anything_is_tokenized(write, tmp_path: Path) -> None:
    files = {"train": write("a.csv", as_csv(ROWS)), "dev": write("b.csv", as_csv([("fine", "good")]))}
    data = module(files, validation_split="auto")
    data.tokenize = None  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match="row 0 .* of the split 'dev' has the label 'good'"):
        trainer(tmp_path).fit(SequenceClassifier(str(demo.model_dir())), data)


@pytest.mark.parametrize("blank", [["", ""], ["", " \t"]])
def test_nothing_is_learned_from_a_column_without_a_word(blank: list[str], write, tmp_path: Path) -> None:
    path = write("a.csv", as_csv(list(zip(blank, ("pos", "neg"), strict=True))))
    with pytest.raises(ValueError, match="all texts in the split 'train' are empty: 'text'. Set --data.text_columns"):
        trainer(tmp_path).fit(SequenceClassifier(str(demo.model_dir())), module(path))


def test_a_hundred_thousand_rows_are_checked_and_read_in_a_second_or_two(write) -> None:
    path = write("a.csv", "text,label\n" + "".join(f'"a film, {row}",{row % 7}\n' for row in range(100_000)))
    before = time.process_time()
    assert len(read_dataset(path)["train"]) == 100_000
    assert time.process_time() - before < 3


@pytest.mark.slow
def test_csv_files_of_the_hub_are_read_as_they_stand(tmp_path: Path) -> None:
    files = {"train.csv": b'text,label\n007,yes\nNA,no\n"a, b",yes\n', "test.csv": b"text,label\n1.50,no\n"}
    read = (
        "import json; from smartbatch_lightning.data.sources import read_dataset;"
        "print(json.dumps({split: rows.to_list() for split, rows in read_dataset('user/reviews').items()}))"
    )
    online = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with hub_with("user/reviews", files) as endpoint:
        output = subprocess.run(
            [sys.executable, "-c", read],
            env=online | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    rows = {Path(name).stem: list(csv.DictReader(content.decode().splitlines())) for name, content in files.items()}
    assert json.loads(output) == rows


@pytest.mark.parametrize(("other", "told"), [("more.jsonl", True), ("extra.csv", True), ("notes.txt", False)])
def test_files_of_a_folder_that_are_not_read_are_named(other: str, told: bool, tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv", "validation.csv"):
        Path(tmp_path, name).write_text("text,label\na,b\n")
    Path(tmp_path, other).write_text("text,label\nc,d\n" if other.endswith(".csv") else '{"text": "c", "label": "d"}\n')
    with pytest.warns(match=f"files that are not read: '{other}'") if told else nullcontext():
        splits = read_dataset(str(tmp_path))
    assert {name: rows["text"] for name, rows in splits.items()} == {"train": ["a"], "test": ["a"], "validation": ["a"]}
