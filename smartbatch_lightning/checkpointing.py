"""Checkpoints: written atomically, and read only if undamaged and made of weights and plain values."""

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
from smartbatch_lightning.storage import atomic_write, reporting_write_errors

_MARK = b"xxh3:"  # precedes the checksum

# Numpy numbers and arrays, and paths, may be arguments and run no code, so torch may load them, in the whole process.
_NUMPY_TYPES = [type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efd"]
_SAFE_TYPES: list[Any] = [np.ndarray, np.dtype, *_NUMPY_TYPES, type(Path())]
_SAFE_TYPES += [value.__reduce__()[0] for value in (np.zeros(1), np.float64())]  # the functions that rebuild them
torch.serialization.add_safe_globals(_SAFE_TYPES)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint to a temporary file and renames it, so that a kill leaves the previous one.

    A Trainer plugin, which the command line uses by default.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Writes a checkpoint atomically; object stores do so by themselves."""
        if _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            with reporting_write_errors(path, "Free some space, or give ModelCheckpoint another dirpath."):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                atomic_write(Path(path), lambda tmp_path: _save(checkpoint, tmp_path))

    def load_checkpoint(self, path: _PATH, *args: Any, **options: Any) -> dict[str, Any]:
        """Reads a checkpoint, always with `weights_only`.

        Raises:
            ValueError: It does not exist, is damaged, or is not a checkpoint.
        """
        # the weights that Lightning's `ddp_spawn` and the like pass between processes are not a checkpoint
        local = path if Path(path).name == ".temp.ckpt" else verified_checkpoint(path)
        return super().load_checkpoint(local, *args[:1], **{**options, "weights_only": True})


def drop_unsavable(of: Any, hparams: MutableMapping[str, Any]) -> None:
    """Removes hyperparameters that a checkpoint cannot store, and logs their names.

    Args:
        of: The object whose hyperparameters they are.
        hparams: The hyperparameters by name; those that are not plain values are removed.
    """
    for name, value in list(hparams.items()):
        content = BytesIO()
        try:
            torch.save(value, content)
            content.seek(0)
            torch.load(content, weights_only=True)
        except Exception:  # pickling may raise anything
            del hparams[name]
            rank_zero_info(
                f"Checkpoints are loaded without running code, so they cannot store the argument {name} of "
                f"{type(of).__name__}, a {type(value).__name__}. Pass it to load_from_checkpoint again."
            )


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """Saves a checkpoint directly; Lightning's function would save it to $TMPDIR first, where there may be no space.

    A checkpoint is a zip file. A checksum of everything before the file's comment is stored in that comment, since zip
    files' own checksums do not cover their directory.
    """
    with path.open("wb") as file:  # with a path, torch would not say what went wrong
        torch.save(checkpoint, file)
    comment = _checksum(path, -2)
    with path.open("r+b") as file:
        file.seek(-2, SEEK_END)  # the length of the comment, the last field
        file.write(len(comment).to_bytes(2, "little") + comment)


def _find_damage(path: str) -> str | None:
    """How a checkpoint's file is damaged; None if it is not."""
    with zipfile.ZipFile(path) as file:
        comment = file.comment
        if not comment.startswith(_MARK):  # not written by this package
            damaged = file.testzip()
            return damaged and f"wrong checksum of {damaged}"
    return None if comment == _checksum(Path(path), -2 - len(comment)) else "wrong checksum"


def _checksum(path: Path, end: int) -> bytes:
    """Checksum of a file's content up to a position."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return _MARK + xxh3_128(memoryview(content)[:end]).hexdigest().encode()


def verified_checkpoint(path: _PATH, *, trusts_code: bool = True) -> str:
    """Makes sure that a checkpoint is undamaged and can be loaded without running code.

    torch does not check the checksums in its files, and Lightning would run code in a remote checkpoint.

    Args:
        path: Path of a file, or a URL.
        trusts_code: False to refuse a checkpoint whose arguments would make transformers run a model's own code, which
            only users may allow.

    Returns:
        The path of the file; for a URL, that of a temporary copy.

    Raises:
        ValueError: It does not exist, is damaged, or is not a checkpoint; or it asks for code that is not trusted.
    """
    try:
        local = fsspec.open_local(f"simplecache::{path}") if _is_remote(path) else str(path)
        assert isinstance(local, str)
        if damage := _find_damage(local):
            raise zipfile.BadZipFile(damage)
        content = torch.load(local, map_location="meta", weights_only=True, mmap=True)
        if not isinstance(content, dict) or "state_dict" not in content:
            raise KeyError("it has no state_dict")
    except FileNotFoundError as error:
        raise _checkpoint_error(path, "does not exist") from error
    except UnpicklingError as error:
        what = "holds Python objects besides weights and plain values, and loading them could run code"
        raise _checkpoint_error(path, what) from error
    except Exception as error:  # a damaged file may raise anything
        what = f"is damaged or not a checkpoint: {root_cause_message(error).rstrip('.')}"
        if Path(path).is_dir():
            what = "is a folder, not a file"
        if Path(path, ".metadata").is_file():  # written by torch.distributed.checkpoint
            what = (
                "is a folder of shards, which only the strategy that wrote it can load. To get a single file, let the "
                "strategy write full checkpoints: FSDPStrategy(state_dict_type='full') or "
                "ModelParallelStrategy(save_distributed_checkpoint=False)"
            )
        raise _checkpoint_error(path, what) from error
    if not trusts_code and (content.get("hyper_parameters", {}).get("model_kwargs") or {}).get("trust_remote_code"):
        raise UsageError(
            f"the checkpoint {path} is of a model with its own Python code, which is not run unless you trust it. Read "
            "the code, then set --model.model_kwargs.trust_remote_code=true, or in Python give load_from_checkpoint "
            "model_kwargs={'trust_remote_code': True}."
        )
    return local


def saved_arguments(path: _PATH) -> dict[str, Any]:
    """The module's arguments in a checkpoint that was verified."""
    arguments: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(
        "hyper_parameters", {}
    )
    return arguments


def _checkpoint_error(path: _PATH, what: str) -> UsageError:
    message = f"the checkpoint {path} {what}. Give another one with --ckpt_path"
    if not _is_remote(path):
        folder, name = (Path(path), "it") if Path(path).is_dir() else (Path(path).parent, "its folder")
        others = sorted(other.name for other in folder.glob("*.ckpt"))
        message += f"; {name} has {others}" if others else f"; there is none in {str(folder)!r}"
    return UsageError(f"{message}.")


def _is_remote(path: _PATH) -> bool:
    return "://" in str(path)
