"""What LoRA costs and gains beside full fine-tuning: a real BERT on real reviews.

    SMARTBATCH_IMDB_DIR=... python -m benchmarks.adapters

MiniLM (6 layers, hidden size 384) is trained on 2,000 reviews of IMDB, cut at 128 tokens, for two epochs, packed, and
tested on 1,000 others: once whole, with the package's defaults, and with LoRA of some ranks, at the learning rate that
suits it. Everything else is the same. Some minutes on two cores; `--max_steps 2` is over in a minute.
"""

import argparse
import os
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L

from benchmarks.accuracy import NUM_SAMPLES, ImdbSample
from benchmarks.common import BATCH_SIZE, SEED, Row, imdb_dir, minilm, quiet_trainer, report
from smartbatch_lightning import SequenceClassifier

LORA: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": 16}
VARIANTS: dict[str, Row] = {
    "all weights": {},
    "LoRA, r 8, queries and values": {"peft_config": {**LORA, "r": 8}, "learning_rate": 1e-3},
    "LoRA, r 8, all linear layers": {
        "peft_config": {**LORA, "r": 8, "target_modules": "all-linear"},
        "learning_rate": 1e-3,
    },
}


def train_and_test(variant: Row, epochs: int, max_steps: int) -> Row:
    """Fine-tunes and tests once; the checkpoint is written and weighed."""
    L.seed_everything(SEED, verbose=False)
    data = ImdbSample(
        imdb_dir(), minilm(), validation_split=None, max_length=128, batch_size=BATCH_SIZE, padding="packed"
    )
    limits = {"max_steps": max_steps, "limit_test_batches": max_steps if max_steps > 0 else None}
    trainer = quiet_trainer(max_epochs=epochs, **limits)
    model = SequenceClassifier(minilm(), **variant)
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    with TemporaryDirectory() as folder:
        trainer.save_checkpoint(f"{folder}/last.ckpt")
        size = os.path.getsize(f"{folder}/last.ckpt")
    return {
        "learning_rate": model.learning_rate,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "checkpoint_mib": size / 2**20,
        "test_accuracy": tested["test_accuracy"],
    }


def main() -> None:
    """Runs every variant and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max_steps", type=int, default=-1, help="stop after so many steps, and so many test batches")
    args = parser.parse_args()
    rows = [
        {"trained": name, **train_and_test(variant, args.epochs, args.max_steps)} for name, variant in VARIANTS.items()
    ]
    report("adapters", {f"IMDB, {NUM_SAMPLES['train']:,} reviews, {args.epochs} epochs": rows})


if __name__ == "__main__":
    main()
