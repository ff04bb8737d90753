"""Ragged rows of tokens -> tensors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smartbatch_lightning.batching import BatchSpec
from smartbatch_lightning.errors import UsageError

Rows = Sequence[Mapping[str, Any]]
Collator = Callable[[Rows], Any]

_TOKEN_COLUMNS = ("input_ids", "token_type_ids")
_DEFAULT = BatchSpec()
_MIN_SLOTS = 32  # minimum number of samples in a filled row
_TOKENS_PER_SLOT = 128


class PadCollator:
    """Pads a batch and creates its attention mask.

    Works on this package's samples and on any tokenized rows without padding, such as those of a `datasets.Dataset` in
    any format; `label` is renamed to `labels`, as transformers models expect.

    Args:
        pad_token_id: Padding value for `input_ids`.
        spec: Decides the width of a batch from its longest sample.
        pad_token_type_id: Padding value for `token_type_ids`.
        padding_side: `right` or `left`.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        spec: BatchSpec = _DEFAULT,
        *,
        pad_token_type_id: int = 0,
        padding_side: str = "right",
    ) -> None:
        self.spec = spec
        self.padding_side = padding_side
        self.padding_values = {"input_ids": pad_token_id, "token_type_ids": pad_token_type_id}

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, spec: BatchSpec) -> "PadCollator":
        """A collator with a tokenizer's padding token and side."""
        return cls(
            tokenizer.pad_token_id or 0,
            spec,
            pad_token_type_id=tokenizer.pad_token_type_id,
            padding_side=tokenizer.padding_side,
        )

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Tensors of a batch.

        Args:
            rows: For each sample `input_ids` and optionally `token_type_ids`, both of shape (length,), and numbers.

        Returns:
            `input_ids`, `attention_mask` and, if given, `token_type_ids` (batch, width), int64; everything else
            (batch, ...). With windows, each window is a row; `window_counts` (batch,) has the number of each sample's
            windows, and `window_pooling` says how their logits are pooled.
        """
        lengths, windows = _window_lengths(rows, self.spec)
        width = int(self.spec.width(lengths.max()))
        on_right = self.padding_side == "right"
        mask = np.arange(width) < lengths[:, None]
        mask = mask if on_right else mask[:, ::-1]
        batch: dict[str, Any] = {}
        for name in _token_columns(rows):
            padded = np.full((len(lengths), width), self.padding_values[name], np.int64)
            padded[mask] = np.concatenate([np.asarray(row[name]) for row in rows])
            batch[name] = torch.from_numpy(padded)
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return {**batch, **windows, **_numbers(rows)}


class PackCollator:
    """Concatenates the samples of a batch into a single row, without padding.

    Also known as *padding-free* or *varlen*: `cu_seq_lens_q` marks where each sample starts, with the names of
    transformers' `DataCollatorWithFlattening`, as in FlashAttention's varlen functions (Dao, 2023). For models prepared
    with `enable_packing`; `SequenceClassifier` does so by itself. Takes the same rows as `PadCollator`.

    With `pad_to_multiple_of`, padding samples fill the row up, and the other shapes are kept constant too: the number
    of samples is a power of two, at least one per 128 tokens, the last of them empty, and the longest has `max_length`.
    Compiled models, CUDA graphs and attention plans then see one shape, or two if samples are short. Only the first
    `num_samples` outputs of such a batch count.

    Args:
        pad_token_id: Token that fills the row up.
        spec: Supplies `pad_to_multiple_of` and `max_length`.
    """

    def __init__(self, pad_token_id: int = 0, spec: BatchSpec = _DEFAULT) -> None:
        self.pad_token_id = pad_token_id
        self.spec = spec

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, spec: BatchSpec) -> "PackCollator":
        """A collator with a tokenizer's padding token."""
        return cls(tokenizer.pad_token_id or 0, spec)

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Tensors of a batch.

        Args:
            rows: For each sample `input_ids` and optionally `token_type_ids`, both of shape (length,), and numbers.

        Returns:
            `input_ids`, `position_ids`, which restart at 0 in each sample, and, if given, `token_type_ids` (1, tokens),
            int64; `cu_seq_lens_q` and `cu_seq_lens_k` (batch + 1,), int32, where each sample starts, and the end;
            `max_length_q` and `max_length_k`, the tokens of the longest sample; everything else (batch, ...). If the
            row is filled up, also `num_samples`, the number of real samples. With windows, each window counts as a
            sample in all of these; `window_counts` (batch,) has the number of each text's windows, and `window_pooling`
            says how their logits are pooled.
        """
        lengths, windows = _window_lengths(rows, self.spec)
        longest = int(lengths.max())
        constant: dict[str, int] = {}
        if self.spec.pad_to_multiple_of > 1:
            longest = max(longest, self.spec.max_length or 0)
            constant["num_samples"] = len(lengths)
            lengths = self._fill(lengths, longest)
        cu_seq_lens = np.concatenate(([0], np.cumsum(lengths)))
        width = int(cu_seq_lens[-1])
        batch: dict[str, Any] = {}
        for name in _token_columns(rows):
            values = np.concatenate([np.asarray(row[name]) for row in rows])
            row = np.full((1, width), self.pad_token_id if name == "input_ids" else 0, np.int64)
            row[0, : len(values)] = values
            batch[name] = torch.from_numpy(row)
        batch["position_ids"] = torch.from_numpy((np.arange(width) - np.repeat(cu_seq_lens[:-1], lengths))[None])
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.from_numpy(cu_seq_lens.astype(np.int32))
        batch["max_length_q"] = batch["max_length_k"] = longest
        return {**batch, **constant, **windows, **_numbers(rows)}

    def _fill(self, lengths: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
        """Lengths of the samples, of padding samples, and of empty samples, a power of two in all."""
        missing = -int(lengths.sum()) % self.spec.pad_to_multiple_of
        fillers = np.diff([*range(0, missing, longest), missing])
        least = (int(lengths.sum()) + missing) // _TOKENS_PER_SLOT
        number = 1 << (max(least, _MIN_SLOTS, len(lengths) + len(fillers)) - 1).bit_length()
        empty = np.zeros(number - len(lengths) - len(fillers), np.int64)
        return np.concatenate((lengths, fillers, empty))


# By `padding`: creates a collator from a tokenizer and a `BatchSpec`.
COLLATORS: dict[str, Callable[[PreTrainedTokenizerBase, BatchSpec], Collator]] = {
    "longest": PadCollator.from_tokenizer,
    "max_length": PadCollator.from_tokenizer,
    "packed": PackCollator.from_tokenizer,
}


def batch_lengths(batch: Any) -> Tensor | None:
    """Real tokens of each sample, on the batch's device. Shape (batch,); None if neither collator made the batch."""
    lengths = window_lengths(batch)
    if lengths is None or "window_counts" not in batch:
        return lengths
    return torch.segment_reduce(lengths.float(), "sum", lengths=batch["window_counts"], unsafe=True).long()


