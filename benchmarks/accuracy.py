"""What smart batching does to accuracy and training time: a real BERT fine-tuned on real reviews.

    SMARTBATCH_IMDB_DIR=... python -m benchmarks.accuracy

MiniLM (6 layers, hidden size 384) is trained on 2,000 reviews of IMDB for two epochs and tested on 1,000, with the
package's defaults (learning rate 5e-5, gradients clipped at 1.0, seed 321), once with `smart` + `longest` and once
with `random` + `max_length`. Everything else is the same: samples, initial weights, number of steps. The samples are
drawn once for all runs, half of each label. Some minutes on two cores; `--max_steps 2` is over in seconds.

This is about accuracy. At 128 tokens nearly every review is cut, so there is little padding to save; and the variants
run one after the other, so that seconds compare only on a machine with nothing else to do. Tokens always do.
"""

import argparse
from typing import Any, ClassVar

import lightning as L
import numpy as np
from datasets import DatasetDict

from benchmarks.common import BATCH_SIZE, SEED, Row, imdb_dir, minilm, quiet_trainer, report
from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule, TrainingMonitor
from smartbatch_lightning.data.splits import stratified_split

NUM_SAMPLES = {"train": 2_000, "test": 1_000}
VARIANTS: tuple[Row, ...] = (
    {"batching": "smart", "padding": "longest"},
    {"batching": "random", "padding": "max_length"},
)


class ImdbSample(SmartBatchDataModule):
    """A few of IMDB's reviews, half of each label."""

    num_samples: ClassVar = NUM_SAMPLES

    def load_dataset(self) -> DatasetDict:
        """Draws `num_samples` of each split; the same ones whatever the run's seed."""
        splits = super().load_dataset()
        return DatasetDict(
            {
                name: splits[name].select(
                    stratified_split(np.array(splits[name]["label"]), wanted / len(splits[name]))[1]
                )
                for name, wanted in self.num_samples.items()
            }
        )


def train_and_test(variant: Row, max_length: int, epochs: int, max_steps: int, precision: Any) -> Row:
    """Fine-tunes and tests once."""
    L.seed_everything(SEED, verbose=False)
    data = ImdbSample(
        imdb_dir(), minilm(), validation_split=None, max_length=max_length, batch_size=BATCH_SIZE, **variant
    )
    monitor = TrainingMonitor()
    trainer = quiet_trainer(
        max_epochs=epochs,
        max_steps=max_steps,
        limit_test_batches=max_steps if max_steps > 0 else None,
        precision=precision,
        callbacks=[monitor],
    )
    model = SequenceClassifier(minilm())
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    trained = monitor.total
    return {
        **variant,
        "steps": trainer.global_step,
        "test_accuracy": tested["test_accuracy"],
        "test_macro_f1": tested["test_f1"],
        "training_seconds": trained.seconds,
        "tokens": trained.tokens,
        "percent_over_real": 100 * trained.padding_ratio,
    }


def main() -> None:
    """Runs every variant and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--max_length", type=int, default=128, help="longest review, in tokens")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max_steps", type=int, default=-1, help="stop after so many steps, and so many test batches")
    parser.add_argument("--precision", default="bf16-mixed", help="as Lightning's Trainer takes it")
    args = parser.parse_args()
    train_and_test(VARIANTS[0], args.max_length, args.epochs, 2, args.precision)  # warms up libraries and caches
    rows = [
        train_and_test(variant, args.max_length, args.epochs, args.max_steps, args.precision) for variant in VARIANTS
    ]
    peer = rows[-1]
    for row in rows:
        row["tokens_ratio"] = row["tokens"] / peer["tokens"]
        row["seconds_ratio"] = row["training_seconds"] / peer["training_seconds"]
    report(
        "accuracy", {f"IMDB, {NUM_SAMPLES['train']:,} reviews, max_length {args.max_length}, {args.precision}": rows}
    )


if __name__ == "__main__":
    main()
