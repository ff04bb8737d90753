"""Training progress: Lightning's loop counters, which only this file reads and writes.

Lightning counts trained epochs, batches and optimizer steps in internal counters (lightning 2.6; see
`tests/test_resume.py` and `tests/test_schedules.py`). This file deals with the following:

- A checkpoint's counters depend on the hook in which it was written. If they are restored unchanged, an epoch's last
  batch ends the epoch without validation and final hooks; a validation that was due is never run; after an exception, a
  batch is repeated. So before Lightning restores the counters, they are rewritten to those of a run that is between two
  batches.
- An epoch that `max_steps`, `max_time` or a callback cuts short counts as finished; when resumed with more steps, the
  rest of it would never be trained.
- `on_train_epoch_start` is not called when an epoch is resumed, so `GradientAccumulationScheduler` is queried here, and
  `StochasticWeightAveraging`, which creates its schedule in that hook, is called here.
- A run with nothing left to train ends without its final hooks, in which averaged weights become the model's.
- `estimated_stepping_batches` takes into account neither the later epochs of `GradientAccumulationScheduler` nor where
  a second `fit` begins.
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
    """Training progress: only batches whose optimizer step has been taken count.

    Attributes:
        epoch: Number of finished epochs.
        batches: Batches per rank trained in the current epoch; None between two epochs.
        validation_due: Whether validation comes next.
    """

    epoch: int
    batches: int | None
    validation_due: bool


def check_flags(trainer: L.Trainer) -> None:
    """Rejects flags of the Trainer with which Lightning would divide by zero, or train nothing."""
    if trainer.accumulate_grad_batches < 1:
        raise UsageError(f"accumulate_grad_batches is {trainer.accumulate_grad_batches}; give 1 or more.")
    if validation_interval(trainer) == 0:
        raise UsageError("val_check_interval is 0; give more, or set limit_val_batches to 0 for no validation.")


def validation_interval(trainer: L.Trainer) -> float | None:
    """Batches between validations, or a fraction of an epoch; None if the interval is given as a time."""
    return getattr(trainer, "val_check_interval", None)  # missing if it is a time


def accumulated_batches(trainer: L.Trainer, epoch: int) -> int:
    """Number of batches accumulated for an optimizer step in an epoch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def total_steps(trainer: L.Trainer) -> float:
    """Optimizer steps of the whole training, from its first epoch on; infinite if it has no end."""
    if trainer.limit_train_batches == 0:  # then Lightning does not look at the loader
        return 0
    trainer.fit_loop.setup_data()  # which sets the number of batches
    return _bounded(trainer, _steps_of_epochs(trainer, 0), 0)


def remaining_steps(trainer: L.Trainer) -> float:
    """Number of optimizer steps still to come."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if epochs.started > epochs.processed and batches.processed < trainer.num_training_batches:
        trained = batches.processed // accumulated_batches(trainer, epochs.processed)
        steps = _steps_of_epochs(trainer, epochs.processed) - trained
    else:
        steps = _steps_of_epochs(trainer, epochs.started)
    return _bounded(trainer, steps, trainer.global_step)


def trained_steps(trainer: L.Trainer) -> int:
    """`total_steps` minus the steps that remain; if training has no end, the steps taken so far."""
    total = total_steps(trainer)
    return trainer.global_step if math.isinf(total) else int(total - remaining_steps(trainer))


def between_steps(trainer: L.Trainer, every_n_steps: int = 1) -> bool:
    """Whether the last batch completed a multiple of `every_n_steps` optimizer steps in the epoch, or the epoch."""
    trained = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    every = trainer.accumulate_grad_batches * every_n_steps
    return bool(trained % every == 0 or trained == trainer.num_training_batches)


def logs_now(trainer: L.Trainer) -> bool:
    """Whether Lightning logs after the last batch, which then completed a multiple of `log_every_n_steps`."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every and trainer.global_step % every == 0 and between_steps(trainer))


def is_cut_short(trainer: L.Trainer) -> bool:
    """Whether the epoch that is ending has not trained all of its batches."""
    trained = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    return bool(trained < trainer.num_training_batches)


def position(trainer: L.Trainer) -> Position:
    """The training progress; batches whose gradients were still being accumulated do not count."""
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
    # the next batch starts only after a validation that was due
    due = trained == batches.ready and _validation_comes_next(trainer)
    return Position(epochs.processed, trained, due)


