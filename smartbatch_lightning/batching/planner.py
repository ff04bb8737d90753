"""From lengths, seed and epoch to a `BatchPlan`, without torch and without global random state."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smartbatch_lightning.batching.arrays import Int64s, even_offsets
from smartbatch_lightning.batching.jitter import choose_jitter
from smartbatch_lightning.batching.layout import PlanRequest
from smartbatch_lightning.batching.plan import BatchPlan
from smartbatch_lightning.batching.spec import BatchSpec
from smartbatch_lightning.batching.strategies import find_strategy
from smartbatch_lightning.errors import UsageError

_DEFAULT = BatchSpec()


def plan_epoch(
    lengths: ArrayLike,
    spec: BatchSpec = _DEFAULT,
    *,
    epoch: int = 0,
    num_replicas: int = 1,
    shuffle: bool = True,
) -> BatchPlan:
    """Plans the batches of one epoch.

    With any strategy, every sample is in the plan exactly once, every rank takes the same number of steps, the number
    of batches is the same in every epoch, batches in the same step have similar lengths, and the plan depends only on
    the arguments.

    Args:
        lengths: Tokens of each sample, after truncation and with special tokens. Shape (num_samples,), integers.
        spec: The batching strategy and the limits of a batch.
        epoch: Number of the epoch, from 0; each has its own plan.
        num_replicas: Number of ranks.
        shuffle: False for evaluation: no randomness; `smart` and `tutorial` sort by length, `random` keeps the order of
            the samples.

    Raises:
        ValueError: A length is below 1 or above the token budget, or there are too few samples for so many ranks.
    """
    checked = as_lengths(lengths)
    if num_replicas < 1:
        raise UsageError(f"num_replicas is {num_replicas}; give the number of ranks, 1 or more.")
    if len(checked) < num_replicas:
        raise UsageError(
            f"{len(checked)} samples are too few for {num_replicas} ranks, since every rank needs a batch and every "
            f"sample is used once. Run on at most {len(checked)} devices, or give more data."
        )
    spec = with_jitter(spec if shuffle else replace(spec, jitter=0.0), checked)
    bit_generator = np.random.PCG64(np.random.SeedSequence((spec.seed, epoch))) if shuffle else None
    return find_strategy(spec.batching)(PlanRequest(checked, spec, num_replicas, bit_generator))


def plan_windows(lengths: ArrayLike, spec: BatchSpec, window: int, *, num_replicas: int) -> BatchPlan:
    """Plans windows of consecutive samples, one after another, each as `plan_epoch` does without shuffling.

    Once a window's batches are done, all samples up to its end are done.

    Args:
        lengths: Tokens of each sample. Shape (num_samples,), integers.
        spec: The batching strategy and the limits of a batch.
        window: Maximum number of samples in a window; window sizes differ by at most one.
        num_replicas: Number of ranks.

    Raises:
        ValueError: As for `plan_epoch`.
    """
    checked = as_lengths(lengths)
    order, offsets = np.empty(len(checked), np.int64), [np.zeros(1, np.int64)]
    for first, end in pairwise(window_offsets(len(checked), window).tolist()):
        plan = plan_epoch(checked[first:end], spec, num_replicas=num_replicas, shuffle=False)
        order[first:end] = first + plan.order
        offsets.append(first + plan.offsets[1:])
    return BatchPlan(order, np.concatenate(offsets), num_replicas)


def window_offsets(num_samples: int, window: int) -> Int64s:
    """Where each window of `plan_windows` starts, and the end. Shape (num_windows + 1,)."""
    return even_offsets(num_samples, max(1, -(-num_samples // window)))


def with_jitter(spec: BatchSpec, lengths: NDArray[np.integer]) -> BatchSpec:
    """The spec with a number for `jitter: auto`, which depends on the lengths of the whole data set.

    Raises:
        ValueError: A length is above the token budget.
    """
    spec.check_lengths(lengths)
    return replace(spec, jitter=choose_jitter(lengths, spec)) if spec.jitter == "auto" else spec


def as_lengths(lengths: ArrayLike) -> NDArray[np.integer]:
    """The lengths as an array, if they can be planned.

    Raises:
        ValueError: They are not a one-dimensional array of integers, there are none, or one is below 1.
    """
    checked = np.asarray(lengths)
    if checked.ndim != 1 or not (np.issubdtype(checked.dtype, np.integer) or checked.size == 0):
        raise UsageError(f"lengths has shape {checked.shape} and type {checked.dtype}; give one integer per sample.")
    if checked.size and checked.min() < 1:
        raise UsageError(
            f"sample {int(checked.argmin())} has length {checked.min()}; every sample needs at least one token."
        )
    return checked
