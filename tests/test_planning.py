"""Tests of the planner: what every plan promises, whatever the batching."""

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smartbatch_lightning import BatchPlan, BatchSpec
from smartbatch_lightning.batching import batch_overlap
from smartbatch_lightning.batching import plan_epoch as plan_with_spec
from smartbatch_lightning.batching.arrays import argsort
from smartbatch_lightning.data.splits import stratified_split

BATCHINGS = ["smart", "tutorial", "random"]
OWN = "test_strategies.shortest_first"  # a strategy from outside of the package, which keeps the same promises


def spec_of(**fields) -> BatchSpec:
    return BatchSpec(**{"jitter": 1.0, **fields})


def plan_epoch(
    lengths, batch_size=None, batching="smart", *, epoch=0, num_replicas=1, shuffle=True, **fields
) -> BatchPlan:
    """A plan of fields of a `BatchSpec`; jitter is 1 unless given."""
    spec = spec_of(batch_size=batch_size, batching=batching, **fields)
    return plan_with_spec(lengths, spec, epoch=epoch, num_replicas=num_replicas, shuffle=shuffle)


def padded_tokens(plan: BatchPlan, lengths) -> int:
    return sum(len(batch) * int(lengths[batch].max()) for batch in map(np.array, batches(plan)))


@st.composite
def cases(draw) -> dict:
    """Arguments of `plan_epoch`, half of them with a token budget, in which there may be room for a single sample."""
    num_replicas = draw(st.integers(1, 9))
    lengths = np.array(draw(st.lists(st.integers(1, 600), min_size=num_replicas, max_size=400)))
    case = {
        "lengths": lengths,
        "batch_size": draw(st.integers(1, 40)),
        "batching": draw(st.sampled_from([*BATCHINGS, OWN])),
        "seed": draw(st.integers(0, 2**32)),
        "epoch": draw(st.integers(0, 50)),
        "num_replicas": num_replicas,
        "jitter": draw(st.sampled_from([0.0, 0.3, 1.0, 2.5, 40.0, "auto"])),
        "shuffle": draw(st.booleans()),
        "padding": draw(st.sampled_from(["longest", "max_length", "packed"])),
        "pad_to_multiple_of": draw(st.sampled_from([1, 8, 100])),
        "max_length": draw(st.sampled_from([None, int(lengths.max()), 1000])),
    }
    if case["padding"] == "max_length" and case["max_length"] is None:
        case["max_length"] = 700
    if draw(st.booleans()):
        rooms = 1 if len(lengths) % num_replicas == 0 else 2
        least = rooms * width(int(lengths.max()), case)
        case["max_tokens_per_batch"] = draw(st.integers(least, 20 * least))
        if case["padding"] == "packed":  # rows are filled up to a multiple, which the budget has to be
            case["max_tokens_per_batch"] = rounded_up(case["max_tokens_per_batch"], case["pad_to_multiple_of"])
        case["batch_size"] = draw(st.none() | st.integers(1, 40))
    return case


def width(longest: int, case: dict) -> int:
    if case["padding"] == "max_length":
        return case["max_length"]
    multiple = 1 if case["padding"] == "packed" else case["pad_to_multiple_of"]
    return min(rounded_up(longest, multiple), case["max_length"] or 10**9)


def rounded_up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def review_lengths(num_samples: int, seed: int = 0) -> NDArray[np.int64]:
    """Lengths with the spread of IMDB's reviews cut at 400 tokens."""
    drawn = np.exp(np.random.default_rng(seed).normal(5.4, 0.7, num_samples)).astype(np.int64) + 10
    return np.minimum(drawn, 400)


def batches(plan: BatchPlan) -> list[list[int]]:
    return [plan[number].tolist() for number in range(len(plan))]


@given(cases())
@settings(max_examples=300, deadline=None)
def test_every_sample_appears_once_over_all_ranks(case: dict) -> None:
    plan = plan_epoch(**case)
    ranks = range(case["num_replicas"])
    seen = [sample for rank in ranks for batch in plan.rank_batches(rank) for sample in batch]
    assert sorted(seen) == list(range(len(case["lengths"])))


@given(cases())
@settings(max_examples=300, deadline=None)
def test_every_rank_takes_equally_many_steps_and_no_batch_is_empty(case: dict) -> None:
    plan = plan_epoch(**case)
    steps = {len(list(plan.rank_batches(rank))) for rank in range(case["num_replicas"])}
    assert steps == {len(plan) / case["num_replicas"]}
    assert plan.batch_sizes().min() >= 1


