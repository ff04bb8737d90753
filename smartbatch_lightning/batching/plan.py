"""Which samples make up which batch of an epoch: lengths, seed and epoch in, a `BatchPlan` out.

Samples are put in order (`arrays.argsort`), the order is cut into batches, and the batches are put in order. Nothing
here knows of torch, of ranks talking to each other, or of global random state.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smartbatch_lightning.batching.arrays import (
    Int64s,
    argsort,
    cuts_by_cost,
    cuts_by_width,
    even_cuts,
    rounded_up,
    split_each,
    take_runs,
    too_few_fit,
    tutorial_draws,
)
from smartbatch_lightning.errors import UsageError

Batching = Literal["smart", "tutorial", "random"]


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlan:
    """The batches of one epoch over all ranks: batch `b` is `order[offsets[b]:offsets[b + 1]]`.

    The `num_replicas` batches that run side by side in a step stand side by side in the plan: rank `r` trains batch
    `step * num_replicas + r`.

    Attributes:
        order: Every sample once. Shape (num_samples,), int64.
        offsets: Where each batch starts, and the end. Shape (num_batches + 1,), int64.
        num_replicas: Ranks that share the plan; it divides the number of batches.
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
            raise IndexError(f"batch {batch} of a plan of {len(self)} batches")
        return self.order[self.offsets[batch] : self.offsets[batch + 1]]

    def share(self, rank: int, first_step: int = 0) -> Iterator[Int64s]:
        """One rank's batches, from step `first_step` on; the steps before it cost nothing."""
        for batch in range(first_step * self.num_replicas + rank, len(self), self.num_replicas):
            yield self[batch]

    def batch_sizes(self) -> Int64s:
        """Samples of each batch. Shape (num_batches,)."""
        return np.diff(self.offsets)

    def longest(self, lengths: ArrayLike) -> Int64s:
        """Tokens of the longest sample of each batch. Shape (num_batches,)."""
        return np.maximum.reduceat(np.asarray(lengths)[self.order], self.offsets[:-1]).astype(np.int64)

    def padded_tokens(self, lengths: ArrayLike) -> int:
        """Tokens of the epoch, padding included, when each batch is padded to its own longest sample."""
        return int(self.batch_sizes() @ self.longest(lengths))


