"""Loss and metrics of each stage and data set, updated with many batches at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from smartbatch_lightning.contract import name_of_set
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.tasks import Task

Stage = Literal["train", "val", "test"]

_MAX_PENDING = 1000  # batches
_MAX_PENDING_LOGITS = 2**20


@contextmanager
def summed_in_float32() -> Iterator[None]:
    """A context in which metrics are created to sum in at least float32, even with `bf16-true` and `16-true`.

    With these precisions, Lightning makes half precision torch's default, which a new metric adopts permanently.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(default, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class _MeanLoss(MeanMetric):
    """A mean without checks for NaN, which wait for the GPU; without them, torchmetrics' own (1.9) ignores weights."""

    def update(self, value: Tensor, weight: Tensor | int) -> None:  # type: ignore[override]
        self.mean_value += value * weight
        self.weight += weight


class StageMetrics(nn.Module):
    """Mean loss and metrics of one pass over a data set.

    Args:
        metrics: Metrics of the task's scores and labels.
        task: The task, which converts logits and labels for the metrics.

    Raises:
        ValueError: A metric is named `loss`.
    """

    def __init__(self, metrics: MetricCollection, task: Task) -> None:
        super().__init__()
        if "loss" in metrics:
            raise UsageError("configure_metrics returns a metric named 'loss', the name of the mean loss. Rename it.")
        self.loss = _MeanLoss()
        self.metrics = metrics
        self._task = task
        self._pending: list[tuple[Tensor, Tensor]] = []

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            loss: Weighted mean loss over its samples, a scalar.
            logits: (batch, num_labels).
            labels: (batch, ...).
        """
        weights = self._task.sample_weights(labels)
        self.loss.update(loss.detach(), len(labels) if weights is None else weights.sum())
        self._pending.append((logits.detach(), labels))
        pending = len(self._pending)
        if pending >= _MAX_PENDING or pending * logits.numel() >= _MAX_PENDING_LOGITS:
            self._flush()

    def computable(self) -> dict[str, Metric]:
        """The loss and every metric that has been updated, by name."""
        self._flush()
        counted: dict[str, Metric] = {"loss": self.loss, **dict(self.metrics.items())}
        return {name: metric for name, metric in counted.items() if metric.update_called}

    def _flush(self) -> None:
        """Updates the metrics with many batches at once, since most of them wait for the GPU."""
        if self._pending:
            logits, labels = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
            self._pending.clear()
            scores = self._task.scores(logits)
            if scores.dtype == torch.float64:  # used by regressions, since float32 has too few digits for large targets
                self.metrics.set_dtype(scores.dtype)
            self.metrics.update(scores, self._task.metric_labels(labels))


class EpochMetrics(nn.ModuleDict):
    """Metrics of an epoch, by stage and index of the data set."""

    def for_data_set(self, stage: Stage, dataloader_idx: int, make: Callable[[], StageMetrics]) -> StageMetrics:
        """The metrics of a data set, created for its first batch."""
        key = f"{stage}_{dataloader_idx}"
        if key not in self:
            self[key] = make()
        found = self[key]
        assert isinstance(found, StageMetrics)
        return found

    def start(self, stage: Stage) -> None:
        """Discards the metrics of the previous pass, whether it finished or not."""
        for key in self._keys_of(stage):
            del self[key]

    def log(self, module: L.LightningModule, stage: Stage) -> None:
        """Logs the metrics of a stage; doing so in each step would cost 1.4 ms.

        Args:
            module: The module to log with.
            stage: The stage; if it has several data sets, metrics are named after them.
        """
        paths = {id(part): path for path, part in module.named_modules()}
        keys = self._keys_of(stage)
        for number, key in enumerate(keys):
            suffix = "" if len(keys) == 1 else f"/{name_of_set(module._trainer, stage, number)}"
            metrics = self[key]
            assert isinstance(metrics, StageMetrics)
            for name, metric in metrics.computable().items():
                # Lightning looks for metrics only once, and some have been created since
                module.log(
                    f"{stage}_{name}{suffix}", metric, metric_attribute=paths[id(metric)], add_dataloader_idx=False
                )

    def _keys_of(self, stage: Stage) -> list[str]:
        return [key for key in self if key.startswith(f"{stage}_")]
