"""Which samples make up which batch of an epoch: lengths, seed and epoch in, a `BatchPlan` out.

The whole module is one primitive used several times: sort 64-bit words that hold a key, random bits and an index
(`_argsort`). Ties therefore fall at random, every word is unique, and the result is the same on every machine and
with every sorting algorithm. Nothing here knows of torch, of ranks talking to each other, or of global random state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Batching = Literal["smart", "tutorial", "random"]
Int64s = NDArray[np.int64]


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
    batch_size: int = 16,
    batching: Batching = "smart",
    *,
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

    Args:
        lengths: Tokens of each sample, after truncation and with special tokens. Shape (num_samples,), integers.
        batch_size: Samples in a batch at most, on one rank. Only where it is 1 and the ranks do not divide the
            samples do some batches hold two, since equal steps leave no other way.
        batching: How batches are chosen.
        seed: Seed of the whole run.
        epoch: Number of the epoch, from 0; each has a plan of its own.
        num_replicas: Ranks that share the epoch.
        jitter: `smart` only: tokens by which a sample's length is randomly moved up or down before sorting. More
            jitter mixes batches more from epoch to epoch and pads more. Up to 0.5 it only breaks ties.
        shuffle: False for evaluation: no randomness at all, `smart` and `tutorial` in order of length, `random` in
            order of the samples.

    Raises:
        ValueError: An argument is out of range, a length is below 1, or there are fewer samples than ranks.
    """
    sizes = checked_arguments(lengths, batching, jitter)
    num_samples = len(sizes)
    num_steps = steps_per_epoch(num_samples, batch_size, num_replicas)
    noise = np.random.PCG64(np.random.SeedSequence((seed, epoch))) if shuffle else None

    if batching == "random":
        order = _argsort(np.zeros(num_samples, np.int64), noise)
        steps = _even_cuts(num_samples, num_steps)
        return _deal_by_length(order, steps, sizes, num_replicas)
    if batching == "tutorial" and noise is not None:
        order = _argsort(sizes, None)
        draws, steps = _tutorial_draws(num_samples, batch_size * num_replicas, num_steps, num_replicas, noise)
        offsets = _split_each(steps, num_replicas)
        return BatchPlan(order[draws], offsets, num_replicas)
    order = _argsort(sizes, noise, spread=2 * jitter)
    offsets = _even_cuts(num_samples, num_steps * num_replicas)
    if noise is None:
        return BatchPlan(order, offsets, num_replicas)
    steps = _argsort(np.zeros(num_steps, np.int64), noise)
    batches = (steps[:, None] * num_replicas + np.arange(num_replicas)).ravel()
    return BatchPlan(*_take_runs(order, offsets, batches), num_replicas)


def steps_per_epoch(num_samples: int, batch_size: int, num_replicas: int = 1) -> int:
    """Batches that each rank trains in an epoch, whatever the batching.

    Raises:
        ValueError: A number is below 1, or there are fewer samples than ranks.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1 sample a batch.")
    if num_replicas < 1:
        raise ValueError(f"num_replicas is {num_replicas}; give the number of ranks, 1 or more.")
    if num_samples < num_replicas:
        raise ValueError(
            f"{num_samples} samples cannot be shared by {num_replicas} ranks with every sample once and a batch on "
            f"every rank. Run on at most {num_samples} devices, or give more data."
        )
    return min(-(-num_samples // (batch_size * num_replicas)), num_samples // num_replicas)


def mates_kept(before: BatchPlan, after: BatchPlan) -> float:
    """Share of a sample's batch-mates in one epoch that it meets again in the other: 1 is no shuffling at all."""
    num_samples = len(before.order)
    batch_of = np.empty((2, num_samples), np.int64)
    for row, plan in zip(batch_of, (before, after), strict=True):
        row[plan.order] = np.repeat(np.arange(len(plan)), plan.batch_sizes())
    together = np.unique(batch_of[0] * len(after) + batch_of[1], return_counts=True)[1]
    sizes = before.batch_sizes()
    return float((together * (together - 1)).sum() / max(1, (sizes * (sizes - 1)).sum()))


