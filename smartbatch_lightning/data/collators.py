"""Ragged rows of tokens -> tensors."""

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smartbatch_lightning.errors import UsageError

Padding = Literal["longest", "max_length", "packed"]
Rows = Sequence[Mapping[str, Any]]

_TOKEN_COLUMNS = ("input_ids", "token_type_ids")


class PadCollator:
    """Pads a batch on the right and makes its attention mask.

    Works on this package's samples and on any tokenized rows without padding, such as those of a `datasets.Dataset`;
    a `label` becomes `labels`, as transformers' models expect.

    Args:
        pad_token_id: What `input_ids` are padded with.
        padding: `longest` pads to the longest sample of the batch, `max_length` always to `max_length`.
        max_length: Width to which rounding up and `padding="max_length"` go; a longer sample is wider still.
        pad_to_multiple_of: Rounds the width up to a multiple, but never beyond `max_length`.

    Raises:
        ValueError: `padding` is unknown, or it is `max_length` and none is given.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        *,
        padding: Literal["longest", "max_length"] = "longest",
        max_length: int | None = None,
        pad_to_multiple_of: int = 1,
    ) -> None:
        if padding not in ("longest", "max_length"):
            raise UsageError(f"padding is {padding!r}; choose longest or max_length.")
        if padding == "max_length" and max_length is None:
            raise UsageError("padding is 'max_length', but max_length is None; give the width in tokens.")
        if pad_to_multiple_of < 1:
            raise UsageError(f"pad_to_multiple_of is {pad_to_multiple_of}; give 1 or more.")
        self.pad_token_id = pad_token_id
        self.padding = padding
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of

    def width(self, longest: int) -> int:
        """Tokens to which a batch with this longest sample is padded."""
        if self.padding == "max_length" and self.max_length is not None:
            return max(longest, self.max_length)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return width if self.max_length is None else max(longest, min(width, self.max_length))

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """Tensors of a batch.

        Args:
            rows: For each sample `input_ids`, perhaps `token_type_ids`, both of shape (length,), and single numbers.

        Returns:
            `input_ids`, `attention_mask` and perhaps `token_type_ids` (batch, width), everything else (batch,); int64.
        """
        lengths = _lengths(rows)
        width = self.width(int(lengths.max()))
        batch: dict[str, Tensor] = {}
        for name in _token_columns(rows):
            padded = np.full((len(rows), width), self.pad_token_id if name == "input_ids" else 0, np.int64)
            for line, row in zip(padded, rows, strict=True):
                line[: len(row[name])] = row[name]
            batch[name] = torch.from_numpy(padded)
        batch["attention_mask"] = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
        return {**batch, **_numbers(rows)}


class PackCollator:
    """Puts the samples of a batch one after another into a single row, without any padding.

    What is known as *padding-free* or *varlen*: `cu_seqlens` says where each sample starts, as in FlashAttention's
    varlen functions (Dao, 2023). For models that `smartbatch_lightning.models.packing.enable_packing` has prepared, as
    `SequenceClassifier` does by itself. Takes the same rows as `PadCollator`.
    """

    def __call__(self, rows: Rows) -> dict[str, Tensor | int]:
        """Tensors of a batch.

        Args:
            rows: For each sample `input_ids`, perhaps `token_type_ids`, both of shape (length,), and single numbers.

        Returns:
            `input_ids`, `position_ids`, which start again at 0 in each sample, and perhaps `token_type_ids`
            (1, tokens), int64; `cu_seqlens` (batch + 1,), int32, where each sample starts, and the end; `max_seqlen`,
            the tokens of the longest sample; everything else (batch,), int64.
        """
        lengths = _lengths(rows)
        cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        batch: dict[str, Tensor | int] = {
            name: torch.from_numpy(np.concatenate([row[name] for row in rows]).astype(np.int64)[None])
            for name in _token_columns(rows)
        }
        batch["position_ids"] = torch.from_numpy(positions[None])
        batch["cu_seqlens"] = torch.from_numpy(cu_seqlens.astype(np.int32))
        batch["max_seqlen"] = int(lengths.max())
        return {**batch, **_numbers(rows)}


def batch_lengths(batch: Any) -> Tensor | None:
    """Real tokens of each sample of a batch that either collator made, on its device. Shape (batch,); else None."""
    if isinstance(batch, Mapping) and "cu_seqlens" in batch:
        return torch.diff(batch["cu_seqlens"])
    if isinstance(batch, Mapping) and "attention_mask" in batch:
        lengths: Tensor = batch["attention_mask"].sum(dim=1)
        return lengths
    return None


def _lengths(rows: Rows) -> NDArray[np.int64]:
    return np.array([len(row["input_ids"]) for row in rows])


def _token_columns(rows: Rows) -> list[str]:
    return [name for name in _TOKEN_COLUMNS if name in rows[0]]


def _numbers(rows: Rows) -> dict[str, Tensor]:
    """The columns that hold a number for each sample, as tensors (batch,)."""
    columns = {}
    for name in rows[0]:
        if name in (*_TOKEN_COLUMNS, "attention_mask"):
            continue
        values = [row[name] for row in rows]
        if not isinstance(values[0], Number):
            raise UsageError(
                f"the column {name!r} holds {type(values[0]).__name__}, which makes no tensor. Remove it from the rows."
            )
        columns["labels" if name == "label" else name] = torch.tensor(values)
    return columns
