"""Where derived files live, and how each is written whole or not at all, once, whoever asks."""

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


def write_once(path: Path, write: Callable[[Path], None], is_whole: Callable[[Path], bool] = Path.exists) -> Path:
    """Makes a file or folder unless it is there, and whole.

    Processes that ask at the same time wait for the first and find its result. Whoever is killed half-way leaves
    nothing that could be taken for finished; what it leaves is removed by the next.

    Args:
        path: The file or folder.
        write: Writes it to the path that it is given.
        is_whole: Tells whether what stands at a path can be used; what cannot is made again.
    """
    if is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if is_whole(path):
            return path
        replace_whole(path, write)
    return path


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file or folder beside its place, to the disk, and renames it: a kill leaves the one before, whole."""
    draft = path.with_name(f"{path.name}.unfinished")
    _remove(draft)
    write(draft)
    for written in [draft, *draft.rglob("*")]:
        if written.is_file():
            with written.open("rb") as file:
                os.fsync(file.fileno())
    if path.is_dir():
        _remove(path)
    draft.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
