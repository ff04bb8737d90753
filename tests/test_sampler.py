"""Tests of the sampler and the loader outside of Lightning."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from smartbatch_lightning import BatchSpec, PadCollator, SmartBatchSampler
from smartbatch_lightning.data.loader import SmartBatchLoader

LENGTHS = np.random.default_rng(0).integers(3, 60, 101)
ROWS = [{"input_ids": list(range(length)), "label": row % 2, "index": row} for row, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("batching", ["smart", "tutorial", "random"])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_ranks_share_every_epoch_and_no_sample_twice(batching: str, num_replicas: int) -> None:
    for epoch in range(3):
        seen: list[int] = []
        for rank in range(num_replicas):
            sampler = SmartBatchSampler(LENGTHS, BatchSpec(batching, 8), num_replicas=num_replicas, rank=rank)
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert len(batches) == len(sampler)
            seen += [sample for batch in batches for sample in batch]
        assert sorted(seen) == list(range(101))


def test_epochs_differ_and_come_back() -> None:
    sampler = SmartBatchSampler(LENGTHS, BatchSpec(batch_size=8))
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] != epochs[1]
    assert epochs[0] == epochs[2]


def test_it_works_in_a_plain_dataloader_over_rows_tokenized_elsewhere() -> None:
    loader = DataLoader(
        ROWS, batch_sampler=SmartBatchSampler(LENGTHS, BatchSpec(batch_size=8)), collate_fn=PadCollator()
    )
    seen = torch.cat([batch["index"] for batch in loader])
    assert sorted(seen.tolist()) == list(range(101))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_epoch_may_be_set_until_the_first_batch_is_asked_for(num_workers: int) -> None:
    sampler = SmartBatchSampler(LENGTHS, BatchSpec(batch_size=8))
    loader = SmartBatchLoader(ROWS, batch_sampler=sampler, collate_fn=PadCollator(), num_workers=num_workers)
    batches = iter(loader)
    loader.sampler.set_epoch(3)
    first = next(batches)["index"].tolist()
    sampler.set_epoch(3)
    assert first == next(iter(sampler))


@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("num_batches", [None, 7])
@pytest.mark.parametrize("resumed", [[], [(2, 4)], [(3, 4)]])
def test_loss_weights_make_the_average_of_batches_the_mean_over_samples(accumulated, num_batches, resumed) -> None:
    """Mean losses, weighted, averaged over ranks and accumulated batches as trainers do it."""
    spec = BatchSpec(max_tokens_per_batch=200, padding="packed", seed=2)  # whose last batches are not alike
    ranks = [SmartBatchSampler(LENGTHS, spec, num_replicas=2, rank=rank) for rank in range(2)]
    losses = np.random.default_rng(1).random(101)
    for sampler in ranks:
        sampler.load_state_dict({"epoch": 0, "consumed": resumed})
    first = ranks[0].start_step
    last = num_batches or len(ranks[0])
    batches = [list(sampler)[: last - first] for sampler in ranks]
    weights = [list(zip(sampler.loss_weights(accumulated, num_batches), batches[0], strict=False)) for sampler in ranks]
    assert len({len(batch) for rank in batches for batch in rank}) > 1
    for start in range(first - first % accumulated, last, accumulated):
        steps = range(max(start, first) - first, min(start + accumulated, last) - first)
        window = [(weights[rank][step][0], losses[batches[rank][step]]) for rank in range(2) for step in steps]
        averaged = sum(weight * part.mean() for weight, part in window) / (2 * accumulated)
        assert averaged == pytest.approx(np.concatenate([part for _, part in window]).mean())


def test_the_loss_weights_of_equal_batches_are_one() -> None:
    sampler = SmartBatchSampler(LENGTHS, BatchSpec(batch_size=8))
    assert {weight for weight, _ in zip(sampler.loss_weights(), sampler, strict=False)} == {1.0}


def test_a_rank_outside_of_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank is 2; with num_replicas=2 give 0 to 1"):
        SmartBatchSampler(LENGTHS, num_replicas=2, rank=2)


@pytest.mark.parametrize(
    ("lengths", "spec", "message"),
    [
        (LENGTHS, {"batching": "samrt"}, "batching is 'samrt'; choose one of"),
        ([3, 0], {}, "sample 1 has length 0"),
        ([3, 9], {"max_tokens_per_batch": 5}, "sample 1 takes 9 tokens, but max_tokens_per_batch is 5"),
    ],
)
def test_what_cannot_be_planned_is_refused_at_once(lengths, spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmartBatchSampler(lengths, BatchSpec(**spec))


def test_the_state_after_a_step_is_where_another_sampler_goes_on() -> None:
    spec = BatchSpec(batch_size=8, seed=3)
    first, second = SmartBatchSampler(LENGTHS, spec), SmartBatchSampler(LENGTHS, spec)
    first.set_epoch(2)
    second.load_state_dict(first.state_dict(5))
    second.set_epoch(2)
    assert list(second) == list(first)[5:]
    third = SmartBatchSampler(LENGTHS, spec)
    third.load_state_dict(second.state_dict(9))
    third.set_epoch(2)
    assert list(third) == list(first)[9:]


def test_a_strategy_whose_epochs_differ_in_batches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from smartbatch_lightning.batching import STRATEGIES, BatchPlan

    sizes = iter((101, 50))

    def unsteady(request):
        size = next(sizes)
        return BatchPlan(np.arange(101), np.append(np.arange(0, 101, size), 101))

    monkeypatch.setitem(STRATEGIES, "unsteady", unsteady)
    sampler = SmartBatchSampler(LENGTHS, BatchSpec("unsteady", batch_size=101))
    with pytest.raises(ValueError, match="'unsteady' made 3 batches in epoch 0, and 1 before"):
        list(sampler)
