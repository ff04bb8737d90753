"""Several labels a sample and regression, learnt by the package and by transformers' Trainer, with the same steps.

    python -m benchmarks.tasks

MiniLM (6 layers, hidden size 384) is fine-tuned for two epochs on composed texts, which need no download:

- `multi-label`, of the shape of GoEmotions: its 28 labels, up to 5 a text, about as frequent as there; 3,427 texts. A
  text has one of four words for each of its labels, and what it is about.
- `pairs`, of the shape of STS-B: 2,000 pairs of sentences whose similarity, from 0 to 5, is the share of words that
  they have in common.

Measured on texts of the same making: micro F1 at a threshold of 0.5, Spearman's correlation. Batch size, rate, number
of steps, linear schedule and clipping are the same; the batches are not, since Trainer shuffles and the package sorts.
Both figures are computed here in one way, from the logits of either model. Some minutes on two cores.

MiniLM's pooler gives numbers of some 0.05, out of which a head at the encoder's rate learns no rare label in 430 steps:
nothing is then more probable than a half, and micro F1 is 0 for both; at 5e-3 it learns the most frequent label alone.
So the head has a rate of its own, the same for both.
"""

import argparse
import tempfile
from functools import partial
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
SIZES = {"multi-label": (3_427, 1_000), "pairs": (2_000, 1_000)}
RATES = {"multi-label": (5e-5, 2e-2), "pairs": (3e-4, 3e-4)}  # of the encoder and of the head, at their peak
# Labels with texts of a thousand that have each, and with words of which a text with the label has one.
EMOTIONS = {
    "neutral": (328, "table window station paper"),
    "admiration": (95, "admirable brilliant impressive masterful"),
    "approval": (68, "agreed correct approved acceptable"),
    "gratitude": (61, "thanks grateful thankful appreciated"),
    "annoyance": (57, "annoying irritating bothersome tiresome"),
    "amusement": (54, "funny hilarious laughing comical"),
    "curiosity": (50, "curious wondering intriguing inquisitive"),
    "love": (48, "love adore beloved darling"),
    "disapproval": (47, "disapprove wrong objectionable unacceptable"),
    "optimism": (36, "hopeful optimistic promising confident"),
    "anger": (36, "angry furious rage outraged"),
    "joy": (33, "happy joyful delighted cheerful"),
    "confusion": (32, "confused puzzled unclear baffled"),
    "sadness": (31, "sad unhappy crying sorrowful"),
    "disappointment": (29, "disappointed letdown underwhelming unsatisfied"),
    "realization": (26, "realized noticed discovered understood"),
    "caring": (25, "caring comforting protective supportive"),
    "surprise": (24, "surprised astonished unexpected shocked"),
    "excitement": (20, "excited thrilled eager exciting"),
    "disgust": (18, "disgusting gross revolting nauseating"),
    "desire": (15, "wish craving longing want"),
    "fear": (14, "afraid terrified scary frightened"),
    "remorse": (13, "sorry apologize regret guilty"),
    "embarrassment": (7, "embarrassed ashamed awkward humiliated"),
    "nervousness": (4, "nervous anxious worried tense"),
    "relief": (4, "relieved phew calmer unburdened"),
    "pride": (3, "proud accomplished triumphant honoured"),
    "grief": (2, "grief mourning bereaved grieving"),
}
NUM_LABELS = len(EMOTIONS)
PHRASES = ("{}", "so {}", "it is {}", "really {}", "I said {}")
TOPICS = (
    "the film",
    "this show",
    "my neighbour",
    "the new teacher",
    "our team",
    "that game",
    "the weather",
    "his answer",
)


def words(tokenizer: Any) -> list[str]:
    """Words of the vocabulary."""
    return [word for word in sorted(tokenizer.get_vocab()) if word.isalpha() and len(word) > 3]


def emotions(number: int, rng: np.random.Generator) -> Dataset:
    """Texts with up to five labels, most of them with one."""
    words_of = [words.split() for _, words in EMOTIONS.values()]
    shares = np.array([share for share, _ in EMOTIONS.values()], float)
    texts, labels = [], []
    for _ in range(number):
        has = rng.choice(
            NUM_LABELS, rng.choice(6, p=[0.02, 0.8, 0.14, 0.025, 0.01, 0.005]), False, shares / shares.sum()
        )
        parts = [rng.choice(PHRASES).format(rng.choice(words_of[label])) for label in has]
        parts.insert(rng.integers(len(parts) + 1), f"about {rng.choice(TOPICS)}")
        texts.append(", ".join(parts))
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
    rng, make = np.random.default_rng(0), emotions
    if task == "pairs":
        vocabulary = words(AutoTokenizer.from_pretrained(minilm()))
        make = partial(pairs, [vocabulary[place] for place in rng.permutation(len(vocabulary))])
    return DatasetDict({split: make(n, rng) for split, n in zip(("train", "test"), SIZES[task], strict=True)})


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


def ours(task: str, splits: DatasetDict, epochs: int, seed: int, max_steps: int) -> float:
    """The package's score."""
    with tempfile.TemporaryDirectory() as folder:
        splits.save_to_disk(folder)
        L.seed_everything(seed, verbose=False)
        columns = ["a", "b"] if task == "pairs" else "text"
        data = SmartBatchDataModule(
            folder, text_columns=columns, validation_split=None, max_length=MAX_LENGTH, batch_size=BATCH_SIZE
        )
        trainer = quiet_trainer(max_epochs=epochs, max_steps=max_steps)
        rate, head_rate = RATES[task]
        model = SequenceClassifier(minilm(), learning_rate=rate, head_learning_rate=head_rate)
        trainer.fit(model, data)
        predictions: Any = trainer.predict(model, data)
        index = torch.cat([batch["index"] for batch in predictions])
        name = "predictions" if task == "pairs" else "probabilities"
        values = torch.cat([batch[name] for batch in predictions])[index.argsort()].double()
        logits = values if task == "pairs" else values.logit()
        return score(task, logits.numpy(), targets(task, splits["test"]))


def theirs(task: str, splits: DatasetDict, epochs: int, seed: int, max_steps: int) -> float:
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
            max_grad_norm=1.0,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        rate, head_rate = RATES[task]
        head = [one for name, one in model.named_parameters() if not name.startswith(model.base_model_prefix)]
        groups: list[dict[str, Any]] = [
            {"params": list(model.base_model.parameters())},
            {"params": head, "lr": head_rate},
        ]
        optimizer = torch.optim.AdamW(groups, rate, weight_decay=0.0)
        trainer = Trainer(
            model,
            arguments,
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=encoded["train"],
            optimizers=(optimizer, None),
        )
        trainer.train()
        predicted = trainer.predict(encoded["test"])
    return score(task, np.asarray(predicted.predictions), targets(task, splits["test"]))


def main() -> None:
    """Runs both on both, and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--only", choices=SIZES, help="this task alone")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=-1, help="stop after so many steps")
    args = parser.parse_args()
    rows: list[Row] = []
    for task in [args.only] if args.only else SIZES:
        splits = data_sets(task)
        for seed in range(args.seeds):
            options = (args.epochs, seed, args.max_steps)
            peer, own = theirs(task, splits, *options), ours(task, splits, *options)
            rows.append({"task": task, "seed": seed, "transformers": peer, "smartbatch": own, "difference": own - peer})
    report("tasks", {"micro F1 of several labels, Spearman of pairs": rows})


if __name__ == "__main__":
    main()
