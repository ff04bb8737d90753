"""Tokenized text in Arrow, written once and memory-mapped afterwards; lengths and rows are read without copying."""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset
from xxhash import xxh3_128

from smartbatch_lightning.cache import CacheLock
from smartbatch_lightning.errors import UsageError

COLUMN_TYPES: dict[str, np.dtype[Any]] = {"input_ids": np.dtype(np.int32), "token_type_ids": np.dtype(np.int8)}


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """A column whose rows are slices of a flat array.

    Attributes:
        values: Shape (num_values,).
        offsets: Start of each row, and the end. Shape (num_rows + 1,), integers.
    """

    values: NDArray[Any]
    offsets: NDArray[np.integer]

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def flat(self) -> NDArray[Any]:
        """All rows, one after another."""
        return self.values[self.offsets[0] : self.offsets[-1]]


class TokenTable:
    """Token ids of samples, in blocks of consecutive samples: flat arrays of which every sample is a slice.

    Attributes:
        lengths: Tokens of each sample. Shape (num_samples,), int32.

    Args:
        blocks: The columns of each block, by name.
        lost_tokens: For each block, the number of tokens cut from each sample; by default none.
    """

    def __init__(self, blocks: Sequence[Mapping[str, Ragged]], lost_tokens: Sequence[NDArray[np.int32]] = ()) -> None:
        self._blocks = blocks
        self._lost_tokens = lost_tokens
        lengths = [np.diff(block["input_ids"].offsets).astype(np.int32) for block in blocks]
        self.lengths = np.concatenate([np.empty(0, np.int32), *lengths])
        self._starts = [0, *accumulate(map(len, lengths))]

    @classmethod
    def from_rows(cls, rows: Iterable[Any], lost_tokens: Sequence[int] = ()) -> "TokenTable":
        """Keeps rows in memory: lists of ids, or mappings with `input_ids` and optionally `token_type_ids`.

        If a mapping has an `attention_mask`, tokens that it masks are dropped.

        Args:
            rows: One for each sample.
            lost_tokens: Tokens of each sample that were cut; by default none.

        Raises:
            ValueError: A row has no tokens, or has something other than whole numbers.
        """
        kept = [_without_padding(row) if isinstance(row, Mapping) else {"input_ids": row} for row in rows]
        columns: dict[str, Ragged] = {}
        for name in [name for name in COLUMN_TYPES if kept and name in kept[0]]:
            arrays = [np.asarray(row[name]) for row in kept]
            for row, array in enumerate(arrays):
                if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
                    raise UsageError(
                        f"tokenize gave {name} of the shape {array.shape} and the type {array.dtype} for row {row}; "
                        "give a list of one or more whole numbers."
                    )
            offsets = np.concatenate(([0], np.cumsum([len(array) for array in arrays])))
            columns[name] = Ragged(np.concatenate(arrays).astype(COLUMN_TYPES[name]), offsets)
        if not columns:
            raise UsageError("tokenize gave no rows of token ids; give a list of ids for each sample.")
        return cls([columns], [np.array(lost_tokens, np.int32)] if len(lost_tokens) else ())

    @property
    def lost_tokens(self) -> NDArray[np.int32] | None:
        """Number of tokens cut from each sample. Shape (num_samples,), int32; None if not known yet."""
        return np.concatenate(self._lost_tokens) if self._lost_tokens else np.zeros(len(self), np.int32)

    @cached_property
    def digest(self) -> str:
        """Hash of all token ids and lengths, the same for files and memory; 3 ms for IMDB."""
        digest = xxh3_128()
        for block in self._blocks:
            digest.update(np.diff(block["input_ids"].offsets).astype(np.int64).data)
        for name in self._blocks[0] if self._blocks else ():
            for block in self._blocks:
                digest.update(block[name].flat.data)
        return digest.hexdigest()

    def check(self, check: "Check") -> None:
        """Runs a check on the token ids of all samples."""
        check(self, range(len(self)))

    def check_ids(self, vocabulary_size: int, token_types: int | None) -> None:
        """Rejects ids and token types for which a model has no embedding.

        Args:
            vocabulary_size: The number of tokens.
            token_types: The number of token types; None if any are taken.

        Raises:
            ValueError: An id or a type is negative, or not below its number.
        """
        for block in self._blocks:
            ids = block["input_ids"].flat
            if ids.min() < 0 or ids.max() >= vocabulary_size:
                raise UsageError(
                    f"tokenize gave ids from {ids.min()} to {ids.max()}, but the tokenizer has {vocabulary_size:,} "
                    "tokens. Give the data module the tokenizer that made the ids."
                )
            types = block["token_type_ids"].flat if token_types and "token_type_ids" in block else ids[:0]
            if types.size and (types.min() < 0 or types.max() >= token_types):
                raise UsageError(
                    f"samples have token types from {types.min()} to {types.max()}, but the model's type_vocab_size is "
                    f"{token_types}. Give the data module the model's own tokenizer, or have tokenize return only "
                    "input_ids."
                )

    def counts(self, token: int) -> NDArray[np.int64]:
        """How often a token occurs in each sample. Shape (num_samples,)."""
        counts = [np.empty(0, np.int64)]
        for block in self._blocks:
            ids = block["input_ids"]
            counts.append(np.add.reduceat(ids.flat == token, ids.offsets[:-1] - ids.offsets[0], dtype=np.int64))
        return np.concatenate(counts)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sample: int) -> dict[str, NDArray[Any]]:
        """Views of a sample's `input_ids` and, if the model uses them, `token_type_ids`. Shapes (length,)."""
        sample = range(len(self))[sample]
        block = bisect_right(self._starts, sample) - 1
        row = sample - self._starts[block]
        return {name: column[row] for name, column in self._blocks[block].items()}

    def samples(self, rows: Sequence[int]) -> list[dict[str, NDArray[Any]]]:
        """Like `self[row]`, for several rows."""
        return [self[row] for row in rows]


