"""Tests of strategies of one's own, from outside of the package, and of the choice of jitter."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from helpers import trainer

from smartbatch_lightning import BatchSpec, SequenceClassifier, SmartBatchDataModule, SmartBatchSampler, plan_epoch
from smartbatch_lightning.batching import STRATEGIES, BatchPlan, PlanRequest, batch_overlap, register_strategy
from smartbatch_lightning.batching.jitter import choose_jitter
from smartbatch_lightning.report.padding_report import PaddingReport
from smartbatch_lightning.tasks import Regression, Task

LENGTHS = np.random.default_rng(0).integers(3, 60, 101)


def shortest_first(request: PlanRequest) -> BatchPlan:
    """A curriculum: short samples first, in every epoch."""
    return request.cut(np.argsort(request.lengths, kind="stable"))


class Unfinished(Task):
    """A task that inherits the defaults, without the rest."""

    description, config_fields = Regression.description, Regression.config_fields


@pytest.fixture
def registered() -> Iterator[str]:
    register_strategy("by_parity")(lambda request: request.cut(np.argsort(request.lengths % 2, kind="stable")))
    yield "by_parity"
    del STRATEGIES["by_parity"]


@pytest.mark.parametrize(
    "fields", [{"batch_size": 8}, {"max_tokens_per_batch": 300}, {"max_tokens_per_batch": 300, "padding": "packed"}]
)
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_a_strategy_given_by_its_import_path_or_its_name_plans_and_samples(registered, fields, num_replicas) -> None:
    for batching in ("test_strategies.shortest_first", registered):
        spec = BatchSpec(batching, **fields)
        plan = plan_epoch(LENGTHS, spec, num_replicas=num_replicas)
        assert sorted(plan.order.tolist()) == list(range(101))
        assert spec.tokens(LENGTHS[plan.order], plan.offsets).max() <= fields.get("max_tokens_per_batch", 10**9)
        seen = [row for rank in range(num_replicas)
                for batch in SmartBatchSampler(LENGTHS, spec, num_replicas=num_replicas, rank=rank) for row in batch]  # fmt: skip
        assert sorted(seen) == list(range(101))


def test_a_strategy_of_ones_own_trains_and_is_reported(registered: str, tmp_path) -> None:
    data = SmartBatchDataModule(max_length=24, validation_split=0.9, batching="test_strategies.shortest_first")
    run = trainer(tmp_path, limit_val_batches=1)
    run.fit(SequenceClassifier(), data)
    widths = [batch["input_ids"].shape[1] for batch in data.train_dataloader()]
    assert widths == sorted(widths)
    report = PaddingReport.from_datamodule(data, ranks=2)
    by_name = {(one.batching, one.padding): one for one in report.strategies}
    assert by_name["test_strategies.shortest_first", "longest"].is_configured
    assert by_name["test_strategies.shortest_first", "longest"].batch_overlap == 1
    assert by_name[registered, "longest"].batches == by_name["smart", "longest"].batches


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: BatchPlan(np.zeros(101, np.int64), np.arange(102)), "does not hold each of the 101 samples exactly once"),
        (lambda r: BatchPlan(np.arange(100), np.arange(101)), "does not hold each of the 101 samples"),
        (lambda r: BatchPlan(np.arange(101), np.array([0, 101])), "made batches of up to 101 samples .* more than the batch size"),
        (lambda r: BatchPlan(np.arange(101), np.array([0, 0, *range(8, 102, 8), 101])), "the smallest of 0 samples"),
        (lambda r: np.arange(101), "returned ndarray; return a BatchPlan"),
    ],
)  # fmt: skip
def test_a_plan_that_breaks_a_promise_is_refused(make, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "broken", make)
    with pytest.raises(ValueError, match=f"'broken'.*{message}"):
        plan_epoch(LENGTHS, BatchSpec("broken", batch_size=8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sorted", "batching is 'sorted'; choose one of 'random', 'tutorial', 'smart', or give an import path"),
        ("test_strategies.nothing", "which cannot be imported: .*Check the path"),
        ("no_such_module.strategy", "which cannot be imported: No module named"),
        ("os.getcwd", "is not a function of a PlanRequest"),
        ("os.sep", "is not a function of a PlanRequest"),
    ],
)
def test_a_strategy_that_is_not_there_is_refused_when_it_is_given(name: str, message: str) -> None:
    for use in (lambda: plan_epoch(LENGTHS, BatchSpec(name)), lambda: SmartBatchDataModule(batching=name)):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("multi", "problem_type is 'multi'; choose one of 'single_label_classification'"),
        ("os.getcwd", "problem_type is 'os.getcwd', which lacks 'label_names', 'description'"),
        ("test_strategies.Unfinished", "Unfinished', which lacks 'label_names', 'from_columns', .* and 5 more;"),
        ("os.nothing", "which cannot be imported"),
    ],
)
def test_a_task_that_is_not_there_is_refused_when_it_is_given(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmartBatchDataModule(problem_type=name)


# --- jitter: auto ---


def reviews(num_samples: int) -> np.ndarray:
    """Lengths with the spread of film reviews cut at 400 tokens."""
    drawn = np.exp(np.random.default_rng(num_samples).normal(5.4, 0.7, num_samples)).astype(np.int64) + 10
    return np.minimum(drawn, 400)


def padding_and_overlap(lengths, spec: BatchSpec, epochs: int = 5) -> tuple[float, float]:
    plans = [plan_epoch(lengths, spec, epoch=epoch) for epoch in range(epochs)]
    padded = [sum(len(plan[b]) * lengths[plan[b]].max() for b in range(len(plan))) for plan in plans]
    overlaps = [batch_overlap(a, b) for a, b in itertools.pairwise(plans)]
    return float(np.mean(padded) / lengths.sum() - 1), float(np.mean(overlaps))


@pytest.mark.parametrize("num_samples", [1800, 5000, 25_000, 200_000])
def test_smart_with_auto_jitter_beats_the_tutorial_in_padding_and_in_overlap(num_samples: int) -> None:
    lengths = reviews(num_samples)
    padding, overlap = padding_and_overlap(lengths, BatchSpec(seed=3))
    tutorial_padding, tutorial_overlap = padding_and_overlap(lengths, BatchSpec("tutorial", seed=3))
    assert padding < tutorial_padding
    assert overlap < tutorial_overlap
    assert padding <= 0.0105
    assert overlap < 0.105 or padding > 0.009  # it stops at one of its two bounds


def test_the_choice_is_the_least_jitter_that_does() -> None:
    lengths = reviews(25_000)
    jitter = choose_jitter(lengths, BatchSpec())
    assert padding_and_overlap(lengths, BatchSpec(jitter=jitter))[1] < 0.105
    assert padding_and_overlap(lengths, BatchSpec(jitter=jitter - 0.2))[1] > 0.1


def test_short_sentences_in_great_numbers_need_no_jitter() -> None:
    assert choose_jitter(np.random.default_rng(0).integers(5, 41, 50_000), BatchSpec()) == 0.0


def test_the_choice_depends_on_the_lengths_and_not_on_their_order_seed_or_ranks() -> None:
    lengths = reviews(3000)
    shuffled = np.random.default_rng(1).permutation(lengths)
    chosen = {choose_jitter(lengths, BatchSpec(seed=seed)) for seed in range(3)}
    chosen |= {choose_jitter(shuffled, BatchSpec())}
    chosen |= {SmartBatchSampler(lengths, num_replicas=4, rank=rank).spec.jitter for rank in range(4)}
    assert len(chosen) == 1


def test_packed_batches_mix_for_nothing() -> None:
    lengths = reviews(1800)
    jitter = choose_jitter(lengths, BatchSpec(padding="packed"))
    assert padding_and_overlap(lengths, BatchSpec(padding="packed", jitter=jitter))[1] < 0.105


@pytest.mark.slow
def test_many_samples_are_judged_by_ranges_of_them() -> None:
    assert choose_jitter(np.tile(reviews(25_000), 60), BatchSpec()) == 0.0
    few_a_length = np.repeat(np.arange(1, 300_001), 4)  # 1.2 million samples, four of each length
    assert choose_jitter(few_a_length, BatchSpec()) > 10
