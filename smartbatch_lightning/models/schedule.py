"""Learning rate schedules that stand where training stands."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from smartbatch_lightning.errors import UsageError
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
    if not trainer.lr_scheduler_configs:  # StochasticWeightAveraging has taken them away, and will bring its own
        return
    [config] = trainer.lr_scheduler_configs
    position = trained_steps(trainer)
    if not position or isinstance(config.scheduler, ReduceLROnPlateau):
        return
    optimizer = config.scheduler.optimizer
    if adds_parameters(trainer):  # Lightning restores what was added, and leaves it frozen
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
    fresh = configure_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = group.pop("initial_lr")  # set again by the schedule
    for group, wanted in zip(optimizer.param_groups, fresh.param_groups, strict=False):  # callbacks may have added some
        group.update({name: value for name, value in wanted.items() if name != "params"})
    config.scheduler = configure_scheduler(optimizer, int(total_steps(trainer)))
    advance_schedule(config.scheduler, position)


def adds_parameters(trainer: L.Trainer | None) -> bool:
    """Whether a callback such as `BackboneFinetuning` freezes parameters and adds them to the optimizer later."""
    callbacks: list[Callback] = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, BaseFinetuning) for callback in callbacks)


def follow_rates(trainer: L.Trainer) -> None:
    """Lets the schedule go on from rates that callbacks have set, also of parameters that they have added.

    `BackboneFinetuning` does both as an epoch starts, and adds them again when a run is resumed; a schedule would undo
    the one, and knows nothing of the other.

    Raises:
        ValueError: Parameters were added at no rate, or to a schedule that is no `LambdaLR`.
    """
    for config in trainer.lr_scheduler_configs:
        schedule, groups = config.scheduler, config.scheduler.optimizer.param_groups
        rates: list[Any] = [*schedule.get_last_lr()]
        added = groups[len(rates) :]
        if added and not (isinstance(schedule, LambdaLR) and all(group["lr"] for group in added)):
            raise UsageError(
                f"a callback adds parameters to the optimizer, but {type(schedule).__name__} has no rate for them. Let "
                "configure_scheduler return a LambdaLR, and unfreeze them in an epoch whose first rate is not 0."
            )
        if isinstance(schedule, LambdaLR):
            schedule.lr_lambdas += [schedule.lr_lambdas[0]] * len(added)
            schedule.base_lrs += [group["lr"] for group in added]
            for number, (group, rate) in enumerate(zip(groups, rates + [None] * len(added), strict=True)):
                if group["lr"] != rate:
                    share = schedule.lr_lambdas[number](schedule.last_epoch) or 1.0
                    group["initial_lr"] = schedule.base_lrs[number] = group["lr"] / share
