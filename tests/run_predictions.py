"""Predicts reviews on some ranks and writes down which rows each run's model sees, until it is done or killed: started by the tests."""

import os
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from smartbatch_lightning import PredictionWriter, SequenceClassifier, SmartBatchDataModule, demo, shards
from smartbatch_lightning.callbacks.stop_on_signal import StopOnSignal
from smartbatch_lightning.data import datamodule

ROWS, WINDOW = 301, 64


class Diary(Callback):
    """Appends the rows of every batch, and sends a signal to all ranks after so many."""

    def __init__(self, folder: Path, number: int, after: int) -> None:
        self.folder, self.number, self.after = folder, number, after

    def on_predict_start(self, trainer, pl_module) -> None:
        run = len(list(self.folder.glob("rows-*.txt")))
        trainer.strategy.barrier()  # all ranks have looked
        self.file = (self.folder / f"rows-{run}-{trainer.global_rank}.txt").open("w", buffering=1)

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.file.write(" ".join(map(str, batch["index"].tolist())) + "\n")
        if batch_idx + 1 == self.after and trainer.is_global_zero:
            os.killpg(0, self.number)


def main(folder: Path, ranks: int, number: int = 0, after: int = 0, joining: bool = False) -> None:
    torch.set_num_threads(1)
    datamodule._PREDICTION_WINDOW = WINDOW
    if joining:
        shards._write_tables = lambda *_: os.killpg(0, number)
    model_folder = str(demo.model_dir())
    data = SmartBatchDataModule(
        {"test": str(folder.parent / "reviews.parquet")},
        model_folder,
        label_names=["negative", "positive"],
        max_length=32,
        batch_size=8,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        callbacks=[
            StopOnSignal(),
            PredictionWriter(str(folder / "predictions.parquet"), columns=["id"]),
            Diary(folder, number, after),
        ],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.predict(SequenceClassifier(model_folder), data, return_predictions=False)
