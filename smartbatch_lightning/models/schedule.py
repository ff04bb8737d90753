"""Learning rate schedules: created by name, class or function, and kept in step with training progress."""

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from smartbatch_lightning.contract import callbacks_of
from smartbatch_lightning.errors import UsageError, join_quoted, root_cause_message
from smartbatch_lightning.models.monitored import check_logged
from smartbatch_lightning.progress import advance_schedule, total_steps, trained_steps
from smartbatch_lightning.registry import look_up

# All of transformers' except `greedy`, which is not a torch schedule and needs the loss of every step.
_FACTORIES: Mapping[Any, Any] = TYPE_TO_SCHEDULER_FUNCTION
SCHEDULES: dict[str, Callable[..., Any]] = {
    **{kind.value: make for kind, make in _FACTORIES.items() if kind.value != "greedy"},
    "reduce_lr_on_plateau": ReduceLROnPlateau,  # its signature has the arguments, unlike transformers'
}

# Schedules' names for the number of optimizer steps, and other arguments that determine it.
_STEPS: dict[str, set[str]] = {
    "num_training_steps": {"num_stable_steps"},
    "total_steps": {"epochs", "steps_per_epoch"},
    "T_max": set(),
    "total_iters": set(),
}

# A frequency, in epochs, at which Lightning never steps a `ReduceLROnPlateau`. Lightning would step it at the end of an
# epoch, after the validation's checkpoints have been written, so that a resumed run would miss that step.
_NEVER = sys.maxsize


class Schedule:
    """Creates the learning rate schedule of a training run.

    Args:
        lr_scheduler: A name in `SCHEDULES`; the import path of a function of an optimizer, such as a class in
            `torch.optim.lr_scheduler`; such a path as `class_path`, with `init_args`; or the function itself.
        arguments: Extra arguments for a schedule given by name or path.
        warmup_steps: Optimizer steps over which the learning rate warms up.
        warmup_ratio: The same as a fraction of all optimizer steps.

    Attributes:
        monitor: Metric monitored by `ReduceLROnPlateau`; None for the loss.

    Raises:
        ValueError: There is no such schedule, or it does not take the arguments or a warm-up.
    """

    def __init__(
        self,
        lr_scheduler: str | Mapping[str, Any] | Callable[[Optimizer], Any],
        arguments: Mapping[str, Any],
        warmup_steps: int,
        warmup_ratio: float,
    ) -> None:
        if warmup_steps and warmup_ratio:
            raise UsageError(f"warmup_steps is {warmup_steps} and warmup_ratio {warmup_ratio}; set one of them to 0.")
        if warmup_steps < 0 or not 0 <= warmup_ratio <= 1:
            raise UsageError(
                f"warmup_steps is {warmup_steps} and warmup_ratio {warmup_ratio}; give 0 or more steps, or a fraction "
                "between 0 and 1."
            )
        self._name, self._make, self._arguments = _resolve(lr_scheduler, arguments)
        self._warmup_steps, self._warmup_ratio = warmup_steps, warmup_ratio
        self.by_validation = isinstance(self._make, type) and issubclass(self._make, ReduceLROnPlateau)
        self.monitor: str | None = None
        try:
            signature = inspect.signature(self._make)
            self._parameters = signature.parameters
            if self.by_validation:
                self._take_monitor()
            if "last_epoch" in self._arguments:
                raise TypeError("last_epoch is set by the Trainer")
            signature.bind(None, **self._all_arguments([0.0], 1))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"lr_scheduler is {self._name} with the arguments {self._arguments}: {error}. Correct them."
            ) from error
        if (warmup_steps or warmup_ratio) and "num_warmup_steps" not in self._parameters:
            raise UsageError(
                f"warmup_steps is {warmup_steps} and warmup_ratio {warmup_ratio}, but lr_scheduler is {self._name}, "
                "which has no warm-up. Set both to 0, or use a schedule with one, such as constant_with_warmup."
            )

    @property
    def needs_end(self) -> bool:
        """Whether the schedule needs to know the number of optimizer steps."""
        return self._steps_parameter is not None or self._warmup_ratio > 0

    @property
    def sets_rates(self) -> bool:
        """Whether the schedule's arguments replace the optimizer's learning rates, as those of `OneCycleLR` may."""
        return "max_lr" in self._arguments

    def __call__(self, optimizer: Optimizer, num_steps: int | None) -> LRScheduler:
        """Creates the schedule for a number of optimizer steps; None if training has no end."""
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            scheduler = self._make(optimizer, **self._all_arguments(rates, num_steps))
        except Exception as error:  # a schedule may raise anything
            raise UsageError(
                f"lr_scheduler {self._name} cannot be created with the arguments {self._arguments}: "
                f"{root_cause_message(error)} Correct them."
            ) from error
        if not isinstance(scheduler, LRScheduler):
            raise UsageError(
                f"lr_scheduler {self._name} creates a {type(scheduler).__name__}; give a schedule of "
                "torch.optim.lr_scheduler."
            )
        return scheduler

    @property
    def _steps_parameter(self) -> str | None:
        """The parameter for the number of optimizer steps, if no argument determines it."""
        for name, others in _STEPS.items():
            if name in self._parameters and not ({name} | others) & self._arguments.keys():
                return name
        return None

    def _all_arguments(self, rates: list[float], num_steps: int | None) -> dict[str, Any]:
        arguments = dict(self._arguments)
        if self._steps_parameter is not None:
            arguments[self._steps_parameter] = num_steps
        if "num_warmup_steps" in self._parameters:
            if "num_warmup_steps" in arguments:
                raise TypeError("num_warmup_steps is set by warmup_steps or warmup_ratio")
            share = math.ceil(self._warmup_ratio * (num_steps or 0))
            arguments["num_warmup_steps"] = self._warmup_steps or share
        if "max_lr" in self._parameters:
            arguments.setdefault("max_lr", rates)
        return arguments

    def _take_monitor(self) -> None:
        if "monitor" in self._arguments and "mode" not in self._arguments:
            monitored = self._arguments["monitor"]
            if not str(monitored).startswith("val_loss"):
                raise TypeError(f"mode is missing: max if a higher {monitored} is better, else min")
        if "monitor" not in self._parameters:
            self.monitor = self._arguments.pop("monitor", None)


