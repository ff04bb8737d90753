"""How evenly the ranks of a step are loaded: the cost of the slowest rank over the mean, simulated on IMDB's lengths.

    SMARTBATCH_IMDB_DIR=... python -m benchmarks.balance

The ranks wait for each other in every step, so that the slowest one's cost is the step's. Cost is counted in tokens:
real ones for packed batches, padded ones for batches that are padded. Batches of 16 on each rank, mean of some epochs.
transformers' `group_by_length` is sharded as its Trainer does it, batch by batch over the ranks. Some seconds.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.common import BATCH_SIZE, SEED, Row, imdb_lengths, report
from smartbatch_lightning import BatchSpec, plan_epoch
from smartbatch_lightning.batching.planner import with_jitter

Batches = Iterable[NDArray[np.int64]]


def planned(lengths: NDArray[np.integer], batching: str, ranks: int) -> Callable[[int], Batches]:
    """This package: batches of all ranks, a step's side by side."""
    spec = with_jitter(BatchSpec(batching, BATCH_SIZE, seed=SEED), lengths)

    def batches(epoch: int) -> Batches:
        plan = plan_epoch(lengths, spec, epoch=epoch, num_replicas=ranks)
        return (plan[number] for number in range(len(plan)))

    return batches


def shuffled(lengths: NDArray[np.integer]) -> Callable[[int], Batches]:
    """An ordinary shuffle, as it comes."""
    return planned(lengths, "random", 1)


def grouped(lengths: NDArray[np.integer]) -> Callable[[int], Batches]:
    """Transformers' `group_by_length`."""
    sampler = LengthGroupedSampler(BATCH_SIZE, lengths=lengths.tolist(), generator=torch.Generator().manual_seed(SEED))
    return lambda _: np.split(np.array(list(sampler)), range(BATCH_SIZE, len(lengths), BATCH_SIZE))


def rebalanced(lengths: NDArray[np.integer], ranks: int) -> Callable[[int], Batches]:
    """Transformers' `batch_rebalance`."""
    from transformers.trainer_pt_utils import BatchRebalanceSampler  # since 5.20

    def batches(epoch: int) -> Batches:
        shares = []
        for rank in range(ranks):
            sampler = BatchRebalanceSampler(
                lengths.tolist(), BATCH_SIZE * ranks, dp_size=ranks, grad_accum=1, seed=SEED + epoch, rank=rank
            )
            shares.append([np.array(batch) for batch in sampler])
        return (batch for step in zip(*shares, strict=True) for batch in step)

    return batches


def slowest_over_mean(costs: list[int], ranks: int) -> float:
    """Cost of the slowest rank over the mean, summed over the steps; a last step without all ranks is left out."""
    steps = np.array(costs[: len(costs) // ranks * ranks]).reshape(-1, ranks)
    return float(steps.max(axis=1).sum() / steps.mean(axis=1).sum())


def main() -> None:
    """Simulates every way on several numbers of ranks and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    lengths = imdb_lengths()
    tables = {}
    for ranks in args.ranks:
        ways = {
            "smart, padded": (planned(lengths, "smart", ranks), True),
            "tutorial, padded": (planned(lengths, "tutorial", ranks), True),
            "random, distributed by length, packed": (planned(lengths, "random", ranks), False),
            "random, as it comes, packed": (shuffled(lengths), False),
            "transformers group_by_length, padded": (grouped(lengths), True),
            "transformers batch_rebalance, padded": (rebalanced(lengths, ranks), True),
        }
        rows: list[Row] = []
        for name, (way, padded) in ways.items():
            ratios, tokens, real = [], 0, 0
            for epoch in range(args.epochs):
                batches = [lengths[batch] for batch in way(epoch)]
                costs = [int(len(batch) * batch.max() if padded else batch.sum()) for batch in batches]
                ratios.append(slowest_over_mean(costs, ranks))
                tokens += sum(costs)
                real += sum(int(batch.sum()) for batch in batches)
            row = {"batches": name, "slowest_over_mean": statistics.mean(ratios)}
            rows.append({**row, "percent_over_real": 100 * (tokens / real - 1)})
        tables[f"IMDB on {ranks} ranks, batch size {BATCH_SIZE}"] = rows
    report("balance", tables)


if __name__ == "__main__":
    main()