@given(cases())
@settings(max_examples=300, deadline=None)
def test_no_batch_is_larger_than_asked_but_where_steps_could_not_be_equal(case: dict) -> None:
    largest = plan_epoch(**case).batch_sizes().max()
    if case["batch_size"] == 1 and len(case["lengths"]) % case["num_replicas"]:
        assert largest == 2
    elif case["batch_size"] is not None:
        assert largest <= case["batch_size"]


@given(cases())
@settings(max_examples=500, deadline=None)
def test_no_batch_exceeds_the_token_budget(case: dict) -> None:
    if "max_tokens_per_batch" not in case:
        return
    for batch in batches(plan_epoch(**case)):
        lengths = case["lengths"][batch]
        packed = rounded_up(int(lengths.sum()), case["pad_to_multiple_of"])
        taken = packed if case["padding"] == "packed" else len(batch) * width(int(lengths.max()), case)
        assert taken <= case["max_tokens_per_batch"]


@given(cases(), st.integers(0, 50))
@settings(max_examples=200, deadline=None)
def test_the_number_of_batches_is_the_same_in_every_epoch(case: dict, other: int) -> None:
    assert len(plan_epoch(**case)) == len(plan_epoch(**case | {"epoch": other}))


@given(cases())
@settings(max_examples=200, deadline=None)
def test_the_same_arguments_give_the_same_plan_and_touch_no_global_random_state(case: dict) -> None:
    np.random.seed(0)
    plan = plan_epoch(**case)
    state = repr(np.random.get_state())
    np.random.seed(1)
    again = plan_epoch(**case)
    assert plan.order.tolist() == again.order.tolist()
    assert plan.offsets.tolist() == again.offsets.tolist()
    np.random.seed(0)
    assert repr(np.random.get_state()) == state


