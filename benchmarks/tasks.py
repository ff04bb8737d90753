"""Several labels a sample and regression, learnt by the package and by transformers' Trainer, with the same steps.

    python -m benchmarks.tasks

MiniLM (6 layers, hidden size 384) is fine-tuned for two epochs on composed texts, which need no download:

- `multi-label`, of the shape of GoEmotions: 28 labels, up to 5 a text, 3,427 texts. Each label has five words of its
  own; a text has one of them for each of its labels, among words that mean nothing.
- `pairs`, of the shape of STS-B: 2,000 pairs of sentences whose similarity, from 0 to 5, is the share of words that
  they have in common.

Measured on texts of the same making: micro F1 at a threshold of 0.5, Spearman's correlation. Batch size, rate, number
of steps, linear schedule and clipping are the same; the batches are not, since Trainer shuffles and the package sorts.
Both figures are computed here in one way, from the logits of either model. Some minutes on two cores.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from datasets import Dataset, DatasetDict, Value
from numpy.typing import NDArray
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from benchmarks.common import Row, minilm, quiet_trainer, report
from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule

BATCH_SIZE = 16
MAX_LENGTH = 64
NUM_LABELS = 28
SIZES = {"multi-label": (3_427, 1_000), "pairs": (2_000, 1_000)}


def words(tokenizer: Any) -> list[str]:
    """Words of the vocabulary."""
    return [word for word in sorted(tokenizer.get_vocab()) if word.isalpha() and len(word) > 3]


def emotions(vocabulary: list[str], number: int, rng: np.random.Generator) -> Dataset:
    """Texts with up to five labels, of which the first are much more frequent than the last."""
    shares = 1 / np.arange(1, NUM_LABELS + 1)
    texts, labels = [], []
    for _ in range(number):
        has = rng.choice(NUM_LABELS, rng.choice(6, p=[0.1, 0.5, 0.2, 0.1, 0.06, 0.04]), False, shares / shares.sum())
        chosen = [vocabulary[5 * label + rng.integers(5)] for label in has]
        chosen += [vocabulary[rng.integers(5 * NUM_LABELS, 1000)] for _ in range(rng.integers(3, 25))]
        texts.append(" ".join(rng.permutation(chosen)))
        labels.append(sorted(has.tolist()))
    return Dataset.from_dict({"text": texts, "label": labels})


def pairs(vocabulary: list[str], number: int, rng: np.random.Generator) -> Dataset:
    """Pairs of sentences that share some of their words."""
    first, second, similarity = [], [], []
    for _ in range(number):
        length = rng.integers(4, 20)
        one = rng.choice(1000, length, False)
        kept = rng.integers(0, length + 1)
        other = np.concatenate([one[:kept], rng.integers(1000, 2000, length - kept)])
        first.append(" ".join(vocabulary[word] for word in one))
        second.append(" ".join(vocabulary[word] for word in rng.permutation(other)))
        similarity.append(5 * kept / length)
    return Dataset.from_dict({"a": first, "b": second, "label": similarity})


def data_sets(task: str) -> DatasetDict:
    """Training and test split."""
    vocabulary = words(AutoTokenizer.from_pretrained(minilm()))
    rng = np.random.default_rng(0)
    vocabulary = [vocabulary[place] for place in rng.permutation(len(vocabulary))]
    make = emotions if task == "multi-label" else pairs
    return DatasetDict(
        {split: make(vocabulary, n, rng) for split, n in zip(("train", "test"), SIZES[task], strict=True)}
    )


def score(task: str, logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Micro F1 of logits and indicators (num_samples, num_labels); or Spearman's correlation of values."""
    if task == "multi-label":
        found, true = logits > 0, labels > 0
        return float(2 * (found & true).sum() / (found.sum() + true.sum()))
    table = pd.DataFrame({"predicted": logits.reshape(-1), "target": labels})
    return float(table.corr("spearman").loc["predicted", "target"])


def targets(task: str, split: Dataset) -> NDArray[np.float32]:
    """Labels as transformers takes them: indicators (num_samples, num_labels), or values."""
    if task == "pairs":
        return np.array(split["label"], np.float32)
    encoded = np.zeros((len(split), NUM_LABELS), np.float32)
    for row, labels in enumerate(split["label"]):
        encoded[row, labels] = 1
    return encoded


def ours(task: str, splits: DatasetDict, rate: float, epochs: int, seed: int, max_steps: int) -> float:
    """The package's score."""
    with tempfile.TemporaryDirectory() as folder:
        splits.save_to_disk(folder)
        L.seed_everything(seed, verbose=False)
        columns = ["a", "b"] if task == "pairs" else "text"
        data = SmartBatchDataModule(
            folder, text_columns=columns, validation_split=None, max_length=MAX_LENGTH, batch_size=BATCH_SIZE
        )
        trainer = quiet_trainer(
            max_epochs=epochs,
            max_steps=max_steps,
        )
        model = SequenceClassifier(minilm(), learning_rate=rate)
        trainer.fit(model, data)
        predictions: Any = trainer.predict(model, data)
        index = torch.cat([batch["index"] for batch in predictions])
        name = "predictions" if task == "pairs" else "probabilities"
        values = torch.cat([batch[name] for batch in predictions])[index.argsort()].double()
        logits = values if task == "pairs" else values.logit()
        return score(task, logits.numpy(), targets(task, splits["test"]))


def theirs(task: str, splits: DatasetDict, rate: float, epochs: int, seed: int, max_steps: int) -> float:
    """The score of transformers' Trainer, with its own collator and the model's own loss."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    columns = ["a", "b"] if task == "pairs" else ["text"]

    def encode(split: Dataset) -> Dataset:
        rows = split.map(
            lambda batch: tokenizer(*(batch[column] for column in columns), truncation=True, max_length=MAX_LENGTH),
            batched=True,
            remove_columns=split.column_names,
        )
        return rows.add_column("labels", targets(task, split).tolist())

    encoded = {name: encode(split) for name, split in splits.items()}
    if task == "pairs":
        encoded = {name: split.cast_column("labels", Value("float32")) for name, split in encoded.items()}
    problem_type = "regression" if task == "pairs" else "multi_label_classification"
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=1 if task == "pairs" else NUM_LABELS, problem_type=problem_type, dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            str(Path(folder)),
            num_train_epochs=epochs,
            max_steps=max_steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=rate,
            max_grad_norm=1.0,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = Trainer(
            model, arguments, data_collator=DataCollatorWithPadding(tokenizer), train_dataset=encoded["train"]
        )
        trainer.train()
        predicted = trainer.predict(encoded["test"])
    return score(task, np.asarray(predicted.predictions), targets(task, splits["test"]))


def main() -> None:
    """Runs both on both, and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=-1, help="stop after so many steps")
    args = parser.parse_args()
    rows: list[Row] = []
    for task in SIZES:
        splits = data_sets(task)
        for seed in range(args.seeds):
            options = (args.rate, args.epochs, seed, args.max_steps)
            peer, own = theirs(task, splits, *options), ours(task, splits, *options)
            rows.append({"task": task, "seed": seed, "transformers": peer, "smartbatch": own, "difference": own - peer})
    report("tasks", {"micro F1 of several labels, Spearman of pairs": rows})


if __name__ == "__main__":
    main()
