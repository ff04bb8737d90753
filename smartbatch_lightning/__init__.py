"""Smart batching for text classification with PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smartbatch_lightning.batching import BatchPlan, BatchSpec, plan_epoch, register_strategy
    from smartbatch_lightning.callbacks.evaluation_report import EvaluationReport
    from smartbatch_lightning.callbacks.prediction_writer import PredictionWriter
    from smartbatch_lightning.callbacks.training_monitor import TrainingMonitor
    from smartbatch_lightning.cli import SmartBatchCLI
    from smartbatch_lightning.data.collators import PackCollator, PadCollator
    from smartbatch_lightning.data.datamodule import SmartBatchDataModule
    from smartbatch_lightning.data.sampler import SmartBatchSampler
    from smartbatch_lightning.data.stream import StreamDataModule
    from smartbatch_lightning.evaluation.evaluation import Evaluation
    from smartbatch_lightning.models.classifier import SequenceClassifier
    from smartbatch_lightning.report.padding_report import PaddingReport

_LAZY_EXPORTS = {
    "BatchPlan": "batching",
    "BatchSpec": "batching",
    "Evaluation": "evaluation.evaluation",
    "EvaluationReport": "callbacks.evaluation_report",
    "PackCollator": "data.collators",
    "PadCollator": "data.collators",
    "PaddingReport": "report.padding_report",
    "PredictionWriter": "callbacks.prediction_writer",
    "SequenceClassifier": "models.classifier",
    "SmartBatchCLI": "cli",
    "SmartBatchDataModule": "data.datamodule",
    "SmartBatchSampler": "data.sampler",
    "StreamDataModule": "data.stream",
    "TrainingMonitor": "callbacks.training_monitor",
    "plan_epoch": "batching",
    "register_strategy": "batching",
}

__all__ = [
    "BatchPlan",
    "BatchSpec",
    "Evaluation",
    "EvaluationReport",
    "PackCollator",
    "PadCollator",
    "PaddingReport",
    "PredictionWriter",
    "SequenceClassifier",
    "SmartBatchCLI",
    "SmartBatchDataModule",
    "SmartBatchSampler",
    "StreamDataModule",
    "TrainingMonitor",
    "plan_epoch",
    "register_strategy",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that planning batches need not wait for Lightning."""
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY_EXPORTS[name]}"), name)
