"""Tests of what watches a run."""

import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import slow, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import BertConfig

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule, TrainingMonitor, demo
from smartbatch_lightning.callbacks import training_monitor
from smartbatch_lightning.models.flops import training_flops

TRAINED = demo.REVIEWS["train"] // 10
STEPS = -(-TRAINED // 16)
LIVE = ["real_tokens_per_second", "padding_ratio", "peak_memory_gib", "data_wait"]


def data(**options) -> SmartBatchDataModule:
    return SmartBatchDataModule(**{"validation_split": 0.9, "max_length": 24, "seed": 1, **options})


def watched(folder: Path, module: SmartBatchDataModule, **options) -> tuple[TrainingMonitor, pd.DataFrame]:
    monitor = TrainingMonitor()
    logger = CSVLogger(folder)
    options = {"log_every_n_steps": 4, "max_epochs": 2, "limit_val_batches": 2, **options}
    run = trainer(folder, callbacks=[monitor], logger=logger, **options)
    run.fit(SequenceClassifier(), module)
    return monitor, pd.read_csv(Path(logger.log_dir) / "metrics.csv")


@pytest.mark.parametrize("padding", [slow("longest"), slow("max_length"), "packed"])
def test_what_was_trained_is_counted_and_logged_live_and_by_epoch(padding: str, tmp_path: Path) -> None:
    module = data(padding=padding)
    monitor, logged = watched(tmp_path, module)
    real = int(module.train_data.lengths.sum())
    assert [counts.samples for counts, _ in monitor.epochs] == [TRAINED, TRAINED]
    assert monitor.total.real_tokens == 2 * real
    assert monitor.total.sum_squared_lengths == 2 * int((module.train_data.lengths**2).sum())
    ratio = {"packed": 0.0, "max_length": TRAINED * 24 / real - 1}.get(padding)
    epochs = logged.dropna(subset="train_padding_ratio")
    assert len(epochs) == 2
    assert (epochs["train_real_tokens_per_second"] > 0).all()
    assert (epochs["train_seconds"] > 0).all()
    if ratio is not None:
        assert epochs["train_padding_ratio"].tolist() == pytest.approx([ratio, ratio])
    else:
        assert 0 < epochs["train_padding_ratio"].max() < 0.1
    live = logged.dropna(subset="throughput/real_tokens_per_second")
    assert live["step"].tolist() == [3, 7, 11, 15, 19, 23]
    for name in LIVE:
        assert live[f"throughput/{name}"].notna().all()
    assert live["throughput/data_wait"].between(0, 1).all()


def test_the_progress_bar_shows_the_loss_that_was_logged_last(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, logger=logger, log_every_n_steps=3, max_steps=4, limit_val_batches=0)
    run.fit(SequenceClassifier(), data())
    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv")["train_loss_step"].dropna()
    assert run.progress_bar_metrics["train_loss_step"] == pytest.approx(logged.item())


def test_the_end_of_fit_prints_a_row_for_each_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched(tmp_path, data())
    printed = capsys.readouterr().out
    assert re.search(r"Training on (1 CPU thread|\d+ CPU threads)\n", printed)
    assert "accuracy" in printed
    assert max(map(len, printed.splitlines()[1:-1])) <= 80
    assert re.search(r"^0 +200 +0\.\d{4} .* 0:00:\d\d +[\d,]+ +\d+\.\d\d% *$", printed, re.MULTILINE)
    assert re.search(r"^all +400 ", printed, re.MULTILINE)
    assert re.search(r"Tokens computed: [\d,]+\. Padding everything to 24 takes 9,600: \d+\.\d% saved\.", printed)


def test_the_table_of_a_resumed_run_has_the_epochs_before(tmp_path: Path) -> None:
    first, second = TrainingMonitor(), TrainingMonitor()
    run = trainer(tmp_path, callbacks=[first], limit_val_batches=1)
    run.fit(SequenceClassifier(), data())
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = trainer(tmp_path, callbacks=[second], max_epochs=3, limit_val_batches=1)
    again.fit(SequenceClassifier(), data(), ckpt_path=tmp_path / "one.ckpt")
    assert [counts.samples for counts, _ in second.epochs] == [TRAINED] * 3
    assert second.epochs[0][0] == first.epochs[0][0]
    assert all({"train_loss", "val_loss"} <= metrics.keys() for _, metrics in second.epochs)


@pytest.mark.parametrize(
    "saved",
    [
        slow({"every_n_train_steps": 5}),
        {"every_n_train_steps": STEPS},
        slow({"every_n_epochs": 1}),
        slow({"every_n_epochs": 1, "monitor": "val_loss"}),
        slow({"every_n_epochs": 1, "monitor": "val_loss", "accumulated": 3}),
        slow({"every_n_train_steps": STEPS, "accumulated": 1}),
    ],
    ids=[
        "in the middle",
        "at the last step",
        "at the end of an epoch",
        "after validation",
        "in an accumulation",
        "one step after validation",
    ],
)
def test_a_run_that_is_resumed_anywhere_tells_of_whole_epochs(saved: dict, tmp_path: Path) -> None:
    def epochs(name: str, checkpoint: Path | None = None) -> list[tuple[Any, ...]]:
        how = dict(saved)
        options = {"max_epochs": 3, "limit_val_batches": 1, "enable_checkpointing": True}
        if accumulated := how.pop("accumulated", None):
            options |= {
                "accumulate_grad_batches": accumulated,
                "val_check_interval": 4,
                "check_val_every_n_epoch": None,
            }
        monitor, saver = TrainingMonitor(), ModelCheckpoint(tmp_path / name, save_top_k=-1, **how)
        run = trainer(tmp_path, callbacks=[monitor, saver], **options)
        run.fit(SequenceClassifier(), data(), ckpt_path=checkpoint)
        return [
            (epoch.samples, epoch.tokens, epoch.real_tokens, epoch.sum_squared_lengths, metrics["val_loss"])
            for epoch, metrics in monitor.epochs
        ]

    whole = epochs("whole")
    assert [samples for samples, *_ in whole] == [TRAINED] * 3
    for checkpoint in sorted((tmp_path / "whole").iterdir()):
        assert epochs(f"after {checkpoint.stem}", checkpoint) == whole, checkpoint.name


def test_the_wait_for_data_is_never_negative_when_the_loader_is_made_again(tmp_path: Path) -> None:
    _, logged = watched(tmp_path, data(), max_epochs=3, reload_dataloaders_every_n_epochs=1, log_every_n_steps=1)
    waited = logged["throughput/data_wait"].dropna()
    assert len(waited) == 3 * STEPS
    assert waited.between(0, 1).all()


@pytest.mark.slow
def test_validation_is_not_counted_as_training_time(tmp_path: Path) -> None:
    class Slow(SequenceClassifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0) -> None:
            time.sleep(0.5)

    class Clock(Callback):
        def on_train_start(self, *args) -> None:
            self.start = time.perf_counter()

        def on_train_end(self, *args) -> None:
            self.seconds = time.perf_counter() - self.start

    clock, monitor = Clock(), TrainingMonitor()
    run = trainer(tmp_path, callbacks=[clock, monitor], limit_train_batches=2, limit_val_batches=4)
    run.fit(Slow(), data())
    assert 0 < monitor.total.seconds < clock.seconds - 4 * 0.5


def test_batches_of_another_kind_are_trained_without_being_counted(tmp_path: Path) -> None:
    class Bare(SmartBatchDataModule):
        def configure_collator(self):
            collator = super().configure_collator()
            return lambda rows: {name: value for name, value in collator(rows).items() if name != "attention_mask"}

    monitor = TrainingMonitor()
    run = trainer(tmp_path, callbacks=[monitor], limit_train_batches=2, limit_val_batches=0)
    run.fit(SequenceClassifier(), Bare(max_length=24))
    assert monitor.total.samples == 0


def test_the_operations_of_training_are_those_of_the_matrix_products() -> None:
    model = SequenceClassifier()
    model.configure_model()
    config = model.model.config
    _, per_token, per_square = training_flops(model.model.config)
    layers = [module for module in model.model.base_model.encoder.modules() if isinstance(module, torch.nn.Linear)]
    assert per_token == pytest.approx(6 * sum(layer.weight.numel() for layer in layers), rel=0.01)
    assert per_square == pytest.approx(12 * config.num_hidden_layers * config.hidden_size, rel=0.01)


@pytest.mark.parametrize(("options", "logged"), [({"freeze_embeddings": True}, True), ({"freeze_layers": 1}, False)])
def test_utilization_is_logged_only_where_all_layers_are_trained(
    options: dict[str, Any], logged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_monitor, "peak_flops", lambda device, precision: 1e15)  # as of a GPU
    logger = CSVLogger(tmp_path)
    run = trainer(
        tmp_path, callbacks=[TrainingMonitor()], logger=logger, log_every_n_steps=1, max_steps=1, limit_val_batches=0
    )
    run.fit(SequenceClassifier(**options), SmartBatchDataModule(max_length=24))
    assert ("throughput/model_flops_utilization" in Path(logger.log_dir, "metrics.csv").read_text()) == logged


def test_the_last_layers_operations_on_tokens_that_no_head_reads_are_not_counted() -> None:
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=99
    )
    (_, token, square), (_, spared_token, spared_square) = (
        training_flops(config, one_token=one) for one in (False, True)
    )
    query, output, up, down = 64 * 64, 64 * 64, 64 * 128, 128 * 64
    attended = 2 * 2 * 64  # scores and sums of one query with one key, all heads
    assert token - spared_token == 6 * (query + output + up + down) - 3 * attended
    assert (square, spared_square) == (2 * 3 * attended, 3 * attended)
