"""Metrics that callbacks monitor, checked before training; Lightning would raise an error only after an epoch."""

from collections.abc import Mapping, Sequence
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from smartbatch_lightning.contract import callbacks_of, text_data_of, validates
from smartbatch_lightning.errors import UsageError, join_quoted

Mode = Literal["min", "max"]

STEP_LOSS = "train_loss_step"
_NOT_BY_THE_MODEL = ("epoch", "step", "train_padding_ratio", "train_seconds", "train_real_tokens_per_second")
_KNOWN = ("lightning.", "smartbatch_lightning.")  # packages whose modules and callbacks log nothing else
_LOGGING_HOOKS = ("step", "validation_step", "on_validation_epoch_end", "on_validation_end")


def find_monitored(
    module: L.LightningModule,
    higher_is_better: Mapping[str, bool | None],
    default: str,
    name: str | None,
    mode: Mode | None,
) -> tuple[str, Mode]:
    """The validation metric that decides which weights are best.

    Args:
        module: Module of a run.
        higher_is_better: Whether higher is better, by the names of the metrics without prefix; None if unknown.
        default: Which of these decides if none is named.
        name: Logged name, such as `val_accuracy`.
        mode: `min` or `max`; by default the metric's own.

    Returns:
        Its name (with several validation sets, for the first one) and `min` or `max`.

    Raises:
        ValueError: There is no such metric, or its mode is unknown.
    """
    splits = _validation_sets(module.trainer)
    suffixes = [f"/{split}" for split in splits] if len(splits) > 1 else [""]
    logged = {f"val_{metric}{suffix}": better for suffix in suffixes for metric, better in higher_is_better.items()}
    name = name or validation_name(module.trainer, default)
    if name not in logged and not _may_log_others(module):
        raise UsageError(
            f"the metric {name!r} is monitored, but the logged metrics are {join_quoted(logged)}. Name one of these, "
            "or add the metric to --model.metrics."
        )
    better = logged.get(name)
    if mode is None and better is None:
        raise UsageError(f"the metric {name!r} does not say whether higher is better. Set mode to min or max.")
    return name, mode or ("max" if better else "min")


def check_validates(module: L.LightningModule, *kinds: type[EarlyStopping] | type[ModelCheckpoint]) -> None:
    """Rejects callbacks of these types that monitor validation if there is none."""
    if validates(module.trainer) or _may_log_others(module):
        return
    for callback in callbacks_of(module.trainer, *kinds):
        stops = isinstance(callback, EarlyStopping)
        monitors = (callback.monitor or "").startswith("val_") or callback.monitor == ""  # of an EarlyStop
        if monitors and not (stops and callback.patience is None):
            what = "early stopping is on" if stops else f"{type(callback).__name__} monitors {callback.monitor!r}"
            remedy = "--early_stopping.patience or the callback" if stops else "the callback"
            raise UsageError(f"{what}, but there is no validation. Set --data.validation_split, or leave out {remedy}.")


def check_logged_in_training(module: L.LightningModule, metrics: Sequence[str]) -> None:
    """Rejects callbacks that monitor what is not logged in training.

    Args:
        module: Module of a run.
        metrics: Names of its metrics without prefix, the loss included.
    """
    if _may_log_others(module):
        return
    logged = [STEP_LOSS, *(f"train_{name}" for name in metrics)]
    for callback in callbacks_of(module.trainer, ModelCheckpoint, EarlyStopping):
        monitor = callback.monitor
        if monitor and not monitor.startswith("val_") and monitor not in (*logged, *_NOT_BY_THE_MODEL):
            raise UsageError(
                f"{type(callback).__name__} monitors {monitor!r}, but training logs {join_quoted(logged)}, and "
                "validation the same with val_. Name one of these."
            )


def check_logged(trainer: L.Trainer, monitor: str, who: str, remedy: str) -> None:
    """Rejects to monitor a metric that validation, or the sanity check before training, has not logged.

    Args:
        trainer: At the end of a validation.
        monitor: Name of the metric.
        who: What monitors it, for the message.
        remedy: How to monitor another metric, for the message.
    """
    if monitor not in trainer.callback_metrics:
        logged = join_quoted(sorted(name for name in trainer.callback_metrics if name.startswith("val")))
        raise UsageError(f"{who} monitors {monitor!r}, but validation logs {logged or 'none'}. {remedy}")


def step_loss_is_monitored(trainer: L.Trainer) -> bool:
    """Whether a callback monitors the loss of each step, which is otherwise logged only when Lightning logs."""
    return any(one.monitor == STEP_LOSS for one in callbacks_of(trainer, ModelCheckpoint, EarlyStopping))


def validation_name(trainer: L.Trainer, metric: str) -> str:
    """Name under which validation logs a metric; with several validation sets, that for the first one."""
    splits = _validation_sets(trainer)
    return f"val_{metric}/{splits[0]}" if len(splits) > 1 else f"val_{metric}"


def _validation_sets(trainer: L.Trainer) -> Sequence[str]:
    data = text_data_of(trainer)
    return [] if data is None else data.evaluation_splits.get("val", [])


def _may_log_others(module: L.LightningModule) -> bool:
    """Whether a subclass or a callback may log validation metrics that `SequenceClassifier` does not."""
    own = next(one for one in type(module).__mro__ if any(hook in vars(one) for hook in _LOGGING_HOOKS))
    callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    return not all(one.__module__.startswith(_KNOWN) for one in (own, *map(type, callbacks)))
