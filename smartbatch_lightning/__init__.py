"""Smart batching for text classification with PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smartbatch_lightning.cli import SmartBatchCLI
    from smartbatch_lightning.collate import PackCollator, PadCollator
    from smartbatch_lightning.data import SmartBatchDataModule
    from smartbatch_lightning.model import SequenceClassifier
    from smartbatch_lightning.monitor import TrainingMonitor
    from smartbatch_lightning.planning import BatchPlan, plan_epoch
    from smartbatch_lightning.predictions import PredictionWriter
    from smartbatch_lightning.report import PaddingReport
    from smartbatch_lightning.sampler import SmartBatchSampler

_HOMES = {
    "BatchPlan": "planning",
    "PackCollator": "collate",
    "PadCollator": "collate",
    "PaddingReport": "report",
    "PredictionWriter": "predictions",
    "SequenceClassifier": "model",
    "SmartBatchCLI": "cli",
    "SmartBatchDataModule": "data",
    "SmartBatchSampler": "sampler",
    "TrainingMonitor": "monitor",
    "plan_epoch": "planning",
}

__all__ = [
    "BatchPlan",
    "PackCollator",
    "PadCollator",
    "PaddingReport",
    "PredictionWriter",
    "SequenceClassifier",
    "SmartBatchCLI",
    "SmartBatchDataModule",
    "SmartBatchSampler",
    "TrainingMonitor",
    "plan_epoch",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: whoever wants a plan need not wait for Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
