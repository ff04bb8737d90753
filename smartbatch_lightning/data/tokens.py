"""Tokenized text on Arrow: written once, memory-mapped afterwards; lengths for free, rows without a copy."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm
from xxhash import xxh3_128

from smartbatch_lightning.data.encoding import TextEncoder, Texts, check_texts
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.storage import write_if_missing

_FORMAT = 3
_ROWS_PER_WRITE = 4096
_COLUMN_TYPES: dict[str, np.dtype[Any]] = {"input_ids": np.dtype(np.int32), "token_type_ids": np.dtype(np.int8)}


_Slices = tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]


class TokenTable:
    """Token ids of samples: flat arrays in which every sample is a slice.

    Attributes:
        lengths: Tokens of each sample. Shape (num_samples,), int64.
        num_truncated: Samples that were cut.

    Args:
        columns: By name, the flat array, and where each sample's slice starts and how long it is.
        num_truncated: Samples that were cut.
    """

    def __init__(self, columns: dict[str, _Slices], num_truncated: int = 0) -> None:
        self._columns = columns
        self.num_truncated = num_truncated
        self.lengths = columns["input_ids"][2]

    @classmethod
    def from_rows(cls, rows: Iterable[Any]) -> "TokenTable":
        """Keeps rows in memory: lists of ids, or mappings with `input_ids` and perhaps `token_type_ids`.

        Where a mapping has an `attention_mask`, tokens that it leaves out are left out.

        Raises:
            ValueError: A row has no tokens, or holds something else than whole numbers.
        """
        kept = [_without_padding(row) if isinstance(row, Mapping) else {"input_ids": row} for row in rows]
        columns: dict[str, _Slices] = {}
        for name in [name for name in _COLUMN_TYPES if kept and name in kept[0]]:
            arrays = [np.asarray(row[name]) for row in kept]
            for row, array in enumerate(arrays):
                if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
                    raise UsageError(
                        f"tokenize gave {name} of the shape {array.shape} and the type {array.dtype} for row {row}; "
                        "give a list of one or more whole numbers."
                    )
            lengths = np.array([len(array) for array in arrays], np.int64)
            starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
            columns[name] = (np.concatenate(arrays).astype(_COLUMN_TYPES[name]), starts, lengths)
        if not columns:
            raise UsageError("tokenize gave no rows of token ids; give a list of ids for each sample.")
        return cls(columns)

    @cached_property
    def digest(self) -> str:
        """Hash of all token ids and lengths, whether they are in a file or in memory; 3 ms for IMDB."""
        digest = xxh3_128(self.lengths.tobytes())
        for name in self._columns:
            for run in self._runs(name):
                digest.update(run.data)
        return digest.hexdigest()

    def check_ids(self, vocabulary_size: int) -> None:
        """Refuses ids that a model has no embedding for.

        Raises:
            ValueError: An id is negative, or not below the size of the vocabulary.
        """
        for run in self._runs("input_ids"):
            if run.min() < 0 or run.max() >= vocabulary_size:
                raise UsageError(
                    f"tokenize gave ids from {run.min()} to {run.max()}, but the tokenizer has {vocabulary_size:,} "
                    "tokens. Give the data module the tokenizer that the ids are of."
                )

    def counts(self, token: int) -> NDArray[np.int64]:
        """How often a token stands in each sample. Shape (num_samples,)."""
        flat, starts, lengths = self._columns["input_ids"]
        spans = zip(starts, lengths, strict=True)
        return np.array([np.count_nonzero(flat[start : start + length] == token) for start, length in spans], np.int64)

    def _runs(self, name: str) -> Iterator[NDArray[Any]]:
        """The tokens of a column in order, as views of as many samples as lie side by side."""
        flat, starts, lengths = self._columns[name]
        breaks = np.flatnonzero(starts[1:] != starts[:-1] + lengths[:-1]) + 1
        for first, end in zip([0, *breaks], [*breaks, len(starts)], strict=True):
            if end:
                yield flat[starts[first] : starts[end - 1] + lengths[end - 1]]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sample: int) -> dict[str, NDArray[Any]]:
        """Views of a sample's `input_ids` and, for pairs, `token_type_ids`. Shapes (length,)."""
        row = {}
        for name, (flat, starts, lengths) in self._columns.items():
            start = starts[sample]
            row[name] = flat[start : start + lengths[sample]]
        return row


