"""Where derived files live, and how each is written atomically, by one process for all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_dir() -> Path:
    """Folder of everything this package derives: `$SMARTBATCH_CACHE`, else a folder in the user's cache."""
    if chosen := os.environ.get("SMARTBATCH_CACHE"):
        return Path(chosen).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "smartbatch_lightning"


def write_if_missing(path: Path, write: Callable[[Path], None], is_valid: Callable[[Path], bool] = Path.exists) -> Path:
    """Makes a file or folder unless it is there and valid.

    Processes that ask at the same time wait for the first and find its result. One that is killed leaves nothing that
    could be taken for finished; what it leaves is removed by the next.

    Args:
        path: The file or folder.
        write: Writes it to the path that it is given.
        is_valid: Tells whether what stands at a path can be used; what cannot is made again.
    """
    if is_valid(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if is_valid(path):
            return path
        atomic_write(path, write)
    return path


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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