Check = Callable[[TokenTable, Sequence[int]], None]  # rejects samples, naming them by these row numbers


class TokenFile(TokenTable):
    """A `TokenTable` memory-mapped from the Arrow files of a folder; slices are given by Arrow's offsets.

    Args:
        path: A folder written by `tokenize_to_cache`.

    Raises:
        ValueError: A file is missing, cut short or corrupt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = CacheLock(path)
        shards = [_Shard(file) for file in sorted(path.glob("*.arrow"))]
        super().__init__(
            [block for shard in shards for block in shard.blocks],
            [lost_tokens for shard in shards for lost_tokens in shard.lost_tokens],
        )
        declared = {(shard.num_samples, shard.max_length) for shard in shards}
        if (
            len(declared) != 1
            or len(self) != shards[0].num_samples
            or not (np.all(self.lengths >= 1) and np.all(self.lengths <= (shards[0].max_length or np.inf)))
        ):
            raise ValueError(f"{path} does not hold the samples that its files declare. Delete it; it will be rebuilt.")

    def __reduce__(self) -> tuple[type["TokenFile"], tuple[Path]]:
        return TokenFile, (self.path,)


class TokenDataset(TorchDataset[dict[str, Any]]):
    """Samples for training: token ids, label and row number.

    Args:
        table: Token ids of all samples of a split.
        labels: Label of each row of the table, (num_rows, ...); None without labels.
        rows: Rows of the table that belong to this data set; by default all.
    """

    def __init__(
        self, table: TokenTable, labels: NDArray[Any] | None = None, rows: NDArray[np.int64] | None = None
    ) -> None:
        self.table = table
        self.labels = labels
        self.rows = np.arange(len(table)) if rows is None else rows
        self.lengths: NDArray[np.int32] = table.lengths if rows is None else table.lengths[rows]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sample_labels(self) -> NDArray[Any] | None:
        """Labels of its samples, (len(self), ...); None without labels."""
        return None if self.labels is None else self.labels[self.rows]

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """`input_ids`, optionally `token_type_ids` and `labels`, and `index`, the row in the loaded split."""
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """Like `self[sample]`, for all samples of a batch, which torch requests together."""
        rows = self.rows[samples].tolist()
        fields: list[dict[str, Any]] = [
            {**tokens, "index": row} for tokens, row in zip(self.table.samples(rows), rows, strict=True)
        ]
        if self.labels is not None:
            for one, row in zip(fields, rows, strict=True):
                one["labels"] = self.labels[row]
        return fields


def _without_padding(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row without the tokens that its attention mask excludes."""
    mask = row.get("attention_mask")
    if mask is None:
        return row
    attended = np.asarray(mask, bool)
    return {name: np.asarray(row[name])[attended] for name in COLUMN_TYPES if name in row}


class _Shard:
    """Views of one of the files.

    Attributes:
        blocks: The columns of each block.
        lost_tokens: For each block, the number of tokens cut from each sample.
        num_samples: Number of samples in all files.
        max_length: Maximum number of tokens in a sample; None for any number.

    Raises:
        ValueError: The file is cut short or corrupt.
    """

    def __init__(self, path: Path) -> None:
        self.blocks: list[dict[str, Ragged]] = []
        self.lost_tokens: list[NDArray[np.int32]] = []
        try:
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_file(file.read_buffer())
            declared = json.loads(reader.schema.metadata[b"smartbatch"])
            self.num_samples, self.max_length = declared["num_samples"], declared["max_length"]
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                self.lost_tokens.append(columns.pop("lost_tokens").to_numpy())
                self.blocks.append(
                    {name: Ragged(one.values.to_numpy(), one.offsets.to_numpy()) for name, one in columns.items()}
                )
        except (pa.ArrowException, OSError, KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path} is not a valid token file: {error}. Delete it; it will be rebuilt.") from error
