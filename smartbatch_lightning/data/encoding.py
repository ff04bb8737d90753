"""Texts -> token ids, with a fingerprint that changes whenever the ids would."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from smartbatch_lightning.data.truncation import Truncation
from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.families import vocabulary_size
from smartbatch_lightning.tasks.source import first_true, is_text

_ROWS_PER_CHECK = 4096
_ROWS_PER_BLOCK = 2**12
_BYTES_PER_BLOCK = 2**22  # of text; the Rust tokenizer needs a hundred times as much memory
_HEAD = Truncation()
_SAMPLE = "Snowflakes don't melt: 2 Schneebälle, снег & 雪!"

Texts = Sequence[str | tuple[str, str]]


class EncodedText(NamedTuple):
    """Token ids and types of a sample, and the number of tokens cut.

    With windows, those of all windows, one after another; all but the last have `max_length` tokens.
    """

    ids: list[int]
    type_ids: list[int]
    lost_tokens: int = 0


class _Backend(NamedTuple):
    """A function that tokenizes texts, and everything that its results depend on."""

    identity: str
    encode: Callable[[Texts], list[EncodedText]]


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizes texts, in any process.

    A text for which a tokenizer without special tokens yields no tokens becomes one padding token.

    Args:
        tokenizer: The tokenizer. For a fast one, a copy of its Rust tokenizer is used, which takes a fifth of the time.
        text_columns: One text column, or two for sentence pairs; or several joined by `text_separator`.
        text_separator: Joins the texts of several columns into one.
        max_length: Tokens that a model takes at once, including special tokens; longer text is cut.
        truncation: How longer text is cut.
    """

    tokenizer: PreTrainedTokenizerBase
    text_columns: Sequence[str]
    text_separator: str | None
    max_length: int
    truncation: Truncation = _HEAD

    def __post_init__(self) -> None:
        self.truncation.check_columns(self.text_columns, self.text_separator)

    @property
    def identity(self) -> str:
        """Everything that the ids depend on besides the texts."""
        columns = [list(self.text_columns), self.text_separator]
        cut = [self.max_length, replace(self.truncation, window_pooling=None).to_dict()]
        return json.dumps([self._backend.identity, *cut, *columns, self.with_types, self._filler])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings stored with a trained model, so that other texts are tokenized in the same way."""
        return {
            "max_length": self.max_length,
            "truncation": self.truncation.to_dict(),
            "sample": tokenized_sample(self.tokenizer),
        }

    @cached_property
    def with_types(self) -> bool:
        """Whether there are several token types and the model distinguishes them."""
        pairs = len(self.text_columns) == 2 and self.text_separator is None
        return "token_type_ids" in self.tokenizer.model_input_names and (
            pairs or any(self._backend.encode(["a"])[0].type_ids)  # such as that of XLNet's last token
        )

    @cached_property
    def vocabulary_size(self) -> int:
        """Number of rows that an embedding table needs for the tokenizer."""
        return vocabulary_size(self.tokenizer)

    def texts(self, table: pa.Table) -> Texts:
        """The texts, or pairs of texts, of some rows."""
        lists = [table.column(name).to_pylist() for name in self.text_columns]
        if self.text_separator is not None:
            return [self.text_separator.join(texts) for texts in zip(*lists, strict=True)]
        return lists[0] if len(lists) == 1 else list(zip(*lists, strict=True))

    def __call__(self, texts: Texts, rows: Iterable[int]) -> list[EncodedText]:
        """Token ids of texts.

        Args:
            texts: Texts as returned by `texts`.
            rows: Their row numbers, for messages.

        Raises:
            ValueError: A text has no tokens, or its special tokens alone exceed `max_length`.
        """
        nothing = EncodedText(self._filler, [0] * len(self._filler))
        samples = [sample if sample.ids else nothing for sample in self._backend.encode(texts)]
        for row, sample in zip(rows, samples, strict=True):
            if not sample.ids or (len(sample.ids) > self.max_length and not self.truncation.pooling):
                what = "has no tokens. Drop it"
                if sample.ids:
                    what = f"has more special tokens than max_length, {self.max_length}. Raise --data.max_length"
                raise UsageError(f"row {row} (counted from 0) {what}.")
        return samples

    def __getstate__(self) -> dict[str, Any]:
        """The state without the backend, which each process creates for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_backend"}

    @cached_property
    def _backend(self) -> _Backend:
        options = self.tokenizer, self.truncation, self.max_length
        return _rust_backend(*options) or _python_backend(*options)

    @property
    def _filler(self) -> list[int]:
        return [] if self.tokenizer.pad_token_id is None else [self.tokenizer.pad_token_id]


