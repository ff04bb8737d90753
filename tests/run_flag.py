"""Trains with one of Lightning's callbacks or flags, and writes down what each rank trained."""

from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from run_to_be_killed import Diary

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule, TrainingMonitor

ROWS, BATCH = 200, 8  # of an epoch; on one rank 25 batches


class Case(NamedTuple):
    """What is tried, and what has to come of it.

    Attributes:
        options: Of the Trainer.
        callbacks: Of Lightning.
        batches: By epoch, in batches of one rank out of the 25 or 13 that one or two ranks have; None for all in both.
        refused: Words of the error with which it ends.
        on_two_ranks: There is a meaning on two ranks.
        data: Options of the data module.
    """

    options: dict = {}
    callbacks: tuple = ()
    batches: list[int] | None = None
    refused: str | None = None
    on_two_ranks: bool = True
    data: dict = {}


class Unfreezing(of_lightning.BaseFinetuning):
    """Trains the head, and from the second epoch on the rest."""

    def freeze_before_training(self, pl_module) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class Predictions(of_lightning.BasePredictionWriter):
    """Is there in training too."""


def cases(folder: Path) -> dict[str, Case]:
    """By the name of the callback or flag."""
    c = of_lightning
    not_on_cpu = {"on_two_ranks": False}
    return {
        "BackboneFinetuning": Case(callbacks=(c.BackboneFinetuning(1),), on_two_ranks=False),
        "BaseFinetuning": Case(callbacks=(Unfreezing(),), on_two_ranks=False),
        "BasePredictionWriter": Case(callbacks=(Predictions(),)),
        "BatchSizeFinder": Case(
            callbacks=(c.BatchSizeFinder(max_trials=1, init_val=4),), on_two_ranks=False, data={"batch_size": 4}
        ),
        "DeviceStatsMonitor": Case(callbacks=(c.DeviceStatsMonitor(cpu_stats=True),)),
        "EMAWeightAveraging": Case(callbacks=(c.EMAWeightAveraging(decay=0.9),)),
        "EarlyStopping": Case(callbacks=(c.EarlyStopping("val_loss", patience=0, min_delta=9.0),)),
        "GradientAccumulationScheduler": Case(callbacks=(c.GradientAccumulationScheduler({0: 2, 1: 3}),)),
        "LambdaCallback": Case(callbacks=(c.LambdaCallback(on_train_epoch_end=lambda *_: None),)),
        "LearningRateFinder": Case(callbacks=(c.LearningRateFinder(num_training_steps=5),), on_two_ranks=False),
        "LearningRateMonitor": Case(callbacks=(c.LearningRateMonitor(),)),
        "ModelCheckpoint": Case(callbacks=(c.ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=2),)),
        "ModelPruning": Case(callbacks=(c.ModelPruning("l1_unstructured", amount=0.2),)),
        "ModelSummary": Case(callbacks=(c.ModelSummary(2),)),
        "OnExceptionCheckpoint": Case(callbacks=(c.OnExceptionCheckpoint(folder),)),
        "RichModelSummary": Case(callbacks=(c.RichModelSummary(2),)),
        "RichProgressBar": Case({"enable_progress_bar": True}, (c.RichProgressBar(),)),
        "StochasticWeightAveraging": Case(callbacks=(c.StochasticWeightAveraging(1e-3, 1),)),
        "TQDMProgressBar": Case({"enable_progress_bar": True}, (c.TQDMProgressBar(),)),
        "ThroughputMonitor": Case(callbacks=(c.ThroughputMonitor(lambda batch: len(batch["labels"])),)),
        "Timer": Case(callbacks=(c.Timer(timedelta(hours=1)),)),
        "WeightAveraging": Case(callbacks=(c.WeightAveraging(),)),
        "accelerator": Case({"accelerator": "cpu"}),
        "accumulate_grad_batches": Case({"accumulate_grad_batches": 3}),
        "barebones": Case({"barebones": True, "logger": None, "log_every_n_steps": None}, on_two_ranks=False),
        "benchmark": Case({"benchmark": True}),
        "check_val_every_n_epoch": Case({"check_val_every_n_epoch": 2}),
        "default_root_dir": Case({"default_root_dir": folder / "root"}),
        "detect_anomaly": Case({"detect_anomaly": True}),
        "deterministic": Case({"deterministic": True}),
        "enable_autolog_hparams": Case({"enable_autolog_hparams": False}),
        "enable_checkpointing": Case({"enable_checkpointing": True}),
        "enable_model_summary": Case({"enable_model_summary": True}),
        "enable_progress_bar": Case({"enable_progress_bar": True}),
        "fast_dev_run": Case({"fast_dev_run": 2}, batches=[2]),
        "gradient_clip_algorithm": Case({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}),
        "gradient_clip_val": Case({"gradient_clip_val": 0.5}),
        "inference_mode": Case({"inference_mode": False}),
        "limit_predict_batches": Case({"limit_predict_batches": 1}),
        "limit_test_batches": Case({"limit_test_batches": 1}),
        "limit_train_batches": Case({"limit_train_batches": 5}, batches=[5, 5]),
        "limit_val_batches": Case({"limit_val_batches": 0}),
        "log_every_n_steps": Case({"log_every_n_steps": 3}),
        "logger": Case({"logger": CSVLogger(folder)}),
        "max_epochs": Case({"max_epochs": 1}, batches=[25]),
        "max_steps": Case({"max_steps": 7}, batches=[7]),
        "max_time": Case({"max_time": timedelta(hours=1)}),
        "min_epochs": Case({"min_epochs": 2}),
        "min_steps": Case({"min_steps": 20}),
        "num_nodes": Case({"num_nodes": 1}),
        "num_sanity_val_steps": Case({"num_sanity_val_steps": 2}),
        "overfit_batches": Case({"overfit_batches": 3}, batches=[3, 3]),
        "plugins": Case({"plugins": [LightningEnvironment()]}),
        "precision bf16-mixed": Case({"precision": "bf16-mixed"}),
        "precision bf16-true": Case({"precision": "bf16-true"}),
        "precision 64-true": Case({"precision": "64-true"}),
        "profiler": Case({"profiler": "simple"}),
        "reload_dataloaders_every_n_epochs": Case({"reload_dataloaders_every_n_epochs": 1}),
        "strategy": Case({"strategy": "auto"}, **not_on_cpu),
        "sync_batchnorm": Case({"sync_batchnorm": True}),
        "use_distributed_sampler": Case({"use_distributed_sampler": False}),
        "val_check_interval": Case({"val_check_interval": 4, "check_val_every_n_epoch": None}),
    }


def train(folder: Path, name: str, devices: int) -> L.Trainer:
    """Two epochs of 200 reviews."""
    case = cases(folder)[name]
    L.seed_everything(3)
    if devices > 1:
        torch.set_num_threads(1)
    data = SmartBatchDataModule(**{"validation_split": 0.9, "max_length": 24, "batch_size": BATCH, **case.data})
    plain = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": "ddp" if devices > 1 else "auto",
        "max_epochs": 2,
        "limit_val_batches": 2,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 2,
        "logger": CSVLogger(folder),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(one, of_lightning.Checkpoint) for one in case.callbacks),
        "default_root_dir": folder,
    }
    if case.options.get("barebones"):
        plain = {key: plain[key] for key in ("accelerator", "devices", "max_epochs", "default_root_dir")}
    monitor = [] if case.options.get("barebones") else [TrainingMonitor()]
    callbacks = [*case.callbacks, *monitor, Diary(folder)]
    trainer = L.Trainer(**{**plain, **case.options}, callbacks=callbacks)
    model = SequenceClassifier(learning_rate=1e-3)
    trainer.fit(model, data)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return trainer
