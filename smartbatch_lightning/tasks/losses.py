"""Losses: the user's options, and the losses of classification tasks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from smartbatch_lightning.errors import QUOTE_NAMES, UsageError, join_quoted

Weights = Literal["balanced"] | Mapping[Any, float] | None


@dataclass(frozen=True)
class LossOptions:
    """Options of the loss.

    Attributes:
        class_weights: Weight of each class, by name; classes not named have weight 1. `balanced` uses scikit-learn's
            weights: `num_samples / (num_classes * samples of the class)`. For single-label tasks.
        pos_weight: Weight of having a label relative to not having it, by name or one number for all, as in
            `torch.nn.BCEWithLogitsLoss`; `balanced` is the number of samples without the label over the number with
            it. For multi-label tasks.
        label_smoothing: Probability mass, from 0 to 1, that is moved from each label to all classes, evenly (Szegedy et
            al., *Rethinking the Inception Architecture*, 2016).
        focal_gamma: Exponent of the focal loss, which gives well-classified samples less weight (Lin et al., *Focal
            Loss for Dense Object Detection*, 2017); 0 for the plain loss.

    Raises:
        ValueError: A number is out of range.
    """

    class_weights: Weights = None
    pos_weight: Weights | float = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing is {self.label_smoothing}; give a number of 0 or more and below 1.")
        if not 0 <= self.focal_gamma < math.inf:
            raise UsageError(f"focal_gamma is {self.focal_gamma}; give a number that is 0 or more, such as 2.")
        for argument, weights in (("class_weights", self.class_weights), ("pos_weight", self.pos_weight)):
            if weights not in (None, "balanced"):
                _check_weights(argument, weights)

    @property
    def to_balance(self) -> list[str]:
        """Names of the options to compute from the training labels."""
        return [name for name in ("class_weights", "pos_weight") if getattr(self, name) == "balanced"]

    def balanced(self, counts: Mapping[str, int], num_samples: int) -> "LossOptions":
        """The options with numbers instead of `balanced`; a label without training samples gets weight 1.

        Args:
            counts: Number of training samples with each label.
            num_samples: Number of training samples.
        """
        found = {name: count for name, count in counts.items() if count}
        options = self
        if self.class_weights == "balanced":
            weights = {name: num_samples / (len(found) * count) for name, count in found.items()}
            options = replace(options, class_weights=weights)
        if self.pos_weight == "balanced":
            weights = {name: (num_samples - count) / count for name, count in found.items() if count < num_samples}
            options = replace(options, pos_weight=weights)
        return options

    def check_supported(self, problem_type: str, *taken: str) -> None:
        """Rejects options that a task does not support.

        Raises:
            ValueError: One is given.
        """
        given = [name for name, value in vars(self).items() if value not in (None, 0.0) and name not in taken]
        if given:
            raise UsageError(
                f"{given[0]} is given, which the loss of {problem_type} does not support. Leave it out, or set "
                "--data.problem_type."
            )


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy, averaged over samples weighted by class.

    Attributes:
        weights: Class weights in the order of the logits; None if all are equal.
        label_smoothing: As in `LossOptions`.
        focal_gamma: As in `LossOptions`.
    """

    weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    @classmethod
    def from_options(cls, options: LossOptions, names: Sequence[str]) -> "CrossEntropy":
        """Creates the loss for classes with these names.

        Raises:
            ValueError: A weight is for an unknown name.
        """
        return cls(
            _in_order(options.class_weights, names, "class_weights"), options.label_smoothing, options.focal_gamma
        )

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss for logits (batch, num_labels) and labels (batch,), a scalar."""
        check_shape(labels, logits.shape if labels.is_floating_point() else logits.shape[:1])  # or probabilities
        weights = None if self.weights is None else _tensor(self.weights, logits.dtype, logits.device)
        if not self.focal_gamma:
            return F.cross_entropy(logits, labels, weights, label_smoothing=self.label_smoothing)
        losses = F.cross_entropy(logits, labels, weights, label_smoothing=self.label_smoothing, reduction="none")
        hardness = 1 - logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
        total = len(labels) if weights is None else weights[labels].sum()
        return (hardness**self.focal_gamma * losses).sum() / total

    def sample_weights(self, labels: Tensor) -> Tensor | None:
        """Weight of each sample in the mean, (batch,); None if all are equal."""
        return None if self.weights is None else _tensor(self.weights, torch.float64, labels.device)[labels]


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy for several labels, averaged over samples and labels.

    Attributes:
        pos_weight: Weight of having each label, in the order of the logits; None if it equals that of not having it.
        label_smoothing: As in `LossOptions`.
        focal_gamma: As in `LossOptions`.
    """

    pos_weight: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    @classmethod
    def from_options(cls, options: LossOptions, names: Sequence[str]) -> "BinaryCrossEntropy":
        """Creates the loss for labels with these names.

        Raises:
            ValueError: A weight is for an unknown name.
        """
        given = options.pos_weight
        if isinstance(given, int | float):
            given = dict.fromkeys(names, given)
        return cls(_in_order(given, names, "pos_weight"), options.label_smoothing, options.focal_gamma)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss for logits and 0/1 labels, both (batch, num_labels), a scalar."""
        check_shape(labels, logits.shape)
        labels = labels.to(logits.dtype)
        weights = None if self.pos_weight is None else _tensor(self.pos_weight, logits.dtype, logits.device)
        smooth = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weights, reduction="none")
        if self.focal_gamma:
            losses = torch.where(labels > 0, 1 - logits.sigmoid(), logits.sigmoid()) ** self.focal_gamma * losses
        return losses.mean()


def check_shape(labels: Tensor, expected: torch.Size) -> None:
    """Rejects labels of another shape, which torch may broadcast, pairing each target with every prediction.

    Raises:
        ValueError: The shape differs.
    """
    if labels.shape != expected:
        raise UsageError(
            f"the batch's labels have the shape {tuple(labels.shape)}, but the loss of these logits takes "
            f"{tuple(expected)}. Give labels of that shape."
        )


def _check_weights(argument: str, weights: Any) -> None:
    if isinstance(weights, str):
        raise UsageError(f"{argument} is {weights!r}; give 'balanced', or numbers by name.")
    if isinstance(weights, Sequence):
        raise UsageError(f"{argument} is the list {weights!r}; give numbers by name, such as {{rare: 5.0}}.")
    numbers = weights if isinstance(weights, Mapping) else {"all labels": weights}
    if len(set(map(str, numbers))) < len(numbers):  # since YAML distinguishes the names 1 and "1"
        raise UsageError(f"{argument} has a name twice: {join_quoted(numbers)}. Give each once.")
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise UsageError(f"{argument} is {number!r} for {name}; give a number above 0.")


def _in_order(weights: Weights, names: Sequence[str], argument: str) -> tuple[float, ...] | None:
    """Weights in the order of the names."""
    if weights is None:
        return None
    if isinstance(weights, str):
        raise UsageError(
            f"{argument} is {weights!r}, but there is neither training data to count labels in nor a checkpoint that "
            "stores them. Give numbers by name, or leave it out."
        )
    given = {str(name): float(weight) for name, weight in weights.items()}
    if unknown := [name for name in given if name not in names]:
        raise UsageError(
            f"{argument} has {join_quoted(unknown)}, which is not one of the labels: {join_quoted(names)}. Correct the "
            f"name. {QUOTE_NAMES}"
        )
    return tuple(given.get(name, 1.0) for name in names)


@lru_cache(maxsize=8)
def _tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these values, cached to avoid waiting for a copy to the GPU; not an inference tensor."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
