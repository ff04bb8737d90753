"""Results by sample and by length, shared by classification and regression."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAX_GROUPS, _MIN_SAMPLES = 10, 50
_MAX_TEXT_LENGTH = 4000


@dataclass(frozen=True)
class Mistake:
    """A sample that was predicted wrongly.

    Attributes:
        row: Its row in the data.
        label: The true label.
        prediction: The prediction.
        loss: Loss of this sample.
        scores: Probabilities of the likeliest labels; for regression, the errors.
        length: Length in tokens or characters; None if unknown.
        text: The text, or the beginning of a very long one; None without texts.
    """

    row: int
    label: str
    prediction: str
    loss: float
    scores: dict[str, float]
    length: int | None
    text: str | None


@dataclass(frozen=True)
class Group:
    """Samples of similar length, or with similar targets.

    Attributes:
        name: The range of the group, from smallest to largest.
        samples: Number of samples.
        value: Mean over the samples.
    """

    name: str
    samples: int
    value: float


@dataclass(frozen=True)
class Lengths:
    """Lengths of samples.

    Attributes:
        values: Lengths of whole texts, or of what was kept of them. Shape (num_samples,).
        unit: `tokens` or `characters`.
        max_length: Length to which longer texts were cut; None if none were.
    """

    values: NDArray[np.integer]
    unit: str = "tokens"
    max_length: int | None = None

    def groups(self, values: NDArray[Any]) -> list[Group]:
        """Mean of a value by length, in groups of equal size.

        If only the length after truncation is known, samples of maximum length, most of which were cut, are a separate
        group.

        Args:
            values: Value of each sample. Shape (num_samples,).
        """
        cut = np.zeros(len(values), bool)
        if self.max_length is not None and self.values.max(initial=0) <= self.max_length:
            cut = self.values >= self.max_length
        groups = by_quantile(self.values[~cut], values[~cut])
        if cut.any():
            groups.append(Group(f"{self.max_length} or more", int(cut.sum()), float(values[cut].mean())))
        return groups


class Texts(Sequence[str]):
    """Texts that are read only when requested.

    Args:
        number: Number of texts.
        read: Returns the text of each column of a sample; they are joined with " / ".
    """

    def __init__(self, number: int, read: Callable[[int], Iterable[Any]]) -> None:
        self._number, self._read = number, read

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, sample: Any) -> Any:
        return " / ".join(map(str, self._read(sample)))


def by_quantile(keys: NDArray[Any], values: NDArray[Any]) -> list[Group]:
    """Mean of values in up to ten groups of about equal size, in the order of the keys.

    Args:
        keys: What to group by; equal keys stay together. Shape (num_samples,).
        values: Value of each sample. Shape (num_samples,).
    """
    groups = []
    for part in quantile_parts(keys):
        low, high = keys[part].min(), keys[part].max()
        name = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
        groups.append(Group(name, int(part.sum()), float(values[part].mean())))
    return groups


def quantile_parts(keys: NDArray[Any]) -> list[NDArray[np.bool_]]:
    """Which samples are in each of up to ten groups of about equal size, in the order of the keys."""
    if not len(keys):
        return []
    number = int(np.clip(len(keys) // _MIN_SAMPLES, 1, _MAX_GROUPS))
    edges = np.unique(np.quantile(keys, np.linspace(0, 1, number + 1)[1:-1]))
    part = np.searchsorted(edges, keys, side="right")
    return [part == one for one in np.unique(part)]


def text_at(texts: Sequence[str] | None, sample: int) -> str | None:
    """A sample's text, or the beginning of a very long one."""
    if texts is None:
        return None
    text = texts[sample]
    return text if len(text) <= _MAX_TEXT_LENGTH else f"{text[:_MAX_TEXT_LENGTH]} ..."


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, np.integer) else f"{value:.4g}"
