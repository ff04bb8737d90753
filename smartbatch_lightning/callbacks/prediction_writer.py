"""Writes predictions as a table."""

from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning as L
import pyarrow as pa
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor
from xxhash import xxh3_128

from smartbatch_lightning.console import echo
from smartbatch_lightning.contract import callbacks_of, datamodule_of
from smartbatch_lightning.data.loader import SmartBatchLoader
from smartbatch_lightning.data.resume import data_digest
from smartbatch_lightning.data.sampler import SmartBatchSampler
from smartbatch_lightning.data.texts import TextDataModule
from smartbatch_lightning.data.tokens import TokenDataset
from smartbatch_lightning.errors import UsageError, did_you_mean_columns, join_quoted
from smartbatch_lightning.models.classifier import SequenceClassifier
from smartbatch_lightning.shards import TableShards
from smartbatch_lightning.storage import check_writable
from smartbatch_lightning.tasks.thresholds import read_thresholds

_REMEDY = "Give another --predictions.path, or overwrite it with --predictions.overwrite=true."


class PredictionWriter(BasePredictionWriter):
    """Writes predictions as one table, with one row per sample in input order.

    | task | `prediction` | `probability_NAME` |
    | --- | --- | --- |
    | single-label | the most likely class, as written in the data | for each class |
    | multi-label | the labels above 0.5: a list, or a string with the data's delimiter | for each label |
    | regression | the number; for several targets a list, in the order of `label_names` | none |

    The first columns are `index`, the row in the split, counted from 0, and the `columns` copied from the input. In
    CSV, lists are written as JSON, and text that a spreadsheet would take for a formula (beginning with `=`, `+`, `-`,
    `@`, a tab or a carriage return) is prefixed with `'`.

    Each rank writes its predictions to the folder `PATH.shards`, about 32,768 rows at a time; all shards are joined at
    the end. A killed run that is restarted with the same data and model, on any number of ranks, predicts only the
    missing rows. Unless you pass `return_predictions=False`, Lightning's `trainer.predict` also keeps all predictions
    in memory.

    Args:
        path: File to write, .parquet or .csv.
        columns: Column or columns of the input to copy to the output.
        overwrite: Replace an existing file, and shards left by a killed run with other data or another model.
        thresholds: File with a threshold for each label, as written by `smartbatch evaluate --thresholds=best`, or a
            folder that contains `thresholds.json`.

    Raises:
        ValueError: `path` ends in neither .parquet nor .csv.
    """

    def __init__(
        self,
        path: str = "predictions.parquet",
        columns: str | list[str] | None = None,
        overwrite: bool = False,
        thresholds: str | None = None,
    ) -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)
        self.columns = [columns] if isinstance(columns, str) else columns or []
        self.overwrite = overwrite
        self.thresholds = thresholds
        self._by_label: dict[str, float] = {}  # thresholds, once read
        if self.path.suffix not in (".parquet", ".csv"):
            raise UsageError(
                f"the predictions' path {path} ends in {self.path.suffix!r}; it has to end in .parquet or .csv."
            )
        self._shards = TableShards(self.path, _REMEDY)
        self._pending: list[dict[str, Tensor]] = []  # of the current shard
        self._shard = 0
        self._steps: list[int] = []  # number of this rank's batches after which each shard is finished
        self._resumed: SmartBatchSampler | None = None

    def check_path(self) -> None:
        """Rejects a folder, an existing file unless it may be overwritten, and thresholds that cannot be read."""
        if self.path.is_dir():
            raise UsageError(f"{self.path} is a folder. Give another --predictions.path.")
        if self.path.exists() and not self.overwrite:
            raise UsageError(f"{self.path} already exists. {_REMEDY}")
        if self.thresholds is not None:
            read_thresholds(self.thresholds)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Rejects a run whose predictions could not be written, before anything is predicted.

        Raises:
            ValueError: The file exists; a column is not in the input, or has the name of a column of predictions; or
                the module is not a `SequenceClassifier`, and no other callback writes its predictions.
        """
        if stage != "predict":
            return
        if not isinstance(pl_module, SequenceClassifier):
            writers = callbacks_of(trainer, BasePredictionWriter)
            if all(isinstance(writer, PredictionWriter) for writer in writers):
                raise UsageError(
                    "PredictionWriter writes predictions of a SequenceClassifier, but this run has "
                    f"{type(pl_module).__name__}. Add your own BasePredictionWriter with --trainer.callbacks."
                )
            return
        self.check_path()
        self._shard, self._resumed = 0, None
        if self.columns:
            _check_columns(self.columns, _input_of(trainer))
        if trainer.is_global_zero:
            check_writable(self.path.parent, "Set another --predictions.path.")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Skips what a killed run with the same data and model has already written.

        Raises:
            ValueError: A different run left shards, there are several loaders, or thresholds do not fit the task.
        """
        if not isinstance(pl_module, SequenceClassifier):
            return
        self._by_label = {} if self.thresholds is None else read_thresholds(self.thresholds, pl_module.task)
        loaders: Any = trainer.predict_dataloaders
        [loader, *others] = loaders if isinstance(loaders, list | tuple) else [loaders]
        if others:
            raise UsageError(
                f"there are {len(loaders)} loaders, but only one table to write. Predict with one at a time."
            )
        known = isinstance(loader, SmartBatchLoader) and isinstance(loader.dataset, TokenDataset)
        finished = 0
        if trainer.is_global_zero:
            fingerprint = {
                "data": data_digest(loader.dataset) if known else uuid4().hex,
                "weights": _weights_digest(pl_module),
                "task": pl_module.task.config_fields(),
                "thresholds": self._by_label,
                "precision": str(trainer.precision),
                "limit_predict_batches": trainer.limit_predict_batches,
                "rows of a shard": loader.plan_sampler.window if known else None,
            }
            finished = self._shards.acquire(fingerprint, overwrite=self.overwrite)
        self._shard = trainer.strategy.broadcast(finished)
        self._shards.check_shared()
        self._pending = []
        self._steps = loader.plan_sampler.window_steps().tolist() if known else []
        if self._shard:
            self._skip_finished(trainer, loader.plan_sampler, self._steps[self._shard - 1])
            rank_zero_info(f"Resuming after {self._shard:,} of {len(self._steps):,} shards in {self._shards.folder}.")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: dict[str, Tensor],
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keeps a batch's predictions; writes the shard after its last batch."""
        if not isinstance(pl_module, SequenceClassifier):
            return  # another callback writes them
        if "index" not in prediction:
            raise UsageError(
                "the batches have no 'index' to order the predictions by. Add each sample's row number as 'index'."
            )
        # a subclass may add what is not a column
        tensors = {name: values for name, values in prediction.items() if isinstance(values, torch.Tensor)}
        self._pending.append({name: values.cpu() for name, values in tensors.items()})
        if self._steps and batch_idx + 1 == self._steps[self._shard]:
            self._write_shard(trainer, pl_module)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Joins the shards into the file, on rank 0."""
        if not isinstance(pl_module, SequenceClassifier):
            return
        if self._resumed is not None:  # the loader may be used again
            self._resumed.load_state_dict({"epoch": self._resumed.epoch, "consumed": []})
        if self._pending:  # if batches are limited, or the loader is of another kind
            self._write_shard(trainer, pl_module)
        if trainer.is_global_zero:
            copied = _input_of(trainer).select_columns(self.columns).with_format("arrow") if self.columns else None
            num_rows = self._shards.join(self._shard, "index", lambda table: _with_columns(table, copied))
            self._shards.release()
            echo(f"Wrote {num_rows:,} predictions to {self.path}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tells the user how to resume."""
        if trainer.predicting and trainer.is_global_zero and self._shard:
            echo(
                f"{self._shard:,} shards are in {self._shards.folder}. Run the same command again to resume from there."
            )
        self._shards.release()

    def _skip_finished(self, trainer: L.Trainer, sampler: SmartBatchSampler, steps: int) -> None:
        """Skips a loader's first batches, also in the limits and progress bar that Lightning has already computed."""
        sampler.load_state_dict({"epoch": sampler.epoch, "consumed": [(sampler.num_replicas, steps)]})
        trainer.predict_loop.max_batches[0] -= steps
        self._steps = [step - steps for step in self._steps]
        self._resumed = sampler

    def _write_shard(self, trainer: L.Trainer, module: SequenceClassifier) -> None:
        predicted = {name: torch.cat([batch[name] for batch in self._pending]).numpy() for name in self._pending[0]}
        self._pending = []
        index, columns = predicted.pop("index"), module.task.prediction_columns(predicted)
        if self._by_label:
            labels = module.task.predict_labels(predicted["probabilities"], self._by_label)
            columns["prediction"] = module.task.decode(labels)
        table = pa.table({"index": index, **columns})
        self._shards.write(table, self._shard, trainer.global_rank, trainer.world_size)
        self._shard += 1
        # after each shard, so that no rank falls behind by more than the timeout of a collective
        trainer.strategy.barrier("predictions")


