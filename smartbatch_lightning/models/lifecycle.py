"""What befalls a model in Lightning's hands: built too late, left in another process, averaged by halves.

Lightning calls `configure_model` after the `setup` of callbacks, where `StochasticWeightAveraging` copies the module,
`ModelPruning` looks for weights and finetuning callbacks freeze them; but the data module's `setup`, which tells what
to build, comes before. So a callback that goes first calls it, with Lightning's own function, and Lightning's call then
finds nothing to do. Strategies that shard a model while it is built keep Lightning's order.

`ddp_spawn`, `ddp_fork` and `ddp_notebook` build and train it in processes of their own, and Lightning loads the trained
weights into a module without a model, passing over what does not fit. So those weights bring the architecture along.

`WeightAveraging` averages buffers too, among them the position ids of most models: whole numbers, which are rounded
down again and again, so that the averaged model reads texts at other positions.

It and `StochasticWeightAveraging` give the model its averaged weights in a hook that a restarted run does not reach
when nothing is left to train.

After an exception or Ctrl-C in an evaluation Lightning leaves the model in evaluation mode, in which the next `fit`
would train it without dropout.
"""

import multiprocessing
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.call import _call_configure_model

from smartbatch_lightning.models.finite import check_evaluated
from smartbatch_lightning.models.schedule import step_by_validation
from smartbatch_lightning.progress import nothing_was_left


class ModelLifecycle(Callback):
    """The first callback of a run: builds the model, and does what has to come before other callbacks' hooks."""

    @staticmethod
    def runs_in(trainer: L.Trainer) -> bool:
        """Whether a Trainer has one."""
        return any(isinstance(callback, ModelLifecycle) for callback in trainer.callbacks)  # type: ignore[attr-defined]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Builds what has not been built, where no strategy shards what is made in `configure_model`.

        An override of that is thus called once, and one that wraps the model does not wrap it again in every run.
        """
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
                pl_module.model = before  # it may be half of what an override makes
                raise
        pl_module.__dict__["configure_model"] = _is_built
        if not all(buffer.is_floating_point() for buffer in pl_module.buffers()):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback._use_buffers = False  # they are copied then

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets a schedule that goes by validation step before checkpoints are written, which then hold that step."""
        check_evaluated(trainer)
        step_by_validation(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses what is not finite before anything is reported of it."""
        check_evaluated(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the model its averaged weights also where a restarted run has nothing left to train."""
        for callback in trainer.callbacks if nothing_was_left(trainer) else []:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                callback.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restores the modes that the model's parts had before the evaluation."""
        if trainer.evaluating or trainer.sanity_checking or trainer.predicting:
            trainer._active_loop._module_mode.restore(pl_module)  # type: ignore[union-attr]


def _is_built() -> None:
    """In place of the `configure_model` of a module that is built."""


def hands_weights_back(trainer: L.Trainer | None) -> bool:
    """Whether this process was started for a `fit` that is over, and its weights go to the process that started it."""
    return (
        trainer is not None
        and trainer.state.finished
        and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        and multiprocessing.parent_process() is not None
    )
