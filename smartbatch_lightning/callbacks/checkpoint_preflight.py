"""Checks before a run that checkpoints can be written, or that one was loaded."""

import lightning as L
from filelock import BaseFileLock
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.models.classifier import SequenceClassifier
from smartbatch_lightning.models.compatibility import is_fine_tuned
from smartbatch_lightning.storage import check_writable, lock_folder

_REMEDY = "Give ModelCheckpoint another dirpath, or set --trainer.default_root_dir."


class CheckpointPreflight(Callback):
    """Checks before training that checkpoints can be written, and before prediction that one was loaded."""

    def __init__(self) -> None:
        self._locks: list[BaseFileLock] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Locks the checkpoint folders that are already known, so that two runs do not resume from the same checkpoint.

        Raises:
            ValueError: Another run has locked one of them.
        """
        if stage == "fit":
            self._locks = [lock_folder(folder, _REMEDY) for folder in _checkpoint_folders(trainer)]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Unlocks the folders."""
        for lock in self._locks:
            lock.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Unlocks the folders."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes a file to each local folder of a `ModelCheckpoint`, and removes it.

        Raises:
            ValueError: A folder cannot be written.
        """
        for folder in _checkpoint_folders(trainer):
            check_writable(folder, _REMEDY)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rejects to evaluate or predict with a model that was never trained to classify."""
        if trainer.state.fn == TrainerFn.FITTING or trainer.ckpt_path is not None or trainer.global_step:
            return
        if not isinstance(pl_module, SequenceClassifier) or pl_module.model is None:
            return
        if pl_module.pretrained == "demo" or not is_fine_tuned(pl_module.model.config):
            raise UsageError(
                f"{pl_module.pretrained!r} has not been trained to classify, and no checkpoint was loaded. Give one "
                "with --ckpt_path, or an exported folder with --model.pretrained."
            )

    on_validation_start = on_predict_start = on_test_start


def _checkpoint_folders(trainer: L.Trainer) -> list[str]:
    """Local folders in which rank 0 will write checkpoints, as far as they are known."""
    callbacks = trainer.checkpoint_callbacks if trainer.is_global_zero else []
    folders = {str(one.dirpath) for one in callbacks if isinstance(one, ModelCheckpoint) and one.dirpath}
    return sorted(folder for folder in folders if "://" not in folder)
