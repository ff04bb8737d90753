"""Smart batching for text classification with PyTorch Lightning."""

from smartbatch_lightning.callbacks import PaddingSummary, PredictionWriter
from smartbatch_lightning.cli import SmartBatchCLI
from smartbatch_lightning.collate import PadCollator
from smartbatch_lightning.data import SmartBatchDataModule
from smartbatch_lightning.model import SequenceClassifier
from smartbatch_lightning.planning import BatchPlan, plan_epoch
from smartbatch_lightning.sampler import SmartBatchSampler

__all__ = [
    "BatchPlan",
    "PadCollator",
    "PaddingSummary",
    "PredictionWriter",
    "SequenceClassifier",
    "SmartBatchCLI",
    "SmartBatchDataModule",
    "SmartBatchSampler",
    "plan_epoch",
]
