"""What a step gains by a last layer that computes only the token of each review that the head reads.

    python -m benchmarks.last_layer

MiniLM trains on the same batches of IMDB's lengths with a whole last layer and with that one, padded and packed; they
take turns, batch by batch. *Expected* is what the gain would be if all operations took equally long.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.common import BATCH_SIZE, MAX_LENGTH, SEED, Row, imdb_lengths, interleaved, minilm, report
from smartbatch_lightning.batching import BatchSpec, plan_epoch
from smartbatch_lightning.data.collators import PackCollator, PadCollator
from smartbatch_lightning.models.flops import training_flops
from smartbatch_lightning.models.packing import supply_attention

WAYS = {"whole": False, "one token a review": True}


def build(*, one_token: bool, attention_dropout: float) -> PreTrainedModel:
    """MiniLM, with the same weights every time."""
    torch.manual_seed(SEED)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        minilm(), dtype=torch.float32, attention_probs_dropout_prob=attention_dropout
    )
    supply_attention(model, one_token=one_token)
    model.train()
    return model


def step(model: PreTrainedModel, optimizer: Optimizer, batches: list[dict[str, Any]], turn: int) -> None:
    """Trains on a batch."""
    model(**batches[turn]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Times the steps and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--attention_dropout", type=float, default=0.0)
    args = parser.parse_args()
    lengths, random = imdb_lengths(), np.random.default_rng(SEED)
    plan = plan_epoch(lengths, BatchSpec(batch_size=BATCH_SIZE, seed=SEED))
    drawn = [plan[number] for number in random.integers(0, len(plan), 1 + args.steps)]
    samples = [
        [{"input_ids": random.integers(1000, 30000, lengths[row]), "labels": row % 2} for row in rows] for rows in drawn
    ]
    models = {name: build(one_token=one, attention_dropout=args.attention_dropout) for name, one in WAYS.items()}
    optimizers = {name: AdamW(model.parameters(), fused=True) for name, model in models.items()}
    real, squares = (float(np.mean([(lengths[rows] ** power).sum() for rows in drawn])) for power in (1, 2))
    flops = {name: training_flops(models[name].config, one_token=one) for name, one in WAYS.items()}
    operations = {name: flops[name].total(BATCH_SIZE, real, squares) for name in WAYS}
    rows: list[Row] = []
    for padding, collator in (("longest", PadCollator()), ("packed", PackCollator())):
        batches = [collator(batch) for batch in samples]
        contestants = {name: partial(step, model, optimizers[name], batches) for name, model in models.items()}
        seconds = interleaved(contestants, args.steps)
        rows += [
            {
                "padding": padding,
                "last layer": name,
                "real_tokens_per_second": real / seconds[name],
                "over_whole": seconds["whole"] / seconds[name],
                "expected": operations["whole"] / operations[name],
            }
            for name in WAYS
        ]
    report("last_layer", {f"MiniLM, batches of {BATCH_SIZE} at {MAX_LENGTH} tokens, {args.steps} steps": rows})


if __name__ == "__main__":
    main()
