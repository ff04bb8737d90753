"""Calibration of probabilities, and the temperature that improves it.

Expected calibration error as in Naeini et al. (2015), temperature scaling as in Guo et al. (2017).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_calibration_error

_BINS = 15
_MAX_TEMPERATURE = 100.0  # maximum temperature, at which all probabilities are nearly equal


@dataclass(frozen=True)
class CalibrationBin:
    """Predictions of about the same probability.

    Attributes:
        probability: Mean predicted probability.
        observed: Observed frequency: the share of these predictions that came true.
        count: Number of predictions.
    """

    probability: float
    observed: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """Calibration of predicted probabilities.

    Attributes:
        expected_calibration_error: Mean gap between `probability` and `observed`, weighted by `count`.
        log_loss: Mean negative logarithm of the probability of the true label, over samples and labels.
        bins: Non-empty bins, by probability.
    """

    expected_calibration_error: float
    log_loss: float
    bins: list[CalibrationBin]


@dataclass(frozen=True)
class Logits:
    """Logits recovered from probabilities, to be divided by a temperature.

    Attributes:
        values: (num_samples, num_labels), float64.
        labels: Class number of each sample, (num_samples,); for multi-label 0 and 1, (num_samples, num_labels).
    """

    values: Tensor
    labels: Tensor

    @classmethod
    def from_probabilities(cls, probabilities: NDArray[Any], labels: NDArray[Any]) -> "Logits":
        """Logarithms of class probabilities; for multi-label, log odds."""
        given = torch.from_numpy(np.asarray(probabilities, np.float64))
        tiny = torch.finfo(torch.float32).tiny  # smaller ones are 0 in float32
        if labels.ndim == 1:
            return cls(given.clamp_min(tiny).log(), torch.from_numpy(np.asarray(labels, np.int64)))
        return cls(torch.logit(given, torch.finfo(torch.float32).eps), torch.from_numpy(np.asarray(labels, np.float64)))

    def loss(self, temperature: Tensor | float = 1.0, reduction: str = "mean") -> Tensor:
        """Cross-entropy; for multi-label, binary cross-entropy."""
        scaled = self.values / temperature
        if self.labels.ndim == 1:
            return F.cross_entropy(scaled, self.labels, reduction=reduction)
        return F.binary_cross_entropy_with_logits(scaled, self.labels, reduction=reduction)

    def all_correct(self) -> bool:
        """Whether all predictions are correct, so that the loss keeps falling with the temperature."""
        if self.labels.ndim == 1:
            others = self.values.scatter(1, self.labels[:, None], -torch.inf).amax(1)
            return bool((self.values.gather(1, self.labels[:, None])[:, 0] > others).all())
        return bool(((self.values > 0) == (self.labels > 0)).all())

    def calibration(self, temperature: float = 1.0) -> Calibration:
        """Calibration of the likeliest class's probability; for multi-label, of every label's."""
        scaled = self.values / temperature
        if self.labels.ndim == 1:
            probabilities, likeliest = scaled.softmax(1).max(1)
            came_true = likeliest == self.labels
        else:
            probabilities, came_true = scaled.sigmoid().flatten(), self.labels.flatten() > 0
        # torchmetrics (1.9) has a separate bin for probabilities of exactly 1
        probabilities = probabilities.clamp(max=float(np.nextafter(1, 0)))
        edges = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64).numpy()
        values, truth = probabilities.numpy(), came_true.numpy()
        counts, sums, trues = (
            np.histogram(values, edges, weights=weights)[0] for weights in (None, values, truth.astype(np.float64))
        )
        bins = [
            CalibrationBin(float(sums[one] / counts[one]), float(trues[one] / counts[one]), int(counts[one]))
            for one in np.flatnonzero(counts)
        ]
        error = binary_calibration_error(probabilities, came_true.long(), _BINS, validate_args=False)
        return Calibration(float(error), float(self.loss(temperature)), bins)


def fit_temperature(loss: Callable[[Tensor], Tensor]) -> float | None:
    """The temperature with the lowest loss; None if there is none up to 100.

    Args:
        loss: Returns the loss at a temperature, a scalar.
    """
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(log_temperature.exp())
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    temperature = float(log_temperature.detach().exp())
    return temperature if 1 / _MAX_TEMPERATURE < temperature < _MAX_TEMPERATURE else None
