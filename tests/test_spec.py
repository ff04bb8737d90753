"""Tests of what a batch may hold and what it costs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartbatch_lightning import BatchSpec, SmartBatchDataModule, plan_epoch


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=8),
    st.sampled_from(["longest", "max_length", "packed"]),
    st.sampled_from([1, 8, 64]),
    st.sampled_from([50, 60, 1000]),
)
@settings(max_examples=200, deadline=None)
def test_tokens_and_pairs_are_those_of_the_tensors(batches, padding: str, multiple: int, max_length: int) -> None:
    spec = BatchSpec(padding=padding, pad_to_multiple_of=multiple, max_length=max_length)
    lengths = np.array([length for batch in batches for length in batch])
    offsets = np.cumsum([0, *map(len, batches)])
    for batch, tokens, pairs in zip(
        batches, spec.tokens(lengths, offsets), spec.token_pairs(lengths, offsets), strict=True
    ):
        longest = min(math.ceil(max(batch) / multiple) * multiple, max_length)
        missing = math.ceil(sum(batch) / multiple) * multiple - sum(batch)
        filled = [*batch, *[max_length] * (missing // max_length), missing % max_length]
        widths = {
            "longest": [longest] * len(batch), "max_length": [max_length] * len(batch), "packed": filled
        }[padding]  # fmt: skip
        assert tokens == sum(widths)
        assert pairs == sum(width**2 for width in widths)


def test_no_batch_is_rounded_up_beyond_max_length_nor_beyond_its_budget() -> None:
    spec = BatchSpec(max_length=100, pad_to_multiple_of=64, max_tokens_per_batch=100)
    lengths = np.tile(np.arange(1, 101), 5)
    plan = plan_epoch(lengths, spec)
    assert spec.width(np.array([1, 64, 65, 100])).tolist() == [64, 64, 100, 100]
    assert spec.tokens(lengths[plan.order], plan.offsets).max() <= 100


def test_a_budget_of_a_samples_tokens_trains_batches_of_that_width() -> None:
    data = SmartBatchDataModule(max_length=100, pad_to_multiple_of=64, max_tokens_per_batch=100, validation_split=0.9)
    data.setup("fit")
    shapes = {tuple(batch["input_ids"].shape) for batch in data.train_dataloader()}
    assert shapes == {(1, 64), (1, 100)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; give 1 or more"),
        ({"max_tokens_per_batch": -5}, "max_tokens_per_batch is -5; give 1 or more"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0; give 1 or more"),
        ({"jitter": math.nan}, "jitter is nan; give a number of tokens from 0 to 1,000,000, or 'auto'"),
        ({"jitter": math.inf}, "jitter is inf; give a number of tokens"),
        ({"jitter": -1.0}, "jitter is -1.0; give a number of tokens"),
        ({"jitter": "much"}, "jitter is much; give a number of tokens"),
        (
            {"padding": "packed", "max_tokens_per_batch": 100, "pad_to_multiple_of": 64},
            "pad_to_multiple_of is 64, but max_tokens_per_batch, 100, is not a multiple of it",
        ),
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"padding": "left"}, "padding is 'left'; choose one of 'longest', 'max_length', 'packed'"),
        ({"padding": "max_length"}, "padding is 'max_length', but max_length is None; set it to the width"),
    ],
)
def test_what_is_out_of_range_is_refused_with_its_value_and_a_remedy(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSpec(**fields)


def test_a_plan_depends_on_nothing_that_its_fingerprint_leaves_out() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 300)
    for budget in (None, 200):
        seen: dict[str, bytes] = {}
        for padding in ("longest", "packed"):
            for multiple in (1, 8):
                spec = BatchSpec("smart", 8, budget, padding, multiple, 60, jitter=1.0)
                key = repr(spec.fingerprint())
                order = plan_epoch(lengths, spec).order.tobytes()
                assert seen.setdefault(key, order) == order
        assert len(seen) == (1 if budget is None else 4)
