"""Where training stands: Lightning's loop counters, read and written in this file alone.

Lightning keeps how many epochs, batches and optimizer steps were trained in counters that are internal to it (lightning
2.6, tried by `tests/test_resume.py` and `tests/test_schedules.py`). What is met here:

- A checkpoint's counters depend on the hook in which it was written. Resumed as they stand, an epoch's last batch ends
  the epoch without validation and without the hooks of its end; a validation that was due is skipped for good; after an
  exception a batch is repeated. So they are rewritten before Lightning restores them: to those of a run that stands
  between two batches.
- An epoch that `max_steps`, `max_time` or a callback cuts short counts as one that has ended; resumed with more steps,
  the rest of it would never be trained.
- No `on_train_epoch_start` is called in an epoch that goes on, so `GradientAccumulationScheduler` is asked here, and
  `StochasticWeightAveraging` called, which makes its schedule there.
- A run with nothing left to train ends without the hooks of its end, in which averaged weights become the model's.
- `estimated_stepping_batches` knows neither that callback's later epochs nor where a second `fit` begins.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR

from smartbatch_lightning.errors import UsageError


@dataclass(frozen=True)
class Position:
    """Where training stands, counted by what the optimizer has seen.

    Attributes:
        epoch: Epochs that have ended.
        batches: Batches of a rank in the epoch that has begun; None between two epochs.
        validation_due: Validation comes next.
    """

    epoch: int
    batches: int | None
    validation_due: bool


def check_flags(trainer: L.Trainer) -> None:
    """Refuses flags of the Trainer with which Lightning would divide by zero, or train nothing.

    Raises:
        ValueError: One is out of range.
    """
    if trainer.accumulate_grad_batches < 1:
        raise UsageError(f"accumulate_grad_batches is {trainer.accumulate_grad_batches}; give 1 or more.")
    if validation_interval(trainer) == 0:
        raise UsageError("val_check_interval is 0; give more, or set limit_val_batches to 0 for no validation.")


def validation_interval(trainer: L.Trainer) -> float | None:
    """As given, a whole number of batches or a part of an epoch; None where validation goes by the clock."""
    return getattr(trainer, "val_check_interval", None)  # an attribute that is then not there


def accumulated_batches(trainer: L.Trainer, epoch: int) -> int:
    """Batches whose gradients are accumulated for an optimizer step, in an epoch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def total_steps(trainer: L.Trainer) -> float:
    """Optimizer steps of the whole training, from its first epoch on; infinite where it has no end."""
    trainer.fit_loop.setup_data()  # else the number of batches is not known
    return _bounded(trainer, _steps_of_epochs(trainer, 0), 0)


def remaining_steps(trainer: L.Trainer) -> float:
    """Optimizer steps that are still to come."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if epochs.started > epochs.processed and batches.processed < trainer.num_training_batches:
        trained = batches.processed // accumulated_batches(trainer, epochs.processed)
        steps = _steps_of_epochs(trainer, epochs.processed) - trained
    else:
        steps = _steps_of_epochs(trainer, epochs.started)
    return _bounded(trainer, steps, trainer.global_step)


def trained_steps(trainer: L.Trainer) -> int:
    """Optimizer steps after which so many remain as do, in a training of `total_steps`; without an end those taken."""
    total = total_steps(trainer)
    return trainer.global_step if math.isinf(total) else int(total - remaining_steps(trainer))


def between_steps(trainer: L.Trainer, every_n_steps: int = 1) -> bool:
    """Whether the batches that were trained end an optimizer step, or every so many; an epoch's last ends one."""
    trained = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    every = trainer.accumulate_grad_batches * every_n_steps
    return bool(trained % every == 0 or trained == trainer.num_training_batches)


def position(trainer: L.Trainer) -> Position:
    """Where training stands; gradients that were still being accumulated are trained again."""
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    progress = loop.epoch_loop.batch_progress
    batches: Any = progress.current
    trained, ended = batches.processed, epochs.started <= epochs.processed
    cut_short = ended and 0 < trained < trainer.num_training_batches  # by max_steps, max_time or a callback
    if ended and not cut_short:
        return Position(epochs.processed, None, False)
    if trained < trainer.num_training_batches:
        trained -= trained % trainer.accumulate_grad_batches
    if cut_short:
        return Position(epochs.processed - 1, trained, False)
    # the next batch is begun only when a validation that was due is over
    due = trained == batches.ready and _validation_due(trainer) and not _validation_over(trainer)
    return Position(epochs.processed, trained, due)


