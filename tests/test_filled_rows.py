"""Tests of training on packed rows that padding samples fill up to the token budget, so that all have one shape."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import slow, trainer
from lightning.pytorch.callbacks import Callback

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule, TrainingMonitor

BUDGET = 64
NAMES = ["dull", "slow", "fine"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Films(SmartBatchDataModule):
    """Reviews of 1 to 20 words."""

    several = False

    def load_dataset(self) -> DatasetDict:
        random = np.random.default_rng(0)
        labels = random.integers(0, 8, 40)
        names = [[name for bit, name in enumerate(NAMES) if label >> bit & 1] for label in labels]
        texts = [" ".join(random.choice(["a", "film", *NAMES], random.integers(1, 20))) for _ in labels]
        rows = {"text": texts, "label": names if self.several else [NAMES[label % 3] for label in labels]}
        return DatasetDict({split: Dataset.from_dict(rows) for split in ("train", "test")})


class SeveralLabels(Films):
    several = True


class Recorder(Callback):
    """Keeps the loss of each batch and the gradient of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[torch.Tensor] = []
        self.shapes: set[tuple[Any, ...]] = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.shapes.add((batch["input_ids"].shape[1], len(batch["cu_seq_lens_q"]), batch["max_length_q"]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Films, {"class_weights": {"fine": 3.0}}),
        slow(SeveralLabels, {"pos_weight": 2.0}),
    ],
)
def test_filled_rows_train_as_others_do(kind: type[Films], options: dict[str, Any], base: str, tmp_path: Path) -> None:
    runs = []
    for multiple in (1, BUDGET):
        data = kind(
            "films",
            base,
            validation_split="test",
            batching="random",
            padding="packed",
            max_tokens_per_batch=BUDGET,
            pad_to_multiple_of=multiple,
            max_length=16,
            seed=0,
        )
        module = SequenceClassifier(
            base, optimizer=partial(torch.optim.SGD, lr=0.1), model_kwargs=NO_DROPOUT, **options
        )
        recorder, monitor = Recorder(), TrainingMonitor()
        run = trainer(tmp_path, callbacks=[recorder, monitor], accumulate_grad_batches=2)
        torch.manual_seed(0)
        run.fit(module, data)
        kept = {name: float(value) for name, value in run.callback_metrics.items() if "loss" in name or "f1" in name}
        runs.append((recorder, kept, monitor.total))
    (plain, metrics, counted), (filled, filled_metrics, filled_counted) = runs
    assert len(plain.shapes) > 1
    assert filled.shapes == {(BUDGET, 33, 16)}
    assert len(plain.losses) == len(filled.losses) > 5
    assert filled.losses == pytest.approx(plain.losses, abs=1e-6)
    for gradient, expected in zip(filled.gradients, plain.gradients, strict=True):
        assert (gradient - expected).norm() < 1e-6 * expected.norm()
    assert len(metrics) >= 4
    assert filled_metrics == pytest.approx(metrics, abs=1e-6)
    for name in ("samples", "real_tokens", "sum_squared_lengths"):
        assert getattr(filled_counted, name) == getattr(counted, name)
    assert counted.tokens == counted.real_tokens
    assert filled_counted.tokens == BUDGET * len(filled.losses)
