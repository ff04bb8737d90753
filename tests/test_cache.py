"""Tests of the cache: whole or not at all, once, whoever asks."""

import multiprocessing
from pathlib import Path

import pytest

from smartbatch_lightning.storage import cache_dir, write_if_missing


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMARTBATCH_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SMARTBATCH_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "smartbatch_lightning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "smartbatch_lightning"


def test_what_stands_is_not_written_again(tmp_path: Path) -> None:
    write_if_missing(tmp_path / "file", lambda path: path.write_text("first"))
    write_if_missing(tmp_path / "file", lambda path: path.write_text("second"))
    assert (tmp_path / "file").read_text() == "first"


def test_what_is_not_whole_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("half")
    write_if_missing(tmp_path / "file", lambda path: path.write_text("all"), lambda path: path.read_text() == "all")
    assert (tmp_path / "file").read_text() == "all"


def test_a_folder_that_is_not_whole_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "half").touch()

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "all").touch()

    write_if_missing(tmp_path / "folder", write, lambda folder: (folder / "all").exists())
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["all"]


def test_a_write_that_fails_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_if_missing(tmp_path / "file", fail)
    assert not (tmp_path / "file").exists()
    write_if_missing(tmp_path / "file", lambda path: path.write_text("all"))
    assert sorted(path.name for path in tmp_path.iterdir()) in (["file"], ["file", "file.lock"])


def _append_and_write(folder: Path) -> None:
    def write(path: Path) -> None:
        with (folder / "writers").open("a") as writers:
            writers.write("x")
        path.write_text("all")

    write_if_missing(folder / "file", write)


def test_of_several_processes_one_writes_and_all_find_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append_and_write, args=(tmp_path,)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 8
    assert (tmp_path / "writers").read_text() == "x"
