"""Derived files: where they are, and how one process writes them for all others, atomically and with a checksum."""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError
from xxhash import xxh3_128

from smartbatch_lightning.errors import UsageError

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_MESSAGES = 5.0  # while waiting for a lock
_SECONDS_TO_END = 30.0  # within which a killed process and its workers release a lock


def cache_dir() -> Path:
    """Folder of all files that this package derives: `$SMARTBATCH_CACHE`, else a folder in the user's cache."""
    if chosen := os.environ.get("SMARTBATCH_CACHE"):
        return Path(chosen).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "smartbatch_lightning"


def write_if_missing(path: Path, write: Callable[[Path], object], *, patience: float = math.inf) -> Path:
    """Creates a file or folder unless it exists and has the checksum stored when it was created.

    Concurrent processes wait for the first one and use its result. A killed process leaves nothing that looks finished;
    the next process removes what it left.

    Args:
        path: The file or folder; its checksum is stored next to it, in `NAME.xxh3`.
        write: Creates it at the path that it is given.
        patience: Seconds to wait for another process that is creating it.

    Raises:
        ValueError: The folder cannot be written.
        Timeout: Another process is still creating it.
    """
    checksum_path = _checksum_path(path)
    if is_valid(path):
        return path
    with reporting_write_errors(path, "Free some space, or set SMARTBATCH_CACHE to a folder that can be written."):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path, patience)
        try:
            if not is_valid(path):
                if path.exists():
                    log.warning("%s is damaged, or of another version. It is rebuilt.", path)
                checksum_path.unlink(missing_ok=True)
                atomic_write(path, write)
                atomic_write(checksum_path, lambda tmp_path: tmp_path.write_text(_checksum(path)))
        finally:
            lock.release()
    return path


def write_together(files: Mapping[Path, Callable[[Path], object]]) -> Iterator[Path]:
    """Creates files like `write_if_missing`, dividing the work with all processes that create the same ones.

    Each process takes the next file that no other is creating, and at the end waits for those of the others. If a
    process is killed, another one creates its file.

    Yields:
        The path of each finished file.
    """
    others = []
    for path, write in files.items():
        try:
            yield write_if_missing(path, write, patience=0)
        except Timeout:
            others.append(path)
    for path in others:
        yield write_if_missing(path, files[path])


def lock_folder(folder: str | Path, remedy: str) -> BaseFileLock:
    """Locks a folder until the lock is released or the process ends.

    Waits half a minute for another process that holds the lock, since it may have been killed and be about to end.

    Raises:
        ValueError: Another process still holds the lock, or it cannot be written; the message ends with the remedy.
    """
    with reporting_write_errors(folder, remedy):
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        try:
            return _locked(Path(folder), patience=_SECONDS_TO_END)
        except Timeout:
            raise UsageError(f"another process is writing to {folder}. Wait until it ends. {remedy}") from None


def _locked(path: Path, patience: float) -> BaseFileLock:
    """Takes the lock next to a file or folder; while waiting, names it every few seconds."""
    lock, waited = FileLock(f"{path}.lock"), 0.0
    while True:
        try:
            lock.acquire(timeout=min(_SECONDS_BETWEEN_MESSAGES, patience - waited))
            return lock
        except Timeout:
            if waited >= patience:
                raise
            waited += _SECONDS_BETWEEN_MESSAGES
            log.warning(
                "Waiting for another process that holds %s, for %.0f seconds now. If no such process runs on any "
                "machine, delete that file: a file system without flock keeps the lock of a killed process.",
                lock.lock_file,
                waited,
            )


def is_valid(path: Path) -> bool:
    """Whether a file or folder has the checksum stored when it was created."""
    try:
        return _checksum_path(path).read_text() == _checksum(path)
    except (OSError, UnicodeDecodeError):
        return False


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.xxh3")


def _checksum(path: Path) -> str:
    """Checksum of a file's content, or of the names and contents of all files in a folder; 2 ms for 25 MB."""
    digest = xxh3_128()
    for file in [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()):
        digest.update(f"{file.relative_to(path)}:{file.stat().st_size}:".encode())
        if file.stat().st_size:
            with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
                digest.update(content)
    return digest.hexdigest()


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file or folder to a temporary path, flushes and renames it, so that a kill leaves the previous one."""
    tmp_path = _write_tmp(path, write)
    if path.is_dir():
        _remove(path)
    tmp_path.replace(path)


def write_into(folder: Path, write: Callable[[Path], object], outdated: Iterable[str]) -> list[Path]:
    """Writes files into a folder that may have others; once all are written, they replace those of the same names.

    Args:
        folder: The folder.
        write: Writes the files into the folder that it is given.
        outdated: Names of files to remove afterwards, unless they have been written.

    Returns:
        The paths of the files.

    Raises:
        ValueError: Writing fails, for example because the disk is full. The previous files are kept.
    """
    with reporting_write_errors(folder, "Free some space, or give another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        tmp_path = _write_tmp(folder / "files", write)
        written = sorted(tmp_path.iterdir())
        for path in written:
            if path.is_dir():  # only an empty one is replaced
                _remove(folder / path.name)
        paths = [path.replace(folder / path.name) for path in written]
        tmp_path.rmdir()
        for name in set(outdated) - {path.name for path in paths}:
            (folder / name).unlink(missing_ok=True)
    return paths


def _write_tmp(path: Path, write: Callable[[Path], object]) -> Path:
    """Temporary path of a file or folder that has been written and is to be renamed to `path`."""
    tmp_path = path.with_name(f"{path.name}.unfinished")
    _remove(tmp_path)
    try:
        write(tmp_path)
        for written in [tmp_path, *tmp_path.rglob("*")]:
            if written.is_file():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
    except BaseException:
        _remove(tmp_path)
        raise
    return tmp_path


def check_writable(folder: str | Path, remedy: str) -> None:
    """Checks that a folder can be written, or created, by writing a file to it or to the nearest parent that exists.

    The file is removed, and no folder is created, so that a run that is rejected later leaves none.

    Raises:
        ValueError: The folder cannot be written or created; the message ends with the remedy.
    """
    if folder == "":  # such as from an unset shell variable; it would be the working directory
        raise UsageError(f"the name of the folder to write to is empty. {remedy}")
    with reporting_write_errors(folder, remedy):
        path = Path(folder).absolute()
        with tempfile.NamedTemporaryFile(dir=next(one for one in (path, *path.parents) if _exists(one))):
            pass


@contextmanager
def reporting_write_errors(path: str | Path, remedy: str) -> Iterator[None]:
    """Turns system errors in writing, such as a full disk, into one line that ends with the remedy."""
    try:
        yield
    except Timeout:  # raised while waiting for a lock; it is also an OSError
        raise
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be written: {error}. {remedy}") from error
    except RuntimeError as error:
        if not isinstance(error.__context__, OSError):
            raise
        # torch tries to finish the file after the system error, and fails
        raise UsageError(f"{path} cannot be written: {error.__context__}. {remedy}") from error


def _exists(path: Path) -> bool:
    """Whether a path exists; unlike `Path.exists`, raises an error for an impossible name."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
