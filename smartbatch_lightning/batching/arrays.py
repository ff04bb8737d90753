"""Array operations for plans, in numpy, without Python loops over samples or batches."""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from smartbatch_lightning.errors import UsageError

Int64s = NDArray[np.int64]
_Number = TypeVar("_Number", int, Int64s)
_MIN_FRACTION_BITS = 6  # minimum resolution of random numbers between two keys


def round_up(tokens: _Number, multiple: int) -> _Number:
    """Rounds up to the next multiple."""
    return -(-tokens // multiple) * multiple


def offsets_by_width(widths: Int64s, counts: Int64s, batch_size: int, budget: int, num_replicas: int) -> Int64s:
    """Cuts sorted samples into as few steps as a token budget allows; an incomplete step holds the shortest samples.

    Args:
        widths: The distinct widths, ascending. Shape (num_widths,).
        counts: Number of samples of each width. Shape (num_widths,).
        batch_size: Maximum number of samples in a batch.
        budget: Token budget of a batch: its number of samples times its largest width is at most this.
        num_replicas: Number of batches in a step.

    Returns:
        Where each step starts among the samples, and the end. Shape (num_steps + 1,).
    """
    sizes_of_width = np.minimum(batch_size, budget // widths) * num_replicas
    runs, ahead = [], 0  # samples of the next width that the last step has already taken
    for count, size in zip(counts[::-1].tolist(), sizes_of_width[::-1].tolist(), strict=True):
        num_steps = max(0, -(-(count - ahead) // size))
        runs.append(np.full(num_steps, size))
        ahead += num_steps * size - count
    sizes = np.concatenate(runs)[::-1].copy()
    sizes[0] -= ahead
    missing = num_replicas - int(sizes[0])
    if missing > 0:  # so that every rank has a sample, taken from the step of the next longer ones
        if sizes[1] - missing < num_replicas:
            raise budget_too_small_error(int(counts.sum()), num_replicas, budget)
        sizes[0] += missing
        sizes[1] -= missing
    return np.concatenate(([0], np.cumsum(sizes)))


def offsets_by_cost(costs: Int64s, parts: int) -> Int64s:
    """Cuts samples into parts of about equal cost with at least one sample each. Returns offsets (parts + 1,)."""
    spent = np.cumsum(costs)
    cuts = np.searchsorted(spent, np.arange(1, parts) * spent[-1] // parts, side="right")
    place = np.arange(1, parts)
    cuts = np.maximum.accumulate(np.maximum(cuts - place, 0)) + place
    return np.concatenate(([0], np.minimum(cuts, len(costs) - parts + place), [len(costs)]))


def argsort(key: NDArray[np.integer], bit_generator: np.random.PCG64 | None, spread: float = 1.0) -> Int64s:
    """Indices that sort `key + uniform(0, spread)`; without `bit_generator`, `key`, with ties in the given order.

    A spread of 1 or less only breaks ties, since keys are whole numbers. The sums are in fixed point, with 16 bits if
    that leaves 64 or more values between two keys, else with 32; ties are broken at random. Only raw bits are drawn,
    which, unlike numpy's distributions, are the same in every version of numpy.
    """
    num_keys = len(key)
    if num_keys == 0:
        return np.empty(0, np.int64)
    key = key - key.min()
    if bit_generator is None:
        return _radix_argsort(key, np.arange(num_keys))
    spread = max(spread, 1.0)
    whole_bits = int(int(key.max()) + spread).bit_length()
    bits, narrow, wide = (16, "<u2", np.uint32) if whole_bits <= 16 - _MIN_FRACTION_BITS else (32, "<u4", np.uint64)
    assert whole_bits <= bits - _MIN_FRACTION_BITS, "lengths and jitter do not fit into 32 bits"
    unit = 1 << (bits - whole_bits)
    raw = bit_generator.random_raw(-(-num_keys * bits // 64)).astype("<u8", copy=False)
    words: NDArray[Any] = raw.view(narrow)[:num_keys].astype(wide)
    words *= int(spread * unit)
    words >>= bits
    words += key.astype(wide) * unit
    return _radix_argsort(words, _scattered_indices(num_keys, bit_generator))


def _radix_argsort(words: NDArray[np.integer], order: NDArray[np.integer]) -> Int64s:
    """Sorts indices by non-negative words; equal ones stay in the given order.

    Sorts 16 bits at a time, which numpy does in linear time on every machine; the speed of its other sorts depends on
    the CPU's instructions.
    """
    for shift in range(0, max(1, int(words.max()).bit_length()), 16):
        digits = (words >> shift).astype(np.uint16)
        order = order.take(digits.take(order).argsort(kind="stable"))
    return order.astype(np.int64, copy=False)


def _scattered_indices(number: int, bit_generator: np.random.PCG64) -> NDArray[np.uint32]:
    """All indices below a number, a random stride apart: not a good shuffle, but good enough to break ties."""
    power = 1 << (number - 1).bit_length()
    indices = np.arange(power, dtype=np.uint32)
    # odd, which makes it a permutation of all indices below the power of two
    indices *= np.uint32(bit_generator.random_raw() & 0xFFFFFFFF | 1)
    indices &= np.uint32(power - 1)
    return indices[indices < number]


def even_offsets(total: int, parts: int) -> Int64s:
    """Offsets of `parts` runs whose sizes differ by at most one, the larger ones first. Shape (parts + 1,)."""
    return split_runs(np.array([0, total]), parts)


def split_runs(offsets: Int64s, parts: int) -> Int64s:
    """Cuts every run into `parts` whose sizes differ by at most one, the larger ones first."""
    size, larger = np.divmod(np.diff(offsets)[:, None], parts)
    part = np.arange(parts)
    starts = offsets[:-1, None] + part * size + np.minimum(part, larger)
    return np.append(starts.ravel(), offsets[-1])


def gather_runs(order: Int64s, offsets: Int64s, runs: Int64s) -> tuple[Int64s, Int64s]:
    """The given runs of `order`, concatenated, and their offsets."""
    starts, sizes = offsets[runs], np.diff(offsets)[runs]
    new_offsets = np.concatenate(([0], np.cumsum(sizes)))
    index = np.repeat(starts - new_offsets[:-1], sizes)
    index += np.arange(len(order))
    return order[index], new_offsets


def tutorial_draws(
    num_samples: int, run: int, num_steps: int, num_replicas: int, bit_generator: np.random.PCG64
) -> tuple[Int64s, Int64s]:
    """Repeatedly removes a random run of `run` neighbours from a list of `num_samples`, closing the gap each time.

    Returns the positions in the original list, draw after draw, and the offsets of the draws. The last draw takes what
    is left; if that is less than one sample per rank, earlier draws are a sample shorter.

    Drawing one after another would move all remaining samples in memory each time. Instead, consecutive draws are
    composed pairwise, in log2(num_steps) passes over all samples: the position that an item of the second half had
    before the first half was drawn is found by binary search among the first half's sorted positions.
    """
    last = min(max(num_samples - (num_steps - 1) * run, num_replicas), num_samples)
    takes = np.diff(even_offsets(num_samples - last, num_steps - 1)) if num_steps > 1 else np.empty(0, np.int64)
    takes = np.append(takes, last)
    steps = np.concatenate(([0], np.cumsum(takes)))
    remaining = num_samples - steps[:-1]
    choices = (remaining - takes + 1).astype(np.uint64)
    starts = ((bit_generator.random_raw(num_steps) >> np.uint64(32)) * choices >> np.uint64(32)).astype(np.int64)

    # Positions in the list just before the draw. Short draws are padded, and so is their number to a power of two, with
    # positions that are too large to ever be searched for.
    width = int(takes.max())
    shape = (1 << (num_steps - 1).bit_length(), width)
    position = 2 * num_samples + np.arange(shape[0] * shape[1]).reshape(shape)
    column = np.arange(width)
    np.copyto(position[:num_steps], starts[:, None] + column, where=column < takes[:, None])
    stride = 2 * (num_samples + position.size)  # separates the positions of one pair of halves from the next pair's
    while width < position.size:
        first, second = position.reshape(-1, 2, width).swapaxes(0, 1)
        pair = np.arange(len(first))[:, None]
        gaps = np.sort(first, axis=1) - np.arange(width)  # how many positions each removal shifts
        shift = np.searchsorted((gaps + pair * stride).ravel(), (second + pair * stride).ravel(), side="right")
        second += shift.reshape(second.shape) - pair * width
        width *= 2
    return position[:num_steps][column < takes[:, None]], steps


def budget_too_small_error(num_samples: int, num_replicas: int, budget: int) -> UsageError:
    """The error to raise if equally many steps would need two samples in a batch that has room for one."""
    return UsageError(
        f"{num_samples} samples cannot be split into equally many batches for {num_replicas} ranks, since the token "
        f"budget of {budget} allows only one sample per batch. Raise it, or use a number of devices that divides the "
        "number of samples."
    )