class TokenFile(TokenTable):
    """The same, memory-mapped from an Arrow file; where the slices are comes from the offsets that Arrow keeps.

    Args:
        path: A file written by `tokenize_to_cache`.

    Raises:
        ValueError: The file is cut short or corrupt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pa.memory_map(str(path)) as file:
                content = file.read_buffer()
            reader = pa.ipc.open_file(content)
            read = [reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches)]
            batches = [batch for batch, _ in read]
            num_truncated = sum(int(noted[b"truncated"]) for _, noted in read)
            declared = json.loads(reader.schema.metadata[b"smartbatch"])
            super().__init__({name: _slices(content, batches, name) for name in reader.schema.names}, num_truncated)
        except (pa.ArrowException, OSError, KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path} is no valid token file: {error}. Delete it; it is made again.") from error
        if len(self.lengths) != declared["num_samples"] or not (
            np.all(self.lengths >= 1) and np.all(self.lengths <= declared["max_length"])
        ):
            raise ValueError(f"{path} does not hold the samples that it declares. Delete it; it is made again.")

    def __reduce__(self) -> tuple[type["TokenFile"], tuple[Path]]:
        return TokenFile, (self.path,)


class TokenDataset(TorchDataset[dict[str, Any]]):
    """Samples for training: token ids, label and row number.

    Args:
        table: Token ids of all samples of a split.
        labels: Label of each sample, or None where there are none. Shape (num_rows of the table, ...).
        rows: Rows of the table that belong to this data set; by default all.
    """

    def __init__(
        self, table: TokenTable, labels: NDArray[Any] | None = None, rows: NDArray[np.int64] | None = None
    ) -> None:
        self.table = table
        self.labels = labels
        self.rows = np.arange(len(table)) if rows is None else rows
        self.lengths: NDArray[np.int64] = table.lengths if rows is None else table.lengths[rows]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sample_labels(self) -> NDArray[Any] | None:
        """Labels of its samples, (len(self), ...); None where there are none."""
        return None if self.labels is None else self.labels[self.rows]

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """`input_ids` and perhaps `token_type_ids`, `labels`; `index` is the row in the split that was loaded."""
        row = int(self.rows[sample])
        fields: dict[str, Any] = {**self.table[row], "index": row}
        if self.labels is not None:
            fields["labels"] = self.labels[row]
        return fields


def tokenize_to_cache(dataset: Dataset, encoder: TextEncoder, cache_dir: Path) -> TokenFile:
    """Tokenizes a data set, or finds that it has been done before.

    The file's name is computed from the data's fingerprint and the encoder's: another start, rank or number of
    processes finds it. A file that was damaged is found by its checksum and made again.

    Args:
        dataset: One split.
        encoder: What makes token ids of its texts.
        cache_dir: Where the file is kept.

    Raises:
        ValueError: A text is missing, no text, or shorter than the special tokens alone.
    """
    key = sha256(json.dumps([_FORMAT, dataset._fingerprint, encoder.identity]).encode()).hexdigest()[:32]
    names = [name for name in _COLUMN_TYPES if encoder.with_types or name != "token_type_ids"]
    schema = pa.schema([(name, pa.list_(pa.from_numpy_dtype(_COLUMN_TYPES[name]))) for name in names])
    declared = json.dumps({"num_samples": len(dataset), "max_length": encoder.max_length})

    def write(path: Path) -> None:
        with pa.ipc.new_file(path, schema.with_metadata({"smartbatch": declared})) as file:
            first = 0
            for texts in _texts(dataset, encoder):
                samples = encoder(texts, first)
                first += len(samples)
                columns = {
                    "input_ids": [sample.ids for sample in samples],
                    "token_type_ids": [sample.type_ids for sample in samples],
                }
                truncated = sum(sample.is_truncated for sample in samples)
                file.write_batch(
                    pa.record_batch([columns[name] for name in names], schema=schema),
                    custom_metadata={"truncated": str(truncated)},
                )

    return TokenFile(write_if_missing(cache_dir / f"tokens-{key}.arrow", write))


def _texts(dataset: Dataset, encoder: TextEncoder) -> Iterator[Texts]:
    """Blocks of texts or pairs of texts, with a progress bar over samples."""
    if dataset.format["type"] == "custom":
        raise UsageError(
            "the data set has a transform, which datasets runs whenever rows are read, while texts are tokenized once. "
            "Use Dataset.map instead of set_transform."
        )
    check_texts(dataset, encoder.text_columns)
    columns = dataset.select_columns(list(encoder.text_columns)).with_format("arrow")
    with tqdm(total=len(dataset), desc="Tokenizing", unit=" samples") as bar:
        for start in range(0, len(dataset), _ROWS_PER_WRITE):
            block = columns[start : start + _ROWS_PER_WRITE]
            yield encoder.texts(block)
            bar.update(len(block))


def _without_padding(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a row with an attention mask what it is to be attended to."""
    mask = row.get("attention_mask")
    if mask is None:
        return row
    attended = np.asarray(mask, bool)
    return {name: np.asarray(row[name])[attended] for name in _COLUMN_TYPES if name in row}


def _slices(content: pa.Buffer, batches: list[pa.RecordBatch], name: str) -> _Slices:
    """A ragged column as a flat view of the whole file, and the start and length of each row in it."""
    dtype = _COLUMN_TYPES[name]
    flat = np.frombuffer(content, dtype, count=content.size // dtype.itemsize)
    starts, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for batch in batches:
        batch.validate(full=True)
        column = batch.column(name)
        first = (column.values.buffers()[1].address - content.address) // dtype.itemsize
        offsets = column.offsets.to_numpy().astype(np.int64)
        starts.append(first + offsets[:-1])
        lengths.append(np.diff(offsets))
    return flat, np.concatenate(starts), np.concatenate(lengths)
