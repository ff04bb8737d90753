"""Learning rates by step: the schedule ends where training ends, whatever changed on the way."""

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import slow, trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from transformers import get_cosine_schedule_with_warmup

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule

PEAK = 1e-3
STEPS = 7  # batches of an epoch


class Rates(Callback):
    """Writes down the rate of every optimizer step, and saves after one of them."""

    def __init__(self, path: Path | None = None, save_after: int = -1) -> None:
        self.rates: list[float] = []
        self.path, self.save_after = path, save_after

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.save_after:
            trainer.save_checkpoint(self.path)


def fit(folder: Path, *callbacks: Callback, module=None, ckpt_path=None, **options):
    rates = next((callback for callback in callbacks if isinstance(callback, Rates)), Rates())
    run = trainer(folder, limit_val_batches=0, **options)
    run.callbacks += [*callbacks, *([] if rates in callbacks else [rates])]
    data = SmartBatchDataModule(validation_split=0.9, max_length=16, batch_size=32, seed=5, jitter=1.0)
    run.fit(module or SequenceClassifier(learning_rate=PEAK), data, ckpt_path=ckpt_path)
    return rates.rates, run


def linear(steps: int, first: int = 0) -> list[float]:
    return [PEAK * (1 - step / steps) for step in range(first, steps)]


@pytest.mark.parametrize("before", [slow(1), 4])
def test_after_another_accumulation_the_rate_goes_on_at_the_same_share_and_ends_at_zero(before, tmp_path) -> None:
    steps_of_epoch = math.ceil(STEPS / before)
    fit(tmp_path, Rates(tmp_path / "a.ckpt", steps_of_epoch), max_epochs=3, accumulate_grad_batches=before)
    after = 5 - before
    rates, run = fit(tmp_path, max_epochs=3, accumulate_grad_batches=after, ckpt_path=tmp_path / "a.ckpt")
    steps = math.ceil(STEPS / after)
    assert rates == pytest.approx(linear(3 * steps, steps))
    assert run.optimizers[0].param_groups[0]["lr"] == 0


@pytest.mark.slow
def test_after_other_limits_the_rate_goes_on_at_the_same_share_and_ends_at_zero(tmp_path: Path) -> None:
    fit(tmp_path, Rates(tmp_path / "a.ckpt", STEPS), max_epochs=2)
    rates, _ = fit(tmp_path, max_epochs=2, limit_train_batches=4, ckpt_path=tmp_path / "a.ckpt")
    assert rates == pytest.approx(linear(8, 4))


def test_more_epochs_after_a_checkpoint_continue_the_longer_schedule(tmp_path: Path) -> None:
    fit(tmp_path, Rates(tmp_path / "a.ckpt", 2 * STEPS), max_epochs=2)
    rates, _ = fit(tmp_path, max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    assert rates == pytest.approx(linear(4 * STEPS, 2 * STEPS))


def test_a_second_fit_of_more_epochs_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    model = SequenceClassifier(learning_rate=PEAK)
    data = SmartBatchDataModule(validation_split=0.9, max_length=16, batch_size=32, seed=5, jitter=1.0)
    run, rates = trainer(tmp_path, limit_val_batches=0, max_epochs=1), Rates()
    run.callbacks.append(rates)
    run.fit(model, data)
    run.fit_loop.max_epochs = 3
    run.fit(model, data)
    assert rates.rates == pytest.approx(linear(STEPS) + linear(3 * STEPS, STEPS))


def test_accumulation_that_changes_by_epoch_is_counted(tmp_path: Path) -> None:
    schedule = {0: 1, 1: 4}
    rates, _ = fit(tmp_path, GradientAccumulationScheduler(schedule), max_epochs=3)
    assert rates == pytest.approx(linear(STEPS + 2 + 2))


@pytest.mark.slow
def test_accumulation_that_changes_by_epoch_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    schedule = {0: 1, 1: 4}
    saver = Rates(tmp_path / "a.ckpt", STEPS + 1)
    fit(tmp_path, GradientAccumulationScheduler(schedule), saver, max_epochs=3)
    rates, _ = fit(tmp_path, GradientAccumulationScheduler(schedule), max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    assert rates == pytest.approx(linear(STEPS + 2 + 2, STEPS + 1))


def test_the_rate_of_a_resumed_run_is_the_one_that_the_module_has_now(tmp_path: Path) -> None:
    fit(tmp_path, Rates(tmp_path / "a.ckpt", 3), max_epochs=1)
    rates, _ = fit(
        tmp_path, module=SequenceClassifier(learning_rate=2 * PEAK), max_epochs=1, ckpt_path=tmp_path / "a.ckpt"
    )
    assert rates == pytest.approx([2 * rate for rate in linear(STEPS, 3)])


KINDS = {
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    "one cycle": lambda optimizer, steps: OneCycleLR(optimizer, PEAK, total_steps=steps + 1, cycle_momentum=False),
    "transformers": lambda optimizer, steps: get_cosine_schedule_with_warmup(optimizer, 2, steps),
}


@pytest.mark.parametrize("kind", [kind if kind == "one cycle" else slow(kind) for kind in KINDS])
@pytest.mark.parametrize("after", [slow(1), 4])
def test_schedules_of_every_kind_go_on_at_the_same_share(kind: str, after: int, tmp_path: Path) -> None:
    class Scheduled(SequenceClassifier):
        def configure_scheduler(self, optimizer, num_steps):
            return KINDS[kind](optimizer, num_steps)

    options = {"max_epochs": 2, "module": Scheduled(learning_rate=PEAK)}
    fit(tmp_path, Rates(tmp_path / "a.ckpt", STEPS), **options)
    rates, _ = fit(tmp_path, accumulate_grad_batches=after, ckpt_path=tmp_path / "a.ckpt", **options)
    optimizer = SGD([torch.zeros(1)], lr=PEAK)
    steps = math.ceil(STEPS / after)
    schedule, expected = KINDS[kind](optimizer, 2 * steps), []
    for _ in range(2 * steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == expected[steps:]


class Foreign(L.LightningModule):
    """A module that knows nothing of this package, but for what a batch holds."""

    def __init__(self, make) -> None:
        super().__init__()
        self.table, self.make = torch.nn.EmbeddingBag(3000, 2), make

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.table(batch["input_ids"]), batch["labels"])

    def validation_step(self, batch, batch_idx) -> None: ...

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=PEAK)
        schedule = self.make(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def decay(optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 - step / steps)


def test_the_schedule_of_a_module_of_ones_own_goes_on_at_the_same_share_or_says_that_it_cannot(tmp_path: Path) -> None:
    for number, make in enumerate((decay, CosineAnnealingLR)):
        path = tmp_path / f"{number}.ckpt"
        fit(tmp_path, Rates(path, 4), module=Foreign(make), max_epochs=2)
        unchanged, _ = fit(tmp_path, module=Foreign(make), max_epochs=2, ckpt_path=path)
        assert len(unchanged) == 2 * STEPS - 4
        changed = {"max_epochs": 2, "accumulate_grad_batches": 2, "ckpt_path": path}
        if make is decay:
            rates, _ = fit(tmp_path, module=Foreign(make), **changed)
            assert rates == pytest.approx(linear(8, 2))
        else:
            with pytest.raises(ValueError, match="CosineAnnealingLR is at step 4, but training is at step 2"):
                fit(tmp_path, module=Foreign(make), **changed)
