"""The limits and the cost of a batch, used by everything that plans, builds or counts batches."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smartbatch_lightning.batching.arrays import Int64s, round_up
from smartbatch_lightning.errors import UsageError, check_at_least, join_quoted

_DEFAULT_BATCH_SIZE = 16
_MAX_JITTER = 1_000_000  # leaves practically nothing of the order by length


@dataclass(frozen=True)
class BatchSpec:
    """The batching strategy, the limits of a batch on one rank, and how it is padded.

    Args:
        batching: Batching strategy: `smart`, `tutorial`, `random`, a name given to `register_strategy`, or an import
            path.
        batch_size: Maximum number of samples in a batch, per rank; by default 16, or as many as the token budget
            allows. Only if it is 1 and the number of samples is not divisible by the number of ranks do some batches
            hold two, so that all ranks take the same number of steps.
        max_tokens_per_batch: Token budget of a batch, per rank, padding included.
        padding: `longest` pads a batch to its longest sample, `max_length` to `max_length`; `packed` concatenates the
            samples without padding.
        pad_to_multiple_of: Pads the width of a batch to a multiple of this, but never beyond `max_length`; for a packed
            batch, its total tokens, so that the token budget itself gives all rows the same length.
        max_length: Maximum tokens of a sample; None if unknown.
        window_pooling: How the model pools the logits of a text's windows, `mean` or `max`; None without windows. With
            windows, a sample of more than `max_length` tokens is a sequence of windows, all but the last `max_length`
            long, which stay in one batch and are padded as separate rows.
        jitter: `smart` only: random noise, in tokens, added to each sample's length before sorting. More jitter mixes
            batches more from epoch to epoch but pads more; up to 0.5 it only breaks ties. `auto` takes the smallest
            value that keeps the batch overlap under 10 %, as long as padding stays within 1 % of the real tokens.
        seed: Seed of the whole run.

    Raises:
        ValueError: An argument is out of range.
    """

    batching: str = "smart"
    batch_size: int | None = None
    max_tokens_per_batch: int | None = None
    padding: str = "longest"
    pad_to_multiple_of: int = 1
    max_length: int | None = None
    window_pooling: str | None = None
    jitter: float | Literal["auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens_per_batch", "pad_to_multiple_of", "max_length"):
            if (value := getattr(self, name)) is not None:
                check_at_least(1, **{name: value})
        if self.padding not in PADDING_WIDTHS:
            raise UsageError(f"padding is {self.padding!r}; choose one of {join_quoted(PADDING_WIDTHS)}.")
        if self.packed and self.max_tokens_per_batch and self.max_tokens_per_batch % self.pad_to_multiple_of:
            raise UsageError(
                f"pad_to_multiple_of is {self.pad_to_multiple_of}, but max_tokens_per_batch, "
                f"{self.max_tokens_per_batch}, is not a multiple of it, as packed batches need. Change one of the two."
            )
        if self.padding == "max_length" and self.max_length is None:
            raise UsageError("padding is 'max_length', but max_length is None; set it to the width in tokens.")
        if self.window_pooling and self.max_length is None:
            raise UsageError("texts are split into windows, but max_length is None; set it to the width of a window.")
        if self.jitter != "auto" and not (isinstance(self.jitter, int | float) and 0 <= self.jitter <= _MAX_JITTER):
            raise UsageError(f"jitter is {self.jitter}; give a number of tokens from 0 to {_MAX_JITTER:,}, or 'auto'.")
        if self.batch_size is None and self.max_tokens_per_batch is None:
            object.__setattr__(self, "batch_size", _DEFAULT_BATCH_SIZE)
        check_at_least(0, seed=self.seed)

    @property
    def packed(self) -> bool:
        """Whether samples are concatenated instead of padded."""
        return PADDING_WIDTHS[self.padding] is None

    @property
    def fixed_width(self) -> bool:
        """Whether all batches are `max_length` wide."""
        return self.padding == "max_length"

    def width(self, longest: ArrayLike) -> Int64s:
        """Width of a batch whose longest sample has this many tokens; takes arrays of any shape."""
        longest = np.asarray(longest, np.int64)
        return longest if self.packed else self.windows(longest) * self._row_width(longest)

    def windows(self, lengths: ArrayLike) -> Int64s:
        """Number of rows for samples of these lengths: one, or one per window; takes arrays of any shape."""
        return -(-np.asarray(lengths, np.int64) // self._longest_row)

    def tokens(self, lengths: ArrayLike, offsets: Int64s) -> Int64s:
        """Tokens in each batch, padding included.

        Args:
            lengths: Sample lengths, batch after batch. Shape (num_samples,).
            offsets: Where each batch starts, and the end. Shape (num_batches + 1,).

        Returns:
            Shape (num_batches,).
        """
        lengths = np.asarray(lengths, np.int64)
        if self.packed:
            return round_up(np.add.reduceat(lengths, offsets[:-1]), self.pad_to_multiple_of)
        rows = np.add.reduceat(self.windows(lengths), offsets[:-1])
        return rows * self._row_width(np.maximum.reduceat(lengths, offsets[:-1]))

    def token_pairs(self, lengths: ArrayLike, offsets: Int64s) -> Int64s:
        """Pairs of tokens that attention compares in each batch; arguments and shape as for `tokens`."""
        lengths = np.asarray(lengths, np.int64)
        if self.packed:
            filled = self.tokens(lengths, offsets) - np.add.reduceat(lengths, offsets[:-1])
            longest = self._row_width(np.maximum.reduceat(lengths, offsets[:-1]))
            longest = np.maximum(longest, self.max_length or 0)
            whole, rest = np.divmod(filled, longest)  # padding samples, as long as possible
            before = (self.windows(lengths) - 1) * self._longest_row  # tokens of a sample before its last window
            of_samples = before * self._longest_row + (lengths - before) ** 2
            pairs: Int64s = np.add.reduceat(of_samples, offsets[:-1]) + whole * longest**2 + rest**2
            return pairs
        return self.tokens(lengths, offsets) * self._row_width(np.maximum.reduceat(lengths, offsets[:-1]))

    def samples_per_batch(self, longest: int, num_samples: int) -> int:
        """Samples that always fit into a batch, out of `num_samples` with at most `longest` tokens."""
        most = self.batch_size or max(1, num_samples)
        if self.max_tokens_per_batch is None:
            return most
        return min(most, self.max_tokens_per_batch // int(self.width(longest)))

    def check_lengths(self, lengths: NDArray[np.integer], rows: Int64s | None = None) -> None:
        """Rejects samples that are longer than the token budget.

        Args:
            lengths: Tokens of each sample. Shape (num_samples,).
            rows: Row numbers of the samples, for the message; by default their positions. Shape (num_samples,).

        Raises:
            ValueError: A batch of one sample would exceed the budget.
        """
        if self.max_tokens_per_batch is None or not len(lengths):
            return
        longest = int(lengths.argmax())
        width = int(self.width(lengths[longest]))
        if width > self.max_tokens_per_batch:
            raise UsageError(
                f"sample {longest if rows is None else rows[longest]} takes {width} tokens, but max_tokens_per_batch "
                f"is {self.max_tokens_per_batch}. Set it to {width} or more, or "
                f"lower {'max_windows' if self.windows(lengths[longest]) > 1 else 'max_length'}."
            )

    @property
    def _longest_row(self) -> int:
        """Maximum tokens of a row; longer samples are split into windows."""
        return self.max_length if self.window_pooling and self.max_length else 2**62

    def _row_width(self, longest: Int64s) -> Int64s:
        """Width of the rows of a batch whose longest sample has this many tokens."""
        row, padded = np.minimum(longest, self._longest_row), PADDING_WIDTHS[self.padding]
        return row if padded is None else np.maximum(row, padded(self, row))

    def fingerprint(self) -> dict[str, Any]:
        """Everything that a plan depends on besides the lengths and the number of ranks."""
        settings = asdict(self)
        if self.window_pooling is None:
            del settings["window_pooling"]
        if self.max_tokens_per_batch is None:  # without a budget, a plan does not depend on the width of its batches
            for name in ("padding", "pad_to_multiple_of", "max_length"):
                del settings[name]
        return settings


def _to_longest(spec: BatchSpec, longest: Int64s) -> Int64s:
    width = round_up(longest, spec.pad_to_multiple_of)
    return width if spec.max_length is None else np.minimum(width, spec.max_length)


def _to_max_length(spec: BatchSpec, longest: Int64s) -> Int64s:
    return np.full_like(longest, spec.max_length)


# By `padding`, the width of batches with the given longest samples, which are never cut; None for packed batches.
PADDING_WIDTHS: dict[str, Callable[[BatchSpec, Int64s], Int64s] | None] = {
    "longest": _to_longest,
    "max_length": _to_max_length,
    "packed": None,
}
