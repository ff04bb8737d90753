"""The data module under the real Trainer, in one process: what each epoch trains on."""

from pathlib import Path

import pytest
from helpers import Seen, slow, trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from smartbatch_lightning import (
    BatchSpec,
    PadCollator,
    SequenceClassifier,
    SmartBatchDataModule,
    SmartBatchSampler,
    demo,
)

TRAINED = demo.REVIEWS["train"] - demo.REVIEWS["train"] // 10


class Frozen(SequenceClassifier):
    """Trains its head alone, on few tokens: these tests ask what is trained on, not what is learnt."""

    def configure_model(self) -> None:
        super().configure_model()
        self.model.base_model.requires_grad_(False)


@pytest.fixture
def seen() -> Seen:
    return Seen()


def data(**options) -> SmartBatchDataModule:
    return SmartBatchDataModule(**{"max_length": 24, "batch_size": 64, **options})


@pytest.mark.parametrize(
    ("batching", "num_workers"),
    [("smart", 2), *(slow(name, 0) for name in ("smart", "tutorial", "random"))]
    + [slow(name, 2) for name in ("tutorial", "random")],
)
def test_every_epoch_trains_every_sample_once_in_a_plan_of_its_own(batching, num_workers, seen, tmp_path: Path) -> None:
    module = data(batching=batching, num_workers=num_workers, seed=3)
    trainer(tmp_path, max_epochs=3, limit_val_batches=1, callbacks=[seen]).fit(Frozen(), module)
    assert len({tuple(epoch) for epoch in seen.epochs}) == 3
    assert module.train_dataloader().persistent_workers == (num_workers > 0)
    for epoch in range(3):
        assert seen.rows(epoch) == module.train_data.rows.tolist()
        assert len(seen.epochs[epoch]) == -(-TRAINED // 64)
        sampler = module.train_dataloader().batch_sampler
        sampler.set_epoch(epoch)
        planned = [tuple(module.train_data.rows[batch].tolist()) for batch in sampler]
        assert seen.epochs[epoch] == planned


def test_the_sampler_alone_plans_every_epoch_anew_in_a_plain_dataloader(seen, tmp_path: Path) -> None:
    module = data()
    module.setup("fit")
    sampler = SmartBatchSampler(module.train_data.lengths, BatchSpec(batch_size=64))
    loader = DataLoader(module.train_data, batch_sampler=sampler, collate_fn=PadCollator())
    trainer(tmp_path, max_epochs=3, callbacks=[seen]).fit(Frozen(), loader)
    assert len({tuple(epoch) for epoch in seen.epochs}) == 3


def test_overfit_batches_trains_the_same_batches_every_epoch(seen, tmp_path: Path) -> None:
    trainer(tmp_path, max_epochs=3, overfit_batches=2, callbacks=[seen]).fit(Frozen(), data())
    assert len(seen.epochs) == 3
    assert seen.epochs[0] == seen.epochs[1] == seen.epochs[2]
    assert len(seen.epochs[0]) == 2


@pytest.mark.slow
def test_reloading_the_loader_goes_on_with_the_next_epoch(seen, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=1, limit_val_batches=1, callbacks=[seen])
    run.fit(Frozen(), data())
    assert len({tuple(epoch) for epoch in seen.epochs}) == 3
    assert all(len(seen.rows(epoch)) == TRAINED for epoch in range(3))


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        slow({"limit_train_batches": 5}, [5, 5]),
        ({"limit_train_batches": 0.25}, [7, 7]),
        ({"max_steps": 40}, [29, 11]),
        ({"fast_dev_run": 3}, [3]),
        slow({"val_check_interval": 10}, [29, 29]),
        ({"accumulate_grad_batches": 4}, [29, 29]),
    ],
)
def test_the_trainers_limits_take_the_first_batches_of_each_plan(options, epochs, seen, tmp_path: Path) -> None:
    module = data()
    trainer(tmp_path, **{"max_epochs": 2, "limit_val_batches": 1, "callbacks": [seen], **options}).fit(Frozen(), module)
    assert [len(epoch) for epoch in seen.epochs] == epochs
    for epoch, trained in enumerate(seen.epochs):
        sampler = module.train_dataloader().batch_sampler
        sampler.set_epoch(epoch)
        assert trained == [tuple(module.train_data.rows[batch].tolist()) for batch in sampler][: len(trained)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prediction_covers_every_row_once(num_workers: int, tmp_path: Path) -> None:
    predictions = trainer(tmp_path).predict(Frozen(), data(num_workers=num_workers))
    rows = [row for batch in predictions for row in batch["index"].tolist()]
    assert sorted(rows) == list(range(demo.REVIEWS["test"]))
    assert rows != sorted(rows)  # by length; the writer brings them into the order of the input
    assert all(batch["probabilities"].sum(1).allclose(batch["probabilities"].new_ones(())) for batch in predictions)


def test_evaluation_covers_every_sample_once(tmp_path: Path) -> None:
    rows: list[int] = []

    class Recorder(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
            rows.extend(batch["index"].tolist())

    trainer(tmp_path, callbacks=[Recorder()]).test(Frozen(), data())
    assert sorted(rows) == list(range(demo.REVIEWS["test"]))
