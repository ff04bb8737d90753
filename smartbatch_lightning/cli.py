"""The command line: prepare, fit, validate, test and predict, by flags and YAML."""

import sys
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from smartbatch_lightning.cluster import CheckpointFolders
from smartbatch_lightning.data import SmartBatchDataModule
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.model import SequenceClassifier
from smartbatch_lightning.monitor import TrainingMonitor
from smartbatch_lightning.predictions import PredictionWriter


class SmartBatchTrainer(L.Trainer):
    """Lightning's Trainer with what the command line can do besides; nothing else needs it."""

    def prepare(self, model: L.LightningModule, datamodule: L.LightningDataModule) -> None:
        """Loads and tokenizes the data, for every later start to find. Run it before the GPUs are taken."""
        datamodule.trainer = self
        self.strategy.connect(model)  # whose tokenizer the data module takes
        datamodule.prepare_data()


class SmartBatchCLI(LightningCLI):
    """`LightningCLI` with this package's classes, or subclasses of them by `class_path`.

    The tokenizer is the model's and the classes are the data's, so neither is stated twice. Gradients are clipped at
    1.0 and everything is seeded with 321, as in the *Smart Batching Tutorial*.

    Args:
        args: Arguments instead of those of the command line.
        options: Everything else that `LightningCLI` takes.
    """

    def __init__(self, args: ArgsType = None, **options: Any) -> None:
        options = {
            "seed_everything_default": 321,
            "save_config_kwargs": {"overwrite": True},
            "auto_configure_optimizers": False,  # make_optimizer and make_scheduler are there for that
            "parser_kwargs": {"description": "Fine-tune BERT and its kin on text classification."},
            "trainer_defaults": {
                "max_epochs": 2,
                "gradient_clip_val": 1.0,
                "plugins": {"class_path": "smartbatch_lightning.cluster.AtomicCheckpointIO"},
            },
            **options,
        }
        super().__init__(
            SequenceClassifier,
            SmartBatchDataModule,
            trainer_class=SmartBatchTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            **options,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and `prepare`."""
        return {**LightningCLI.subcommands(), "prepare": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks of every run and the default classes."""
        parser.add_lightning_class_args(TrainingMonitor, "monitor")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(CheckpointFolders, "checkpoint_folders")
        parser.set_defaults({"model": {"class_path": "smartbatch_lightning.SequenceClassifier"}})
        parser.set_defaults({"data": {"class_path": "smartbatch_lightning.SmartBatchDataModule"}})

    def before_fit(self) -> None:
        """Says so where the run is the demo."""
        if self.datamodule.is_demo:
            rank_zero_info(
                "This is the embedded demo: made-up reviews and a small untrained BERT. How well it does says nothing "
                "about real texts."
            )

    def after_fit(self) -> None:
        """Names the command for the real thing after the demo."""
        if self.datamodule.is_demo:
            rank_zero_info(
                "That was the embedded demo. The real thing: smartbatch fit --model.pretrained=bert-base-uncased "
                "--data.dataset=stanfordnlp/imdb (or your own CSV, JSON lines or Parquet file)"
            )


# What a user cannot act on.
_IGNORED_WARNINGS = (
    "does not have many workers",  # batches are collated in microseconds: workers gain nothing
    "using a custom batch sampler",  # ours does return every sample for prediction
    "Total length of `list` across ranks is zero",  # whoever sets no validation data knows
    "The dirpath has changed from",  # testing and predicting have folders of their own
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own affair
)


def main() -> None:
    """Entry point of `smartbatch` and `train.py`."""
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    sys.path.insert(0, "")  # classes of the folder it is called in, by class_path, as `python -m` finds them
    try:
        SmartBatchCLI()
    except UsageError as error:
        sys.exit(f"error: {error}")
