"""Trains the demo with weights of classes and keeps the gradient and the rows of each step: started by the tests."""

from itertools import product
from pathlib import Path

import lightning as L
import torch
from helpers import trainer as quiet_trainer
from lightning.pytorch.callbacks import Callback

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule

SEED, STEPS = 3, 2
CLASS_WEIGHTS = {"negative": 0.25, "positive": 3.0}
SETTINGS = list(product((1, 3), (None, 256), ("longest", "packed")))  # accumulation, token budget, padding
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Steps(Callback):
    """Rows of each optimizer step of this rank, and the gradient."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = [[]]
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.rows[-1] += batch["index"].tolist()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = pl_module.model.named_parameters()
        self.gradients.append({name: value.grad.clone() for name, value in named if value.grad is not None})
        self.rows.append([])


class Still(SequenceClassifier):
    """Its weights stay as they are, so that every step's gradient is of the same."""

    def configure_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def model() -> SequenceClassifier:
    L.seed_everything(SEED)
    return Still(class_weights=CLASS_WEIGHTS, model_kwargs=NO_DROPOUT)


def data(budget: int | None, padding: str) -> SmartBatchDataModule:
    options = {"batch_size": 5} if budget is None else {"max_tokens_per_batch": budget}
    return SmartBatchDataModule(validation_split=0.9, max_length=64, padding=padding, seed=SEED, **options)


def main(folder: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    for number, (accumulated, budget, padding) in enumerate(SETTINGS):
        steps = Steps()
        trainer = quiet_trainer(
            folder,
            callbacks=[steps],
            devices=ranks,
            strategy="ddp" if ranks > 1 else "auto",
            max_steps=STEPS,
            limit_val_batches=0,
            accumulate_grad_batches=accumulated,
            precision="64-true",  # in 32 bits the order of sums alone makes 1e-6
        )
        trainer.fit(model(), data(budget, padding))
        kept = {"rows": steps.rows[:STEPS], "gradients": steps.gradients}
        torch.save(kept, folder / f"{number}-{trainer.global_rank}.pt")
