"""What is best kept of long reviews: a real BERT fine-tuned on the head, the tail, both, or all of them in windows.

    SMARTBATCH_IMDB_DIR=... python -m benchmarks.truncation

MiniLM (6 layers, hidden size 384) is trained on 4,000 reviews of IMDB for two epochs at 128 tokens and tested on
4,000, with each truncation and seed; `head` and so on are the same samples, initial weights and order of seeds. Each
run is printed as it ends; `--rows` keeps it in a file as well, and skips what is in there, so that several short
sessions add up. Some minutes a run on two cores; `--max_steps 2` is over in seconds.

Sun et al., *How to Fine-Tune BERT for Text Classification?* (2019), with BERT-base at 512 tokens on all of IMDB, have
test errors of 5.63 % (head), 5.44 % (tail), 5.42 % (128 tokens of head, 382 of tail), and 5.89 % (mean) and 5.71 %
(max) for windows whose hidden states, where here it is the logits, are pooled.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from benchmarks.accuracy import ImdbSample
from benchmarks.common import BATCH_SIZE, Row, imdb_dir, minilm, quiet_trainer, report
from smartbatch_lightning import SequenceClassifier

PUBLISHED_ERROR = {"head": 5.63, "tail": 5.44, "head_tail": 5.42, "windows, mean": 5.89, "windows, max": 5.71}


class Reviews(ImdbSample):
    """4,000 reviews to train on and 4,000 to test on, half of each label."""

    num_samples: ClassVar = {"train": 4_000, "test": 4_000}


def train_and_test(name: str, seed: int, max_length: int, max_steps: int, precision: Any) -> Row:
    """Fine-tunes and tests once."""
    L.seed_everything(seed, verbose=False)
    truncation, _, pooling = name.partition(", ")
    data = Reviews(
        imdb_dir(),
        minilm(),
        validation_split=None,
        max_length=max_length,
        batch_size=BATCH_SIZE,
        padding="packed",
        truncation=truncation,
        window_pooling=pooling or None,
    )
    trainer = quiet_trainer(
        max_epochs=2, max_steps=max_steps, limit_test_batches=max_steps if max_steps > 0 else None, precision=precision
    )
    model = SequenceClassifier(minilm())
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    tokens = int(data.train_data.lengths.sum())
    return {"truncation": name, "seed": seed, "tokens": tokens, "test_accuracy": tested["test_accuracy"]}


def main() -> None:
    """Runs every truncation with every seed and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--truncations", nargs="+", default=list(PUBLISHED_ERROR), choices=PUBLISHED_ERROR)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--max_length", type=int, default=128, help="longest input, in tokens")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop after so many steps, and so many test batches")
    parser.add_argument("--precision", default="bf16-mixed", help="as Lightning's Trainer takes it")
    parser.add_argument("--rows", type=Path, help="file that keeps each run; what is in there is not run again")
    args = parser.parse_args()
    kept = args.rows.read_text().splitlines() if args.rows and args.rows.exists() else []
    runs = {(row["truncation"], row["seed"]): row for row in map(json.loads, kept)}
    wanted = [(name, seed) for seed in args.seeds for name in args.truncations]
    for name, seed in wanted:
        if (name, seed) not in runs:
            row = train_and_test(name, seed, args.max_length, args.max_steps, args.precision)
            runs[name, seed] = row
            print(json.dumps(row), flush=True)
            if args.rows:
                with args.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    rows = [runs[run] for run in wanted]
    summary = []
    for name in args.truncations:
        accuracies = [row["test_accuracy"] for row in rows if row["truncation"] == name]
        summary.append(
            {
                "truncation": name,
                "tokens": next(row["tokens"] for row in rows if row["truncation"] == name),
                "percent_error": 100 * (1 - statistics.mean(accuracies)),
                "standard_deviation": 100 * statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "published_percent_error": PUBLISHED_ERROR[name],
            }
        )
    report("truncation", {f"IMDB, 4,000 reviews, max_length {args.max_length}, {args.precision}": summary})


if __name__ == "__main__":
    main()
