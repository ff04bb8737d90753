"""How fast an epoch is planned, and what its batches cost, beside transformers' `LengthGroupedSampler`.

    SMARTBATCH_IMDB_DIR=... python -m benchmarks.planning

1. Seconds to plan 1 million samples at batch size 16. The peer gets its lengths as the Python list that it expects,
   and only iterating an epoch is timed, never its construction. It yields single samples, which a `BatchSampler` then
   groups; so both are also timed to the end, every batch of the epoch a Python list. `smart` plans with a jitter of
   one token, and once more with `jitter: auto`, which a run chooses only once.
2. Seconds and peak memory to plan 100 million samples, alone in a fresh process; memory includes the interpreter, the
   imported libraries and the lengths (int32).
3. Padding, and how random the batches are, on IMDB: means over some epochs. `batch_overlap_percent` is the share
   of the samples batched with a given sample that are batched with it again in the next epoch.
4. The same of `smart` with `jitter: auto` beside `tutorial`, each from its own plans: on IMDB, its first 2,000 reviews,
   the demo, and 50,000 sentences of 5 to 40 tokens.

Lengths are IMDB's, drawn with replacement; without SMARTBATCH_IMDB_DIR they are lognormal, and parts 3 and 4 are left
out.
"""

import argparse
import os
import resource
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.common import BATCH_SIZE, MAX_LENGTH, SEED, Row, imdb_lengths, in_fresh_process, interleaved, report
from smartbatch_lightning import BatchPlan, BatchSpec, SmartBatchDataModule, SmartBatchSampler, plan_epoch
from smartbatch_lightning.batching import batch_overlap
from smartbatch_lightning.batching.planner import with_jitter

Jitter = float | Literal["auto"]

PEER = "transformers LengthGroupedSampler"


def spec_of(batching: str, jitter: Jitter = 1.0) -> BatchSpec:
    """Batches of the benchmark's size."""
    return BatchSpec(batching, BATCH_SIZE, jitter=jitter, seed=SEED)


def peer_sampler(lengths: NDArray[np.integer]) -> Sampler[int]:
    """The peer, with the lengths as the list that it expects and a generator of its own."""
    return LengthGroupedSampler(BATCH_SIZE, lengths=lengths.tolist(), generator=torch.Generator().manual_seed(SEED))


def length_pool() -> NDArray[np.int32]:
    """Lengths of IMDB's training reviews, or lognormal ones where there is no IMDB. Shape (25000,)."""
    if "SMARTBATCH_IMDB_DIR" in os.environ:
        return imdb_lengths().astype(np.int32)
    return np.random.default_rng(SEED).lognormal(5.5, 0.6, 25_000).clip(3, MAX_LENGTH).astype(np.int32)


def draw_lengths(pool: NDArray[np.int32], num_samples: int) -> NDArray[np.int32]:
    """Lengths of a data set of any size, drawn with replacement. Shape (num_samples,)."""
    rng = np.random.default_rng(SEED)
    lengths = np.empty(num_samples, np.int32)
    for start in range(0, num_samples, 1_000_000):  # in blocks, so that the indices take no memory to speak of
        block = lengths[start : start + 1_000_000]
        block[:] = pool[rng.integers(len(pool), size=len(block))]
    return lengths


def plan_speed(lengths: NDArray[np.int32], repeats: int) -> list[Row]:
    """Seconds of each way to plan an epoch, and how many times as fast as the peer it is."""
    peer = peer_sampler(lengths)
    ours = SmartBatchSampler(lengths, spec_of("smart"), num_replicas=1, rank=0)
    peer_lists = BatchSampler(peer, BATCH_SIZE, drop_last=False)

    def sampled(epoch: int) -> list[list[int]]:
        ours.set_epoch(epoch)
        return list(ours)

    seconds = interleaved(
        {
            PEER: lambda _: list(peer),
            "smart, jitter 1": lambda epoch: plan_epoch(lengths, spec_of("smart"), epoch=epoch),
            "smart, jitter auto": lambda epoch: plan_epoch(lengths, spec_of("smart", "auto"), epoch=epoch),
            "tutorial": lambda epoch: plan_epoch(lengths, spec_of("tutorial"), epoch=epoch),
            "random": lambda epoch: plan_epoch(lengths, spec_of("random"), epoch=epoch),
            f"{PEER}, every batch a list": lambda _: list(peer_lists),
            "smart, jitter 1, every batch a list": sampled,
        },
        repeats,
    )
    peers = {name: seconds[f"{PEER}, every batch a list" if "list" in name else PEER] for name in seconds}
    return [
        {"batching": name, "seconds": taken, "times_as_fast": peers[name] / taken} for name, taken in seconds.items()
    ]


