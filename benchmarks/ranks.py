"""A packed training step on one GPU or many: real tokens a second, and how evenly the ranks are loaded.

    torchrun --nproc-per-node=1 -m benchmarks.ranks --lengths imdb_lengths.npy            # what one does alone
    torchrun --nproc-per-node=2 -m benchmarks.ranks --lengths imdb_lengths.npy            # DDP
    torchrun --nproc-per-node=2 -m benchmarks.ranks --lengths imdb_lengths.npy --model large --sharded   # FSDP2

Needs no network: BERT's shapes with random weights, random tokens of the given lengths (`benchmarks.peers
--save_lengths`), attention dropout 0, bfloat16. Each rank trains its share of the same plan of an epoch. With `--device
cpu` a dry run on gloo with a tiny model. Prints one line of JSON at the end, from rank 0.
"""

import argparse
import json
import os
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from benchmarks.common import MAX_LENGTH, SEED, card
from benchmarks.gpu import BASE, LARGE, Bench, loss_of
from smartbatch_lightning.batching import BatchSpec, plan_epoch
from smartbatch_lightning.data.collators import PackCollator
from smartbatch_lightning.models.flops import training_flops
from smartbatch_lightning.models.layers import encoder_layers

WARMUPS = 3


def distributed(bench: Bench, model: Any, *, sharded: bool) -> Any:
    """The model, its gradients averaged over the ranks, or its layers sharded over them."""
    if not sharded:
        return DistributedDataParallel(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in encoder_layers(model):
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def trained(bench: Bench, config: Any, batches: list[Any], *, sharded: bool) -> tuple[float, float]:
    """Seconds of the steps after the warm-up ones, and the last loss.

    The model lives in here: DDP's reducer must not be the last to hold the process group, since it waits for gloo's
    threads with Python's lock, which they may need to end (torch 2.13: the process then hangs at its end).
    """
    model = distributed(bench, bench.model(config), sharded=sharded)
    optimizer = AdamW(model.parameters(), lr=5e-5, fused=not sharded or bench.device == "cuda")
    started = 0.0
    for number, batch in enumerate(batches):
        if number == WARMUPS:
            bench.wait()
            dist.barrier()
            started = perf_counter()
        with torch.autocast(bench.device, torch.bfloat16, enabled=not sharded):
            loss, _ = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    bench.wait()
    dist.barrier()
    return perf_counter() - started, float(loss.detach())


def main() -> None:
    """Trains and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", choices=("base", "large"), default="base")
    parser.add_argument("--sharded", action="store_true", help="FSDP2 in place of DDP")
    parser.add_argument("--max_tokens_per_batch", type=int, default=32_768, help="on each rank")
    parser.add_argument("--steps", type=int, default=30, help="that are timed")
    args = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    bench = Bench(args.device, np.load(args.lengths).astype(np.int64))
    spec = BatchSpec(
        "random", max_tokens_per_batch=args.max_tokens_per_batch, padding="packed", max_length=MAX_LENGTH, seed=SEED
    )
    plan = plan_epoch(bench.lengths, spec, num_replicas=ranks)
    random = np.random.default_rng(SEED + rank)
    rows = list(plan.rank_batches(rank))[: WARMUPS + args.steps]
    batches = [bench.tensors(PackCollator(0, spec), one, random) for one in rows]
    config = bench.config(LARGE if args.model == "large" else BASE)
    seconds, loss = trained(bench, config, batches, sharded=args.sharded)
    flops = training_flops(config, one_token=True)
    lengths = [bench.lengths[one] for one in rows[WARMUPS:]]
    mine = {
        "tokens": sum(int(one.sum()) for one in lengths),
        "flops": [flops.total(len(one), int(one.sum()), int((one**2).sum())) for one in lengths],
    }
    shares: list[Any] = [None] * ranks
    dist.all_gather_object(shares, mine)
    if rank == 0:
        by_step = np.array([share["flops"] for share in shares])  # (ranks, steps)
        tokens = sum(share["tokens"] for share in shares)
        row = {
            "model": "tiny" if bench.small else args.model,
            "ranks": ranks,
            "strategy": "FSDP2" if args.sharded else "DDP",
            "steps": len(lengths),
            "ms_a_step": 1e3 * seconds / len(lengths),
            "real_tokens_per_second": tokens / seconds,
            "of_each_rank": tokens / seconds / ranks,
            "slowest_rank_over_mean": float(by_step.max(axis=0).sum() / by_step.mean(axis=0).sum()),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None,
            "loss": loss,
        }
        print(json.dumps({"card": card(), **row}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
