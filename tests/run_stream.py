"""Trains on a stream, on one rank or two, and writes the token ids of each rank's batches: started by the tests."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from lightning.pytorch.callbacks import ModelCheckpoint

from smartbatch_lightning import SequenceClassifier, StreamDataModule, demo

FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
ROWS = [{"text": f"film {number} " * (1 + number * 7 % 11), "label": number % 2} for number in range(48)]


def stream() -> IterableDataset:
    return Dataset.from_list(ROWS, features=FEATURES).to_iterable_dataset(num_shards=3)


class Diary(L.Callback):
    """The token ids of each batch."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if "cu_seq_lens_q" in batch:
            starts, [ids] = batch["cu_seq_lens_q"].tolist(), batch["input_ids"].tolist()
            self.batches.append([ids[start:end] for start, end in pairwise(starts)])
        else:
            rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(dim=1).tolist(), strict=True)
            self.batches.append([ids[:length] for ids, length in rows])


def fit(
    folder: Path, max_steps: int, ckpt_path: Path | None = None, devices: int = 1, **options: Any
) -> tuple[L.Trainer, list[list[list[int]]]]:
    """Trains so many steps, or goes on from a checkpoint, and writes one after step 7."""
    diary = Diary()
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=max_steps, max_epochs=1,
        callbacks=[diary, saver], default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    L.seed_everything(1, verbose=False)
    data = StreamDataModule(stream(), buffer_size=16, **{"batch_size": 4, "max_length": 24, **options})
    model = SequenceClassifier(str(demo.model_dir()), learning_rate=1e-3)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return trainer, diary.batches


def main(folder: Path) -> None:
    trainer, batches = fit(folder, 12, devices=2)
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(batches))