def window_lengths(batch: Any) -> Tensor | None:
    """Real tokens of each window; without windows, of each sample. Shape (windows,); else None."""
    if isinstance(batch, Mapping) and "cu_seq_lens_q" in batch:
        return torch.diff(batch["cu_seq_lens_q"])[: batch.get("num_samples")]
    if isinstance(batch, Mapping) and "attention_mask" in batch:
        lengths: Tensor = batch["attention_mask"].sum(dim=1)
        return lengths
    return None


def _window_lengths(rows: Rows, spec: BatchSpec) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """Number of tokens in each window, (windows,), and the batch's entries about windows, if there are any."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    if spec.window_pooling is None or spec.max_length is None:
        return lengths, {}
    counts = spec.windows(lengths)
    windows = np.full(counts.sum(), spec.max_length)
    windows[np.cumsum(counts) - 1] = lengths - (counts - 1) * spec.max_length
    return windows, {"window_counts": torch.from_numpy(counts), "window_pooling": spec.window_pooling}


def _token_columns(rows: Rows) -> list[str]:
    return [name for name in _TOKEN_COLUMNS if name in rows[0]]


def _numbers(rows: Rows) -> dict[str, Tensor]:
    """The numeric columns as tensors (batch, ...)."""
    columns = {}
    for name, first in rows[0].items():
        if name in (*_TOKEN_COLUMNS, "attention_mask"):
            continue
        values = np.array(
            [np.asarray(row[name]) for row in rows] if isinstance(first, Tensor) else [row[name] for row in rows]
        )
        if values.dtype.kind not in "biuf":
            raise UsageError(
                f"the column {name!r} holds {type(first).__name__}, which cannot become a tensor. Remove it from the "
                "rows."
            )
        columns["labels" if name == "label" else name] = torch.from_numpy(values)
    return columns
