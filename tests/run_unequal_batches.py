"""Trains the demo in batches of unequal size and keeps the weights: started by the tests."""

from pathlib import Path

import lightning as L
import torch

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule

ACCUMULATED, STEPS, RATE, SEED = 2, 5, 0.5, 3


class Descent(SequenceClassifier):
    """Plain gradient descent without dropout: the weights tell the gradients."""

    def configure_model(self) -> None:
        super().configure_model()
        for module in self.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def configure_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)

    def configure_scheduler(self, optimizer, num_steps):
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def data(padding: str) -> SmartBatchDataModule:
    return SmartBatchDataModule(
        validation_split=0.9, max_length=400, max_tokens_per_batch=1600, padding=padding, seed=SEED
    )


def main(folder: Path, ranks: int, padding: str) -> None:
    torch.set_num_threads(1)
    L.seed_everything(SEED)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        limit_train_batches=STEPS,
        limit_val_batches=0,
        accumulate_grad_batches=ACCUMULATED,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Descent()
    trainer.fit(model, data(padding))
    if trainer.is_global_zero:
        torch.save(model.model.state_dict(), folder / "weights.pt")
