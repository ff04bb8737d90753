"""The best weights: saving them next to the last ones, and stopping when they no longer improve."""

import os
from itertools import count
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from smartbatch_lightning.contract import callbacks_of, validates
from smartbatch_lightning.errors import UsageError, check_at_least
from smartbatch_lightning.models.classifier import SequenceClassifier
from smartbatch_lightning.models.monitored import Mode, check_logged
from smartbatch_lightning.progress import between_steps, is_cut_short, validation_interval


class BestCheckpoint(ModelCheckpoint):
    """Saves the weights with the best validation metric as `best.ckpt`, and those of the last epoch as `last.ckpt`.

    Lightning's `ModelCheckpoint(monitor=..., save_last=True)` writes `last.ckpt` only when the best improves. Without
    validation there is only `last.ckpt`, which also counts as the best.

    Args:
        monitor: Logged name of the metric that decides which weights are best, such as `val_f1`; by default that of the
            `SequenceClassifier`, on the first validation set.
        mode: `min` or `max`; by default the metric's own.
        dirpath: Checkpoint folder, from which the run can resume; by default `lightning_logs/version_N/checkpoints`.
        every_n_train_steps: Optimizer steps between additional saves of `last.ckpt`; None for none.

    Raises:
        ValueError: There is no such metric, the folder has checkpoints of another run, or `every_n_train_steps` is
            below 1.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Mode | None = None,
        dirpath: str | None = None,
        every_n_train_steps: int | None = None,
    ) -> None:
        if every_n_train_steps is not None:
            check_at_least(1, every_n_train_steps=every_n_train_steps)
        # in a given folder, a run resumed after a kill overwrites its own files
        super().__init__(dirpath, "best", monitor, enable_version_counter=dirpath is None)
        self.given = (monitor, mode)
        self._steps_between = every_n_train_steps
        self._fits = True

    @property
    def state_key(self) -> str:
        """The same key for all metrics, since the metric is not known before the data."""
        return type(self).__qualname__

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds the metric that decides which weights are best.

        Raises:
            ValueError: There is no such metric.
        """
        super().setup(trainer, pl_module, stage)
        self._fits = stage == "fit"
        if not self._fits:
            return
        if trainer.global_step == 0:  # otherwise this fit continues the Trainer's previous one
            self.best_k_models, self.kth_best_model_path, self.best_model_path = {}, "", ""
            self.best_model_score, self.last_model_path = None, ""
        self._save_on_train_epoch_end = _at_epoch_end(trainer)
        found = _monitored(trainer, pl_module, *self.given)
        self.monitor, self.mode = found or (None, "min")
        self.save_top_k = 1 if found else 0
        self.kth_value = torch.tensor(float("inf" if self.mode == "min" else "-inf"))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state in `fit`, unless another metric was monitored.

        Lightning would do so for a checkpoint that is tested too, and a second `fit` would know only what that one did.
        """
        if self._fits and state_dict["monitor"] == self.monitor:
            super().load_state_dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rejects to replace another run's checkpoints; only now do all strategies know whether the run resumes.

        Raises:
            ValueError: The given folder has checkpoints, and this run does not start from one of them.
        """
        super().on_train_start(trainer, pl_module)
        files = [self._path_of("best"), self._path_of("last")]
        continues = self.last_model_path or os.path.dirname(os.path.realpath(trainer.ckpt_path or "")) == self.dirpath
        continues = continues or trainer.fast_dev_run  # type: ignore[attr-defined]
        if not self._enable_version_counter and not continues and any(map(self._fs.exists, files)):
            raise UsageError(
                f"{self.dirpath} has checkpoints of another run, which would be replaced. Resume that run with "
                "--ckpt_path=last, or set another --checkpoint.dirpath."
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Writes `last.ckpt` every `every_n_train_steps` steps."""
        every = self._steps_between
        if every and between_steps(trainer) and trainer.global_step % every == 0:
            self.write_last(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes `best.ckpt` if the metric has improved, then `last.ckpt`, whose state includes it."""
        if self.monitor in trainer.callback_metrics:  # otherwise the epoch ended before its validation
            super().on_train_epoch_end(trainer, pl_module)
        self.write_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes `best.ckpt` if an epoch has several validations.

        Raises:
            ValueError: Validation, or the sanity check before training, does not log the metric.
        """
        if trainer.state.fn == TrainerFn.FITTING and self.monitor is not None:
            check_logged(trainer, self.monitor, "BestCheckpoint", "Set --checkpoint.monitor to one of these.")
        super().on_validation_end(trainer, pl_module)

    def write_last(self, trainer: L.Trainer) -> None:
        """Writes `last.ckpt`, on all ranks together."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self.last_model_path:
            paths = (self._path_of(f"last-v{number}" if number else "last") for number in count())
            others = self._enable_version_counter  # whether the folder may have files of other runs, which are kept
            self.last_model_path = next(path for path in paths if not (others and self.file_exists(path, trainer)))
        if self.monitor is None:
            self.best_model_path = self.last_model_path
        trainer.save_checkpoint(self.last_model_path)

    def _path_of(self, name: str) -> str:
        return os.path.join(str(self.dirpath), f"{name}{self.FILE_EXTENSION}")


class EarlyStop(EarlyStopping):
    """Stops training when the monitored metric stops improving.

    Args:
        patience: Consecutive validations without improvement before training stops; None for no early stopping.
        monitor: Logged name of the metric; by default that of the run's `BestCheckpoint`.
        mode: `min` or `max`; by default the metric's own.
        min_delta: Smallest change that counts as an improvement.

    Raises:
        ValueError: There is no such metric, or no validation.
    """

    def __init__(
        self,
        patience: int | None = None,
        monitor: str | None = None,
        mode: Mode | None = None,
        min_delta: float = 0.0,
    ) -> None:
        if patience is not None:
            check_at_least(0, patience=patience)
        super().__init__(monitor or "", min_delta, patience, mode=mode or "min")  # type: ignore[arg-type]
        self.given = (monitor, mode)
        self._given_delta = min_delta
        self._fits = True

    @property
    def state_key(self) -> str:
        """The same key for all metrics, since the metric is not known before the data."""
        return type(self).__qualname__

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds the metric to monitor.

        Raises:
            ValueError: There is no such metric, or no validation.
        """
        self._fits = stage == "fit"
        if self._fits and self.patience is not None:
            monitor, mode = self.given
            if monitor is None:
                for saver in callbacks_of(trainer, BestCheckpoint):
                    monitor, mode = saver.given[0], mode or saver.given[1]
            found = _monitored(trainer, pl_module, monitor, mode)
            if found is None and monitor is None and not isinstance(pl_module, SequenceClassifier):
                raise UsageError(
                    f"early stopping is on, but which metric of {type(pl_module).__name__} to watch is not known. Set "
                    "--early_stopping.monitor."
                )
            if found is None:
                raise UsageError(
                    "early stopping is on, but there is no validation. Set --data.validation_split, or leave out "
                    "--early_stopping.patience."
                )
            monitor, mode = found
            super().__init__(
                monitor, self._given_delta, self.patience, mode=mode, check_on_train_epoch_end=_at_epoch_end(trainer)
            )
        super().setup(trainer, pl_module, stage)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the metric, unless `max_steps` or the like has ended the epoch before its validation."""
        if not is_cut_short(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs why training ended early."""
        if trainer.should_stop and self.stopping_reason_message:
            rank_zero_info(self.stopping_reason_message)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state plus the monitored metric."""
        return {**super().state_dict(), "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state in `fit` except the patience, unless another metric was monitored."""
        if not self._fits or state_dict.get("monitor") != self.monitor:
            return
        super().load_state_dict({**state_dict, "patience": self.patience})
        if self.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED and self.wait_count < self.patience:
            self.stopped_epoch = 0  # this run has more patience than the one that stopped

    def _should_skip_check(self, trainer: L.Trainer) -> bool:
        return self.patience is None or super()._should_skip_check(trainer)


def _at_epoch_end(trainer: L.Trainer) -> bool | None:
    """Whether to check metrics at the end of an epoch; None to let Lightning decide.

    Lightning mistakes validation after every batch, `val_check_interval=1`, for validation after every epoch, `1.0`,
    and does not consider intervals given as times.
    """
    return None if isinstance(validation_interval(trainer), float) else False


def _monitored(
    trainer: L.Trainer, module: L.LightningModule, monitor: str | None, mode: Mode | None
) -> tuple[str, Mode] | None:
    """Name and mode of the metric to monitor; None if there is no validation, or no metric is known."""
    if not validates(trainer):
        return None
    if isinstance(module, SequenceClassifier):
        return module.monitored(monitor, mode)
    return None if monitor is None else (monitor, mode or "min")
