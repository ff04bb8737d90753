"""Exports the model when training ends."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from smartbatch_lightning.callbacks.training_monitor import TrainingMonitor
from smartbatch_lightning.console import command_line
from smartbatch_lightning.contract import datamodule_of
from smartbatch_lightning.data.datamodule import SmartBatchDataModule
from smartbatch_lightning.export import check_export_folder, check_exportable, export_model
from smartbatch_lightning.models.classifier import SequenceClassifier


class ModelExport(Callback):
    """Writes the model as an ordinary `transformers` folder when `fit` ends, with the weights that it ends with.

    Args:
        folder: Where to; None for not at all.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds out before training whether this is a run that can be exported."""
        datamodule = datamodule_of(trainer)
        if self.folder is None:
            return
        check_exportable(pl_module, datamodule)
        if trainer.is_global_zero:
            check_export_folder(self.folder)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes it, on rank 0."""
        datamodule = datamodule_of(trainer)
        if self.folder is None or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, SequenceClassifier)  # on_fit_start has seen to it
        assert isinstance(datamodule, SmartBatchDataModule)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not metrics and isinstance(callback, TrainingMonitor) and callback.epochs:
                metrics = callback.epochs[-1][1]  # where a run that had ended was started again
        export_model(pl_module, datamodule, self.folder, metrics, command_line())
