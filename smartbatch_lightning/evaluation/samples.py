"""Samples one by one and by length: what classifications and regressions tell alike."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_GROUPS, _LEAST_SAMPLES = 10, 50
_LONGEST_TEXT = 4000


@dataclass(frozen=True)
class Mistake:
    """A sample that was predicted wrongly.

    Attributes:
        row: Its row in the data.
        label: What is right.
        prediction: What was predicted.
        loss: Of this sample.
        scores: Probabilities of the likeliest labels; of a regression the errors.
        length: In tokens or characters; None where it is unknown.
        text: The text, of very long ones the beginning; None where there is none.
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
    """Samples of about the same length, or of about the same target.

    Attributes:
        name: The least and the most of them.
        samples: How many there are.
        value: Mean over them.
    """

    name: str
    samples: int
    value: float


@dataclass(frozen=True)
class Lengths:
    """Lengths of samples.

    Attributes:
        values: Of whole texts, or of what was kept of them. Shape (num_samples,).
        unit: `tokens` or `characters`.
        max_length: Length at which longer texts were cut; None where none was.
    """

    values: NDArray[np.integer]
    unit: str = "tokens"
    max_length: int | None = None

    def groups(self, values: NDArray[Any]) -> list[Group]:
        """Mean of a value by length, in equal parts.

        Where all that is known is what was kept, samples as long as texts can be, most of them cut, are by themselves.

        Args:
            values: Of each sample. Shape (num_samples,).
        """
        cut = np.zeros(len(values), bool)
        if self.max_length is not None and self.values.max(initial=0) <= self.max_length:
            cut = self.values >= self.max_length
        groups = by_quantile(self.values[~cut], values[~cut])
        if cut.any():
            groups.append(Group(f"{self.max_length}, cut there", int(cut.sum()), float(values[cut].mean())))
        return groups


class Texts(Sequence[str]):
    """Texts that are read when they are asked for.

    Args:
        number: How many there are.
        read: Gives the text of each column of a sample, which are shown with " / " between them.
    """

    def __init__(self, number: int, read: Callable[[int], Iterable[Any]]) -> None:
        self._number, self._read = number, read

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, sample: Any) -> Any:
        return " / ".join(map(str, self._read(sample)))


def by_quantile(keys: NDArray[Any], values: NDArray[Any]) -> list[Group]:
    """Mean of values in up to ten parts with about as many samples each, in the order of the keys.

    Args:
        keys: What to part them by; equal ones stay together. Shape (num_samples,).
        values: Shape (num_samples,).
    """
    groups = []
    for part in quantile_parts(keys):
        low, high = keys[part].min(), keys[part].max()
        name = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
        groups.append(Group(name, int(part.sum()), float(values[part].mean())))
    return groups


def quantile_parts(keys: NDArray[Any]) -> list[NDArray[np.bool_]]:
    """Which samples are in each of up to ten parts with about as many each, in the order of the keys."""
    if not len(keys):
        return []
    number = int(np.clip(len(keys) // _LEAST_SAMPLES, 1, _MOST_GROUPS))
    edges = np.unique(np.quantile(keys, np.linspace(0, 1, number + 1)[1:-1]))
    part = np.searchsorted(edges, keys, side="right")
    return [part == one for one in np.unique(part)]


def text_at(texts: Sequence[str] | None, sample: int) -> str | None:
    """A sample's text, of very long ones the beginning."""
    if texts is None:
        return None
    text = texts[sample]
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ..."


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, np.integer) else f"{value:.4g}"