def stratified_split(labels: ArrayLike, share: float, seed: int = 0) -> tuple[Int64s, Int64s]:
    """Splits samples in two at random, with the same share of every label in the second part, to within one sample.

    Args:
        labels: Label of each sample. Shape (num_samples,), integers.
        share: Share of the samples in the second part, between 0 and 1.
        seed: The split depends on this and the labels alone.

    Returns:
        The samples of the first and of the second part, each in ascending order.

    Raises:
        ValueError: The share is out of range, or leaves one part without a sample.
    """
    classes = np.asarray(labels)
    num_samples = len(classes)
    taken = round(num_samples * share)
    if not 0 < share < 1 or not 0 < taken < num_samples:
        raise ValueError(
            f"a share of {share} of {num_samples} samples leaves one part of the split empty. "
            "Give a share between 0 and 1 that leaves samples in both, or name a split."
        )
    by_label = _argsort(classes, np.random.PCG64(np.random.SeedSequence(seed)))
    second = np.zeros(num_samples, bool)
    second[by_label] = np.diff(np.arange(num_samples + 1) * taken // num_samples) > 0
    return np.flatnonzero(~second), np.flatnonzero(second)


def checked_arguments(lengths: ArrayLike, batching: str, jitter: float) -> NDArray[np.integer]:
    """The lengths as an array, if a plan can be made of these.

    Raises:
        ValueError: An argument is out of range, or a length is below 1.
    """
    if batching not in get_args(Batching):
        raise ValueError(f"batching is {batching!r}; choose one of {', '.join(get_args(Batching))}.")
    if not jitter >= 0:
        raise ValueError(f"jitter is {jitter}; give a number of tokens, 0 or more.")
    sizes = np.asarray(lengths)
    if sizes.ndim != 1 or not (np.issubdtype(sizes.dtype, np.integer) or sizes.size == 0):
        raise ValueError(f"lengths has shape {sizes.shape} and type {sizes.dtype}; give one integer a sample.")
    if sizes.size and sizes.min() < 1:
        raise ValueError(f"sample {int(sizes.argmin())} has length {sizes.min()}; every sample needs a token or more.")
    return sizes


def _argsort(key: NDArray[np.integer], noise: np.random.PCG64 | None, spread: float = 1.0) -> Int64s:
    """Indices in order of `key + uniform(0, spread)`; without `noise`, of `key` and then index.

    A spread of 1 or less only breaks ties, since keys are whole numbers. One sort of unique 64-bit words: the sum in
    fixed point above, the index below. The raw bits of the generator, unlike its distributions, are the same in every
    version of numpy.
    """
    num_keys = len(key)
    if num_keys == 0:
        return np.empty(0, np.int64)
    spread = max(spread, 1.0)
    lowest = int(key.min())
    index_bits = num_keys.bit_length()
    key_bits = int(int(key.max()) - lowest + spread).bit_length()
    fraction_bits = min(64 - index_bits - key_bits, 32 - int(spread).bit_length())
    assert fraction_bits > 0, "lengths and number of samples do not fit into 64 bits"
    if noise is None:
        words = np.zeros(num_keys, np.uint64)
    else:
        words = noise.random_raw(num_keys)
        words >>= np.uint64(32)
        words *= np.uint64(spread * 2**fraction_bits)
        words >>= np.uint64(32)
    fixed_point = (key - lowest).astype(np.uint64)
    fixed_point <<= np.uint64(fraction_bits)
    words += fixed_point
    del fixed_point
    words <<= np.uint64(index_bits)
    words |= np.arange(num_keys, dtype=np.uint64)
    words.sort()
    words &= np.uint64(2**index_bits - 1)
    return words.view(np.int64)


def _even_cuts(total: int, parts: int) -> Int64s:
    """Offsets of `parts` runs whose sizes differ by one at most, the larger ones first. Shape (parts + 1,)."""
    size, larger = divmod(total, parts)
    cuts = np.arange(parts + 1, dtype=np.int64)
    return cuts * size + np.minimum(cuts, larger)


def _split_each(offsets: Int64s, parts: int) -> Int64s:
    """Cuts every run into `parts` whose sizes differ by one at most, the larger ones first."""
    size, larger = np.divmod(np.diff(offsets)[:, None], parts)
    part = np.arange(parts)
    starts = offsets[:-1, None] + part * size + np.minimum(part, larger)
    return np.append(starts.ravel(), offsets[-1])


def _take_runs(order: Int64s, offsets: Int64s, runs: Int64s) -> tuple[Int64s, Int64s]:
    """The given runs of `order`, one after another, and their offsets."""
    starts, sizes = offsets[runs], np.diff(offsets)[runs]
    new_offsets = np.concatenate(([0], np.cumsum(sizes)))
    index = np.ones(len(order), np.int64)  # steps of one inside a run, a jump at its start
    index[0] = starts[0]
    index[new_offsets[1:-1]] = starts[1:] - (starts[:-1] + sizes[:-1] - 1)
    np.cumsum(index, out=index)
    return order[index], new_offsets


def _deal_by_length(order: Int64s, steps: Int64s, sizes: NDArray[np.integer], num_replicas: int) -> BatchPlan:
    """Deals the samples of each step to its ranks by length, back and forth."""
    if num_replicas == 1:
        return BatchPlan(order, steps)
    step = np.repeat(np.arange(len(steps) - 1), np.diff(steps))
    # longest first, so that the odd ones that are left over at the end are the short ones
    by_length = _argsort((step + 1) * (int(sizes.max()) + 1) - sizes[order], None)
    turn, seat = np.divmod(np.arange(len(order)) - steps[step], num_replicas)
    rank = np.where(turn % 2 == 0, seat, num_replicas - 1 - seat)
    batch = step * num_replicas + rank
    offsets = np.concatenate(([0], np.cumsum(np.bincount(batch))))
    return BatchPlan(order[by_length[_argsort(batch, None)]], offsets, num_replicas)


def _tutorial_draws(
    num_samples: int, run: int, num_steps: int, num_replicas: int, noise: np.random.PCG64
) -> tuple[Int64s, Int64s]:
    """Takes a random run of `run` neighbours out of a list of `num_samples`, closes the gap, and so on to the end.

    Returns the positions in the original list, draw after draw, and the offsets of the draws. The last draw takes
    what is left; where that is less than a sample a rank, earlier draws are a sample shorter.

    Drawing one after another costs a memory move of the whole rest each time. Instead the effect of consecutive draws
    is composed pairwise, in log2(num_steps) passes over all samples: what a position of the second half means before
    the first half was drawn is found by a binary search among the first half's sorted positions.
    """
    last = min(max(num_samples - (num_steps - 1) * run, num_replicas), num_samples)
    takes = np.diff(_even_cuts(num_samples - last, num_steps - 1)) if num_steps > 1 else np.empty(0, np.int64)
    takes = np.append(takes, last)
    steps = np.concatenate(([0], np.cumsum(takes)))
    remaining = num_samples - steps[:-1]
    choices = (remaining - takes + 1).astype(np.uint64)
    starts = ((noise.random_raw(num_steps) >> np.uint64(32)) * choices >> np.uint64(32)).astype(np.int64)

    # Positions in the list as it is just before the draw. Short draws are filled up, and draws past the end added up
    # to a power of two, by positions so far off that nothing ever looks for them.
    width = int(takes.max())
    shape = (1 << (num_steps - 1).bit_length(), width)
    position = 2 * num_samples + np.arange(shape[0] * shape[1]).reshape(shape)
    column = np.arange(width)
    np.copyto(position[:num_steps], starts[:, None] + column, where=column < takes[:, None])
    apart = 2 * (num_samples + position.size)  # keeps the positions of one pair of halves clear of the next pair's
    while width < position.size:
        first, second = position.reshape(-1, 2, width).swapaxes(0, 1)
        pair = np.arange(len(first))[:, None]
        gaps = np.sort(first, axis=1) - np.arange(width)  # how many later positions each removal moves up
        shift = np.searchsorted((gaps + pair * apart).ravel(), (second + pair * apart).ravel(), side="right")
        second += shift.reshape(second.shape) - pair * width
        width *= 2
    return position[:num_steps][column < takes[:, None]], steps
