"""For runs that are killed and started again: checkpoints written whole, and a requeue that holds on many ranks."""

import logging
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from smartbatch_lightning.errors import UsageError, cause
from smartbatch_lightning.storage import replace_whole

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint beside its place and renames it, so that a kill leaves the one before, whole.

    A plugin of the Trainer; the command line has it by default.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Writes a checkpoint whole or not at all. Object stores do that by themselves."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            replace_whole(Path(path), lambda draft: super(AtomicCheckpointIO, self).save_checkpoint(checkpoint, draft))

    def load_checkpoint(self, path: _PATH, *args: Any, **options: Any) -> dict[str, Any]:
        """Reads a checkpoint.

        Raises:
            ValueError: It is not there, cut short or no checkpoint.
        """
        try:
            return super().load_checkpoint(path, *args, **options)
        except (RuntimeError, EOFError, OSError) as error:
            what = "not there" if isinstance(error, FileNotFoundError) else f"cut short or corrupt: {cause(error)}"
            raise UsageError(
                f"the checkpoint {path} is {what.rstrip('.')}. Give another one by --ckpt_path; in its folder are "
                f"{sorted(other.name for other in Path(path).parent.glob('*.ckpt'))}."
            ) from error


class CheckpointCheck(Callback):
    """Finds out before training whether checkpoints can be written, and before predicting whether one was read."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes a file to each local folder of a `ModelCheckpoint`, and removes it.

        Raises:
            ValueError: A folder cannot be written.
        """
        for callback in trainer.checkpoint_callbacks:
            folder = getattr(callback, "dirpath", None)
            if not trainer.is_global_zero or not folder or "://" in str(folder):
                continue
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise UsageError(
                    f"checkpoints cannot be written to {folder}: {error}. Give ModelCheckpoint another dirpath, or set "
                    "--trainer.default_root_dir."
                ) from error

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses to measure a model that was never trained to classify, unless it is about to be."""
        if trainer.state.fn != TrainerFn.FITTING:
            _check_trained(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses to measure a model that was never trained to classify."""
        _check_trained(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses to predict with a model that was never trained to classify."""
        _check_trained(trainer, pl_module)


def _check_trained(trainer: L.Trainer, module: L.LightningModule) -> None:
    model = getattr(module, "model", None)
    if trainer.ckpt_path is not None or trainer.global_step or not isinstance(model, PreTrainedModel):
        return
    name = getattr(module, "pretrained", "the model")
    head = any(one.endswith("ForSequenceClassification") for one in model.config.architectures or [])
    if name == "demo" or not head:
        raise UsageError(
            f"{name!r} has not been trained to classify, and no checkpoint was loaded. Give the path of one by "
            "--ckpt_path, or an exported folder by --model.pretrained."
        )


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
        self._announced = False
        self._handler: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the signal; Lightning, which comes later, leaves handlers alone that are there."""
        if stage == "fit":
            if not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
                raise UsageError(
                    "Requeue has nowhere to save. Add a ModelCheckpoint with a dirpath and save_last=True."
                )
            self._announced = False
            self._handler = signal.signal(self.signal, self._announce)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the signal back."""
        if stage == "fit":
            signal.signal(self.signal, self._handler)

    def _announce(self, *_: Any) -> None:
        self._announced = True

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves, requeues and ends if any rank was told to; only where an optimizer step and all its hooks are done."""
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if batches.processed % (trainer.accumulate_grad_batches * self.every_n_steps):
            return
        if not trainer.strategy.reduce_boolean_decision(self._announced, all=False):
            return
        _save_last(trainer)
        if trainer.is_global_zero:
            _requeue()
        trainer.strategy.barrier("requeue")
        raise SystemExit(0)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the trained model, unless the run only tries the code."""
        if not getattr(trainer, "fast_dev_run", False):
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
