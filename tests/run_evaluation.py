"""Tests and predicts real reviews on some ranks: started by the tests."""

import json
from pathlib import Path

import lightning as L
import torch

from smartbatch_lightning import EvaluationReport, PredictionWriter, SequenceClassifier, SmartBatchDataModule, demo


def main(folder: Path, reviews: Path, ranks: int, padding: str) -> None:
    torch.set_num_threads(1)
    model_folder = str(demo.model_dir())  # named as a folder: these are not the demo's texts
    data = SmartBatchDataModule(
        {"test": str(reviews)}, model_folder, label_names=["negative", "positive"], max_length=64, padding=padding
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        callbacks=[PredictionWriter(str(folder / "predictions.csv")), EvaluationReport(str(folder / "report"))],
        logger=False,
        enable_progress_bar=False,
    )
    model = SequenceClassifier(model_folder)
    [metrics] = trainer.test(model, data)
    trainer.predict(model, data)
    if trainer.is_global_zero:
        (folder / "metrics.json").write_text(json.dumps(metrics))
