"""Tests of the bounds of `jitter: auto` over lengths of many kinds; `test_strategies.py` has those of its choice."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smartbatch_lightning import BatchSpec, SmartBatchSampler, plan_epoch
from smartbatch_lightning.batching import batch_overlap
from smartbatch_lightning.batching.jitter import choose_jitter

NOISE = 0.0005  # of the padding of an epoch, as a share of the real tokens; no epoch here is one that was measured


def lognormal(num_samples: int, median: float, spread: float, longest: int, seed: int) -> NDArray[np.int64]:
    drawn = median * np.exp(np.random.default_rng(seed).normal(0, spread, num_samples))
    return np.clip(drawn.astype(np.int64), 3, longest)


@st.composite
def length_sets(draw) -> NDArray[np.int64]:
    """1,800 to 25,000 lengths, from those of short sentences to those of long documents, cut or whole."""
    return lognormal(
        draw(st.integers(1800, 25_000)),
        draw(st.floats(10, 1000)),
        draw(st.floats(0.1, 1.2)),
        draw(st.sampled_from([64, 400, 512, 8192])),
        draw(st.integers(0, 2**32)),
    )


def padding_and_overlap(lengths: NDArray[np.int64], spec: BatchSpec) -> tuple[float, float]:
    """Means of five epochs."""
    plans = [plan_epoch(lengths, spec, epoch=epoch) for epoch in range(2, 7)]
    tokens = [sum(len(plan[b]) * int(lengths[plan[b]].max()) for b in range(len(plan))) for plan in plans]
    return float(np.mean(tokens) / lengths.sum() - 1), float(
        np.mean([batch_overlap(*pair) for pair in itertools.pairwise(plans)])
    )


@pytest.mark.slow
@given(length_sets(), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_jitter_pads_no_more_than_one_percent_or_what_is_padded_without_it(lengths, seed: int) -> None:
    padding, _ = padding_and_overlap(lengths, BatchSpec(seed=seed))
    without, _ = padding_and_overlap(lengths, BatchSpec(seed=seed, jitter=0.0))
    assert padding <= max(0.01, 1.05 * without) + NOISE


@given(length_sets())
@settings(max_examples=25, deadline=None)
def test_smart_pads_more_than_the_tutorial_only_within_its_percent_and_mixes_less_only_at_its_end(lengths) -> None:
    padding, overlap = padding_and_overlap(lengths, BatchSpec())
    tutorial_padding, tutorial_overlap = padding_and_overlap(lengths, BatchSpec("tutorial"))
    assert padding <= max(tutorial_padding, 0.01 + NOISE)
    assert overlap < tutorial_overlap or padding > 0.009


@pytest.mark.parametrize("num_samples", [1800, 2500, 10_000, 25_000])
@pytest.mark.parametrize("seed", range(3))
def test_on_reviews_cut_at_400_tokens_smart_beats_the_tutorial_in_padding_and_overlap(num_samples, seed) -> None:
    lengths = lognormal(num_samples, 230, 0.7, 400, seed)
    padding, overlap = padding_and_overlap(lengths, BatchSpec(seed=seed))
    tutorial_padding, tutorial_overlap = padding_and_overlap(lengths, BatchSpec("tutorial", seed=seed))
    assert padding < tutorial_padding
    assert overlap < tutorial_overlap


@pytest.mark.parametrize(
    ("median", "spread", "longest"), [(20, 0.5, 64), (230, 0.7, 400), (230, 0.75, 512), (60, 1, 512)]
)
def test_of_many_samples_few_mates_meet_again_and_less_than_a_percent_is_padding(median, spread, longest) -> None:
    lengths = lognormal(200_000, median, spread, longest, seed=1)
    padding, overlap = padding_and_overlap(lengths, BatchSpec(seed=9))
    assert padding < 0.01
    assert overlap < 0.10


def test_every_epoch_and_seed_has_the_same_jitter() -> None:
    lengths = lognormal(3000, 230, 0.7, 400, seed=2)
    chosen = choose_jitter(lengths, BatchSpec())
    assert chosen > 0.5
    for epoch, seed in itertools.product((0, 1, 7), (0, 5)):
        sampler = SmartBatchSampler(lengths, BatchSpec(seed=seed))
        sampler.set_epoch(epoch)
        told = plan_epoch(lengths, BatchSpec(seed=seed, jitter=chosen), epoch=epoch)
        assert sampler.spec.jitter == chosen
        assert list(sampler) == [batch.tolist() for batch in told.rank_batches(0)]