def tokenized_sample(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a fixed text, which tell different tokenizers apart."""
    return list(tokenizer(_SAMPLE, verbose=False)["input_ids"])


def stored_texts(dataset: Dataset, text_columns: Sequence[str]) -> Dataset:
    """The text columns of a data set, as Arrow tables.

    Raises:
        ValueError: The data set has a transform, or a column or a row is not text.
    """
    if dataset.format["type"] == "custom":
        raise UsageError(
            "the data set has a transform, which datasets applies when rows are read, but texts are read as stored. "
            "Use Dataset.map instead of set_transform."
        )
    check_texts(dataset, text_columns)
    return dataset.select_columns(list(text_columns)).with_format("arrow")


def text_blocks(texts: Dataset, rows: range) -> Iterator[tuple[int, pa.Table]]:
    """Rows of `stored_texts` in blocks small enough for their tokens to fit in memory.

    Returns:
        For each block, the number of its first row and its table.
    """
    for start in range(rows.start, rows.stop, _ROWS_PER_BLOCK):
        table = texts[start : min(start + _ROWS_PER_BLOCK, rows.stop)]
        sizes = sum(pc.binary_length(column.cast(pa.large_string())).to_numpy() for column in table.columns)
        cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // _BYTES_PER_BLOCK)) + 1
        for first, end in pairwise([0, *cuts.tolist(), len(table)]):
            yield start + first, table.slice(first, end - first)


def check_texts(dataset: Dataset, text_columns: Sequence[str]) -> None:
    """Rejects columns that are not text, and rows without text.

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
        for start in range(0, len(columns), _ROWS_PER_CHECK):
            texts = columns[start : start + _ROWS_PER_CHECK].column(name)
            if texts.null_count:
                raise UsageError(
                    f"the text column {name!r} has no text in row {start + first_true(texts.is_null())} (counted from "
                    "0). Drop such rows, or fill them with an empty text."
                )


def check_not_blank(dataset: Dataset, text_columns: Sequence[str], split: str) -> None:
    """Rejects a split whose texts are all empty or blank.

    Raises:
        ValueError: All texts are empty.
    """
    columns = dataset.select_columns(list(text_columns)).with_format("arrow")
    for start in range(0, len(columns), _ROWS_PER_CHECK):
        for texts in columns[start : start + _ROWS_PER_CHECK].columns:
            if pc.max(pc.utf8_length(pc.utf8_trim_whitespace(texts))).as_py():
                return
    raise UsageError(
        f"all texts in the split {split!r} are empty: {join_quoted(text_columns)}. Set --data.text_columns to the "
        "columns with the texts."
    )


def _cut(whole: EncodedText, first: int, end: int, truncation: Truncation, max_length: int) -> EncodedText:
    """The part of a text that is kept, with the special tokens around it.

    Args:
        whole: The uncut text.
        first: Where its own tokens start, after special ones.
        end: Where they end, before special ones.
        truncation: How it is cut.
        max_length: Maximum number of tokens in a piece.
    """
    room = max_length - len(whole.ids) + end - first

    def keep(tokens: list[int]) -> tuple[list[int], int]:
        pieces, lost = truncation.pieces(tokens[first:end], room, max_length)
        return list(chain.from_iterable(chain(tokens[:first], piece, tokens[end:]) for piece in pieces)), lost

    ids, lost = keep(whole.ids)
    return EncodedText(ids, keep(whole.type_ids)[0], lost)


def _rust_backend(tokenizer: PreTrainedTokenizerBase, truncation: Truncation, max_length: int) -> _Backend | None:
    """Tokenizes with the Rust part of a fast tokenizer alone; None if a part of the tokenizer is in Python.

    The function uses a copy, which never pads, whatever the original was set to. It truncates pairs, the longer text
    first.
    """
    try:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception:  # it is not fast, or has a custom part in Python, for which tokenizers raises a plain Exception
        return None
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens

    @cache
    def truncating() -> Tokenizer:
        """A truncating copy, for pairs only, since threads share the other one."""
        copied = Tokenizer.from_str(backend.to_str())
        copied.encode_special_tokens = backend.encode_special_tokens
        copied.enable_truncation(max_length, direction=truncation.side or "right")
        return copied

    def encode(texts: Texts) -> list[EncodedText]:
        # transformers treats a pair with an empty second text as one text, unless it is in a list
        texts = [text if isinstance(text, str) or text[1] else text[0] for text in texts]
        encodings = backend.encode_batch_fast(texts)
        samples = [EncodedText(encoding.ids, encoding.type_ids) for encoding in encodings]
        longer = [row for row, sample in enumerate(samples) if len(sample.ids) > max_length]
        for row in longer:
            if isinstance(texts[row], str):
                special = encodings[row].special_tokens_mask
                first, end = (special.index(0), len(special) - special[::-1].index(0)) if 0 in special else (0, 0)
                samples[row] = _cut(samples[row], first, end, truncation, max_length)
        if pairs := [row for row in longer if not isinstance(texts[row], str)]:
            for row, shorter in zip(pairs, truncating().encode_batch_fast([texts[row] for row in pairs]), strict=True):
                lost_tokens = len(samples[row].ids) - len(shorter.ids)
                samples[row] = EncodedText(shorter.ids, shorter.type_ids, lost_tokens)
        return samples

    return _Backend(json.dumps([backend.to_str(), tokenizer.split_special_tokens]), encode)


def _python_backend(tokenizer: PreTrainedTokenizerBase, truncation: Truncation, max_length: int) -> _Backend:
    """Tokenizes through transformers; the tokenizer is identified by all files it is saved as."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}
    if truncation.side not in (None, tokenizer.truncation_side):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.truncation_side = truncation.side
    lock = Lock()  # a call may change options for the next one

    def call(texts: Texts, **options: Any) -> list[EncodedText]:
        columns = list(zip(*texts, strict=True)) if isinstance(texts[0], tuple) else [texts]
        with lock:
            encoded = tokenizer(*map(list, columns), return_token_type_ids=True, verbose=False, **options)
        ids: list[list[int]] = encoded["input_ids"]
        type_ids = encoded.get("token_type_ids", [[0] * len(row) for row in ids])
        return [EncodedText(*row) for row in zip(ids, type_ids, strict=True)]

    def shorten(texts: Texts, samples: list[EncodedText]) -> list[EncodedText]:
        if truncation.side is not None:
            shorter = call(texts, truncation=True, max_length=max_length)
            return [
                short._replace(lost_tokens=len(whole.ids) - len(short.ids))
                for whole, short in zip(samples, shorter, strict=True)
            ]
        return [
            _cut(whole, *_find_text(whole.ids, text.ids), truncation, max_length)
            for whole, text in zip(samples, call(texts, add_special_tokens=False), strict=True)
        ]

    def encode(texts: Texts) -> list[EncodedText]:
        samples = call(texts)
        longer = [row for row, sample in enumerate(samples) if len(sample.ids) > max_length]
        if longer:
            shorter = shorten([texts[row] for row in longer], [samples[row] for row in longer])
            for row, sample in zip(longer, shorter, strict=True):
                samples[row] = sample
        return samples

    return _Backend(json.dumps([type(tokenizer).__qualname__, files]), encode)


def _find_text(ids: list[int], text: list[int]) -> tuple[int, int]:
    """Where a text's own tokens start and end among those with special tokens."""
    for first in range(len(ids) - len(text) + 1):
        if ids[first : first + len(text)] == text:
            return first, first + len(text)
    raise UsageError(
        "the tokenizer puts special tokens inside a text, which can then only be cut at the beginning or the end. Set "
        "--data.truncation to head or tail."
    )
