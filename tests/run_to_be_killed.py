"""Trains the demo and writes down what each rank trains, until it is done or killed: started by the tests.

Usage: python tests/run_to_be_killed.py FOLDER [name=value ...]
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule, TrainingMonitor
from smartbatch_lightning.callbacks.best import BestCheckpoint, EarlyStop
from smartbatch_lightning.callbacks.stop_on_signal import StopOnSignal
from smartbatch_lightning.checkpointing import AtomicCheckpointIO


class Diary(Callback):
    """Appends a line for every batch: epoch, batch, rank and ids; the checkpoint's position is in its own line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer, pl_module) -> None:
        self.file = (self.folder / f"diary-{trainer.global_rank}.txt").open("a", buffering=1)
        self.file.write(f"start {trainer.world_size}\n")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        ids = " ".join(map(str, batch["index"].tolist()))
        self.file.write(f"{trainer.current_epoch} {batch_idx} {ids}\n")


class KillsItself(Callback):
    """By SIGKILL, at the first moment of a kind, or where that many of them have passed."""

    def __init__(self, moment: str, passed: int = 0) -> None:
        self.moment, self.left = moment, passed

    def _reach(self, moment: str) -> None:
        if moment == self.moment:
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1

    def on_train_batch_start(self, *_) -> None:
        self._reach("first step")

    def on_train_batch_end(self, *_) -> None:
        self._reach("step")

    def on_validation_batch_end(self, *_) -> None:
        self._reach("validation")

    def on_validation_end(self, *_) -> None:
        self._reach("end of validation")

    def on_train_epoch_end(self, *_) -> None:
        self._reach("end of epoch")

    def on_train_epoch_start(self, *_) -> None:
        self._reach("start of epoch")


class TokenizesSlowly(SmartBatchDataModule):
    """Tells that it tokenizes, and takes its time."""

    def tokenize(self, dataset) -> Any:
        (Path(sys.argv[1]) / "tokenizing.txt").touch()
        time.sleep(5)
        return super().tokenize(dataset)


class Dropped(SequenceClassifier):
    """The demo's model with dropout, so that the random state matters."""

    def configure_model(self) -> None:
        super().configure_model()
        for module in self.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1


def main(folder: Path, *arguments: str) -> None:
    options = {
        "devices": 1,
        "workers": 0,
        "accumulate": 1,
        "epochs": 3,
        "every": 2,
        "batching": "smart",
        "max_steps": -1,
        "padding": "longest",
        "budget": 0,
        "tokenization": "ahead",
        "stopping": 0,
        "averaging": "none",
        "best": 0,
        "logged": 0,
        "val_interval": 1.0,
        "seed_by_rank": 0,
        "kill": "never",
        "passed": 0,
        "tokenizing": 0,
        "schedule": "linear",
        "layer_decay": 1.0,
        "adapters": 0,
    }
    options |= {name: type(options[name])(value) for name, value in (argument.split("=") for argument in arguments)}
    L.seed_everything(7 + options["seed_by_rank"] * int(os.environ.get("LOCAL_RANK", 0)))
    torch.set_num_threads(1)
    data = (TokenizesSlowly if options["tokenizing"] else SmartBatchDataModule)(
        validation_split=0.9,
        max_length=24,
        batch_size=None if options["budget"] else 8,
        max_tokens_per_batch=options["budget"] or None,
        num_workers=options["workers"],
        batching=options["batching"],
        padding=options["padding"],
        tokenization=options["tokenization"],
    )
    checkpoint = ModelCheckpoint(
        folder / "checkpoints", save_last=True, every_n_train_steps=options["every"], save_top_k=0
    )
    averaging = {"none": [], "ema": [EMAWeightAveraging(decay=0.9)], "swa": [StochasticWeightAveraging(1e-3, 2, 2)]}
    stopping = EarlyStopping("val_loss", min_delta=0.01, patience=options["stopping"])
    best = ModelCheckpoint(
        folder / "checkpoints", "best-{step}", monitor="val_loss", save_top_k=2, enable_version_counter=False
    )
    if options["best"] == 2:  # those of the command line
        checkpoint = best = BestCheckpoint("val_loss", None, str(folder / "checkpoints"), options["every"])
        stopping = EarlyStop(options["stopping"], "val_loss", min_delta=0.01)
    monitor = TrainingMonitor()
    callbacks = [
        StopOnSignal(),
        Diary(folder),
        monitor,
        *averaging[options["averaging"]],
        *([stopping] if options["stopping"] else []),
        *([LearningRateMonitor("step")] if options["logged"] else []),
        checkpoint,
        *([best] if options["best"] == 1 else []),
        KillsItself(options["kill"], options["passed"]),
    ]
    interval = options["val_interval"]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=options["devices"],
        strategy="ddp" if options["devices"] > 1 else "auto",
        max_epochs=options["epochs"],
        max_steps=options["max_steps"],
        accumulate_grad_batches=options["accumulate"],
        gradient_clip_val=1.0,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        val_check_interval=int(interval) if interval > 1 else interval,
        check_val_every_n_epoch=None if interval > 1 else 1,
        log_every_n_steps=1,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        logger=CSVLogger(folder, flush_logs_every_n_steps=1) if options["logged"] else False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Dropped(
        learning_rate=1e-3,
        lr_scheduler=options["schedule"],
        layer_decay=options["layer_decay"],
        peft_config={"peft_type": "LORA", "lora_dropout": 0.1} if options["adapters"] else None,
    )
    trainer.fit(model, data, ckpt_path="last")
    if trainer.is_global_zero:
        torch.save(model.state_dict(), folder / "weights.pt")
        (folder / "steps.txt").write_text(f"{trainer.global_step} {trainer.optimizers[0].param_groups[0]['lr']}")
        epochs = [
            [counts.samples, counts.tokens, counts.real_tokens, counts.sum_squared_lengths]
            + [(name, value) for name, value in sorted(metrics.items()) if name.startswith("val_")]
            for counts, metrics in monitor.epochs
        ]
        ended = {
            "step": trainer.global_step,
            "rate": trainer.optimizers[0].param_groups[0]["lr"],
            "patience": [stopping.wait_count, stopping.stopped_epoch, float(stopping.best_score)],
            "best": [best.best_model_path.rpartition("/")[2], float(best.best_model_score or 0)],
            "files": sorted(os.listdir(folder / "checkpoints")),
            "epochs": epochs,
        }
        (folder / "end.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
