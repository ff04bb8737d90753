"""Checkpoints that are written atomically and read with a clear error."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from smartbatch_lightning.errors import UsageError, root_cause_message
from smartbatch_lightning.storage import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint beside its place and renames it, so that a kill leaves the one before.

    A plugin of the Trainer; the command line has it by default.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Writes a checkpoint atomically, as object stores do by themselves."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            atomic_write(
                Path(path), lambda tmp_path: super(AtomicCheckpointIO, self).save_checkpoint(checkpoint, tmp_path)
            )

    def load_checkpoint(self, path: _PATH, *args: Any, **options: Any) -> dict[str, Any]:
        """Reads a checkpoint.

        Raises:
            ValueError: It is not there, cut short or no checkpoint.
        """
        try:
            return super().load_checkpoint(path, *args, **options)
        except (RuntimeError, EOFError, OSError) as error:
            what = (
                "not there"
                if isinstance(error, FileNotFoundError)
                else f"cut short or corrupt: {root_cause_message(error)}"
            )
            raise UsageError(
                f"the checkpoint {path} is {what.rstrip('.')}. Give another one by --ckpt_path; in its folder are "
                f"{sorted(other.name for other in Path(path).parent.glob('*.ckpt'))}."
            ) from error
