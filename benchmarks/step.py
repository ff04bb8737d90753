"""What a step costs besides the model: batch, loop, optimizer, schedule, metrics and logging, on a tiny BERT.

    python -m benchmarks.step

The *Smart Batching Tutorial*'s bare loop over tensors that are ready is held against this package and transformers'
`Trainer`, each with everything that a run has, over the same batches; they take turns. On so small a model next to all
of a step's time is overhead, so the difference to the bare loop is what a framework adds to every step. The package
runs three times: not watched, with `TrainingMonitor` and both loggers, and with the progress bar besides, which costs
something in a terminal alone.
"""

import argparse
import statistics
from functools import partial

import numpy as np
from transformers import BertConfig

from benchmarks.common import SEED, Row, report
from benchmarks.peers import (
    Clock,
    Reviews,
    Setting,
    Training,
    lightning_trainer,
    quiet,
    transformers_trainer,
    tutorial_loop,
)

BATCH, WARMUPS = 8, 50


def main() -> None:
    """Lets them take turns and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    quiet()
    config = BertConfig(
        vocab_size=2000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    random = np.random.default_rng(SEED)
    token_ids = [random.integers(5, 2000, length).astype(np.int32) for length in random.integers(8, 24, 4000)]
    setting = Setting("cpu", Reviews(token_ids, random.integers(0, 2, 4000)), None, config, None, "32-true", 0, 0, 0)
    batches = list(random.integers(0, 4000, (WARMUPS + args.steps, BATCH)))
    ways: dict[str, Training] = {
        "bare loop": tutorial_loop,
        "smartbatch under Lightning's Trainer, not watched": partial(lightning_trainer, watched="not"),
        "smartbatch, monitored and logged": lightning_trainer,
        "smartbatch, progress bar besides": partial(lightning_trainer, watched="shown"),
        "transformers' Trainer": transformers_trainer,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, train in ways.items():
            clock = Clock("cpu", WARMUPS)
            train(setting, batches, "longest", clock)
            seconds[name].append(clock.seconds / args.steps)
    bare = statistics.median(seconds["bare loop"])
    rows: list[Row] = [
        {"": name, "ms_a_step": 1e3 * statistics.median(times), "ms_over_bare": 1e3 * (statistics.median(times) - bare)}
        for name, times in seconds.items()
    ]
    report("step", {f"tiny BERT, batches of {BATCH}, {args.steps} steps": rows})


if __name__ == "__main__":
    main()
