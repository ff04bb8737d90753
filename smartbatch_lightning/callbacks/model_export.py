"""Exports the model when training ends."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor

from smartbatch_lightning.callbacks.training_monitor import TrainingMonitor, metrics_in
from smartbatch_lightning.checkpointing import verified_checkpoint
from smartbatch_lightning.console import command_line
from smartbatch_lightning.contract import callbacks_of, datamodule_of
from smartbatch_lightning.data.datamodule import SmartBatchDataModule
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.export import check_export_folder, check_exportable, export_model
from smartbatch_lightning.hub import create_repository
from smartbatch_lightning.models.classifier import SequenceClassifier


class ModelExport(Callback):
    """Exports the best model as an ordinary `transformers` folder when `fit` ends.

    The best weights are those saved by a `ModelCheckpoint` with a `monitor`, such as the command line's
    `BestCheckpoint`. Without one, and with `StochasticWeightAveraging`, whose weights are never validated, the final
    weights are exported.

    Args:
        folder: Folder to export to; None for no export.
        adapter: Write only the peft adapters and the head, instead of merging them into the model's weights.
        push_to_hub: Hub repository to upload the folder to, such as `me/reviewer`; created if it does not exist.
        private: Make the repository private if it is created; by default the owner's setting, usually public.
        commit_message: Commit message for the upload.

    Raises:
        ValueError: `push_to_hub` is given without a folder.
    """

    def __init__(
        self,
        folder: str | None = None,
        adapter: bool = False,
        push_to_hub: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> None:
        if push_to_hub is not None and folder is None:
            raise UsageError(f"push_to_hub is {push_to_hub!r}, but no folder is given to export to. Set folder.")
        self.folder = folder
        self.adapter = adapter
        self.push_to_hub = push_to_hub
        self.private = private
        self.commit_message = commit_message

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks before training that this run can be exported."""
        datamodule = datamodule_of(trainer)
        if self.folder is None:
            return
        check_exportable(pl_module, datamodule, self.adapter)
        if trainer.is_global_zero:
            check_export_folder(self.folder)
            if self.push_to_hub is not None:
                create_repository(self.push_to_hub, self.private)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the model, on rank 0."""
        datamodule = datamodule_of(trainer)
        if self.folder is None or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, SequenceClassifier)  # checked in on_fit_start
        assert isinstance(datamodule, SmartBatchDataModule)
        if (best := _best_path(trainer)) is not None:
            checkpoint = torch.load(verified_checkpoint(best), map_location="cpu", weights_only=True)
            with _weights(pl_module, checkpoint["state_dict"]):
                self.write(pl_module, datamodule, metrics_in(checkpoint), command_line())
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for monitor in callbacks_of(trainer, TrainingMonitor):
            if not metrics and monitor.epochs:
                metrics = monitor.epochs[-1][1]  # if a finished run was started again
        self.write(pl_module, datamodule, metrics, command_line())

    def write(
        self, model: SequenceClassifier, data: SmartBatchDataModule, metrics: dict[str, float], command: str | None
    ) -> None:
        """Exports a model with these metrics, trained by this command, to the folder and to the Hub if requested."""
        assert self.folder is not None
        export_model(
            model,
            data,
            self.folder,
            metrics,
            command,
            adapter=self.adapter,
            push_to_hub=self.push_to_hub,
            private=self.private,
            commit_message=self.commit_message,
        )


def _best_path(trainer: L.Trainer) -> str | None:
    """The checkpoint of the best weights; None if no metric was monitored."""
    if callbacks_of(trainer, StochasticWeightAveraging):
        return None
    saver = trainer.checkpoint_callback
    return saver.best_model_path or None if isinstance(saver, ModelCheckpoint) and saver.monitor else None


@contextmanager
def _weights(module: L.LightningModule, weights: dict[str, Tensor]) -> Iterator[None]:
    """Temporarily gives a module other weights."""
    own = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
    module.load_state_dict(weights)
    try:
        yield
    finally:
        module.load_state_dict(own)
