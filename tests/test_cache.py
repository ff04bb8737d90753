"""Tests of the cache: files are written atomically and once, folders are pruned unless they are in use."""

import errno
import fcntl
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from smartbatch_lightning import storage
from smartbatch_lightning.cache import CacheLock, prune, prune_cache, size_limit
from smartbatch_lightning.cli import main
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

    with pytest.raises(UsageError, match="file cannot be written: disk full. Free some space, or set SMARTBATCH_CACHE"):
        write_if_missing(tmp_path / "file", fail)
    assert not (tmp_path / "file").exists()
    write_if_missing(tmp_path / "file", lambda path: path.write_text("all"))
    assert (tmp_path / "file").read_text() == "all"
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_lock_that_another_process_holds_is_named_while_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "_SECONDS_BETWEEN_MESSAGES", 0.2)
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
    monkeypatch.setattr(storage, "_SECONDS_BETWEEN_MESSAGES", 0.2)
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


@pytest.fixture
def entries(tmp_path: Path) -> list[Path]:
    """Three folders of 1,000 bytes, the one after the other used."""
    folders = [tmp_path / f"tokens-{number}" for number in range(3)]
    for age, folder in zip((30, 20, 10), folders, strict=True):
        CacheLock(folder, "x" * 100)
        (folder / "000000.arrow").write_bytes(bytes(900))
        os.utime(folder / "about.txt", (time.time() - age,) * 2)
    return folders


@pytest.mark.parametrize(("max_size", "left"), [(3000, [0, 1, 2]), (2999, [1, 2]), (1000, [2]), (0, [])])
def test_what_was_not_used_for_longest_is_removed(
    max_size: int, left: list[int], entries: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "demo-v1").mkdir()
    assert prune(tmp_path, max_size) == 1000 * (3 - len(left))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "demo-v1", *(entries[number] for number in left)]


def test_what_is_in_use_stays_until_it_is_no_longer(entries: list[Path], tmp_path: Path) -> None:
    holds = [CacheLock(entries[0]), CacheLock(entries[0])]  # which is then the one used last, too
    holds.pop()
    assert prune(tmp_path, 500) == 2000
    assert list(tmp_path.iterdir()) == [entries[0]]
    holds.pop()
    assert prune(tmp_path, 500) == 1000


def _hold(folder: Path, held, release) -> None:
    hold = CacheLock(folder)
    held.set()
    release.wait(30)
    del hold


def test_what_another_process_uses_stays_until_that_is_killed(entries: list[Path], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=_hold, args=(entries[1], held, context.Event()))
    other.start()
    assert held.wait(10)
    assert prune(tmp_path, 0) == 2000
    other.kill()
    other.join(10)
    assert prune(tmp_path, 0) == 1000


def test_a_hold_that_waits_while_the_folder_is_removed_makes_it_again(entries: list[Path]) -> None:
    file = os.open(entries[0] / "about.txt", os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(CacheLock, entries[0], "made again")
        time.sleep(0.2)
        removed = entries[0].rename(entries[0].with_suffix(".removed"))
        (removed / "about.txt").unlink()
        os.close(file)
        waiting.result(10)
    assert (entries[0] / "about.txt").read_text() == "made again"


def test_a_cache_that_can_only_be_read_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    CacheLock(tmp_path / "tokens-0")


def test_the_commands_list_and_prune(
    entries: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SMARTBATCH_CACHE", str(tmp_path))
    (entries[1] / "about.txt").write_text("9 samples of films.csv")
    hold = CacheLock(entries[2])

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["smartbatch", "cache", *arguments])
        main()
        return capsys.readouterr().out

    listed = run("list")
    assert re.search(r"9 samples of films.csv +922 bytes +[0-9-]+ [0-9:]+ +tokens-1\b", listed)
    assert re.search(r"x+ +1.0 kB +[0-9-]+ [0-9:]+ +yes +tokens-2\b", listed)
    assert f"2.9 kB in {tmp_path}" in listed
    assert "Removed 1.9 kB" in run("prune", "--max_size=0")
    assert list(tmp_path.iterdir()) == [entries[2]]
    del hold


def test_no_size_or_none_that_is_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SMARTBATCH_CACHE_MAX_SIZE", raising=False)
    with pytest.raises(UsageError, match="no size limit is given. Set --max_size"):
        prune_cache(folder=str(tmp_path))
    with pytest.raises(
        UsageError, match="--max_size is 'lots'; give a size, such as 50GB or 1500MB, or a whole number of bytes"
    ):
        prune_cache("lots", str(tmp_path))
    with pytest.raises(
        UsageError, match="--max_size is '-5GB'; give a size, such as 50GB or 1500MB, or a whole number of bytes"
    ):
        prune_cache("-5GB", str(tmp_path))
    assert size_limit() is None
    monkeypatch.setenv("SMARTBATCH_CACHE_MAX_SIZE", "2 gb")
    assert size_limit() == 2 * 10**9
    monkeypatch.setenv("SMARTBATCH_CACHE_MAX_SIZE", "1KiB")
    assert size_limit() == 1024