@given(cases(), st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_going_on_after_a_step_yields_exactly_the_remaining_batches(case: dict, step: int) -> None:
    plan = plan_epoch(**case)
    for rank in range(case["num_replicas"]):
        rest = [batch.tolist() for batch in plan.rank_batches(rank, start_step=step)]
        assert rest == [batch.tolist() for batch in plan.rank_batches(rank)][step:]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_epochs_seeds_and_batchings_have_plans_of_their_own(batching: str) -> None:
    lengths = review_lengths(2000)
    plans = [plan_epoch(lengths, 16, batching, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({plan.order.tobytes() for plan in plans}) == 6


def test_a_plan_is_pinned_so_that_no_version_or_machine_may_change_it() -> None:
    lengths = np.array([5, 3, 9, 9, 2, 7, 7, 7, 1, 4])
    pinned = {
        "smart": [[5, 6], [9, 0, 7], [3, 2], [4, 8, 1]],
        "tutorial": [[9, 0, 5], [8, 4, 1], [7, 2, 3], [6]],
        "random": [[4, 7, 1], [3, 2, 0], [9, 8], [5, 6]],
    }
    for batching, expected in pinned.items():
        assert batches(plan_epoch(lengths, 3, batching, seed=321, epoch=1)) == expected


@pytest.mark.parametrize("num_replicas", [1, 4])
def test_smart_batches_are_contiguous_runs_of_the_sorted_samples(num_replicas: int) -> None:
    lengths = review_lengths(1003)
    plan = plan_epoch(lengths, 16, "smart", seed=5, num_replicas=num_replicas, jitter=0)
    spans = sorted((lengths[batch].min(), lengths[batch].max()) for batch in map(np.array, batches(plan)))
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_jitter_moves_a_sample_past_another_by_twice_its_tokens_at_most() -> None:
    lengths = np.arange(1, 2001)
    for jitter in (1.0, 2.0, 8.0):
        plan = plan_epoch(lengths, 1, "smart", seed=1, jitter=jitter)
        by_batch = plan_epoch(lengths, 2000, "smart", seed=1, jitter=jitter)[0]
        assert len(plan) == 2000
        rises = np.maximum.accumulate(lengths[by_batch]) - lengths[by_batch]
        assert 0 < rises.max() <= 2 * jitter


@pytest.mark.parametrize("batching", ["smart", "random"])
def test_ties_fall_at_random(batching: str) -> None:
    """Each of 8 equal samples comes first in its batch about equally often."""
    first = np.zeros(8)
    for epoch in range(800):
        first[plan_epoch(np.full(8, 10), 8, batching, epoch=epoch, jitter=0)[0][0]] += 1
    assert first.min() > 60
    assert first.max() < 140


def test_the_batches_come_in_random_order() -> None:
    lengths = review_lengths(8000)
    widths = plan_epoch(lengths, 16, "smart").longest(lengths)
    assert abs(np.corrcoef(np.arange(len(widths)), widths)[0, 1]) < 0.15


@pytest.mark.parametrize("batching", ["smart", "tutorial"])
def test_the_batches_of_a_step_are_neighbours_in_length(batching: str) -> None:
    lengths = review_lengths(4000)
    ranked = np.empty(4000, np.int64)
    ranked[np.lexsort((np.arange(4000), lengths))] = np.arange(4000)
    plan = plan_epoch(lengths, 16, batching, num_replicas=8, jitter=0)
    for step in range(0, len(plan), 8):
        samples = np.concatenate([plan[step + rank] for rank in range(8)])
        assert np.ptp(lengths[samples]) <= 60 or batching == "tutorial"
        assert all(lengths[plan[step + rank]].max() <= lengths[plan[step + rank + 1]].min() for rank in range(7))


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_tutorial_draws_contiguous_runs_of_what_is_left_of_the_sorted_list(num_replicas: int) -> None:
    """Replays every draw on a real list: each is a run of neighbours in it, and taking them all empties it."""
    lengths = review_lengths(1217)
    left = np.argsort(lengths, kind="stable").tolist()
    plan = plan_epoch(lengths, 16, "tutorial", seed=9, num_replicas=num_replicas)
    for step in range(0, len(plan), num_replicas):
        run = [sample for rank in range(num_replicas) for sample in plan[step + rank].tolist()]
        start = left.index(run[0])
        assert left[start : start + len(run)] == run
        del left[start : start + len(run)]
    assert not left


def test_tutorial_starts_its_runs_anywhere_with_equal_chance() -> None:
    starts = [int(plan_epoch(np.arange(1, 12), 2, "tutorial", epoch=epoch)[0][0]) for epoch in range(2000)]
    counts = np.bincount(starts, minlength=11)
    assert counts[10] == 0
    assert counts[:10].min() > 140
    assert counts[:10].max() < 265


def test_tutorial_leaves_one_short_batch_at_the_end_as_the_tutorial_does() -> None:
    assert plan_epoch(review_lengths(25_000), 16, "tutorial").batch_sizes().tolist() == [16] * 1562 + [8]


def test_random_deals_the_samples_of_a_step_to_its_ranks_by_length() -> None:
    lengths = review_lengths(25_000)
    plan = plan_epoch(lengths, 16, "random", num_replicas=8)
    tokens = np.add.reduceat(lengths[plan.order], plan.offsets[:-1]).reshape(-1, 8)
    assert tokens.max(1).sum() / tokens.mean(1).sum() < 1.02


def test_random_on_many_ranks_takes_the_steps_of_an_ordinary_shuffle() -> None:
    lengths = review_lengths(1000)
    dealt = plan_epoch(lengths, 4, "random", num_replicas=4, seed=2)
    shuffled = plan_epoch(lengths, 16, "random", num_replicas=1, seed=2)
    for step in range(len(shuffled)):
        samples = np.concatenate([dealt[4 * step + rank] for rank in range(4)])
        assert sorted(samples) == sorted(shuffled[step])


@pytest.mark.parametrize("batching", ["smart", "tutorial"])
def test_evaluation_goes_by_length_without_randomness(batching: str) -> None:
    lengths = review_lengths(500)
    plan = plan_epoch(lengths, 16, batching, shuffle=False)
    assert plan.order.tolist() == np.argsort(lengths, kind="stable").tolist()


def test_random_evaluation_keeps_the_order_of_the_samples() -> None:
    assert plan_epoch(review_lengths(500), 16, "random", shuffle=False).order.tolist() == list(range(500))


def test_jitter_mixes_batches_from_epoch_to_epoch() -> None:
    lengths = review_lengths(25_000)
    kept = [
        batch_overlap(*(plan_epoch(lengths, 16, "smart", epoch=epoch, jitter=jitter) for epoch in (0, 1)))
        for jitter in (0.0, 1.0, 4.0)
    ]
    assert kept[0] > kept[1] > kept[2]
    assert kept[1] < 0.08


@pytest.mark.parametrize("num_replicas", [1, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_a_token_budget_is_nearly_filled_by_smart_batches(packed: bool, num_replicas: int) -> None:
    lengths = review_lengths(25_000)
    plan = plan_epoch(
        lengths, max_tokens_per_batch=16_384, padding="packed" if packed else "longest", num_replicas=num_replicas
    )
    assert lengths.sum() / (16_384 * len(plan)) > 0.95
    assert padded_tokens(plan, lengths) < 1.005 * lengths.sum()


def test_packed_random_batches_of_a_budget_hold_equal_shares_of_the_tokens_on_every_rank() -> None:
    lengths = review_lengths(25_000)
    plan, later = (
        plan_epoch(lengths, None, "random", max_tokens_per_batch=16_384, padding="packed", num_replicas=8, epoch=epoch)
        for epoch in (0, 1)
    )
    tokens = np.add.reduceat(lengths[plan.order], plan.offsets[:-1])
    assert tokens.min() > 0.93 * 16_384
    steps = tokens.reshape(-1, 8)
    assert steps.max(1).sum() / steps.mean(1).sum() < 1.02
    assert batch_overlap(plan, later) < 0.01


def test_a_budget_of_short_samples_is_bounded_by_the_batch_size_too() -> None:
    lengths = np.full(1000, 4)
    for packed in (False, True):
        assert (
            plan_epoch(lengths, 32, max_tokens_per_batch=4096, padding="packed" if packed else "longest")
            .batch_sizes()
            .max()
            == 32
        )


def test_smart_batches_of_a_budget_hold_many_short_samples_or_few_long_ones() -> None:
    lengths = np.repeat([10, 100], [100, 20])
    plan = plan_epoch(lengths, max_tokens_per_batch=200, jitter=0)
    assert sorted(zip(plan.batch_sizes().tolist(), plan.longest(lengths).tolist(), strict=True)) == [
        *[(2, 100)] * 10,
        *[(20, 10)] * 5,
    ]


def test_jitter_never_takes_a_batch_over_its_budget() -> None:
    lengths = np.tile(np.arange(1, 101), 20)
    for epoch in range(30):
        plan = plan_epoch(lengths, max_tokens_per_batch=300, jitter=5.0, epoch=epoch)
        assert (plan.batch_sizes() * plan.longest(lengths)).max() <= 300


def test_batch_overlap_is_one_for_the_same_plan_and_nearly_zero_for_a_shuffle() -> None:
    lengths = review_lengths(5000)
    plan = plan_epoch(lengths, 10, "random")
    assert batch_overlap(plan, plan) == 1
    assert batch_overlap(plan, plan_epoch(lengths, 10, "random", epoch=1)) < 0.01


def test_the_tokens_of_a_spec_are_what_padding_to_the_longest_makes() -> None:
    lengths = review_lengths(333)
    plan = plan_epoch(lengths, 16, "smart")
    assert spec_of().tokens(lengths[plan.order], plan.offsets).sum() == padded_tokens(plan, lengths)


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint16, np.int64])
def test_lengths_may_be_of_any_integer_type(kind: type) -> None:
    lengths = review_lengths(300)
    assert batches(plan_epoch(lengths.astype(kind), 16)) == batches(plan_epoch(lengths, 16))


def test_lengths_of_millions_of_tokens_are_planned() -> None:
    lengths = np.array([1, 5_000_000, 3, 4_000_000])
    assert sorted(map(sorted, batches(plan_epoch(lengths, 2)))) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; give 1 or more"),
        ({"num_replicas": 0}, "num_replicas is 0; give the number of ranks"),
        ({"num_replicas": 4}, "3 samples are too few for 4 ranks.*at most 3 devices"),
        ({"batching": "sorted"}, "batching is 'sorted'; choose one of 'random', 'tutorial', 'smart'"),
        ({"jitter": -1.0}, "jitter is -1.0; give a number of tokens from 0 to"),
        ({"lengths": [3, 0, 2]}, "sample 1 has length 0; every sample needs at least one token"),
        ({"lengths": [[3, 4]]}, "give one integer per sample"),
        ({"lengths": [1.5, 2.0]}, "float64; give one integer per sample"),
        ({"lengths": []}, "0 samples are too few"),
        (
            {"lengths": [9, 30, 2], "max_tokens_per_batch": 20},
            "sample 1 takes 30 tokens, but max_tokens_per_batch is 20. Set it to 30",
        ),
        ({"max_tokens_per_batch": 5, "pad_to_multiple_of": 8}, "sample 0 takes 8 tokens.*Set it to 8"),
        (
            {"max_tokens_per_batch": 5, "num_replicas": 2},
            "cannot be split into equally many batches for 2 ranks.*Raise it",
        ),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0; give 1 or more"),
    ],
)
def test_arguments_out_of_range_are_refused_with_a_remedy(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_epoch(**{"lengths": [3, 1, 2], **arguments})


def test_a_batch_that_is_not_there_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="batch 1 is out of range for a plan of 1 batches"):
        plan_epoch([1, 2, 3], 4)[1]


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=300),
    st.floats(0.01, 0.99),
    st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_a_stratified_split_keeps_the_share_of_every_label(labels: list[int], share: float, seed: int) -> None:
    few = round(len(labels) * share)
    if not 0 < few < len(labels):
        with pytest.raises(ValueError, match="leaves one part of the split empty"):
            stratified_split(labels, share, seed)
        return
    pool = [label for label in labels if labels.count(label) > 1]
    if not pool:
        with pytest.raises(ValueError, match="every label has only one sample"):
            stratified_split(labels, share, seed)
        return
    first, second = stratified_split(labels, share, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    wanted = max(1, round(len(pool) * share)) / len(pool)
    for label in set(labels):
        taken, count = sum(labels[sample] == label for sample in second), labels.count(label)
        assert abs(taken - count * wanted) <= 1 or count == 1
        assert taken < count


def test_a_split_depends_on_its_seed() -> None:
    labels = [0, 1] * 50
    assert stratified_split(labels, 0.2, 1)[1].tolist() == stratified_split(labels, 0.2, 1)[1].tolist()
    assert stratified_split(labels, 0.2, 1)[1].tolist() != stratified_split(labels, 0.2, 2)[1].tolist()


PLAN_DIGEST = """
import zlib
import numpy as np
from smartbatch_lightning.batching import BatchSpec, plan_epoch
for batching, longest, ranks in (("smart", 400, 1), ("smart", 8192, 3), ("random", 400, 2), ("tutorial", 400, 1)):
    lengths = np.random.PCG64(1).random_raw(70_000) % np.uint64(longest) + np.uint64(1)
    plan = plan_epoch(lengths.astype(np.int64), BatchSpec(batching, 16, jitter=0.8, seed=3), num_replicas=ranks)
    print(zlib.crc32(plan.order.tobytes()), zlib.crc32(plan.offsets.tobytes()))
"""


def test_a_plan_is_the_same_whatever_instructions_the_cpu_has_for_sorting() -> None:
    features = " ".join(np._core._multiarray_umath.__cpu_dispatch__)  # those that this machine lacks are passed over
    digests = [
        subprocess.run(
            [sys.executable, "-c", PLAN_DIGEST],
            env={**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled},
            capture_output=True, text=True, check=True,
        ).stdout
        for disabled in ("", features)
    ]  # fmt: skip
    assert digests[0] == digests[1]
    assert len(digests[0].splitlines()) == 4


@pytest.mark.parametrize(("batching", "jitter"), [("smart", 0.0), ("smart", 1.0), ("random", 0.0)])
def test_batches_of_samples_that_come_sorted_by_label_hold_both_labels(batching: str, jitter: float) -> None:
    """Also where far more samples than a batch holds cannot be told apart by length and random number."""
    lengths = np.full(2**18, 7) if batching == "smart" else review_lengths(2**18)
    plan = plan_epoch(lengths, 8, batching, jitter=jitter, seed=5)
    second_half = (plan.order.reshape(-1, 8) >= 2**17).sum(axis=1)
    binomial = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1]) / 2**8
    np.testing.assert_allclose(np.bincount(second_half, minlength=9) / len(second_half), binomial, atol=0.01)


def test_jitter_moves_no_sample_past_one_that_is_longer_by_more() -> None:
    for longest, jitter in ((400, 0.0), (400, 1.5), (30_000, 0.8)):
        lengths = np.random.default_rng(0).integers(1, longest, 20_000)
        order = argsort(lengths, np.random.PCG64(1), spread=2 * jitter)
        assert (np.maximum.accumulate(lengths[order]) - lengths[order]).max() <= 2 * jitter
        assert sorted(order.tolist()) == list(range(20_000))
