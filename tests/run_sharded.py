"""Trains on two ranks, by DDP or sharded by FSDP2, and writes what each rank has trained and got: started by tests."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule

LORA = {"peft_type": "LORA", "r": 4}


class Sharded(SequenceClassifier):
    """As docs/clusters.md shows it."""

    def configure_model(self) -> None:
        super().configure_model()
        mesh = self.device_mesh["data_parallel"]
        for layer in self.backbone.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Diary(L.Callback):
    """The samples and the loss of each step."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.steps.append([batch["index"].tolist(), float(outputs["loss"])])


def main(folder: Path, strategy: str, ckpt_path: Path | None = None, options: dict[str, Any] | None = None) -> None:
    """Trains 6 steps, or goes on to the sixth, with a checkpoint after the third, and tests.

    Args:
        folder: Where it writes.
        strategy: `ddp`; `full` or `shards`, the checkpoints that FSDP2 writes; or `auto`, as Lightning chooses.
        ckpt_path: The checkpoint that it goes on from.
        options: Of the model.
    """
    diary = Diary()
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    sizes: Any = {} if strategy == "auto" else {"data_parallel_size": 2, "tensor_parallel_size": 1}
    sharding = ModelParallelStrategy(**sizes, save_distributed_checkpoint=strategy == "shards")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp" if strategy == "ddp" else sharding, max_steps=6,
        callbacks=[diary, saver], default_root_dir=folder, logger=False, limit_val_batches=2, limit_test_batches=4,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    L.seed_everything(3, verbose=False)
    data = SmartBatchDataModule(max_length=32, batch_size=8, padding="packed")
    model = (SequenceClassifier if strategy == "ddp" else Sharded)(learning_rate=1e-3, **options or {})
    trainer.fit(model, data, ckpt_path=ckpt_path)
    [tested] = trainer.test(model, data, verbose=False)
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps({"steps": diary.steps, "tested": tested}))
