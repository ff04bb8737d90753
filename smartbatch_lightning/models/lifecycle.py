"""Workarounds for a model's life cycle in Lightning.

Lightning calls `configure_model` after the callbacks' `setup`, in which `StochasticWeightAveraging` copies the module,
`ModelPruning` looks for weights and finetuning callbacks freeze them. The data module's `setup`, which determines what
to build, comes earlier. So a callback that runs before all others calls `configure_model`, with Lightning's own
function, and Lightning's later call does nothing. Strategies that shard a model while it is built keep Lightning's
order.

With `ddp_spawn`, `ddp_fork` and `ddp_notebook`, the model is built and trained in other processes, and Lightning loads
the trained weights into a module without a model, ignoring what does not fit. So the weights include the architecture.

`WeightAveraging` also averages buffers, including the position ids of most models: whole numbers, whose averages are
rounded down each time, so that the averaged model uses wrong positions.

`WeightAveraging` and `StochasticWeightAveraging` give the model its averaged weights in a hook that a restarted run
does not reach if nothing is left to train.

`LearningRateFinder` and `BatchSizeFinder` restore a checkpoint of their own when `fit` begins, after which Lightning
does not restore the given one: training would start over from the given checkpoint's weights.

A finetuning callback freezes parameters whenever a `fit` begins, and unfreezes them in a certain epoch. In a second
`fit` of a Trainer, which goes on after that epoch, they would stay frozen, so it has to go on as after a resume.

After an exception or Ctrl-C in an evaluation, or after an evaluation with `BatchSizeFinder`, Lightning leaves the model
in evaluation mode, so that the next `fit` would train it without dropout.
"""

import multiprocessing
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.call import _call_configure_model
from lightning.pytorch.utilities.model_helpers import _ModuleMode

from smartbatch_lightning.contract import callbacks_of
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.models.finite import check_evaluated
from smartbatch_lightning.models.schedule import step_by_validation
from smartbatch_lightning.progress import had_nothing_to_train


class ModelLifecycle(Callback):
    """The first callback of a run: builds the model, and does what must come before other callbacks' hooks."""

    @staticmethod
    def runs_in(trainer: L.Trainer) -> bool:
        """Whether a Trainer has this callback."""
        return bool(callbacks_of(trainer, ModelLifecycle))

    def __init__(self) -> None:
        self._modes_before = _ModuleMode()  # whether each part of the model was in training mode before the run

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Builds the model if there is none, unless the strategy shards models in `configure_model`.

        Overrides of `configure_model` are thus called once, and one that wraps the model does not do so in every run.
        """
        self._build(trainer, pl_module)
        self._random_state = torch.get_rng_state()
        self._modes_before.capture(pl_module)
        if not all(buffer.is_floating_point() for buffer in pl_module.buffers()):
            for callback in callbacks_of(trainer, WeightAveraging):
                callback._use_buffers = False  # buffers are then copied
        for callback in callbacks_of(trainer, BaseFinetuning) if stage == "fit" and trainer.global_step else []:
            callback._restarting = True

    def _build(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.__dict__.pop("configure_model", None)
        if type(trainer.strategy).model_sharded_context is not Strategy.model_sharded_context:
            return
        before = pl_module.model
        if before is not None and pl_module.hparams.get("architecture"):
            pl_module.match_data()
        else:
            try:
                _call_configure_model(trainer)
            except BaseException:
                pl_module.model = before  # an override may have failed halfway
                raise
        pl_module.__dict__["configure_model"] = _do_nothing

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rejects callbacks that would make a resumed run start over."""
        hooks = (LearningRateFinder.on_fit_start, BatchSizeFinder.on_fit_start)
        for callback in callbacks_of(trainer, LearningRateFinder, BatchSizeFinder) if trainer.ckpt_path else []:
            if type(callback).on_fit_start in hooks:
                found = trainer._checkpoint_connector._loaded_checkpoint.get("hyper_parameters", {})
                raise UsageError(
                    f"with the callback {type(callback).__name__} training would start over from the checkpoint's "
                    "weights. Leave it out to resume; the checkpoint's learning_rate is "
                    f"{found.get('learning_rate')}."
                )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restores the random state after `fit`, in which each step sets it; after an evaluation, the modes."""
        if stage == "fit":
            torch.set_rng_state(self._random_state)  # from which a later run without a seed draws its own
        else:
            self._modes_before.restore(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restores the modes after an exception in an evaluation, including those of `fit`."""
        if trainer.evaluating or trainer.sanity_checking or trainer.predicting:
            self._modes_before.restore(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Steps a schedule that depends on validation before checkpoints are written, so that they include the step."""
        check_evaluated(trainer)
        step_by_validation(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rejects results that are not finite before they are reported."""
        check_evaluated(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the model its averaged weights even if a restarted run has nothing left to train."""
        if had_nothing_to_train(trainer):
            for callback in callbacks_of(trainer, WeightAveraging, StochasticWeightAveraging):
                callback.on_train_end(trainer, pl_module)


def _do_nothing() -> None:
    """Replaces the `configure_model` of a module that is already built."""


def returns_weights(trainer: L.Trainer | None) -> bool:
    """Whether this process was spawned for a `fit` that has ended, and returns its weights to its parent process."""
    return (
        trainer is not None
        and trainer.state.finished
        and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        and multiprocessing.parent_process() is not None
    )
