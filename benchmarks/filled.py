"""What it costs on a CPU that packed rows are filled up to their token budget, which gives all of them one shape.

    python -m benchmarks.filled

MiniLM trains on the same batches of IMDB's lengths, as they are and filled up; they take turns, batch by batch.
"""

import argparse
from dataclasses import replace
from functools import partial

import numpy as np
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from benchmarks.common import MAX_LENGTH, SEED, Row, imdb_lengths, interleaved, report
from benchmarks.gpu import Batch, loss_of
from benchmarks.last_layer import build
from smartbatch_lightning.batching import BatchSpec, plan_epoch
from smartbatch_lightning.data.collators import PackCollator


def step(model: PreTrainedModel, optimizer: Optimizer, batches: list[Batch], turn: int) -> None:
    """Trains on a batch."""
    loss_of(model, batches[turn])[0].backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Times the steps and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budget", type=int, default=6400)
    args = parser.parse_args()
    lengths, random = imdb_lengths(), np.random.default_rng(SEED)
    spec = BatchSpec("random", max_tokens_per_batch=args.budget, padding="packed", max_length=MAX_LENGTH, seed=SEED)
    plan = plan_epoch(lengths, spec)
    drawn = [plan[number] for number in random.integers(0, len(plan), 1 + args.steps)]
    samples = [
        [{"input_ids": random.integers(1000, 30000, lengths[row]), "labels": row % 2} for row in rows] for rows in drawn
    ]
    real = float(np.mean([lengths[rows].sum() for rows in drawn]))
    model = build(one_token=True, attention_dropout=0.0)
    optimizer = AdamW(model.parameters(), fused=True)
    specs = {"as they are": spec, "filled": replace(spec, pad_to_multiple_of=args.budget)}
    batches = {name: [PackCollator(0, each)(rows) for rows in samples] for name, each in specs.items()}
    seconds = interleaved({name: partial(step, model, optimizer, made) for name, made in batches.items()}, args.steps)
    rows: list[Row] = [
        {
            "rows": name,
            "tokens_over_real": float(np.mean([batch["input_ids"].numel() for batch in made])) / real,
            "real_tokens_per_second": real / seconds[name],
            "over_as_they_are": seconds["as they are"] / seconds[name],
        }
        for name, made in batches.items()
    ]
    report("filled", {f"MiniLM, packed rows of {args.budget:,} tokens, {args.steps} steps": rows})


if __name__ == "__main__":
    main()