def rewrite_checkpoint(trainer: L.Trainer, at: Position, batches_of_epoch: int) -> None:
    """Makes the counters that Lightning is about to restore those of a run that stands between two batches.

    Args:
        trainer: In `fit`, with a checkpoint loaded.
        at: Where training goes on.
        batches_of_epoch: Batches of a rank in an epoch.
    """
    loops = trainer._checkpoint_connector._loaded_checkpoint["loops"]["fit_loop"]
    before = at.epoch * batches_of_epoch
    epochs, batches, outer = loops["epoch_progress"], loops["epoch_loop.batch_progress"], loops["epoch_loop.state_dict"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if at.batches is None:
        # As after the last batch of an epoch, all hooks of whose end are over.
        trained, completed, begun = batches_of_epoch, batches_of_epoch - 1, 0
        before -= batches_of_epoch
    else:
        trained = completed = at.batches
        begun = 1
    for counts in (epochs["total"], epochs["current"]):
        counts.update(ready=at.epoch + begun, started=at.epoch + begun, processed=at.epoch, completed=at.epoch)
    for counts, offset in ((batches["total"], before), (batches["current"], 0)):
        counts.update(ready=offset + trained, started=offset + trained, processed=offset + trained)
        counts["completed"] = offset + completed
    batches["is_last_batch"] = trained >= batches_of_epoch
    for counts in (validation["total"], validation["current"]):
        counts.update(ready=0, started=0, processed=0, completed=0)
    validation["is_last_batch"] = at.batches is None  # else Lightning would count the epoch twice
    if at.validation_due:
        validation["total"].update(ready=1, started=1)  # by which Lightning knows that it was begun and not ended
    # the last step is counted after the validation that is still to come, or the end of the epoch
    outer["_batches_that_stepped"] = steps - (at.batches is None or at.validation_due or trained >= batches_of_epoch)


def advance_schedule(scheduler: Any, steps: int) -> None:
    """Lets a schedule that has just been made stand after so many optimizer steps, as if they had been taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses the optimizer's steps
        if isinstance(scheduler, LambdaLR):  # a function of the step
            scheduler.last_epoch, steps = steps - 1, 1
        for _ in range(steps):
            scheduler.step()


def place_schedules(trainer: L.Trainer) -> None:
    """Lets the schedules of a module of one's own, restored from a checkpoint, stand where as many steps remain.

    Raises:
        ValueError: Training has other steps than before, and a schedule is no function of the step.
    """
    if math.isinf(total_steps(trainer)):
        return
    position = trained_steps(trainer)
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        by_step = config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
        if not by_step or scheduler.last_epoch == position:
            continue
        if not isinstance(scheduler, LambdaLR):
            raise UsageError(
                f"the checkpoint's {type(scheduler).__name__} is at step {scheduler.last_epoch}, but training is at "
                f"step {position}, since ranks, accumulation or limits have changed. Restore them, use a LambdaLR, or "
                "create the schedule in SequenceClassifier.configure_scheduler."
            )
        advance_schedule(scheduler, position)


def restore_loaders(trainer: L.Trainer) -> None:
    """Gives loaders their state in the checkpoint, which Lightning forgets where they were made before it was read."""
    trainer.fit_loop._load_combined_loader_states()


def begin_epoch(trainer: L.Trainer) -> None:
    """Does what callbacks do as an epoch begins, also where it goes on; called before its first batch."""
    trainer.accumulate_grad_batches = accumulated_batches(trainer, trainer.current_epoch)
    for callback in trainer.callbacks if stands_in_epoch(trainer) else []:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            callback.on_train_epoch_start(trainer, trainer.lightning_module)


def stay_stopped(trainer: L.Trainer) -> None:
    """Ends a run that goes on from a checkpoint of after its early stopping; Lightning would train another epoch."""
    stops = [one for one in trainer.early_stopping_callbacks if one.patience is not None]
    stopped = [one for one in stops if one.wait_count >= max(one.patience, 1) or one.stopped_epoch]
    if trainer.ckpt_path and stopped:
        trainer.should_stop = True
        rank_zero_info(
            "Early stopping ended this run. To train further, raise its patience or resume without that callback."
        )


def stands_in_epoch(trainer: L.Trainer) -> bool:
    """Whether Lightning goes on in the middle of an epoch."""
    return trainer.fit_loop.restarted_mid_epoch


def nothing_was_left(trainer: L.Trainer) -> bool:
    """Whether a `fit` that is over found its training at an end."""
    return trainer.fit_loop.is_resuming and trainer.fit_loop.done


def count_logged_steps(trainer: L.Trainer) -> None:
    """Makes loggers count by optimizer steps, wherever training was resumed; called before the first batch."""
    if trainer.lightning_module.automatic_optimization:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def batches_per_epoch(trainer: L.Trainer, length: int) -> int:
    """Batches of a rank in an epoch of a loader of this length."""
    limit = trainer.limit_train_batches
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        limit = trainer.overfit_batches  # type: ignore[attr-defined]
    return min(length, limit) if isinstance(limit, int) else int(length * limit)


def _steps_of_epochs(trainer: L.Trainer, first: int) -> float:
    """Optimizer steps of an epoch and those after it."""
    batches, last = trainer.num_training_batches, trainer.max_epochs
    if last == -1 or math.isinf(batches):
        return math.inf
    epochs = range(first, 1000 if last is None else last)
    return sum(math.ceil(batches / accumulated_batches(trainer, epoch)) for epoch in epochs)


def _bounded(trainer: L.Trainer, steps: float, done: int) -> float:
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps - done)


def _validation_due(trainer: L.Trainer) -> bool:
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _validation_over(trainer: L.Trainer) -> bool:
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    over = progress.is_last_batch and progress.current.completed == progress.current.ready
    return bool(trainer.validating and over)
