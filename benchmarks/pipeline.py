"""How fast `predict` is beside transformers' `pipeline`: texts to probabilities, tokenizing included.

    SMARTBATCH_IMDB_DIR=... python -m benchmarks.pipeline

MiniLM (6 layers, hidden size 384) classifies the same reviews of IMDB, cut at 400 tokens: by `pipeline` with the
reviews as they come, one at a time and in batches, and in batches of reviews that the caller has sorted by length;
and by `Trainer.predict`, padded and packed. They take turns in one process, and nothing is cached: ours tokenizes anew
in every turn, checks of its data included. The probabilities are compared, and so are the operations of both. A quarter
of an hour on two cores; `--reviews 64` is over in a minute.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig, pipeline

from benchmarks.common import BATCH_SIZE, MAX_LENGTH, SEED, Row, imdb_dir, interleaved, minilm, quiet_trainer, report
from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule
from smartbatch_lightning.models.flops import training_flops

_OURS: dict[str, Row] = {
    "padded": {"padding": "longest"},
    "packed": {"padding": "packed"},
    # of which the largest tensor, 24 MiB, is one that glibc keeps, where it gives back those of 32 MiB and more
    "packed, 4,096 tokens": {"padding": "packed", "batch_size": None, "max_tokens_per_batch": 4096},
}


def save_model(folder: Path) -> None:
    """MiniLM with a head that counts as trained, so that both sides read the same weights."""
    torch.manual_seed(SEED)
    AutoModelForSequenceClassification.from_pretrained(minilm(), dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)


def by_characters(texts: list[str]) -> NDArray[Any]:
    """Order of the texts by their number of characters."""
    return np.argsort([len(text) for text in texts], kind="stable")


def by_pipeline(classify: Any, texts: list[str], batch_size: int, in_order: bool, _: int = 0) -> NDArray[Any]:
    """The second class' probability of each text, in the order of `texts`."""
    order = by_characters(texts) if in_order else np.arange(len(texts))
    results = classify([texts[row] for row in order], batch_size=batch_size)
    probabilities = np.empty(len(texts))
    probabilities[order] = [{one["label"]: one["score"] for one in result}["LABEL_1"] for result in results]
    return probabilities


def by_predict(model: SequenceClassifier, texts: list[str], folder: Path, spec: Row, turn: int = 0) -> NDArray[Any]:
    """The same by `Trainer.predict`, from a cache that is empty."""
    rows = DatasetDict(test=Dataset.from_dict({"text": texts}))
    cache = folder / f"{'-'.join(map(str, spec.values()))}-{turn}"
    data = SmartBatchDataModule(rows, max_length=MAX_LENGTH, cache_dir=cache, **spec)
    probabilities = np.empty(len(texts))
    for batch in quiet_trainer().predict(model, data):
        probabilities[batch["index"]] = batch["probabilities"][:, 1]
    return probabilities


def savings(config: PretrainedConfig, tokens: NDArray[Any], orders: dict[str, NDArray[Any]], size: int) -> list[Row]:
    """Padding of `pipeline` in each order, and its operations over those of `predict` without any padding.

    Args:
        config: Of the model.
        tokens: Of each text. Shape (num_texts,).
        orders: In which texts become batches.
        size: Texts in a batch.
    """
    ours = training_flops(config, one_token=True).total(len(tokens), tokens.sum(), (tokens**2).sum())
    flops, rows = training_flops(config), []
    for name, order in orders.items():
        starts = np.arange(0, len(order), size)
        widths = np.repeat(np.maximum.reduceat(tokens[order], starts), np.diff([*starts, len(order)]))
        theirs = flops.total(len(widths), widths.sum(), (widths**2).sum())
        rows.append({"": name, "padding": widths.sum() / tokens.sum() - 1, "expected": theirs / ours})
    return rows


def main() -> None:
    """Compares, times and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--reviews", type=int, default=2_000)
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    reviews = load_dataset("parquet", data_files=str(Path(imdb_dir(), "test.parquet")), split="train")
    texts = list(reviews.shuffle(seed=SEED).select(range(args.reviews))["text"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        options: Any = {"truncation": True, "max_length": MAX_LENGTH, "top_k": None}
        classify = pipeline("text-classification", str(folder / "model"), dtype=torch.float32, **options)
        model = SequenceClassifier(str(folder / "model"))
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        orders = {"as given": np.arange(len(texts)), "sorted": by_characters(texts)}
        expected = savings(classify.model.config, np.array(list(map(len, encoded))), orders, args.batch_size)
        several = f"batches of {args.batch_size}"
        contestants: dict[str, Callable[[int], NDArray[Any]]] = {
            f"pipeline, as given, {several}": partial(by_pipeline, classify, texts, args.batch_size, False),
            f"pipeline, sorted, {several}": partial(by_pipeline, classify, texts, args.batch_size, True),
            "pipeline, one at a time": partial(by_pipeline, classify, texts, 1, False),
        }
        for batches, spec in _OURS.items():
            title = f"predict, {batches}" + ("" if "batch_size" in spec else f", {several}")
            spec = {"batch_size": args.batch_size, **spec}
            contestants[title] = partial(by_predict, model, texts, folder, spec)
        by_predict(model, texts[:BATCH_SIZE], folder, {**_OURS["padded"], "batch_size": 1}, turn=-1)  # warms up
        probabilities: dict[str, NDArray[Any]] = {}

        def run(name: str, turn: int) -> None:
            probabilities[name] = contestants[name](turn)

        seconds = interleaved({name: partial(run, name) for name in contestants}, args.repeats, warmups=0)
    first = next(iter(probabilities.values()))
    peers = [name for name in contestants if name.startswith("pipeline")]
    rows = [
        {
            "": name,
            "seconds": seconds[name],
            "reviews_per_second": len(texts) / seconds[name],
            **{f"over {peer.removeprefix('pipeline, ')}": seconds[peer] / seconds[name] for peer in peers},
            "largest_difference": float(np.abs(probabilities[name] - first).max()),
        }
        for name in contestants
    ]
    title = f"IMDB, {len(texts):,} reviews, MiniLM at {MAX_LENGTH} tokens"
    report("pipeline", {title: rows, f"pipeline, {several}: expected speed-ups": expected})


if __name__ == "__main__":
    main()