def _input_of(trainer: L.Trainer) -> Dataset:
    """The rows to predict, with all their columns."""
    datamodule = datamodule_of(trainer)
    if not isinstance(datamodule, TextDataModule):
        raise UsageError(
            f"predictions.columns needs a SmartBatchDataModule, but this run has {type(datamodule).__name__}. Leave "
            "--predictions.columns out."
        )
    return datamodule.predict_rows


def _check_columns(columns: list[str], rows: Dataset) -> None:
    if missing := [column for column in columns if column not in rows.column_names]:
        raise UsageError(
            f"predictions.columns has {join_quoted(missing)}, but the split to predict has "
            f"{join_quoted(rows.column_names)}. Choose from these."
            + did_you_mean_columns(missing[0], rows.column_names)
        )
    taken = [name for name in columns if name in ("index", "prediction") or name.startswith("probability_")]
    if taken or len(set(columns)) < len(columns):
        raise UsageError(
            f"predictions.columns is {join_quoted(columns)}, but index, prediction and probability_NAME are reserved "
            "and each name may appear once. Leave those out, or rename them in the data."
        )


def _with_columns(table: pa.Table, copied: Dataset | None) -> pa.Table:
    """The table with columns copied from the input after `index`; ids of a `ClassLabel` become names."""
    if copied is None:
        return table
    rows = table["index"].to_numpy()
    run = range(int(rows[0]), int(rows[-1]) + 1)
    columns = copied[run if len(run) == len(rows) else rows.tolist()]
    for number, name in enumerate(columns.column_names, 1):
        table = table.add_column(number, columns.schema.field(name), columns[name])
    return table.replace_schema_metadata(copied.features.arrow_schema.metadata)


def _weights_digest(module: L.LightningModule) -> str:
    """Hash of the parameters and buffers, for a sharded module only this rank's part; 0.1 s for BERT-base."""
    digest = xxh3_128()
    for tensor in chain(module.parameters(), module.buffers()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        digest.update(local.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
