"""Loss and metrics of a stage over one data set, counted many batches at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.tasks import Task

_MAX_PENDING = 1000  # batches
_MAX_PENDING_LOGITS = 2**20


@contextmanager
def summed_in_float32() -> Iterator[None]:
    """Within it metrics are built to sum in float32 at least, also under Lightning's `bf16-true` and `16-true`.

    Lightning makes half precision torch's default there, which a metric takes over as it is built, for good.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(default, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class _MeanLoss(MeanMetric):
    """A mean without checks for NaN, which wait for the GPU, and without which torchmetrics (1.9) ignores weights."""

    def update(self, value: Tensor, weight: Tensor) -> None:  # type: ignore[override]
        self.mean_value += value * weight
        self.weight += weight


class StageMetrics(nn.Module):
    """Mean loss and metrics of one pass.

    Args:
        metrics: Of what the task makes of logits and labels.
        task: That does.

    Raises:
        ValueError: A metric is named `loss`.
    """

    def __init__(self, metrics: MetricCollection, task: Task) -> None:
        super().__init__()
        if "loss" in metrics:
            raise UsageError("configure_metrics gives a metric the name 'loss', which the mean loss has. Rename it.")
        self.loss = _MeanLoss()
        self.metrics = metrics
        self._task = task
        self._pending: list[tuple[Tensor, Tensor]] = []

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch.

        Args:
            loss: Mean over its samples by their weights, a scalar.
            logits: (batch, num_labels).
            labels: (batch, ...).
        """
        weights = self._task.sample_weights(labels)
        self.loss.update(loss.detach(), torch.tensor(len(labels)) if weights is None else weights.sum())
        self._pending.append((logits.detach(), labels))
        pending = len(self._pending)
        if pending >= _MAX_PENDING or pending * logits.numel() >= _MAX_PENDING_LOGITS:
            self._flush()

    def computable(self) -> dict[str, Metric]:
        """The loss and every metric that has seen a sample, by name."""
        self._flush()
        counted: dict[str, Metric] = {"loss": self.loss, **dict(self.metrics.items())}
        return {name: metric for name, metric in counted.items() if metric.update_called}

    def _flush(self) -> None:
        """Updates the metrics with many batches at once, since most of them wait for the GPU."""
        if self._pending:
            logits, labels = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
            self._pending.clear()
            scores = self._task.scores(logits)
            if scores.dtype == torch.float64:  # as which a regression gives large targets, for the digits of float64
                self.metrics.set_dtype(scores.dtype)
            self.metrics.update(scores, self._task.metric_labels(labels))
