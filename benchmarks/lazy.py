"""Texts that are tokenized when their batch is made, beside texts that are tokenized ahead: IMDB, MiniLM.

    SMARTBATCH_IMDB_DIR=... python -m benchmarks.lazy

1. Seconds from the constructor of the data module to the first training step, in a fresh process that has trained a
   step of the demo before, so that nothing is left to import; the cache of `datasets` is in place, that of tokens is
   empty. The two take turns. Imports take some ten seconds more, for both, and as much again for a worker that is not
   forked.
2. Padding over real tokens of an epoch of `smart` batches, which are planned by true lengths, and by estimates.
3. Rate of training with one process that loads batches. The two take turns with every step, and train the same
   batches, those of the lazy plan: the rate of a token is the median over the steps, and that of a real token is it
   with the padding of part 2.
"""

import argparse
import statistics
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import LambdaCallback
from transformers import AutoModelForSequenceClassification

from benchmarks.common import (
    BATCH_SIZE,
    MAX_LENGTH,
    SEED,
    Row,
    imdb_dir,
    in_fresh_process,
    minilm,
    quiet_trainer,
    report,
)
from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule, plan_epoch

Tokenization = Literal["ahead", "lazy"]
TOKENIZATIONS: tuple[Tokenization, ...] = ("ahead", "lazy")


def imdb(tokenization: Tokenization, **options: Any) -> SmartBatchDataModule:
    """IMDB's reviews, loaded by one process."""
    options = {"max_length": MAX_LENGTH, "batch_size": BATCH_SIZE, "seed": SEED, "num_workers": 1, **options}
    # as in a script on Linux before Python 3.14; in the fresh process, the worker would import everything once more
    options["loader_kwargs"] = {"multiprocessing_context": "fork"}
    return SmartBatchDataModule(imdb_dir(), minilm(), tokenization=tokenization, validation_split=None, **options)


def seconds_to_first_step(tokenization: Tokenization) -> float:
    """Seconds from the constructor of the data module, without any token in the cache."""
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(SequenceClassifier(minilm()), SmartBatchDataModule())
    at: list[float] = []
    with TemporaryDirectory() as folder:
        start = perf_counter()
        data = imdb(tokenization, cache_dir=folder)
        first = LambdaCallback(on_train_batch_start=lambda *_: at.append(perf_counter()))
        quiet_trainer(max_steps=1, callbacks=[first]).fit(SequenceClassifier(minilm()), data)
    return at[0] - start


def starts(repeats: int) -> list[Row]:
    """Part 1."""
    seconds = [[in_fresh_process(seconds_to_first_step, one) for one in TOKENIZATIONS] for _ in range(repeats)]
    ratios = [lazy / ahead for ahead, lazy in seconds]
    return [
        {
            "tokenization": one,
            "median_seconds_to_first_step": statistics.median(took[number] for took in seconds),
            "over_ahead": 1.0 if one == "ahead" else statistics.median(ratios),
        }
        for number, one in enumerate(TOKENIZATIONS)
    ]


def padding(ahead: SmartBatchDataModule, lazy: SmartBatchDataModule) -> list[Row]:
    """Part 2."""
    lengths, rows = ahead.train_data.lengths, []
    for name, planned in (("true", lengths), ("estimated", lazy.train_data.lengths)):
        plan = plan_epoch(planned, ahead.spec)
        tokens = int(ahead.spec.tokens(lengths[plan.order], plan.offsets).sum())
        rows.append({"lengths": name, "padding_over_real": tokens / int(lengths.sum()) - 1})
    return rows


def rates(ahead: SmartBatchDataModule, lazy: SmartBatchDataModule, steps: int, padded: list[Row]) -> list[Row]:
    """Part 3."""
    ahead.train_data.lengths = lazy.train_data.lengths
    batches = {"ahead": iter(ahead.train_dataloader()), "lazy": iter(lazy.train_dataloader())}
    model = AutoModelForSequenceClassification.from_pretrained(minilm())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for step in range(steps + 1):
        widths = set()
        for name, loader in batches.items():
            start = perf_counter()
            batch = next(loader)
            widths.add((tuple(batch["index"].tolist()), batch["input_ids"].shape))
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step:  # the first one starts the process
                seconds[name].append(perf_counter() - start)
        assert len(widths) == 1, "the two train other batches"
    ratio = statistics.median(ahead / lazy for ahead, lazy in zip(seconds["ahead"], seconds["lazy"], strict=True))
    by_length, by_estimate = (1 + row["padding_over_real"] for row in padded)
    return [
        {"lazy over ahead": "tokens a second", "ratio": ratio},
        {"lazy over ahead": "real tokens a second", "ratio": ratio * by_length / by_estimate},
    ]


def main() -> None:
    """Runs all parts and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes of part 1, for each of the two")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of part 3, for each of the two")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    ahead, lazy = map(imdb, TOKENIZATIONS)
    for data in (ahead, lazy):  # which fills the caches
        data.prepare_data()
        data.setup("fit")
    padded = padding(ahead, lazy)
    report(
        "lazy",
        {
            "start with an empty token cache": starts(args.starts),
            f"smart batches of {BATCH_SIZE}": padded,
            "training, one loading process": rates(ahead, lazy, args.steps, padded),
        },
    )


if __name__ == "__main__":
    main()
