"""The batches of an epoch, as two arrays."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from smartbatch_lightning.batching.arrays import Int64s


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlan:
    """The batches of one epoch over all ranks: batch `b` is `order[offsets[b]:offsets[b + 1]]`.

    The `num_replicas` batches of a step are next to each other in the plan: rank `r` trains batch
    `step * num_replicas + r`.

    Attributes:
        order: Every sample once. Shape (num_samples,), int64.
        offsets: Where each batch starts, and the end. Shape (num_batches + 1,), int64.
        num_replicas: Number of ranks; it divides the number of batches.
    """

    order: Int64s
    offsets: Int64s
    num_replicas: int = 1

    def __len__(self) -> int:
        """Number of batches over all ranks."""
        return len(self.offsets) - 1

    def __getitem__(self, batch: int) -> Int64s:
        """Samples of a batch, counted over all ranks. Shape (batch_size,)."""
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} is out of range for a plan of {len(self)} batches")
        return self.order[self.offsets[batch] : self.offsets[batch + 1]]

    def rank_batches(self, rank: int, start_step: int = 0) -> Iterator[Int64s]:
        """One rank's batches from `start_step` on; skipping earlier steps costs nothing."""
        for batch in range(start_step * self.num_replicas + rank, len(self), self.num_replicas):
            yield self[batch]

    def batch_sizes(self) -> Int64s:
        """Samples of each batch. Shape (num_batches,)."""
        return np.diff(self.offsets)

    def longest(self, lengths: ArrayLike) -> Int64s:
        """Tokens of the longest sample of each batch. Shape (num_batches,)."""
        return np.maximum.reduceat(np.asarray(lengths)[self.order], self.offsets[:-1]).astype(np.int64)


def batch_overlap(before: BatchPlan, after: BatchPlan) -> float:
    """Fraction of the samples batched with a given sample in `before` that are batched with it again in `after`."""
    num_samples = len(before.order)
    batch_of = np.empty((2, num_samples), np.int64)
    for row, plan in zip(batch_of, (before, after), strict=True):
        row[plan.order] = np.repeat(np.arange(len(plan)), plan.batch_sizes())
    together = np.unique(batch_of[0] * len(after) + batch_of[1], return_counts=True)[1]
    sizes = before.batch_sizes()
    return float((together * (together - 1)).sum() / max(1, (sizes * (sizes - 1)).sum()))
