"""Choosing the jitter: measuring batch overlap and padding as functions of it."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from smartbatch_lightning.batching.layout import PlanRequest
from smartbatch_lightning.batching.plan import batch_overlap
from smartbatch_lightning.batching.spec import BatchSpec
from smartbatch_lightning.batching.strategies import smart

MAX_OVERLAP, MAX_PADDING = 0.10, 0.01
_FIRST_TENTHS = 6  # up to half a token, jitter only breaks ties
_MAX_SAMPLES, _WINDOWS = 2**20, 16


@dataclass(frozen=True)
class JitterPoint:
    """Padding and mixing of `smart` batches with a given jitter.

    Attributes:
        jitter: Jitter in tokens.
        padding_ratio: Padding over real tokens, in the epoch that pads more.
        batch_overlap: Fraction of the samples batched with a given sample that are batched with it again in the next
            epoch.
    """

    jitter: float
    padding_ratio: float
    batch_overlap: float


def measure_jitter(
    lengths: NDArray[np.integer], spec: BatchSpec, jitter: float, tokens: NDArray[np.integer] | None = None
) -> JitterPoint:
    """Plans two epochs and compares them, independently of the run's seed.

    Args:
        lengths: Lengths to plan by, in tokens. Shape (num_samples,).
        spec: The limits of a batch.
        jitter: Jitter in tokens.
        tokens: Actual lengths, if `lengths` are estimates. Shape (num_samples,).
    """
    tokens = lengths if tokens is None else tokens
    first, second = (
        smart(PlanRequest(lengths, replace(spec, jitter=jitter), 1, np.random.PCG64(epoch))) for epoch in (0, 1)
    )
    computed = max(int(spec.tokens(tokens[plan.order], plan.offsets).sum()) for plan in (first, second))
    return JitterPoint(jitter, computed / int(tokens.sum()) - 1, batch_overlap(first, second))


def choose_jitter(lengths: NDArray[np.integer], spec: BatchSpec) -> float:
    """The smallest jitter, in tenths of a token, that keeps the batch overlap under 10 %.

    Padding must stay within 1 % of the real tokens, or within the padding without jitter if that is more (for windows,
    1 % more than that). If no jitter meets both conditions, it is the largest one that meets the limit on padding.
    Depends on the lengths and the limits of a batch, not on the seed. With more than a million samples, only some
    ranges of the sorted lengths are used.

    Args:
        lengths: Tokens of each sample. Shape (num_samples,).
        spec: The limits of a batch.
    """
    if spec.batching != "smart" or len(lengths) < 2:
        return 0.0
    lengths = _sorted_windows(lengths)
    unmixed = measure_jitter(lengths, spec, 0.0)
    if unmixed.batch_overlap < MAX_OVERLAP:
        return 0.0
    allowed = max(MAX_PADDING, unmixed.padding_ratio)
    if spec.window_pooling:
        allowed += MAX_PADDING  # on top of the padding of last windows, which is nearly the same in any order

    def enough(tenths: int) -> bool:
        point = measure_jitter(lengths, spec, tenths / 10)
        return point.batch_overlap < MAX_OVERLAP or point.padding_ratio > allowed

    most = 10 * int(lengths[-1])
    low, high = 0, _FIRST_TENTHS  # the answer is above `low` and at most `high`
    while high < most and not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return (high if measure_jitter(lengths, spec, high / 10).padding_ratio <= allowed else low) / 10


def _sorted_windows(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """The sorted lengths; if there are very many, only some evenly spread ranges of them."""
    counts = np.bincount(lengths)
    ends = np.cumsum(counts)
    places = np.arange(min(len(lengths), _MAX_SAMPLES))
    if len(lengths) > _MAX_SAMPLES:
        window, place = np.divmod(places, _MAX_SAMPLES // _WINDOWS)
        places = window * (len(lengths) // _WINDOWS) + place
    return np.searchsorted(ends, places, side="right")
