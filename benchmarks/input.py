"""How soon training starts, and how fast batches come out of the token cache, beside `datasets` and transformers.

    SMARTBATCH_IMDB_DIR=... python -m benchmarks.input

1. Warm start on IMDB: seconds from the constructor of the data module to the first training batch, in a fresh process
   that has imported everything, with the caches of `datasets` and of this package in place.
2. A batch of 16 random reviews, fetched and padded to the longest. Ours: rows of `TokenDataset`, then `PadCollator`.
   The peer: a `datasets.Dataset` of the same `input_ids` and labels, memory-mapped, then `DataCollatorWithPadding`;
   by single rows, and all rows at once with `__getitems__`, as torch's DataLoader does it. All get the same samples
   and must give the same tensors.
"""

import argparse
import statistics
from collections.abc import Callable
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from benchmarks.common import (
    BATCH_SIZE,
    MAX_LENGTH,
    SEED,
    Row,
    imdb_dir,
    in_fresh_process,
    interleaved,
    minilm,
    report,
)
from smartbatch_lightning import SmartBatchDataModule


def prepared_data() -> SmartBatchDataModule:
    """IMDB, ready to train."""
    data = SmartBatchDataModule(imdb_dir(), minilm(), max_length=MAX_LENGTH, batch_size=BATCH_SIZE, seed=SEED)
    data.prepare_data()
    data.setup("fit")
    return data


def seconds_to_first_batch() -> float:
    """Seconds from the constructor to the first training batch."""
    start = perf_counter()
    next(iter(prepared_data().train_dataloader()))
    return perf_counter() - start


def fetch_speed(data: SmartBatchDataModule, peer: Dataset, repeats: int) -> list[Row]:
    """Microseconds of a batch, and how many times as fast as each form of the peer ours is."""
    rows, pad, peer_pad = data.train_data, data.configure_collator(), DataCollatorWithPadding(data.tokenizer)
    rng = np.random.default_rng(SEED)
    batches = [rng.choice(len(rows), BATCH_SIZE, replace=False).tolist() for _ in range(repeats + 10)]
    ours = "TokenDataset + PadCollator"
    contestants: dict[str, Callable[[int], dict[str, torch.Tensor]]] = {
        ours: lambda turn: pad([rows[sample] for sample in batches[turn]]),
        "datasets rows + DataCollatorWithPadding": lambda turn: peer_pad([peer[sample] for sample in batches[turn]]),
        "datasets __getitems__ + DataCollatorWithPadding": lambda turn: peer_pad(peer.__getitems__(batches[turn])),
    }
    for turn in range(10):
        first, *others = (run(turn) for run in contestants.values())
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in ("input_ids", "attention_mask", "labels"))
    seconds = interleaved(contestants, repeats, warmups=10)
    return [
        {"input": name, "microseconds_a_batch": taken * 1e6, "ours_times_as_fast": taken / seconds[ours]}
        for name, taken in seconds.items()
    ]


def main() -> None:
    """Runs both parts and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--starts", type=int, default=5, help="fresh processes of part 1")
    parser.add_argument("--repeats", type=int, default=500, help="timed batches of part 2")
    args = parser.parse_args()
    data = prepared_data()  # fills the caches where they are empty
    starts = [in_fresh_process(seconds_to_first_batch) for _ in range(args.starts)]
    warm_start = {"median_seconds": statistics.median(starts), "fastest": min(starts), "slowest": max(starts)}
    columns = {
        "input_ids": [data.train_data[sample]["input_ids"] for sample in range(len(data.train_data))],
        "labels": [data.train_data[sample]["labels"] for sample in range(len(data.train_data))],
    }
    with TemporaryDirectory() as folder:
        Dataset.from_dict(columns).save_to_disk(folder)
        fetched = fetch_speed(data, Dataset.load_from_disk(folder), args.repeats)
    report("input", {"warm start to the first batch": [warm_start], f"a batch of {BATCH_SIZE}": fetched})


if __name__ == "__main__":
    main()