def plan_alone(pool: NDArray[np.int32], num_samples: int) -> Row:
    """Seconds and peak memory to plan one epoch in this process."""
    lengths = draw_lengths(pool, num_samples)
    start = perf_counter()
    plan = plan_epoch(lengths, spec_of("smart"))
    seconds = perf_counter() - start
    assert len(plan.order) == num_samples
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"samples": num_samples, "seconds": seconds, "peak_memory_gb": peak / 1e9}


def imdb_padding(epochs: int) -> list[Row]:
    """Tokens of an epoch with padding, and batch overlap, for each way to choose batches."""
    lengths = imdb_lengths()
    real_tokens = int(lengths.sum())
    peer = peer_sampler(lengths)
    offsets = np.append(np.arange(0, len(lengths), BATCH_SIZE), len(lengths))

    def planned(batching: str, jitter: Jitter = "auto") -> Callable[[int], BatchPlan]:
        return lambda epoch: plan_epoch(lengths, spec_of(batching, jitter), epoch=epoch)

    ways: dict[str, Callable[[int], BatchPlan]] = {
        "fixed padding": planned("random"),
        "random": planned("random"),
        "tutorial": planned("tutorial"),
        "smart, jitter auto": planned("smart"),
        **{f"smart, jitter {jitter}": planned("smart", jitter) for jitter in (0, 1, 2, 4)},
        PEER: lambda _: BatchPlan(np.array(list(peer)), offsets),
    }
    rows = []
    for name, way in ways.items():
        plans = [way(epoch) for epoch in range(epochs)]
        tokens, overlap = measure(plans, lengths)
        if name == "fixed padding":
            tokens = len(lengths) * MAX_LENGTH
        over = 100 * (tokens / real_tokens - 1)
        rows.append(
            {
                "batching": name,
                "tokens": round(tokens),
                "percent_over_real": over,
                "batch_overlap_percent": 100 * overlap,
            }
        )
    return rows


def measure(plans: list[BatchPlan], lengths: NDArray[np.integer]) -> tuple[float, float]:
    """Mean tokens of an epoch, padded to the longest of each batch, and mean batch overlap of neighbouring epochs."""
    spec = BatchSpec()
    tokens = statistics.mean(int(spec.tokens(lengths[plan.order], plan.offsets).sum()) for plan in plans)
    return tokens, statistics.mean(batch_overlap(before, after) for before, after in pairwise(plans))


def smart_beside_tutorial(epochs: int) -> list[Row]:
    """Padding and batch overlap of both on IMDB, a part of it, the demo and short sentences."""
    imdb = imdb_lengths()
    demo = SmartBatchDataModule(seed=SEED)
    demo.setup("fit")
    sets: dict[str, NDArray[np.integer]] = {
        "IMDB": imdb,
        "IMDB's first 2,000": imdb[:2000],
        "the demo": demo.train_data.lengths,
        "50,000 sentences of 5 to 40 tokens": np.random.default_rng(SEED).integers(5, 41, 50_000),
    }
    rows = []
    for name, lengths in sets.items():
        row: Row = {"data": name, "jitter": with_jitter(spec_of("smart", "auto"), lengths).jitter}
        for batching in ("smart", "tutorial"):
            plans = [plan_epoch(lengths, spec_of(batching, "auto"), epoch=epoch) for epoch in range(epochs)]
            tokens, overlap = measure(plans, lengths)
            row[f"{batching}_padding_percent"] = 100 * (tokens / int(lengths.sum()) - 1)
            row[f"{batching}_batch_overlap_percent"] = 100 * overlap
        rows.append(row)
    return rows


def main() -> None:
    """Runs all parts and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples of part 1")
    parser.add_argument("--samples_alone", type=int, default=100_000_000, help="samples of part 2")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats of part 1")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of parts 3 and 4")
    args = parser.parse_args()
    pool = length_pool()
    # before the others: a process' peak memory is at least what its parent held when it was started
    tables = {"alone in a fresh process": [in_fresh_process(plan_alone, pool, args.samples_alone)]}
    speed = plan_speed(draw_lengths(pool, args.samples), args.repeats)
    tables[f"{args.samples:,} samples, batch size {BATCH_SIZE}"] = speed
    if "SMARTBATCH_IMDB_DIR" in os.environ:
        tables["IMDB"] = imdb_padding(args.epochs)
        tables["smart, jitter auto, beside the tutorial"] = smart_beside_tutorial(args.epochs)
    report("planning", tables)


if __name__ == "__main__":
    main()
