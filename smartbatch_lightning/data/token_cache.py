"""Texts -> token ids in the cache, in shards, written by one or more processes on all cores; a kill loses one shard."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm

from smartbatch_lightning.cache import CacheLock, prune, size_limit
from smartbatch_lightning.data.encoding import TextEncoder, stored_texts, text_blocks
from smartbatch_lightning.data.tokens import COLUMN_TYPES, TokenFile
from smartbatch_lightning.storage import is_valid, write_together

_FORMAT = 5
_ROWS_PER_SHARD = 2**16
_THREADS = 3  # some convert tokenized texts while another one's Rust tokenizer uses all cores

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def tokenize_to_cache(dataset: Dataset, encoder: TextEncoder, cache_dir: Path, source: str = "") -> TokenFile:
    """Tokenizes a data set into the cache, except for what is already there.

    The folder's name is computed from the fingerprints of the data and the encoder, so later runs, other ranks and
    other processes find it. Concurrent processes divide the shards among themselves. A damaged shard is detected by its
    checksum and recreated.

    Args:
        dataset: One split.
        encoder: Tokenizes its texts.
        cache_dir: Folder of the cache.
        source: Name of the data set in `smartbatch cache list`.

    Raises:
        ValueError: A text is missing or not text, or has no tokens or too many special tokens.
    """
    named = [_FORMAT, _ROWS_PER_SHARD, dataset._fingerprint, encoder.identity]
    folder = cache_dir / f"tokens-{sha256(json.dumps(named).encode()).hexdigest()[:32]}"
    num_samples, limit = len(dataset), size_limit()
    lock = CacheLock(folder, f"{num_samples:,} samples of {source}, tokens of {encoder.tokenizer.name_or_path}")
    shards = {
        folder / f"{shard:06}.arrow": range(first, min(first + _ROWS_PER_SHARD, num_samples))
        for shard, first in enumerate(range(0, max(num_samples, 1), _ROWS_PER_SHARD))
    }
    missing = {path: rows for path, rows in shards.items() if not is_valid(path)}
    if missing:
        texts = stored_texts(dataset, encoder.text_columns)
        done = num_samples - sum(map(len, missing.values()))
        with tqdm(total=num_samples, initial=done, desc="Tokenizing", unit=" samples") as bar:
            writes = {path: partial(_write_shard, texts, rows, encoder, bar.update) for path, rows in missing.items()}
            for path in write_together(writes):
                done += len(shards[path])
                bar.update(done - bar.n)  # for files from other processes
        if limit is not None:
            prune(cache_dir, limit)
    tokens = TokenFile(folder)
    del lock
    return tokens


def _write_shard(
    texts: Dataset, rows: range, encoder: TextEncoder, report: Callable[[int], object], path: Path
) -> None:
    """Writes the token ids of some rows to a file, and reports the number of rows of each block."""
    names = [name for name in COLUMN_TYPES if encoder.with_types or name != "token_type_ids"]
    ragged = [(name, pa.list_(pa.from_numpy_dtype(COLUMN_TYPES[name]))) for name in names]
    schema = pa.schema([*ragged, ("lost_tokens", pa.int32())])
    longest = None if encoder.truncation.pooling else encoder.max_length
    declared = json.dumps({"num_samples": len(texts), "max_length": longest})

    def encode(block: tuple[int, pa.Table]) -> pa.RecordBatch:
        first, table = block
        samples = encoder(encoder.texts(table), range(first, first + len(table)))
        columns = {
            "input_ids": [sample.ids for sample in samples],
            "token_type_ids": [sample.type_ids for sample in samples],
            "lost_tokens": [sample.lost_tokens for sample in samples],
        }
        return pa.record_batch([columns[name] for name in schema.names], schema=schema)

    with pa.ipc.new_file(path, schema.with_metadata({"smartbatch": declared})) as file:
        for batch in _in_threads(encode, text_blocks(texts, rows)):
            file.write_batch(batch)
            report(batch.num_rows)


def _in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Results of a function for each item, in order, computed in threads, with at most `_THREADS` pending."""
    with ThreadPoolExecutor(_THREADS) as threads:
        waiting: deque[Future[_Result]] = deque()
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
