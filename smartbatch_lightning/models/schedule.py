"""Learning rate schedules that stand where training stands."""

from collections.abc import Callable

import lightning as L
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from smartbatch_lightning.progress import advance_schedule, total_steps, trained_steps


def place_schedule(
    trainer: L.Trainer,
    configure_optimizer: Callable[[], Optimizer],
    configure_scheduler: Callable[[Optimizer, int], LRScheduler],
) -> None:
    """Makes the schedule again, for the steps that training has now, and lets it stand where so many remain.

    After a change of ranks, accumulation, limits or epochs, the steps of a checkpoint's schedule are others than those
    of training. Whatever its kind, the schedule then stands at the same share of training, and ends where that ends.
    Learning rate, weight decay and the like are what the module says now.

    Args:
        trainer: In `fit`, with optimizer and counters restored.
        configure_optimizer: Makes a fresh optimizer.
        configure_scheduler: Makes a schedule, of an optimizer and the number of steps.
    """
    [config] = trainer.lr_scheduler_configs
    position = trained_steps(trainer)
    if not position or isinstance(config.scheduler, ReduceLROnPlateau):
        return
    optimizer = config.scheduler.optimizer
    fresh = configure_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = group.pop("initial_lr")  # set again by the schedule
    for group, wanted in zip(optimizer.param_groups, fresh.param_groups, strict=False):  # callbacks may have added some
        group.update({name: value for name, value in wanted.items() if name != "params"})
    config.scheduler = configure_scheduler(optimizer, int(total_steps(trainer)))
    advance_schedule(config.scheduler, position)
