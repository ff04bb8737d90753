"""Tokenized text on Arrow: written once, memory-mapped afterwards; lengths for free, rows without a copy."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128

from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.storage import write_if_missing
from smartbatch_lightning.tasks.source import first_true, is_text

_FORMAT = 3
_ROWS_PER_WRITE = 4096
_COLUMN_TYPES: dict[str, np.dtype[Any]] = {"input_ids": np.dtype(np.int32), "token_type_ids": np.dtype(np.int8)}


_Slices = tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]


class _Sample(NamedTuple):
    ids: list[int]
    type_ids: list[int]
    is_truncated: bool


_Texts = Sequence[str | tuple[str, str]]
_Encode = Callable[[_Texts], list[_Sample]]


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


def tokenize_to_cache(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_columns: Sequence[str],
    text_separator: str | None = None,
    max_length: int,
    cache_dir: Path,
) -> TokenFile:
    """Tokenizes a data set, or finds that it has been done before.

    The file's name is computed from the data's fingerprint, the tokenizer itself, `max_length` and the text columns:
    another start, rank or number of processes finds it. A file that was damaged is found by its checksum and
    made again. A text of which a tokenizer without special tokens makes no tokens is one token of padding.

    Args:
        dataset: One split.
        tokenizer: Where it is a fast one, a copy of its Rust tokenizer does it, in a fifth of the time.
        text_columns: One column of text, or two for sentence pairs; or several that `text_separator` joins.
        text_separator: What stands between the texts of several columns in the one text that is tokenized.
        max_length: Longest sample, in tokens with special tokens; longer text is cut.
        cache_dir: Where the file is kept.

    Raises:
        ValueError: A text is missing, no text, or shorter than the special tokens alone.
    """
    identity, encode = _rust_encoder(tokenizer, max_length) or _python_encoder(tokenizer, max_length)
    pairs = len(text_columns) == 2 and text_separator is None
    with_types = "token_type_ids" in tokenizer.model_input_names and (
        pairs or any(encode(["a"])[0].type_ids)  # as of XLNet's last token
    )
    filler = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
    nothing = _Sample(filler, [0] * len(filler), is_truncated=False)
    key_fields = [_FORMAT, dataset._fingerprint, identity, max_length, list(text_columns), text_separator, with_types]
    key = sha256(json.dumps([*key_fields, filler]).encode()).hexdigest()[:32]
    names = [name for name in _COLUMN_TYPES if with_types or name != "token_type_ids"]
    schema = pa.schema([(name, pa.list_(pa.from_numpy_dtype(_COLUMN_TYPES[name]))) for name in names])
    declared = json.dumps({"num_samples": len(dataset), "max_length": max_length})

    def write(path: Path) -> None:
        with pa.ipc.new_file(path, schema.with_metadata({"smartbatch": declared})) as file:
            first = 0
            for texts in _texts(dataset, text_columns, text_separator):
                samples = [sample if sample.ids else nothing for sample in encode(texts)]
                _check_samples(samples, first, max_length)
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


def _without_padding(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a row with an attention mask what it is to be attended to."""
    mask = row.get("attention_mask")
    if mask is None:
        return row
    attended = np.asarray(mask, bool)
    return {name: np.asarray(row[name])[attended] for name in _COLUMN_TYPES if name in row}


def _check_samples(samples: list[_Sample], first_row: int, max_length: int) -> None:
    for row, sample in enumerate(samples, first_row):
        if not 0 < len(sample.ids) <= max_length:
            what = "has no tokens. Drop it" if not sample.ids else "has more special tokens than that. Raise it"
            raise UsageError(f"with max_length {max_length} row {row} (counted from 0) {what}.")


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


def _rust_encoder(tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[str, _Encode] | None:
    """What tells a fast tokenizer from others, and its Rust part alone; None where Python has a part in it.

    A copy truncates and never pads, whatever the original was last asked to do.
    """
    try:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception:  # no fast one, or a custom part, of which tokenizers says in an Exception that it is in Python
        return None
    backend.no_padding()
    backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
    backend.encode_special_tokens = tokenizer.split_special_tokens

    def encode(texts: _Texts) -> list[_Sample]:
        # a pair without a second text is one text to transformers, where it is not in a list
        encodings = backend.encode_batch_fast([text if isinstance(text, str) or text[1] else text[0] for text in texts])
        return [_Sample(encoding.ids, encoding.type_ids, bool(encoding.overflowing)) for encoding in encodings]

    return json.dumps([backend.to_str(), tokenizer.split_special_tokens]), encode


def check_texts(dataset: Dataset, text_columns: Sequence[str]) -> None:
    """Refuses columns that are not text, and rows without one.

    Raises:
        ValueError: There is such a column or row.
    """
    columns = dataset.select_columns(list(text_columns)).with_format("arrow")
    for name in text_columns:
        kind = columns.data.schema.field(name).type
        if not is_text(kind):
            raise UsageError(
                f"the text column {name!r} holds {kind}, not text. Set --data.text_columns to a column of text, or "
                "turn it into text."
            )
        if not columns.data.column(name).null_count:
            continue
        for start in range(0, len(columns), _ROWS_PER_WRITE):
            texts = columns[start : start + _ROWS_PER_WRITE].column(name)
            if texts.null_count:
                raise UsageError(
                    f"the text column {name!r} has no text in row {start + first_true(texts.is_null())} (counted from "
                    "0). Drop such rows, or fill them with an empty text."
                )


def _python_encoder(tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[str, _Encode]:
    """What tells a tokenizer from others, all files that it is saved as, and transformers' own call of it."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}

    def call(texts: _Texts, **options: Any) -> list[tuple[list[int], list[int]]]:
        columns = list(zip(*texts, strict=True)) if isinstance(texts[0], tuple) else [texts]
        encoded = tokenizer(*(list(column) for column in columns), return_token_type_ids=True, verbose=False, **options)
        ids: list[list[int]] = encoded["input_ids"]
        return list(zip(ids, encoded.get("token_type_ids", [[0] * len(row) for row in ids]), strict=True))

    def encode(texts: _Texts) -> list[_Sample]:
        samples = [_Sample(*row, is_truncated=False) for row in call(texts)]
        cut = [row for row, sample in enumerate(samples) if len(sample.ids) > max_length]
        if cut:
            shorter = call([texts[row] for row in cut], truncation=True, max_length=max_length)
            for row, columns in zip(cut, shorter, strict=True):
                samples[row] = _Sample(*columns, is_truncated=True)
        return samples

    return json.dumps([type(tokenizer).__qualname__, files]), encode


def _texts(dataset: Dataset, text_columns: Sequence[str], text_separator: str | None) -> Iterator[_Texts]:
    """Blocks of texts or pairs of texts, with a progress bar over samples."""
    if dataset.format["type"] == "custom":
        raise UsageError(
            "the data set has a transform, which datasets runs whenever rows are read, while texts are tokenized once. "
            "Use Dataset.map instead of set_transform."
        )
    check_texts(dataset, text_columns)
    columns = dataset.select_columns(list(text_columns)).with_format("arrow")
    with tqdm(total=len(dataset), desc="Tokenizing", unit=" samples") as bar:
        for start in range(0, len(dataset), _ROWS_PER_WRITE):
            block = columns[start : start + _ROWS_PER_WRITE]
            lists = [block.column(name).to_pylist() for name in text_columns]
            if text_separator is not None:
                yield [text_separator.join(texts) for texts in zip(*lists, strict=True)]
            else:
                yield lists[0] if len(lists) == 1 else list(zip(*lists, strict=True))
            bar.update(len(block))