def rewrite_checkpoint(trainer: L.Trainer, at: Position, batches_of_epoch: int) -> None:
    """Rewrites the counters that Lightning is about to restore to those of a run that is between two batches.

    Args:
        trainer: In `fit`, with a checkpoint loaded.
        at: Where training resumes.
        batches_of_epoch: Batches per rank in an epoch.
    """
    trainer.fit_loop._combined_loader = None  # created for a new run if the strategy restores late, as FSDP does
    loops = trainer._checkpoint_connector._loaded_checkpoint["loops"]["fit_loop"]
    before = at.epoch * batches_of_epoch
    epochs, batches, outer = loops["epoch_progress"], loops["epoch_loop.batch_progress"], loops["epoch_loop.state_dict"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if at.batches is None:
        # As after the last batch of an epoch whose final hooks have run.
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
    validation["is_last_batch"] = at.batches is None  # otherwise Lightning would count the epoch twice
    if at.validation_due:
        validation["total"].update(ready=1, started=1)  # Lightning then takes it as started but not finished
    # the last step is counted only after the validation still to come, or the end of the epoch
    outer["_batches_that_stepped"] = steps - (at.batches is None or at.validation_due or trained >= batches_of_epoch)


def advance_schedule(scheduler: Any, steps: int) -> None:
    """Advances a new schedule by a number of optimizer steps, as if they had been taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the optimizer has not stepped
        if isinstance(scheduler, LambdaLR):  # a function of the step
            scheduler.last_epoch, steps = steps - 1, 1
        for _ in range(steps):
            scheduler.step()


def sync_schedules(trainer: L.Trainer) -> None:
    """Moves the restored schedules of a user's own module to the step where training is, as in `trained_steps`.

    Raises:
        ValueError: The number of steps has changed, and a schedule is not a function of the step.
    """
    if math.isinf(total_steps(trainer)):
        return
    step = trained_steps(trainer)
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        by_step = config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
        if not by_step or scheduler.last_epoch == step:
            continue
        if not isinstance(scheduler, LambdaLR):
            raise UsageError(
                f"the checkpoint's {type(scheduler).__name__} is at step {scheduler.last_epoch}, but training is at "
                f"step {step}, since ranks, accumulation or limits have changed. Restore them, use a LambdaLR, or "
                "create the schedule in SequenceClassifier.configure_scheduler."
            )
        advance_schedule(scheduler, step)


def restore_loaders(trainer: L.Trainer) -> None:
    """Restores the loaders' state; Lightning does not if it created them before reading the checkpoint."""
    trainer.fit_loop._load_combined_loader_states()


def begin_epoch(trainer: L.Trainer) -> None:
    """Does what callbacks do at the start of an epoch, even if it is resumed; called before its first batch."""
    trainer.accumulate_grad_batches = accumulated_batches(trainer, trainer.current_epoch)
    for callback in trainer.callbacks if resumes_mid_epoch(trainer) else []:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            callback.on_train_epoch_start(trainer, trainer.lightning_module)


def respect_early_stopping(trainer: L.Trainer) -> None:
    """Ends a run resumed from a checkpoint written after early stopping; Lightning would train another epoch."""
    stops = [one for one in trainer.early_stopping_callbacks if one.patience is not None]
    stopped = [one for one in stops if one.wait_count >= max(one.patience, 1) or one.stopped_epoch]
    if trainer.ckpt_path and stopped:
        trainer.should_stop = True
        rank_zero_info(
            "Early stopping ended this run. To train further, raise its patience, or resume without early stopping."
        )


def resumes_mid_epoch(trainer: L.Trainer) -> bool:
    """Whether this run was resumed in the middle of an epoch."""
    return trainer.fit_loop.restarted_mid_epoch


def had_nothing_to_train(trainer: L.Trainer) -> bool:
    """Whether a finished `fit` had nothing left to train."""
    return trainer.fit_loop.is_resuming and trainer.fit_loop.done


def count_logged_steps(trainer: L.Trainer) -> None:
    """Makes loggers count optimizer steps, including those before a resume; called before the first batch."""
    if trainer.lightning_module.automatic_optimization:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def batches_per_epoch(trainer: L.Trainer, length: int) -> int:
    """Batches per rank in an epoch, for a loader of this length."""
    limit = trainer.limit_train_batches
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        limit = trainer.overfit_batches  # type: ignore[attr-defined]
    return min(length, limit) if isinstance(limit, int) else int(length * limit)


def _steps_of_epochs(trainer: L.Trainer, first: int) -> float:
    """Optimizer steps of an epoch and all later ones."""
    batches, last = trainer.num_training_batches, trainer.max_epochs
    if last == -1 or math.isinf(batches):
        return math.inf
    epochs = range(first, 1000 if last is None else last)
    return sum(math.ceil(batches / accumulated_batches(trainer, epoch)) for epoch in epochs)


def _bounded(trainer: L.Trainer, steps: float, done: int) -> float:
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps - done)


def _validation_comes_next(trainer: L.Trainer) -> bool:
    """Whether a validation is due after the last batch and has not finished."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    progress = loop.epoch_loop.val_loop.batch_progress
    over = trainer.validating and progress.is_last_batch and progress.current.completed == progress.current.ready
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher) and not over
