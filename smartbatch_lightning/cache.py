"""`smartbatch cache`: lists the cache entries, and removes the least recently used ones."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from datasets.utils.py_utils import convert_file_size_to_int
from rich.filesize import decimal

from smartbatch_lightning.console import echo, table_of
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.storage import cache_dir

try:
    import fcntl
except ImportError:  # on Windows, where every entry counts as in use
    fcntl = None  # type: ignore[assignment]

_LIMIT = "SMARTBATCH_CACHE_MAX_SIZE"


class CacheLock:
    """Protects a cache entry from being pruned while this object exists; creates its folder if needed.

    The folder's `about.txt` describes the content. Its modification time is that of the last use, and a lock on it
    marks the entry as in use. A read-only cache is left unchanged.

    Args:
        folder: Folder of the entry.
        about: Description of the content.
    """

    def __init__(self, folder: Path, about: str = "") -> None:
        self._file: int | None = None
        with suppress(OSError):
            while self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = _locked(folder, exclusive=False)
            os.utime(self._file)
            if not os.fstat(self._file).st_size:
                os.write(self._file, about.encode())

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def list_cache(folder: str | None = None) -> None:
    """Lists the cache entries, most recently used last.

    Args:
        folder: Cache folder; by default $SMARTBATCH_CACHE, else a folder in the user's cache.
    """
    root = _root(folder)
    rows = [
        {
            "content": _about(entry).read_text(encoding="utf-8") if _about(entry).exists() else "unknown",
            "size": decimal(_size(entry)),
            "last used": f"{datetime.fromtimestamp(_last_used(entry)):%Y-%m-%d %H:%M}",
            "in use": "yes" if _is_in_use(entry) else "",
            "folder": entry.name,
        }
        for entry in _entries(root)
    ]
    if rows:
        echo(table_of(rows))
    echo(f"{decimal(sum(map(_size, _entries(root))))} in {root}")


def prune_cache(max_size: str | None = None, folder: str | None = None) -> None:
    """Removes the least recently used entries until the cache is small enough; entries in use stay.

    Args:
        max_size: Maximum size to keep, such as 50GB; 0 keeps nothing. By default $SMARTBATCH_CACHE_MAX_SIZE, to which
            the cache is also pruned after each tokenization.
        folder: Cache folder; by default $SMARTBATCH_CACHE, else a folder in the user's cache.

    Raises:
        ValueError: No size is given, or it is not a size.
    """
    limit = size_limit() if max_size is None else _bytes(max_size, "--max_size")
    if limit is None:
        raise UsageError(f"no size limit is given. Set --max_size, such as 50GB, or {_LIMIT}.")
    root = _root(folder)
    removed = prune(root, limit)
    left = sum(map(_size, _entries(root)))
    echo(f"Removed {decimal(removed)} from {root}. {decimal(left)} are left{', in use' if left > limit else ''}.")


def size_limit() -> int | None:
    """Maximum size of the cache in bytes, from $SMARTBATCH_CACHE_MAX_SIZE; None if that is not set.

    Raises:
        ValueError: It is not a size.
    """
    given = os.environ.get(_LIMIT)
    return _bytes(given, _LIMIT) if given else None


def prune(root: Path, max_size: int) -> int:
    """Removes the least recently used entries that are not in use, until at most `max_size` bytes are left.

    Returns:
        Number of bytes removed.
    """
    sizes = {entry: _size(entry) for entry in _entries(root)}
    total, removed = sum(sizes.values()), 0
    for entry, size in sizes.items():
        if total - removed > max_size:
            with _unused(entry) as unused:  # locked until it is removed, which waiting processes then notice
                if unused:
                    # renamed first, so that processes that start now do not find it half removed
                    shutil.rmtree(entry.rename(entry.with_suffix(".removed")))
                    removed += size
    return removed


@contextmanager
def _unused(entry: Path) -> Iterator[bool]:
    """Locks an entry against use by other processes, unless one is using it; yields whether it was locked."""
    try:
        lock = _locked(entry, exclusive=True)
    except OSError:
        lock = None
    yield lock is not None
    if lock is not None:
        os.close(lock)


def _is_in_use(entry: Path) -> bool:
    with _unused(entry) as unused:
        return not unused


def _locked(entry: Path, exclusive: bool) -> int | None:
    """File descriptor of the entry's locked `about.txt`; None if the entry has been removed in the meantime.

    Raises:
        OSError: Another process holds the lock, or the system has no such locks.
    """
    if fcntl is None:
        raise OSError("there are no shared locks on Windows")
    file = os.open(_about(entry), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        if os.fstat(file).st_nlink:
            return file
    except OSError:
        os.close(file)
        raise
    os.close(file)
    return None


def _about(entry: Path) -> Path:
    return entry / "about.txt"


def _entries(root: Path) -> list[Path]:
    """Folders of the cache entries, most recently used last."""
    return sorted((path for path in root.glob("tokens-*") if path.is_dir()), key=_last_used)


def _last_used(entry: Path) -> float:
    """Seconds since 1970."""
    return _about(entry).stat().st_mtime if _about(entry).exists() else 0.0


def _size(entry: Path) -> int:
    """Size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())


def _root(folder: str | None) -> Path:
    return Path(folder) if folder else cache_dir()


def _bytes(size: str, name: str) -> int:
    try:
        given = int(size) if size.isdecimal() else int(convert_file_size_to_int(size.replace(" ", "").upper()))
    except ValueError:
        given = -1
    if given < 0:
        raise UsageError(f"{name} is {size!r}; give a size, such as 50GB or 1500MB, or a whole number of bytes.")
    return given
