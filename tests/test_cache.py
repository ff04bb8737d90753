"""Tests of the cache: whole or not at all, once, whoever asks."""

import errno
import fcntl
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from smartbatch_lightning import storage
from smartbatch_lightning.errors import UsageError
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


def test_what_was_changed_is_written_again(tmp_path: Path) -> None:
    write_if_missing(tmp_path / "file", lambda path: path.write_text("all"))
    (tmp_path / "file").write_text("alt")
    write_if_missing(tmp_path / "file", lambda path: path.write_text("all"))
    assert (tmp_path / "file").read_text() == "all"


def test_a_folder_in_which_anything_was_changed_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def write(path: Path) -> None:
        (path / "inner").mkdir(parents=True)
        (path / "a").write_text("first")
        (path / "inner" / "b").touch()

    write_if_missing(folder, write)
    changes = [
        lambda: (folder / "a").write_text("other"),
        lambda: (folder / "a").unlink(),
        lambda: (folder / "inner" / "b").rename(folder / "b"),
        lambda: (folder / "inner" / "c").touch(),
        lambda: (folder.with_name("folder.xxh3")).unlink(),
    ]
    for change in changes:
        change()
        write_if_missing(folder, write)
        assert sorted(path.name for path in folder.rglob("*")) == ["a", "b", "inner"]
        assert (folder / "a").read_text() == "first"
        assert (folder / "inner" / "b").exists()


def test_a_write_that_fails_leaves_nothing_that_looks_finished_and_says_what_to_do(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(UsageError, match="file cannot be written: disk full. Make room or set SMARTBATCH_CACHE"):
        write_if_missing(tmp_path / "file", fail)
    assert not (tmp_path / "file").exists()
    write_if_missing(tmp_path / "file", lambda path: path.write_text("all"))
    assert (tmp_path / "file").read_text() == "all"
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_lock_that_another_process_holds_is_named_while_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "_SILENCE", 0.2)
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold() -> None:
        with FileLock(tmp_path / "file.lock"):
            held.set()
            time.sleep(1)

    other = context.Process(target=hold)
    other.start()
    assert held.wait(10)
    write_if_missing(tmp_path / "file", lambda path: path.write_text("all"))
    other.join(10)
    assert (tmp_path / "file").read_text() == "all"
    assert len(caplog.messages) >= 2
    assert caplog.messages[0].startswith(f"Waiting for another process that holds {tmp_path}/file.lock, for ")


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_without_flock_a_lock_that_was_left_is_named_and_can_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(storage, "_SILENCE", 0.2)
    lock = tmp_path / "file.lock"
    lock.touch()
    with ThreadPoolExecutor() as pool:
        written = pool.submit(write_if_missing, tmp_path / "file", lambda path: path.write_text("all"))
        while not caplog.messages:
            time.sleep(0.01)
        assert f"holds {lock}" in caplog.messages[0]
        assert "delete that file" in caplog.messages[0]
        lock.unlink()
        assert written.result(10).read_text() == "all"


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
