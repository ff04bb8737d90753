"""Ragged rows of tokens -> tensors."""

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Padding = Literal["longest", "max_length"]


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
        padding: Padding = "longest",
        max_length: int | None = None,
        pad_to_multiple_of: int = 1,
    ) -> None:
        if padding not in ("longest", "max_length"):
            raise ValueError(f"padding is {padding!r}; choose longest or max_length.")
        if padding == "max_length" and max_length is None:
            raise ValueError("padding is 'max_length', but max_length is None; give the width in tokens.")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of}; give 1 or more.")
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

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tensors of a batch.

        Args:
            rows: For each sample `input_ids`, perhaps `token_type_ids`, both of shape (length,), and single numbers.

        Returns:
            `input_ids`, `attention_mask` and perhaps `token_type_ids` (batch, width), everything else (batch,); int64.
        """
        lengths = np.array([len(row["input_ids"]) for row in rows])
        width = self.width(int(lengths.max()))
        batch: dict[str, Tensor] = {}
        for name in rows[0]:
            if name == "attention_mask":
                continue
            if name in ("input_ids", "token_type_ids"):
                filler = self.pad_token_id if name == "input_ids" else 0
                padded = np.full((len(rows), width), filler, np.int64)
                for line, row in zip(padded, rows, strict=True):
                    line[: len(row[name])] = row[name]
                batch[name] = torch.from_numpy(padded)
            else:
                values = [row[name] for row in rows]
                if not isinstance(values[0], Number):
                    raise ValueError(
                        f"the column {name!r} holds {type(values[0]).__name__}, which makes no tensor. Remove it from "
                        "the rows."
                    )
                batch["labels" if name == "label" else name] = torch.tensor(values)
        batch["attention_mask"] = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
        return batch
