"""On a signal, saves on all ranks together and exits, so that the run can be resumed."""

import logging
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from smartbatch_lightning.callbacks.best import BestCheckpoint
from smartbatch_lightning.console import echo, resume_command
from smartbatch_lightning.contract import callbacks_of
from smartbatch_lightning.errors import UsageError, check_at_least
from smartbatch_lightning.progress import between_steps

log = logging.getLogger(__name__)

_FORWARDING_SECONDS = 1.0  # within which a launcher such as torchrun also forwards a signal that all ranks received
# Windows has only SIGTERM and SIGINT
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class StopOnSignal(Callback):
    """On SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C, saves `last.ckpt` at the next optimizer step, on all ranks, and exits.

    The exit status is 128 plus the signal number, as for a process killed by it; it is 0 only if training finished. A
    running validation is finished first. A second Ctrl-C exits at once. Outside `fit` there is nothing to save, and a
    signal ends the run at once. Under SLURM, `requeue_signal` requeues the job.

    Lightning's own handlers act as soon as a signal arrives, in the middle of gradient accumulation or between
    collectives of other ranks, where they can deadlock. This callback's handlers only set a flag, on which it acts at a
    point that every rank reaches.

    It also saves `last.ckpt` when training ends, if the `ModelCheckpoint` has `save_last`, since the end may fall
    between two of its checkpoints.

    Args:
        requeue_signal: Signal on which a SLURM job is requeued, as in `sbatch --signal=USR1@120`.
        every_n_steps: Optimizer steps between two checks; with several ranks, each check takes a small all-reduce.

    Raises:
        ValueError: `requeue_signal` cannot be handled, or `every_n_steps` is below 1.
    """

    def __init__(self, requeue_signal: str = "SIGUSR1", every_n_steps: int = 1) -> None:
        known = {*signal.Signals.__members__, "SIGUSR1"} - {"SIGKILL", "SIGSTOP"}
        if requeue_signal not in known:
            raise UsageError(f"requeue_signal is {requeue_signal!r}; give one that can be handled, such as SIGUSR1.")
        check_at_least(1, every_n_steps=every_n_steps)
        self.requeue_signal = signal.Signals.__members__.get(requeue_signal)
        self.every_n_steps = every_n_steps
        self._received: signal.Signals | None = None
        self._since = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Installs the signal handlers."""
        self._received = None
        self._trainer = trainer
        self._install_handlers()

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the SIGTERM handler again: Lightning has replaced it with its own, which waits for other ranks."""
        self._install_handlers()

    on_train_start = on_validation_start = on_test_start = on_predict_start = on_sanity_check_start

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restores the previous signal handlers."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves and exits if any rank has received a signal, once an optimizer step and all its hooks are done."""
        if not between_steps(trainer, self.every_n_steps):
            return
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        received = _agreed_signal(trainer, self._received)
        path = _save_last(trainer)
        if trainer.is_global_zero:
            _announce(trainer, f"Stopped by {received.name} after step {trainer.global_step}.", path)
            if received == self.requeue_signal:
                _requeue()
        trainer.strategy.barrier("stop on signal")
        raise SystemExit(128 + received)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """After a second Ctrl-C, prints the last checkpoint."""
        if (
            isinstance(exception, KeyboardInterrupt)
            and trainer.state.fn == TrainerFn.FITTING
            and trainer.is_global_zero
        ):
            saver = trainer.checkpoint_callback
            path = (saver.last_model_path or saver.best_model_path) if isinstance(saver, ModelCheckpoint) else None
            _announce(trainer, f"Interrupted after step {trainer.global_step}.", path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves `last.ckpt` if the `ModelCheckpoint` has `save_last`."""
        saver = trainer.checkpoint_callback
        if isinstance(saver, ModelCheckpoint) and saver.save_last:
            _save_last(trainer)

    def _install_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread():  # other threads cannot set signal handlers
            for number in {*_SIGNALS, self.requeue_signal} - {None}:
                before = signal.signal(number, self._receive)
                self._handlers.setdefault(number, before)

    def _receive(self, number: int, frame: Any) -> None:
        received = signal.Signals(number)
        if self._trainer.state.fn != TrainerFn.FITTING:
            raise SystemExit(128 + number)
        if self._received == received == signal.SIGINT and time.monotonic() - self._since > _FORWARDING_SECONDS:
            raise KeyboardInterrupt
        self._received, self._since = received, time.monotonic()
        if self._trainer.is_global_zero:
            press = "Press Ctrl-C again" if received == signal.SIGINT else "Press Ctrl-C twice"
            log.warning("%s: saving and stopping after this step. %s to stop at once.", received.name, press)


def _agreed_signal(trainer: L.Trainer, received: signal.Signals | None) -> signal.Signals:
    """One of the signals received by any rank, the same on all ranks."""
    mine = torch.tensor(received or 0, device=trainer.strategy.root_device)
    return signal.Signals(int(trainer.strategy.reduce(mine, reduce_op="max")))


def _save_last(trainer: L.Trainer) -> str | None:
    """Saves `last.ckpt` next to the other checkpoints and returns its path; None if none are saved."""
    saver = trainer.checkpoint_callback
    tried = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    if not isinstance(saver, ModelCheckpoint) or saver.dirpath is None or tried:
        return None
    if isinstance(saver, BestCheckpoint):
        saver.write_last(trainer)
    else:
        # otherwise Lightning would take the file for another run's and write last-v1 from then on
        saver.last_model_path = os.path.join(saver.dirpath, f"{saver.CHECKPOINT_NAME_LAST}{saver.FILE_EXTENSION}")
        trainer.save_checkpoint(saver.last_model_path)
    return saver.last_model_path


def _announce(trainer: L.Trainer, what: str, checkpoint: str | None) -> None:
    if not checkpoint or not ("://" in checkpoint or Path(checkpoint).exists()):
        echo(f"{what} There is no checkpoint.")
        return
    is_command = callbacks_of(trainer, SaveConfigCallback)
    how = resume_command(checkpoint) if is_command else f"trainer.fit(..., ckpt_path={checkpoint!r})"
    echo(f"{what} Checkpoint: {checkpoint}\nResume with: {how}")


def _requeue() -> None:
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    elif "SLURM_JOB_ID" in os.environ:
        job = os.environ["SLURM_JOB_ID"]
    else:
        return
    log.warning("Requeueing job %s.", job)
    subprocess.run(["scontrol", "requeue", job], check=True)
