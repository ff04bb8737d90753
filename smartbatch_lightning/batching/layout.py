"""Cutting an order of samples into steps and batches under a token budget, and distributing them over ranks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smartbatch_lightning.batching.arrays import (
    Int64s,
    argsort,
    budget_too_small_error,
    even_offsets,
    gather_runs,
    offsets_by_cost,
    offsets_by_width,
    split_runs,
)
from smartbatch_lightning.batching.plan import BatchPlan
from smartbatch_lightning.batching.spec import BatchSpec


@dataclass(frozen=True, eq=False)
class PlanRequest:
    """The input of a batching strategy.

    Attributes:
        lengths: Tokens of each sample. Shape (num_samples,), integers.
        spec: The limits of a batch; its jitter is a number.
        num_replicas: Number of ranks, which all take the same number of steps.
        bit_generator: The only source of randomness, derived from the seed and the epoch; None for evaluation, whose
            plan is not random.
    """

    lengths: NDArray[np.integer]
    spec: BatchSpec
    num_replicas: int
    bit_generator: np.random.PCG64 | None

    @property
    def samples_per_batch(self) -> int:
        """Number of samples that always fit into a batch."""
        return self.spec.samples_per_batch(int(self.lengths.max()), len(self.lengths))

    @property
    def num_steps(self) -> int:
        """Number of steps of an epoch whose batches have the same number of samples, to within one.

        Raises:
            ValueError: The token budget does not allow equally many steps on all ranks.
        """
        samples, num_samples, budget = self.samples_per_batch, len(self.lengths), self.spec.max_tokens_per_batch
        if budget and budget < 2 * self.spec.width(self.lengths.max()) and num_samples % self.num_replicas:
            raise budget_too_small_error(num_samples, self.num_replicas, budget)
        return min(-(-num_samples // (samples * self.num_replicas)), num_samples // self.num_replicas)

    def cut(self, order: Int64s) -> BatchPlan:
        """Cuts samples, in the given order, into batches; their number does not depend on the order.

        Batches have equally many samples, and those of a step are distributed over ranks by length, back and forth.
        Packed batches under a token budget are cut into equal shares of the tokens.

        Args:
            order: Every sample once. Shape (num_samples,).
        """
        by_cost = self._cut_by_cost(order)
        if by_cost is not None:
            return by_cost
        return self._distribute_by_length(order, even_offsets(len(order), self.num_steps))

    def cut_sorted(self, order: Int64s, headroom: int = 0) -> BatchPlan:
        """Cuts samples sorted by length; under a token budget, batches have few long or many short samples.

        Args:
            order: Every sample once, the shortest first. Shape (num_samples,).
            headroom: Tokens by which a sample may be longer than a later one.
        """
        by_cost = self._cut_by_cost(order)
        if by_cost is not None:
            return by_cost
        steps = self._steps_by_width(headroom)
        if steps is not None:
            return BatchPlan(order, split_runs(steps, self.num_replicas), self.num_replicas)
        return BatchPlan(order, even_offsets(len(order), self.num_steps * self.num_replicas), self.num_replicas)

    def is_too_large(self, samples: int, tokens: int) -> bool:
        """Whether a batch exceeds its limits; two samples are allowed where equally many steps per rank need them."""
        most = max(self.spec.batch_size or samples, 1 + (len(self.lengths) % self.num_replicas > 0))
        return samples > most or tokens > (self.spec.max_tokens_per_batch or tokens)

    def shuffle_steps(self, plan: BatchPlan) -> BatchPlan:
        """Shuffles the steps of a plan; in evaluation, they stay in order."""
        if self.bit_generator is None:
            return plan
        steps = argsort(np.zeros(len(plan) // self.num_replicas, np.int64), self.bit_generator)
        batches = (steps[:, None] * self.num_replicas + np.arange(self.num_replicas)).ravel()
        return BatchPlan(*gather_runs(plan.order, plan.offsets, batches), self.num_replicas)

    def _cut_by_cost(self, order: Int64s) -> BatchPlan | None:
        """Cuts packed batches under a budget; None if that saves no steps over equally many samples a batch."""
        budget = self.spec.max_tokens_per_batch
        if budget is None or not self.spec.packed:
            return None
        # tokens of the budget that a sample uses up, at least its share of `batch_size`
        costs = np.maximum(self.lengths, -(-budget // (self.spec.batch_size or len(order)))).astype(np.int64)
        # a run between two cuts exceeds an equal share by less than the cost of its last sample
        num_batches = -(-int(costs.sum()) // (budget - int(costs.max()) + 1))
        num_steps = -(-num_batches // self.num_replicas)
        samples = self.samples_per_batch * self.num_replicas
        if num_steps >= min(-(-len(order) // samples), len(order) // self.num_replicas):
            return None
        return BatchPlan(order, offsets_by_cost(costs[order], num_steps * self.num_replicas), self.num_replicas)

    def _steps_by_width(self, headroom: int) -> Int64s | None:
        """Offsets of steps under a budget; None if batches of short samples cannot have more samples than others."""
        budget = self.spec.max_tokens_per_batch
        batch_size = self.spec.batch_size or len(self.lengths)
        if budget is None or self.samples_per_batch >= batch_size:
            return None
        counts = np.bincount(self.lengths)
        lengths = np.flatnonzero(counts)
        # any sample may be replaced by one this much longer
        widths = self.spec.width(np.minimum(lengths + headroom, lengths[-1]))
        return offsets_by_width(widths, counts[lengths], batch_size, budget, self.num_replicas)

    def _distribute_by_length(self, order: Int64s, steps: Int64s) -> BatchPlan:
        if self.num_replicas == 1:
            return BatchPlan(order, steps)
        step = np.repeat(np.arange(len(steps) - 1), np.diff(steps))
        # longest first, so that those left over at the end are short
        by_length = argsort((step + 1) * (int(self.lengths.max()) + 1) - self.lengths[order], None)
        round_, slot = np.divmod(np.arange(len(order)) - steps[step], self.num_replicas)
        rank = np.where(round_ % 2 == 0, slot, self.num_replicas - 1 - slot)
        batch = step * self.num_replicas + rank
        offsets = np.concatenate(([0], np.cumsum(np.bincount(batch))))
        return BatchPlan(order[by_length[argsort(batch, None)]], offsets, self.num_replicas)
