"""The command line: fit, validate, test and predict, by flags and YAML."""

import warnings
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from smartbatch_lightning.callbacks import PaddingSummary, PredictionWriter
from smartbatch_lightning.data import SmartBatchDataModule
from smartbatch_lightning.model import SequenceClassifier


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
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            **options,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks of every run and the default classes."""
        parser.add_lightning_class_args(PaddingSummary, "padding_summary")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.set_defaults({"model": {"class_path": "smartbatch_lightning.SequenceClassifier"}})
        parser.set_defaults({"data": {"class_path": "smartbatch_lightning.SmartBatchDataModule"}})

    def before_instantiate_classes(self) -> None:
        """Takes the model's tokenizer where none is given.

        `link_arguments` would silently ignore a tokenizer that is given.
        """
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        model, data = config.model.init_args, config.data.init_args
        if "tokenizer" in data and data.tokenizer is None:
            data.tokenizer = model.get("pretrained")


def main() -> None:
    """Entry point of `smartbatch` and `train.py`."""
    # what a user cannot act on: batches are collated in microseconds, so that workers gain nothing; our sampler does
    # return every sample for prediction; and whoever sets no validation data knows
    for message in ("does not have many workers", "using a custom batch sampler", "Total length of `list`"):
        warnings.filterwarnings("ignore", message=f".*{message}")
    SmartBatchCLI()
