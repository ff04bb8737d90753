"""The demo that `python train.py fit` runs by default: made-up film reviews and a small untrained BERT.

The reviews are composed from banks of phrases, so the demo needs no network. It shows that the whole pipeline works
on texts of very different lengths. It is not a benchmark: its accuracy says nothing about real reviews or real models.
It is created once, in a second or two, and kept in the user's cache.
"""

from functools import cache
from pathlib import Path

from smartbatch_lightning.demo.reviews import REVIEWS, make_reviews
from smartbatch_lightning.storage import cache_dir, write_if_missing

NAME = "demo-v1"  # increase the number if the content changes


def _make(folder: Path) -> None:
    from smartbatch_lightning.demo.model import make_model, make_tokenizer  # only needed to create the demo

    splits = {split: make_reviews(split) for split in REVIEWS}
    (folder / "data").mkdir(parents=True)
    for split, reviews in splits.items():
        reviews.to_parquet(folder / "data" / f"{split}.parquet")
    tokenizer = make_tokenizer(splits["train"]["text"][:])
    tokenizer.save_pretrained(folder / "model")
    make_model(len(tokenizer)).save_pretrained(folder / "model")


@cache
def _made(folder: Path) -> Path:
    """The demo's folder; cached, so that its checksums are verified only once per process."""
    return write_if_missing(folder, _make)


def _demo() -> Path:
    return _made(cache_dir() / NAME)


def data_dir() -> Path:
    """The folder of `train.parquet` and `test.parquet`, with columns `text` and `label` (a `ClassLabel`)."""
    return _demo() / "data"


def files() -> dict[str, str]:
    """The demo's data files, by split."""
    return {split: str(data_dir() / f"{split}.parquet") for split in REVIEWS}


def model_dir() -> Path:
    """The `save_pretrained` folder of the tokenizer and the untrained model."""
    return _demo() / "model"
