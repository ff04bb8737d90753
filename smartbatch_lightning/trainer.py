"""Lightning's Trainer with the commands `prepare`, `report` and `export`."""

from collections.abc import Iterable
from pathlib import Path
from types import FunctionType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from smartbatch_lightning.callbacks.best import BestCheckpoint, EarlyStop
from smartbatch_lightning.callbacks.model_export import ModelExport
from smartbatch_lightning.callbacks.training_monitor import TrainingMonitor, metrics_in
from smartbatch_lightning.console import echo
from smartbatch_lightning.contract import TEXT_ENCODING
from smartbatch_lightning.data.datamodule import SmartBatchDataModule
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.export import check_exportable
from smartbatch_lightning.models.classifier import SequenceClassifier
from smartbatch_lightning.precision import with_precision
from smartbatch_lightning.progress import check_flags
from smartbatch_lightning.storage import check_writable

_MEASURES = """Measures a trained model on the {} data.

Args:
    ckpt_path: Checkpoint to measure.
    verbose: Whether to print the results.
    weights_only: Ignored: checkpoints are always loaded without running code in them.
"""


def _described(method: Any, docstring: str) -> Any:
    """A copy of a method with another docstring, which the command line shows as its help."""
    copied = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    copied.__annotations__, copied.__doc__ = method.__annotations__, docstring
    return copied


class SmartBatchTrainer(L.Trainer):
    """Lightning's Trainer plus the commands `prepare`, `report` and `export`.

    Args:
        logger: As in Lightning; by default a `TensorBoardLogger` and, in the same folder, a `CSVLogger` with a version
            for each start of the run, so that a requeued job keeps its earlier logs.
        callbacks: As in Lightning. Unless they include a progress bar, one is added that updates every five batches,
            since an update takes about a millisecond. A `ModelCheckpoint` replaces the default `BestCheckpoint`.
        options: All other arguments of `Trainer`; `precision` defaults to the best that the GPU supports.
    """

    def __init__(
        self,
        logger: Logger | Iterable[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        **options: Any,
    ) -> None:
        callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
        shown = options.get("enable_progress_bar") is not False and not options.get("barebones")
        if shown and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.insert(0, RichProgressBar(refresh_rate=5))  # first, so that it is removed before others print
        options.update(with_precision(options))
        super().__init__(logger=logger, callbacks=_needed_callbacks(callbacks, options), **options)
        check_flags(self)
        if logger in (None, True) and isinstance(self.logger, TensorBoardLogger):
            # written at every log, so that a kill loses nothing; the default is every hundredth step
            self.loggers.append(CSVLogger(self.logger.log_dir, name="csv", flush_logs_every_n_steps=1))

    fit = _described(
        L.Trainer.fit,
        """Trains a model, and saves its best and its last weights.

        Args:
            ckpt_path: Checkpoint to resume from; `last` for the `last.ckpt` in `--checkpoint.dirpath`, or to start from
                scratch if there is none.
            weights_only: Ignored: checkpoints are always loaded without running code in them.
        """,
    )
    validate = _described(L.Trainer.validate, _MEASURES.format("validation"))
    test = _described(L.Trainer.test, _MEASURES.format("test"))

    def prepare(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Loads and tokenizes the data ahead of time, so that no GPU waits for it.

        Args:
            model: The model, whose tokenizer is used.
            datamodule: The data.
            ckpt_path: Ignored; accepted because a run's `config.yaml` contains it.
            weights_only: Ignored, like `ckpt_path`.
        """
        datamodule.trainer = self
        self.strategy.connect(model)  # the data module uses its tokenizer
        datamodule.prepare_data()
        echo("The data is prepared. Runs with the same arguments will use it.")

    def report(
        self,
        model: L.LightningModule,
        datamodule: SmartBatchDataModule,
        folder: str = "report",
        ranks: int = 8,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Shows how much padding each batching strategy costs: prints tables, and writes JSON and figures to a folder.

        Args:
            model: The model, whose tokenizer is used.
            datamodule: The data and its batching.
            folder: Folder for `report.json` and the figures.
            ranks: Number of ranks for which to show the load balance.
            ckpt_path: Ignored; accepted because a run's `config.yaml` contains it.
            weights_only: Ignored, like `ckpt_path`.
        """
        from smartbatch_lightning.report.padding_report import PaddingReport

        check_writable(folder, "Set another --folder.")
        datamodule.trainer = self
        self.strategy.connect(model)
        report = PaddingReport.from_datamodule(datamodule, ranks)
        report.show()
        echo("Wrote " + ", ".join(map(str, report.save(folder))))

    def predict(
        self,
        model: L.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        return_predictions: bool | None = False,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Predicts, and writes the predictions to a table.

        Args:
            model: The model.
            dataloaders: Data loaders to use instead of the data module's.
            datamodule: The data.
            return_predictions: Also keep all predictions in memory and return them.
            ckpt_path: Checkpoint to predict with.
            weights_only: Ignored: checkpoints are always loaded without running code in them.
        """
        return super().predict(model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only)

    def export(
        self,
        model: SequenceClassifier,
        datamodule: SmartBatchDataModule,
        ckpt_path: str,
        folder: str = "model",
        adapter: bool = False,
        push_to_hub: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Exports a checkpoint's model as a `transformers` folder, with its tokenizer and a model card.

        Args:
            model: The model of the checkpoint.
            datamodule: The data it was trained on.
            ckpt_path: The checkpoint.
            folder: Folder to export to.
            adapter: Export only peft adapters and the head instead of merging adapters into the model's weights.
            push_to_hub: Hub repository to upload the folder to, such as `me/reviewer`; created if it does not exist.
            private: Make the repository private if it is created; by default the owner's setting, usually public.
            commit_message: Commit message for the upload.
            weights_only: Ignored: checkpoints are always loaded without running code in them.
        """
        check_exportable(model, datamodule, adapter)
        datamodule.trainer = self
        self.strategy.connect(model)
        checkpoint = self.strategy.load_checkpoint(ckpt_path, weights_only=True)
        model.on_load_checkpoint(checkpoint)
        model.configure_model()
        assert model.model is not None
        max_length = datamodule.text_encoder.max_length
        trained = getattr(model.model.config, TEXT_ENCODING, {}).get("max_length", max_length)
        if max_length != trained:
            raise UsageError(
                f"the checkpoint was trained with max_length {trained}, but it is now {max_length}, to which the "
                f"exported pipeline would truncate texts. Leave --data.max_length out, or set it to {trained}."
            )
        model.load_state_dict(checkpoint["state_dict"])
        command = checkpoint.get("callbacks", {}).get(TrainingMonitor.__qualname__, {}).get("command")
        export = ModelExport(folder, adapter, push_to_hub, private, commit_message)
        export.write(model, datamodule, metrics_in(checkpoint), command)


def _needed_callbacks(callbacks: list[Callback], options: dict[str, Any]) -> list[Callback]:
    """Removes default callbacks that this run does not need: early stopping, or saving checkpoints."""
    kept = [one for one in callbacks if not (isinstance(one, EarlyStop) and one.patience is None)]
    savers = [one for one in kept if isinstance(one, ModelCheckpoint)]
    saves = options.get("enable_checkpointing") is not False and not options.get("barebones")
    if savers and isinstance(savers[-1], BestCheckpoint) and (len(savers) > 1 or not saves):
        kept.remove(savers[-1])
    return kept
