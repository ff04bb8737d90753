"""Tests of training on a stream."""

import json
from collections import Counter
from pathlib import Path

import pytest
import run_stream
from datasets import Dataset, IterableDataset
from helpers import Fork, assert_same, finish, slow, trainer
from run_stream import ROWS, fit, stream
from transformers import AutoTokenizer

from smartbatch_lightning import SequenceClassifier, StreamDataModule, demo


def counts(batches: list[list[list[int]]]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(ids) for batch in batches for ids in batch)


def passes(number: int) -> Counter[tuple[int, ...]]:
    """The samples of a stream of three buffers that is read so often; `datasets` may shuffle its shards in between."""
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir())
    texts = [row["text"] for row in ROWS * number]
    return Counter(map(tuple, tokenizer(texts, truncation=True, max_length=24)["input_ids"]))


def test_a_stream_is_batched_buffer_by_buffer_and_resumed_exactly(tmp_path: Path) -> None:
    whole, batches = fit(tmp_path, 24)
    assert len(batches) == 24
    assert counts(batches[:12]) == passes(1)
    assert counts(batches) == passes(2)
    spread = [max(map(len, batch)) - min(map(len, batch)) for batch in batches[:4]]
    assert sum(spread) < 30  # of any four rows it is about 15
    resumed, rest = fit(tmp_path, 24, tmp_path / "step=7.ckpt")
    assert rest == batches[7:]
    assert_same(resumed.lightning_module.state_dict(), whole.lightning_module.state_dict())


@pytest.mark.parametrize("padding", ["packed", slow("longest")])
def test_a_stream_that_is_tokenized_ahead_keeps_a_token_budget_and_is_resumed_exactly(padding, tmp_path: Path) -> None:
    options = {"tokenization": "ahead", "batch_size": None, "max_tokens_per_batch": 72, "padding": padding}
    whole, batches = fit(tmp_path, 24, **options)
    costs = [sum(map(len, batch)) if padding == "packed" else len(batch) * max(map(len, batch)) for batch in batches]
    assert max(costs) <= 72
    assert len(set(map(len, batches))) > 1
    rows = [tuple(ids) for batch in batches for ids in batch]
    assert Counter(rows[: len(ROWS)]) == passes(1)
    resumed, rest = fit(tmp_path, 24, tmp_path / "step=7.ckpt", **options)
    assert rest == batches[7:]
    assert_same(resumed.lightning_module.state_dict(), whole.lightning_module.state_dict())


@pytest.mark.parametrize("tokenization", ["lazy", slow("ahead")])
def test_the_windows_of_a_text_in_a_stream_stay_in_one_batch(tokenization: str, tmp_path: Path) -> None:
    options = {"tokenization": tokenization, "max_length": 16, "truncation": "windows", "stride": 4}
    _, batches = fit(tmp_path, 12, **options)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir())
    windows = [
        tokenizer(row["text"], truncation=True, max_length=16, stride=4, return_overflowing_tokens=True)["input_ids"]
        for row in ROWS
    ]
    counted = Counter(tuple(window) for text in windows for window in text)
    assert counts(batches) == counted
    for batch in batches:
        left = Counter(map(tuple, batch))
        whole = [text for text in windows if not Counter(map(tuple, text)) - left]
        for text in whole:
            left -= Counter(map(tuple, text))
        assert not left


@pytest.mark.slow
def test_two_ranks_share_the_rows_of_a_stream_in_equally_many_steps(tmp_path: Path) -> None:
    finish(Fork(tmp_path, 2, run_stream.main, tmp_path), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(first) == len(second) == 12
    assert counts(first + second) == passes(2)


def test_what_a_stream_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="a stream has no epochs, so training would never end. Set --trainer.max_steps"
    ):
        fit(tmp_path, -1)
    with pytest.raises(ValueError, match="no fraction of a stream can be set aside"):
        StreamDataModule(stream(), validation_split=0.1)
    with pytest.raises(ValueError, match="the split 'train' is Dataset. Use SmartBatchDataModule"):
        StreamDataModule(Dataset.from_list(ROWS))
    plain = Dataset.from_list(ROWS).to_iterable_dataset()  # labels are numbers, not a ClassLabel
    with pytest.raises(ValueError, match="after the first 16 of the stream may have other labels than '0', '1'"):
        trainer(tmp_path, max_steps=2, max_epochs=-1).fit(
            SequenceClassifier(), StreamDataModule(plain, str(demo.model_dir()), buffer_size=16)
        )


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"text": "fine", "label": "c"}, "after 16 rows of the stream: row 14 .* has the label 'c'"),
        ({"text": 5, "label": "a"}, "after 16 rows of the stream: .*int"),
    ],
)
def test_a_row_that_cannot_be_trained_is_told_by_its_place_in_the_stream(odd, message: str, tmp_path: Path) -> None:
    rows = [{"text": "fine", "label": "ab"[row % 2]} for row in range(40)]
    rows[30] = odd
    stream = IterableDataset.from_generator(lambda: iter(rows))
    options = {"label_names": ["a", "b"], "batch_size": 4, "max_length": 16}
    data = StreamDataModule(stream, str(demo.model_dir()), buffer_size=16, **options)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=20, max_epochs=-1, limit_val_batches=0).fit(SequenceClassifier(), data)