def plan_epoch(
    lengths: ArrayLike,
    batch_size: int | None = None,
    batching: Batching = "smart",
    *,
    max_tokens_per_batch: int | None = None,
    pad_to_multiple_of: int = 1,
    packed: bool = False,
    seed: int = 0,
    epoch: int = 0,
    num_replicas: int = 1,
    jitter: float = 1.0,
    shuffle: bool = True,
) -> BatchPlan:
    """Plans the batches of one epoch.

    Whatever the batching, every sample stands in the plan exactly once, every rank takes the same number of steps,
    the number of batches is the same in every epoch, the batches of a step are of nearly equal length, and the plan
    depends on the arguments alone.

    `smart` and `tutorial` are forms of length-grouped batching as popularised by Chris McCormick's *Smart Batching
    Tutorial* (2020), after Michaël Benesty: `tutorial` is that tutorial's algorithm, `smart` cuts the sorted samples
    into runs once and takes the runs in random order. Under `random` on several ranks, the samples of a step are
    dealt to its ranks by length, back and forth: the step's gradient stays that of an ordinary shuffle.

    Under a token budget `smart` batches hold as many samples as fit, few long ones or many short ones. A run drawn by
    `tutorial` and a shuffled batch cannot know how long their longest sample will be in another epoch, so they hold
    as many as fit whatever their lengths. Packed batches, also those of one step, are cut where equal shares of the
    tokens end.

    Args:
        lengths: Tokens of each sample, after truncation and with special tokens. Shape (num_samples,), integers.
        batch_size: Samples in a batch at most, on one rank; by default 16, or as many as the token budget allows. Only
            where it is 1 and the ranks do not divide the samples do some batches hold two, since equal steps leave no
            other way.
        batching: How batches are chosen.
        max_tokens_per_batch: Token budget of a batch on one rank, with padding to its longest sample.
        pad_to_multiple_of: What batches are padded to a multiple of, for the budget to reckon with.
        packed: The batches will not be padded: the budget is for the sum of their lengths.
        seed: Seed of the whole run.
        epoch: Number of the epoch, from 0; each has a plan of its own.
        num_replicas: Ranks that share the epoch.
        jitter: `smart` only: tokens by which a sample's length is randomly moved up or down before sorting. More
            jitter mixes batches more from epoch to epoch and pads more. Up to 0.5 it only breaks ties.
        shuffle: False for evaluation: no randomness at all, `smart` and `tutorial` in order of length, `random` in
            order of the samples.

    Raises:
        ValueError: An argument is out of range, a length is below 1 or above the token budget, or there are too few
            samples for so many ranks.
    """
    sizes = _checked(lengths, batching, jitter)
    layout = _layout(
        sizes, batch_size, batching, max_tokens_per_batch, pad_to_multiple_of, packed, num_replicas, jitter, shuffle
    )
    num_samples, num_steps = len(sizes), layout.num_steps
    noise = np.random.PCG64(np.random.SeedSequence((seed, epoch))) if shuffle else None

    if batching == "tutorial" and noise is not None:
        order = argsort(sizes, None)
        run = layout.samples * num_replicas
        draws, steps = tutorial_draws(num_samples, run, num_steps, num_replicas, noise)
        return BatchPlan(order[draws], split_each(steps, num_replicas), num_replicas)
    if batching == "random":
        order = argsort(np.zeros(num_samples, np.int64), noise)
    else:
        order = argsort(sizes, noise, spread=2 * jitter)
    if layout.costs is not None:
        offsets = cuts_by_cost(layout.costs[order], num_steps * num_replicas)
    elif batching == "random":
        return _deal_by_length(order, even_cuts(num_samples, num_steps), sizes, num_replicas)
    elif layout.steps is not None:
        offsets = split_each(layout.steps, num_replicas)
    else:
        offsets = even_cuts(num_samples, num_steps * num_replicas)
    if batching == "random" or noise is None:
        return BatchPlan(order, offsets, num_replicas)
    steps = argsort(np.zeros(num_steps, np.int64), noise)
    batches = (steps[:, None] * num_replicas + np.arange(num_replicas)).ravel()
    return BatchPlan(*take_runs(order, offsets, batches), num_replicas)


def mates_kept(before: BatchPlan, after: BatchPlan) -> float:
    """Share of a sample's batch-mates in one epoch that it meets again in the other: 1 is no shuffling at all."""
    num_samples = len(before.order)
    batch_of = np.empty((2, num_samples), np.int64)
    for row, plan in zip(batch_of, (before, after), strict=True):
        row[plan.order] = np.repeat(np.arange(len(plan)), plan.batch_sizes())
    together = np.unique(batch_of[0] * len(after) + batch_of[1], return_counts=True)[1]
    sizes = before.batch_sizes()
    return float((together * (together - 1)).sum() / max(1, (sizes * (sizes - 1)).sum()))


def _checked(lengths: ArrayLike, batching: str, jitter: float) -> NDArray[np.integer]:
    """The lengths as an array, if a plan can be made of these.

    Raises:
        ValueError: An argument is out of range, or a length is below 1.
    """
    if batching not in get_args(Batching):
        raise UsageError(f"batching is {batching!r}; choose one of {', '.join(get_args(Batching))}.")
    if not jitter >= 0:
        raise UsageError(f"jitter is {jitter}; give a number of tokens, 0 or more.")
    sizes = np.asarray(lengths)
    if sizes.ndim != 1 or not (np.issubdtype(sizes.dtype, np.integer) or sizes.size == 0):
        raise UsageError(f"lengths has shape {sizes.shape} and type {sizes.dtype}; give one integer a sample.")
    if sizes.size and sizes.min() < 1:
        raise UsageError(f"sample {int(sizes.argmin())} has length {sizes.min()}; every sample needs a token or more.")
    return sizes


