"""The classifier under what Lightning offers: its callbacks, strategies and loops, also interrupted ones."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import trainer
from lightning.pytorch.callbacks import Callback, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.nn.utils import parameters_to_vector

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule


def data(**options) -> SmartBatchDataModule:
    return SmartBatchDataModule(**{"validation_split": 0.9, "max_length": 16, "batch_size": 32, "seed": 1, **options})


# --- a model that is there when callbacks look for it ---


class Setup(Callback):
    """Looks at the module in `setup`."""

    def setup(self, trainer, pl_module, stage) -> None:
        self.found = pl_module.model


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_averaged_weights_are_the_mean_over_the_starts_of_epochs(tmp_path: Path) -> None:
    class Weights(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            weights.append(parameters_to_vector(pl_module.parameters()).detach().clone())

    weights: list[torch.Tensor] = []
    averaging = StochasticWeightAveraging(1e-3, swa_epoch_start=2)
    model = SequenceClassifier(learning_rate=1e-3)
    trainer(tmp_path, callbacks=[Weights(), averaging], max_epochs=4, limit_val_batches=0).fit(model, data())
    expected = torch.stack(weights[1:]).mean(0)
    assert (expected - weights[-1]).abs().max() > 1e-3
    torch.testing.assert_close(parameters_to_vector(model.parameters()).detach(), expected)


def test_pruned_weights_are_zero_after_training(tmp_path: Path) -> None:
    model = SequenceClassifier()
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.75)
    trainer(tmp_path, callbacks=[pruning], limit_train_batches=2, limit_val_batches=0).fit(model, data())
    weights = torch.cat([weight.flatten() for name, weight in model.named_parameters() if name.endswith("weight")])
    assert (weights == 0).double().mean() > 0.7


def test_callbacks_find_the_model_in_setup_and_it_is_configured_once_a_run(tmp_path: Path) -> None:
    class Headed(SequenceClassifier):
        def configure_model(self) -> None:
            super().configure_model()
            configured.append(self.model)
            self.own = torch.nn.Linear(2, 2)

    configured: list[torch.nn.Module] = []
    looker = Setup()
    model = Headed()
    for number, stage in enumerate(("fit", "validate", "test", "predict"), 1):
        run = trainer(tmp_path, callbacks=[looker], fast_dev_run=1)
        getattr(run, stage)(model, data())
        assert looker.found is model.model
        assert configured == [model.model] * number


def test_a_strategy_that_shards_a_model_while_it_is_built_still_does(tmp_path: Path) -> None:
    class Sharding(SingleDeviceStrategy):
        inside = False

        @contextmanager
        def model_sharded_context(self):
            self.inside = True
            yield
            self.inside = False

    class Built(SequenceClassifier):
        def configure_model(self) -> None:
            inside.append(self.trainer.strategy.inside)
            super().configure_model()

    inside: list[bool] = []
    looker = Setup()
    run = trainer(tmp_path, callbacks=[looker], fast_dev_run=1, strategy=Sharding(torch.device("cpu")))
    run.fit(Built(), data())
    assert inside == [True]
    assert looker.found is None