def _resolve(
    lr_scheduler: str | Mapping[str, Any] | Callable[[Optimizer], Any], arguments: Mapping[str, Any]
) -> tuple[str, Any, dict[str, Any]]:
    """The name of a schedule for messages, the function that creates it, and its arguments; as for `Schedule`."""
    chosen: Any = lr_scheduler
    if isinstance(chosen, Mapping):
        if arguments or "class_path" not in chosen:
            raise UsageError(
                f"lr_scheduler has {join_quoted(chosen)}; give class_path and init_args, without lr_scheduler_kwargs; "
                "or a name and lr_scheduler_kwargs."
            )
        # flags such as --model.lr_scheduler.init_args.step_size=3 arrive without init_args
        others = {name: value for name, value in chosen.items() if name not in ("class_path", "init_args")}
        chosen, arguments = chosen["class_path"], {**(chosen.get("init_args") or {}), **others}
    name = chosen if isinstance(chosen, str) else repr(chosen)
    make: Any = look_up(chosen, SCHEDULES, "lr_scheduler") if isinstance(chosen, str) else chosen
    if isinstance(make, partial) and not make.args:
        make, arguments = make.func, {**make.keywords, **arguments}
    return name, make, dict(arguments)


def lightning_config(scheduler: LRScheduler, monitor: str) -> dict[str, Any]:
    """How Lightning steps a schedule: after every optimizer step, but never for a `ReduceLROnPlateau`.

    Args:
        scheduler: The schedule.
        monitor: Metric for a `ReduceLROnPlateau` that does not name one itself, as
            `lightning.pytorch.cli.ReduceLROnPlateau` does.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "step"}
    for group in scheduler.optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # as other schedules do
    monitor = getattr(scheduler, "monitor", monitor)
    return {"scheduler": scheduler, "interval": "epoch", "frequency": _NEVER, "monitor": monitor}


def check_validation(trainer: L.Trainer) -> None:
    """Rejects a schedule that depends on validation if there is none; called when loaders are known."""
    validated = trainer.enable_validation and (trainer.val_dataloaders is None or any(trainer.num_val_batches))
    if _by_validation(trainer) and not validated:
        raise UsageError(
            "lr_scheduler is ReduceLROnPlateau, which needs validation, but there is none. Set "
            "--data.validation_split, or use another schedule."
        )


def step_by_validation(trainer: L.Trainer) -> None:
    """Steps a `ReduceLROnPlateau` after validation; after the sanity check, only checks that it could.

    Raises:
        ValueError: Validation does not log its metric.
    """
    for config in _by_validation(trainer):
        remedy = "Set its monitor to one of these, with mode max or min."
        check_logged(trainer, config.monitor, "ReduceLROnPlateau", remedy)
        if not trainer.sanity_checking:
            config.scheduler.step(trainer.callback_metrics[config.monitor])


def _by_validation(trainer: L.Trainer) -> list[Any]:
    if trainer.state.fn != TrainerFn.FITTING:
        return []
    return [config for config in trainer.lr_scheduler_configs if config.frequency == _NEVER]


def sync_schedule(
    trainer: L.Trainer,
    configure_optimizer: Callable[[], Optimizer],
    configure_scheduler: Callable[[Optimizer, int | None], LRScheduler],
) -> None:
    """Recreates the schedule for the current number of training steps, at the step where training is.

    After a change of ranks, accumulation, limits or epochs, a checkpoint's schedule has a different number of steps
    than training. Any kind of schedule then continues at the same fraction of training and ends when training ends.
    Learning rate, weight decay and the like are the module's current ones.

    Args:
        trainer: In `fit`, with optimizer and counters restored.
        configure_optimizer: Creates a fresh optimizer.
        configure_scheduler: Creates a schedule from an optimizer and the number of steps, None if there is no end.
    """
    if not trainer.lr_scheduler_configs:  # StochasticWeightAveraging has removed it, and will add its own
        return
    [config] = trainer.lr_scheduler_configs
    optimizer = config.scheduler.optimizer
    if adds_parameters(trainer):  # Lightning restores added parameters, but leaves them frozen
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
    fresh = configure_optimizer()
    before = [(group["lr"], group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group.pop("initial_lr", group["lr"])  # set again by the schedule
    for group, wanted in zip(optimizer.param_groups, fresh.param_groups, strict=False):  # callbacks may have added some
        group.update({name: value for name, value in wanted.items() if name != "params"})
    steps, restored = total_steps(trainer), config.scheduler
    config.scheduler = configure_scheduler(optimizer, None if math.isinf(steps) else int(steps))
    if isinstance(restored, ReduceLROnPlateau):
        _continue_plateau(config.scheduler, restored, before)
    else:
        advance_schedule(config.scheduler, trained_steps(trainer))


def _continue_plateau(scheduler: Any, restored: ReduceLROnPlateau, before: list[tuple[float, float]]) -> None:
    """Continues a checkpoint's `ReduceLROnPlateau`, with the current settings.

    Args:
        scheduler: The new schedule, with a new optimizer's rates as `initial_lr` of the groups.
        restored: The checkpoint's schedule.
        before: Rate and initial rate of each group in the checkpoint.
    """
    counts = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
    scheduler.load_state_dict({name: getattr(restored, name) for name in counts})
    for group, (rate, initial) in zip(scheduler.optimizer.param_groups, before, strict=False):
        group["initial_lr"] = group["lr"]
        if restored.last_epoch:  # otherwise the checkpoint had another schedule, or there was no validation before it
            group["lr"] = rate if group["lr"] == initial else group["lr"] * rate / initial


def adds_parameters(trainer: L.Trainer | None) -> bool:
    """Whether a callback such as `BackboneFinetuning` freezes parameters and adds them to the optimizer later."""
    return bool(callbacks_of(trainer, BaseFinetuning))


def adopt_learning_rates(trainer: L.Trainer) -> None:
    """Makes the schedule continue from the rates that callbacks have set, including those of added parameters.

    `BackboneFinetuning` sets rates and adds parameters at the start of an epoch, and adds them again on resume; the
    schedule would otherwise reset these rates and ignore these parameters.

    Raises:
        ValueError: Parameters were added at a rate of 0, or the schedule is not a `LambdaLR`.
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
        if not isinstance(schedule, LambdaLR | ReduceLROnPlateau) and [group["lr"] for group in groups] != rates:
            raise UsageError(
                f"a callback has set learning rates, which {type(schedule).__name__} would override. Use one of "
                "transformers' schedules by name, or leave the callback out."
            )
        if isinstance(schedule, LambdaLR):
            schedule.lr_lambdas += [schedule.lr_lambdas[0]] * len(added)
            schedule.base_lrs += [group["lr"] for group in added]
            for number, (group, rate) in enumerate(zip(groups, rates + [None] * len(added), strict=True)):
                if group["lr"] != rate:
                    share = schedule.lr_lambdas[number](schedule.last_epoch) or 1.0
                    group["initial_lr"] = schedule.base_lrs[number] = group["lr"] / share
