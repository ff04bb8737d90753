"""Two ranks of which one prepares the data for longer than a process group waits: started by the tests."""

import time
from datetime import timedelta
from pathlib import Path

import lightning as L
from lightning.pytorch.strategies import DDPStrategy

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule

TIMEOUT = 20  # seconds


class SlowlyPrepared(SmartBatchDataModule):
    """The demo, whose preparation takes twice as long as a process group waits."""

    def prepare_data(self) -> None:
        time.sleep(2 * TIMEOUT)
        super().prepare_data()


def main(folder: Path) -> None:
    trainer = L.Trainer(
        strategy=DDPStrategy(timeout=timedelta(seconds=TIMEOUT)),
        accelerator="cpu",
        devices=2,
        max_steps=2,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(SequenceClassifier("demo"), datamodule=SlowlyPrepared(max_length=16))
    if trainer.is_global_zero:
        (folder / "steps").write_text(str(trainer.global_step))
