"""What weights of classes do for a rare class: IMDB with few positive reviews, fine-tuned with and without.

    SMARTBATCH_IMDB_DIR=... python -m benchmarks.imbalance

MiniLM (6 layers, hidden size 384) is trained on 4,000 reviews of IMDB, 5 % of them positive, for two epochs at 64
tokens, packed, with the package's defaults, and tested on 2,000 others with as few, once with the plain loss and once
with each option. Within a seed everything else is the same: reviews, initial weights, number of steps. Half an hour on
two cores; `--max_steps 2` is over in a minute.
"""

import argparse
from typing import Any

import lightning as L
import numpy as np
from datasets import DatasetDict, concatenate_datasets

from benchmarks.common import BATCH_SIZE, Row, imdb_dir, minilm, quiet_trainer, report
from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule

NUM_SAMPLES = {"train": 4_000, "test": 2_000}
POSITIVE = 0.05
VARIANTS: dict[str, Row] = {
    "plain": {},
    "class_weights: balanced": {"class_weights": "balanced"},
    "focal_gamma: 2": {"focal_gamma": 2.0},
}


class FewPositive(SmartBatchDataModule):
    """Some of IMDB's reviews, few of them positive; the first of each label in an order drawn once."""

    def load_dataset(self) -> DatasetDict:
        """Draws `NUM_SAMPLES` of each split."""
        splits = super().load_dataset()
        drawn = {}
        for name, wanted in NUM_SAMPLES.items():
            shuffled = splits[name].shuffle(seed=0)
            labels = np.array(shuffled["label"])
            positive = round(POSITIVE * wanted)
            parts = [
                shuffled.select(np.flatnonzero(labels == label)[:number])
                for label, number in ((1, positive), (0, wanted - positive))
            ]
            drawn[name] = concatenate_datasets(parts)
        return DatasetDict(drawn)


def train_and_test(variant: Row, seed: int, epochs: int, max_steps: int) -> Row:
    """Fine-tunes and tests once."""
    L.seed_everything(seed, verbose=False)
    data = FewPositive(
        imdb_dir(), minilm(), validation_split=None, max_length=64, batch_size=BATCH_SIZE, padding="packed"
    )
    trainer = quiet_trainer(
        max_epochs=epochs,
        max_steps=max_steps,
        limit_test_batches=max_steps if max_steps > 0 else None,
    )
    metrics: Any = ["f1", "balanced_accuracy", "accuracy", "average_precision"]
    model = SequenceClassifier(minilm(), metrics=metrics, **variant)
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    return {name.removeprefix("test_"): value for name, value in tested.items() if name != "test_loss"}


def main() -> None:
    """Runs all variants with each seed, and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max_steps", type=int, default=-1, help="stop after so many steps")
    args = parser.parse_args()
    rows: list[Row] = []
    for seed in range(args.seeds):
        for name, variant in VARIANTS.items():
            rows.append({"loss": name, "seed": seed, **train_and_test(variant, seed, args.epochs, args.max_steps)})
            print(rows[-1], flush=True)
    names = [name for name in rows[0] if name not in ("loss", "seed")]
    means = [
        {"loss": loss, **{name: float(np.mean([row[name] for row in rows if row["loss"] == loss])) for name in names}}
        for loss in VARIANTS
    ]
    report("imbalance", {f"{POSITIVE:.0%} positive": rows, "means over seeds": means})


if __name__ == "__main__":
    main()
