"""A model that is built before callbacks look at it.

Lightning calls `configure_model` after the `setup` of callbacks, where `StochasticWeightAveraging` copies the module,
`ModelPruning` looks for weights and finetuning callbacks freeze them; but the data module's `setup`, which tells what
to build, comes before. So a callback that goes first calls it, with Lightning's own function, and Lightning's call then
finds nothing to do. Strategies that shard a model while it is built keep Lightning's order.
"""

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.call import _call_configure_model


class BuildModel(Callback):
    """Builds the module's model in `setup`; the first callback of a run."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Calls `configure_model` once a run, where no strategy shards what is made in it."""
        pl_module.__dict__.pop("configure_model", None)
        if type(trainer.strategy).model_sharded_context is Strategy.model_sharded_context:
            _call_configure_model(trainer)
            pl_module.__dict__["configure_model"] = _is_built


def _is_built() -> None:
    """In place of a module's `configure_model` in a run in which it has been called."""
