"""Where derived files live, and how each is written atomically, with a checksum, by one process for all."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from xxhash import xxh3_128

from smartbatch_lightning.errors import UsageError

log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds to wait for a lock before saying so


def cache_dir() -> Path:
    """Folder of everything this package derives: `$SMARTBATCH_CACHE`, else a folder in the user's cache."""
    if chosen := os.environ.get("SMARTBATCH_CACHE"):
        return Path(chosen).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "smartbatch_lightning"


def write_if_missing(path: Path, write: Callable[[Path], None]) -> Path:
    """Makes a file or folder unless it is there and has the checksum that was noted when it was made.

    Processes that ask at the same time wait for the first and find its result. One that is killed leaves nothing that
    could be taken for finished; what it leaves is removed by the next.

    Args:
        path: The file or folder; its checksum is kept beside it, in `NAME.xxh3`.
        write: Writes it to the path that it is given.

    Raises:
        ValueError: The folder cannot be written.
    """
    noted = path.with_name(f"{path.name}.xxh3")
    if _is_valid(path, noted):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(FileLock(f"{path}.lock")):
            if not _is_valid(path, noted):
                if path.exists():
                    log.warning("%s is damaged, or of another version. It is made again.", path)
                noted.unlink(missing_ok=True)
                atomic_write(path, write)
                atomic_write(noted, lambda tmp_path: tmp_path.write_text(_checksum(path)))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error}. Make room or set SMARTBATCH_CACHE to a folder that can be written."
        ) from error
    return path


def _locked(lock: BaseFileLock) -> AbstractContextManager[Any]:
    """Takes a lock, and says every few seconds which one is waited for."""
    waited = 0.0
    while True:
        try:
            return lock.acquire(timeout=_PATIENCE)
        except Timeout:
            waited += _PATIENCE
            log.warning("Waiting for another process that holds %s, for %.0f seconds now.", lock.lock_file, waited)


def _is_valid(path: Path, noted: Path) -> bool:
    try:
        return noted.read_text() == _checksum(path)
    except (OSError, UnicodeDecodeError):
        return False


def _checksum(path: Path) -> str:
    """Of a file's content, or of the names and contents of all files in a folder; 2 ms for 25 MB."""
    digest = xxh3_128()
    for file in [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()):
        digest.update(f"{file.relative_to(path)}:{file.stat().st_size}:".encode())
        if file.stat().st_size:
            with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
                digest.update(content)
    return digest.hexdigest()


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file or folder beside its place, flushes it to the disk and renames it: a kill leaves the one before."""
    tmp_path = path.with_name(f"{path.name}.unfinished")
    _remove(tmp_path)
    write(tmp_path)
    for written in [tmp_path, *tmp_path.rglob("*")]:
        if written.is_file():
            with written.open("rb") as file:
                os.fsync(file.fileno())
    if path.is_dir():
        _remove(path)
    tmp_path.replace(path)


def check_writable(folder: str | Path, remedy: str) -> None:
    """Makes a folder, writes a file into it and removes that.

    Raises:
        ValueError: That fails; the message ends with the remedy.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error}. {remedy}") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
