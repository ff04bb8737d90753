"""Tests and predicts real reviews on some ranks: python tests/run_evaluation.py FOLDER REVIEWS.parquet RANKS."""

import json
import sys
from pathlib import Path

import lightning as L

from smartbatch_lightning import PredictionWriter, SequenceClassifier, SmartBatchDataModule, demo

folder, reviews, ranks, padding = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
model_folder = str(demo.model_dir())  # named as a folder: these are not the demo's texts
data = SmartBatchDataModule(
    {"test": reviews}, model_folder, label_names=["negative", "positive"], max_length=64, padding=padding
)
trainer = L.Trainer(
    accelerator="cpu",
    devices=ranks,
    strategy="ddp" if ranks > 1 else "auto",
    callbacks=[PredictionWriter(str(folder / "predictions.csv"))],
    logger=False,
    enable_progress_bar=False,
)
model = SequenceClassifier(model_folder)
[metrics] = trainer.test(model, data)
trainer.predict(model, data)
if trainer.is_global_zero:
    (folder / "metrics.json").write_text(json.dumps(metrics))
