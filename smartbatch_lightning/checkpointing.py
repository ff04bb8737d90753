"""Checkpoints that are written atomically, and read only when they are whole and hold weights and plain values."""

import zipfile
from collections.abc import MutableMapping
from io import BytesIO
from mmap import ACCESS_READ, mmap
from os import SEEK_END
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import fsspec
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities import rank_zero_info
from xxhash import xxh3_128

from smartbatch_lightning.errors import UsageError, root_cause_message
from smartbatch_lightning.storage import atomic_write, refused

_MARK = b"xxh3:"  # before the checksum of a file

# Numbers and arrays of numpy and paths, of which arguments are made and which run no code: loaded too, wherever.
_NUMPY_TYPES = [type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efd"]
_PLAIN: list[Any] = [np.ndarray, np.dtype, *_NUMPY_TYPES, type(Path())]
_PLAIN += [value.__reduce__()[0] for value in (np.zeros(1), np.float64())]  # what they are rebuilt by
torch.serialization.add_safe_globals(_PLAIN)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint beside its place and renames it, so that a kill leaves the one before.

    A plugin of the Trainer; the command line has it by default.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Writes a checkpoint atomically, as object stores do by themselves."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            with refused(path, "Make room, or give ModelCheckpoint another dirpath."):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                atomic_write(Path(path), lambda tmp_path: _save(checkpoint, tmp_path))

    def load_checkpoint(self, path: _PATH, *args: Any, **options: Any) -> dict[str, Any]:
        """Reads a checkpoint, with `weights_only` whatever is asked for.

        Raises:
            ValueError: It is not there, damaged, or no checkpoint.
        """
        # the weights that Lightning's `ddp_spawn` and its like hand from process to process are no checkpoint
        local = path if Path(path).name == ".temp.ckpt" else verified_checkpoint(path)
        return super().load_checkpoint(local, *args[:1], **{**options, "weights_only": True})


def forget_objects(of: Any, hparams: MutableMapping[str, Any]) -> None:
    """Leaves arguments that a checkpoint cannot hold out of those that it keeps, and says so.

    Args:
        of: Whose arguments they are.
        hparams: By name; what is no plain value is taken out.
    """
    for name, value in list(hparams.items()):
        content = BytesIO()
        try:
            torch.save(value, content)
            content.seek(0)
            torch.load(content, weights_only=True)
        except Exception:  # pickle and what is pickled may raise anything
            del hparams[name]
            rank_zero_info(
                f"Checkpoints are loaded without running code, so they cannot store {name}={type(value).__name__} of "
                f"{type(of).__name__}. Pass it to load_from_checkpoint again."
            )


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """Not by Lightning's function, which writes to $TMPDIR first, where there may be no room.

    The comment of the zip file that a checkpoint is holds a checksum of all before it: those that zip files have by
    themselves leave out their directory.
    """
    with path.open("wb") as file:  # given a path, torch does not say what went wrong
        torch.save(checkpoint, file)
    comment = _checksum(path, -2)
    with path.open("r+b") as file:
        file.seek(-2, SEEK_END)  # where the length of the comment stands, which is the last entry
        file.write(len(comment).to_bytes(2, "little") + comment)


def _find_damage(path: str) -> str | None:
    """What is wrong with a checkpoint's file; None where nothing is."""
    with zipfile.ZipFile(path) as file:
        comment = file.comment
        if not comment.startswith(_MARK):  # not of this package
            damaged = file.testzip()
            return damaged and f"wrong checksum of {damaged}"
    return None if comment == _checksum(Path(path), -2 - len(comment)) else "wrong checksum"


def _checksum(path: Path, end: int) -> bytes:
    """Of a file's content up to there."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return _MARK + xxh3_128(memoryview(content)[:end]).hexdigest().encode()


def verified_checkpoint(path: _PATH) -> str:
    """Makes sure that a checkpoint is undamaged and can be loaded without running code.

    torch does not look at the checksums that its files hold, and Lightning runs what a remote checkpoint asks for.

    Args:
        path: Of a file, or a URL.

    Returns:
        The path of the file, for a URL that of a temporary copy.

    Raises:
        ValueError: It is not there, damaged, or no checkpoint.
    """
    remote = "://" in str(path)
    try:
        local = fsspec.open_local(f"simplecache::{path}") if remote else str(path)
        assert isinstance(local, str)
        if damage := _find_damage(local):
            raise zipfile.BadZipFile(damage)
        content = torch.load(local, map_location="meta", weights_only=True, mmap=True)
        if not isinstance(content, dict) or "state_dict" not in content:
            raise KeyError("it has no state_dict")
    except Exception as error:  # a damaged file may raise anything
        if isinstance(error, FileNotFoundError):
            what = "is not there"
        elif isinstance(error, UnpicklingError):
            what = "holds Python objects besides weights and plain values, and loading them could run code"
        else:
            what = f"is damaged or no checkpoint: {root_cause_message(error)}"
        message = f"the checkpoint {path} {what.rstrip('.')}. Give another one with --ckpt_path"
        if not remote:
            folder = Path(path).parent
            others = sorted(other.name for other in folder.glob("*.ckpt"))
            message += f"; its folder has {others}" if others else f"; there is none in {str(folder)!r}"
        raise UsageError(f"{message}.") from error
    return local
