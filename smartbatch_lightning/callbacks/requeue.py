"""Saving and requeueing on a signal, on many ranks together."""

import logging
import os
import signal
import subprocess
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from smartbatch_lightning.errors import UsageError

log = logging.getLogger(__name__)


class Requeue(Callback):
    """On a signal, saves `last.ckpt` at the next optimizer step, on all ranks together, and requeues the SLURM job.

    Also saves it when training ends, which may be between two checkpoints of the `ModelCheckpoint`.

    Lightning's own handler saves wherever the signal lands: in the middle of an accumulation, or between the
    collectives of other ranks, where it waits for ever. This one only takes note, and acts where every rank passes.
    Start with `--ckpt_path=last`, which goes on from the newest `last.ckpt`, or starts where there is none.

    Args:
        signal_name: Signal that announces the end, as in `sbatch --signal=USR1@120`.
        every_n_steps: Optimizer steps between two looks; on many ranks each is a collective of one number.

    Raises:
        ValueError: There is no such signal, or no `ModelCheckpoint` says where to save.
    """

    def __init__(self, signal_name: str = "SIGUSR1", every_n_steps: int = 1) -> None:
        if signal_name not in signal.Signals.__members__:
            raise UsageError(f"signal_name is {signal_name!r}; give a name such as SIGUSR1.")
        if every_n_steps < 1:
            raise UsageError(f"every_n_steps is {every_n_steps}; give 1 or more.")
        self.signal = signal.Signals[signal_name]
        self.every_n_steps = every_n_steps
        self._stop_requested = False
        self._handler: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the signal; Lightning, which comes later, leaves handlers alone that are there."""
        if stage == "fit":
            if not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
                raise UsageError(
                    "Requeue has nowhere to save. Add a ModelCheckpoint with a dirpath and save_last=True."
                )
            self._stop_requested = False
            self._handler = signal.signal(self.signal, self._request_stop)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the signal back."""
        if stage == "fit":
            signal.signal(self.signal, self._handler)

    def _request_stop(self, *_: Any) -> None:
        self._stop_requested = True

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves, requeues and ends if any rank was asked to, where an optimizer step and all its hooks are done."""
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if batches.processed % (trainer.accumulate_grad_batches * self.every_n_steps):
            return
        if not trainer.strategy.reduce_boolean_decision(self._stop_requested, all=False):
            return
        _save_last(trainer)
        if trainer.is_global_zero:
            _requeue()
        trainer.strategy.barrier("requeue")
        raise SystemExit(0)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the trained model, unless the run only tries the code."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _save_last(trainer)


def _save_last(trainer: L.Trainer) -> None:
    checkpoint = trainer.checkpoint_callback
    assert isinstance(checkpoint, ModelCheckpoint)
    assert checkpoint.dirpath is not None
    path = os.path.join(checkpoint.dirpath, f"{checkpoint.CHECKPOINT_NAME_LAST}{checkpoint.FILE_EXTENSION}")
    checkpoint.last_model_path = path  # or it would take the file for another's and write last-v1 from then on
    trainer.save_checkpoint(path)


def _requeue() -> None:
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    elif "SLURM_JOB_ID" in os.environ:
        job = os.environ["SLURM_JOB_ID"]
    else:
        log.warning("Saved. Start the same command again to go on.")
        return
    log.warning("Saved. Requeueing job %s.", job)
    subprocess.run(["scontrol", "requeue", job], check=True)