class _Layout(NamedTuple):
    """How every epoch is cut into steps.

    Attributes:
        num_steps: Batches of each rank.
        samples: Samples in a batch at most, whatever their lengths.
        steps: Where the token budget cuts the sorted samples into steps, which hold unequally many. Shape
            (num_steps + 1,).
        costs: What of a batch's budget each sample takes up, where packed batches are cut by that. Shape
            (num_samples,).
    """

    num_steps: int
    samples: int
    steps: Int64s | None = None
    costs: Int64s | None = None


def _layout(
    sizes: NDArray[np.integer],
    batch_size: int | None,
    batching: Batching,
    budget: int | None,
    multiple: int,
    packed: bool,
    num_replicas: int,
    jitter: float,
    shuffle: bool,
) -> _Layout:
    num_samples = len(sizes)
    if batch_size is None:
        batch_size = 16 if budget is None else max(1, num_samples)
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; give at least 1 sample a batch.")
    if multiple < 1:
        raise UsageError(f"pad_to_multiple_of is {multiple}; give 1 or more.")
    if num_replicas < 1:
        raise UsageError(f"num_replicas is {num_replicas}; give the number of ranks, 1 or more.")
    if num_samples < num_replicas:
        raise UsageError(
            f"{num_samples} samples cannot be shared by {num_replicas} ranks with every sample once and a batch on "
            f"every rank. Run on at most {num_samples} devices, or give more data."
        )
    if budget is None:
        return _Layout(_equal_steps(num_samples, batch_size, num_replicas), batch_size)

    multiple = 1 if packed else multiple
    longest = int(sizes.max())
    widest = rounded_up(longest, multiple)
    if widest > budget:
        raise UsageError(
            f"sample {int(sizes.argmax())} takes {widest} tokens, but max_tokens_per_batch is {budget}. Raise it to "
            f"{widest} or more, or cut samples shorter."
        )
    fitting = budget // widest
    samples = min(batch_size, fitting)
    if packed and batching != "tutorial":
        costs = np.maximum(sizes, -(-budget // batch_size)).astype(np.int64)
        # a run between two cuts exceeds an equal share of the costs by less than its last sample's
        num_batches = -(-int(costs.sum()) // (budget - int(costs.max()) + 1))
        num_steps = -(-num_batches // num_replicas)
        if num_steps < _equal_steps(num_samples, samples, num_replicas):
            return _Layout(num_steps, samples, costs=costs)
    elif samples < batch_size and (batching == "smart" or (batching == "tutorial" and not shuffle)):
        headroom = math.ceil(max(2 * jitter, 1)) - 1 if shuffle and batching == "smart" else 0
        counts = np.bincount(sizes)
        lengths = np.flatnonzero(counts)
        # jitter may bring a sample this much longer to the place of any other
        widths = rounded_up(np.minimum(lengths + headroom, longest), multiple)
        steps = cuts_by_width(widths, counts[lengths], batch_size, budget, num_replicas)
        return _Layout(len(steps) - 1, samples, steps=steps)
    if fitting == 1 and num_samples % num_replicas:
        raise too_few_fit(num_samples, num_replicas, budget)
    return _Layout(_equal_steps(num_samples, samples, num_replicas), samples)


def _equal_steps(num_samples: int, batch_size: int, num_replicas: int) -> int:
    """Steps of an epoch whose batches hold equally many samples, to within one."""
    return min(-(-num_samples // (batch_size * num_replicas)), num_samples // num_replicas)


def _deal_by_length(order: Int64s, steps: Int64s, sizes: NDArray[np.integer], num_replicas: int) -> BatchPlan:
    """Deals the samples of each step to its ranks by length, back and forth."""
    if num_replicas == 1:
        return BatchPlan(order, steps)
    step = np.repeat(np.arange(len(steps) - 1), np.diff(steps))
    # longest first, so that the odd ones that are left over at the end are the short ones
    by_length = argsort((step + 1) * (int(sizes.max()) + 1) - sizes[order], None)
    turn, seat = np.divmod(np.arange(len(order)) - steps[step], num_replicas)
    rank = np.where(turn % 2 == 0, seat, num_replicas - 1 - seat)
    batch = step * num_replicas + rank
    offsets = np.concatenate(([0], np.cumsum(np.bincount(batch))))
    return BatchPlan(order[by_length[argsort(batch, None)]], offsets, num_replicas)
