"""Standardizing regression targets by mean and standard deviation, and back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smartbatch_lightning.errors import UsageError

# Fields of a model's configuration, next to `id2label`.
STANDARDIZATION_FIELDS = ("target_mean", "target_std")


@dataclass(frozen=True)
class Standardization:
    """Standardization of targets: `(target - mean) / std`.

    Attributes:
        mean: Mean of each target, in the original units.
        std: Standard deviation of each target, with the number of samples as divisor.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_targets(cls, targets: NDArray[np.float64], names: Sequence[str]) -> "Standardization":
        """Computes mean and standard deviation of targets, (num_samples, num_targets), with these names.

        Raises:
            ValueError: All values of a target are equal.
        """
        means, deviations = [], []
        for name, values in zip(names, targets.T, strict=True):
            # summed exactly, so that the data's fingerprint, which includes labels, is the same on every machine
            mean = math.fsum(values) / len(values)
            std = math.sqrt(math.fsum((values - mean) ** 2) / len(values))
            if std == 0 or values.min() == values.max():
                raise UsageError(
                    f"the target {name!r} is {values[0]} in every training sample, so it cannot be standardized. Leave "
                    "it out of --data.label_column, or set --data.standardize_targets=false."
                )
            means.append(mean)
            deviations.append(std)
        return cls(tuple(means), tuple(deviations))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Standardization | None":
        """Reads the standardization from a model's configuration; None if its outputs are in the original units."""
        mean, std = (fields.get(name) for name in STANDARDIZATION_FIELDS)
        return None if mean is None or std is None else cls(tuple(mean), tuple(std))

    @property
    def fields(self) -> dict[str, Any]:
        """Configuration fields read by `from_fields`."""
        return dict(zip(STANDARDIZATION_FIELDS, (list(self.mean), list(self.std)), strict=True))

    def standardize(self, targets: NDArray[np.float64]) -> NDArray[np.float64]:
        """Targets, (..., num_targets), in standard deviations from the mean."""
        return np.asarray((targets - np.array(self.mean)) / np.array(self.std))

    def restore(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Standardized values, (num_samples,) or (num_samples, num_targets), in the original units."""
        return np.asarray(np.asarray(values, np.float64) * np.array(self.std) + np.array(self.mean))

    def restore_tensor(self, values: Tensor) -> Tensor:
        """Like `restore`, in float64 if possible: float32 would round 1,000,000.3 to 1,000,000.3125."""
        mean, std = (torch.tensor(each, dtype=_widest_float(), device=values.device) for each in (self.mean, self.std))
        return values.to(mean.dtype) * std + mean


def _widest_float() -> torch.dtype:
    """The float type with the most digits that all devices of this machine support."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64
