"""Trains the demo and writes down what each rank trains, until it is done or killed: started by the tests.

Usage: python tests/run_to_be_killed.py FOLDER [name=value ...]
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule
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


class Dropped(SequenceClassifier):
    """The demo's model with dropout, so that the random state matters."""

    def configure_model(self) -> None:
        super().configure_model()
        for module in self.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1


def main() -> None:
    folder = Path(sys.argv[1])
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
    }
    options |= {
        name: int(value) if value.lstrip("-").isdigit() else value
        for name, value in (a.split("=") for a in sys.argv[2:])
    }
    L.seed_everything(7)
    torch.set_num_threads(1)
    data = SmartBatchDataModule(
        validation_split=0.9,
        max_length=24,
        batch_size=None if options["budget"] else 8,
        max_tokens_per_batch=options["budget"] or None,
        num_workers=options["workers"],
        batching=options["batching"],
        padding=options["padding"],
    )
    checkpoint = ModelCheckpoint(
        folder / "checkpoints", save_last=True, every_n_train_steps=options["every"], save_top_k=0
    )
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
        callbacks=[StopOnSignal(), checkpoint, Diary(folder)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Dropped(learning_rate=1e-3)
    trainer.fit(model, data, ckpt_path="last")
    if trainer.is_global_zero:
        torch.save(model.state_dict(), folder / "weights.pt")
        (folder / "steps.txt").write_text(f"{trainer.global_step} {trainer.optimizers[0].param_groups[0]['lr']}")


if __name__ == "__main__":
    main()
