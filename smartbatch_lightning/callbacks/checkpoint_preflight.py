"""Checks before a run that checkpoints can be written, or that one was read."""

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.models.classifier import SequenceClassifier
from smartbatch_lightning.models.compatibility import is_fine_tuned
from smartbatch_lightning.storage import check_writable


class CheckpointPreflight(Callback):
    """Finds out before training whether checkpoints can be written, and before predicting whether one was read."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes a file to each local folder of a `ModelCheckpoint`, and removes it.

        Raises:
            ValueError: A folder cannot be written.
        """
        for callback in trainer.checkpoint_callbacks:
            folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
            if not trainer.is_global_zero or not folder or "://" in str(folder):
                continue
            check_writable(folder, "Give ModelCheckpoint another dirpath, or set --trainer.default_root_dir.")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses to measure a model that was never trained to classify, unless it is about to be."""
        if trainer.state.fn != TrainerFn.FITTING:
            _check_trained(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses to measure a model that was never trained to classify."""
        _check_trained(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses to predict with a model that was never trained to classify."""
        _check_trained(trainer, pl_module)


def _check_trained(trainer: L.Trainer, module: L.LightningModule) -> None:
    if trainer.ckpt_path is not None or trainer.global_step or not isinstance(module, SequenceClassifier):
        return
    if module.model is None or (module.pretrained != "demo" and is_fine_tuned(module.model.config)):
        return
    raise UsageError(
        f"{module.pretrained!r} has not been trained to classify, and no checkpoint was loaded. Give the path of one "
        "by --ckpt_path, or an exported folder by --model.pretrained."
    )
