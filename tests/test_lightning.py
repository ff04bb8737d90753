"""The classifier under what Lightning offers: its callbacks, strategies and loops, also interrupted ones."""

import math
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_same, slow, trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForSequenceClassification, BertConfig

from smartbatch_lightning import PadCollator, PredictionWriter, SequenceClassifier, SmartBatchDataModule, demo
from smartbatch_lightning.checkpointing import AtomicCheckpointIO
from smartbatch_lightning.export import export_model


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


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_a_moving_average_is_that_of_the_weights_and_leaves_the_position_ids_alone(tmp_path: Path) -> None:
    class Weights(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            weights.append(parameters_to_vector(pl_module.parameters()).detach().clone())

    weights: list[torch.Tensor] = []
    model = SequenceClassifier(learning_rate=1e-3)
    averaging = EMAWeightAveraging(decay=0.9)
    trainer(tmp_path, callbacks=[Weights(), averaging], limit_train_batches=5, limit_val_batches=1).fit(model, data())
    expected = weights[0]
    for one in weights[1:]:
        expected = 0.9 * expected + 0.1 * one
    torch.testing.assert_close(parameters_to_vector(model.parameters()).detach(), expected)
    positions = model.model.bert.embeddings.position_ids[0]
    assert positions.tolist() == list(range(len(positions)))


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize("averaging", [slow(EMAWeightAveraging), lambda: StochasticWeightAveraging(1e-3, 1)])
def test_a_finished_run_that_is_started_again_has_its_averaged_weights(averaging, tmp_path: Path) -> None:
    models = []
    for checkpoint in (None, tmp_path / "epoch=1.ckpt"):
        saver = ModelCheckpoint(
            tmp_path, "epoch={epoch}", auto_insert_metric_name=False, save_on_train_epoch_end=True, save_top_k=-1
        )
        options = {"callbacks": [averaging(), saver], "enable_checkpointing": True, "limit_val_batches": 0}
        models.append(SequenceClassifier(learning_rate=1e-3))
        trainer(tmp_path, max_epochs=2, limit_train_batches=3, **options).fit(models[-1], data(), ckpt_path=checkpoint)
    assert_same(*(model.state_dict() for model in models))


def test_pruned_weights_are_zero_after_training(tmp_path: Path) -> None:
    model = SequenceClassifier()
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.75)
    trainer(tmp_path, callbacks=[pruning], limit_train_batches=2, limit_val_batches=0).fit(model, data())
    weights = torch.cat([weight.flatten() for name, weight in model.named_parameters() if name.endswith("weight")])
    assert (weights == 0).double().mean() > 0.7


def test_callbacks_find_the_model_in_setup_and_it_is_configured_once(tmp_path: Path) -> None:
    class Headed(SequenceClassifier):
        def configure_model(self) -> None:
            super().configure_model()
            configured.append(self.model)
            self.own = torch.nn.Linear(2, 2)

    configured: list[torch.nn.Module] = []
    looker = Setup()
    model = Headed()
    for stage in ("fit", "validate", "test", "predict"):
        run = trainer(tmp_path, callbacks=[looker], fast_dev_run=1)
        getattr(run, stage)(model, data())
        assert looker.found is model.model
        assert configured == [model.model]


def test_a_model_that_is_made_in_a_way_of_its_own_is_configured_in_every_run_and_checked(tmp_path: Path) -> None:
    class Made(SequenceClassifier):
        def __init__(self, *names: str) -> None:
            super().__init__()
            config = BertConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, id2label=dict(enumerate(names))
            )
            self.model = AutoModelForSequenceClassification.from_config(config)

        def configure_model(self) -> None:
            calls.append(self.model)
            super().configure_model()

    calls: list[torch.nn.Module] = []
    module = data(tokenizer=str(demo.model_dir()))
    run, model = trainer(tmp_path, fast_dev_run=1), Made("negative", "positive")
    run.fit(model, module)
    run.test(model, module, verbose=False)
    assert calls == [model.model] * 2
    with pytest.raises(ValueError, match="the model classifies into 'good', 'bad', but the data has"):
        run.fit(Made("good", "bad"), module)


def test_a_model_whose_override_failed_is_built_again(tmp_path: Path) -> None:
    class Headed(SequenceClassifier):
        size = "two"

        def configure_model(self) -> None:
            super().configure_model()
            self.own = torch.nn.Linear(self.size, self.size)

    model = Headed()
    run = trainer(tmp_path, fast_dev_run=1)
    with pytest.raises(TypeError):
        run.fit(model, data())
    model.size = 2
    run.fit(model, data())
    assert model.own.in_features == 2


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


# --- numbers that are no longer finite ---


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize(("every", "accumulated"), [(1, 1), (5, 1), (50, 2)])
def test_training_that_diverges_ends_with_the_first_step_whose_loss_is_not_finite(every, accumulated, tmp_path) -> None:
    class Diverging(SequenceClassifier):
        def compute_loss(self, output, labels):
            step = self.trainer.global_step if self.training else 0
            return super().compute_loss(output, labels) * (float("inf") if step == 3 else 1.0)

    losses = Losses()
    options = {"log_every_n_steps": every, "accumulate_grad_batches": accumulated, "max_epochs": 4}
    run = trainer(tmp_path, callbacks=[losses], limit_train_batches=12, limit_val_batches=0, **options)
    with pytest.raises(
        ValueError, match=r"the loss of step 3 is nan or infinite\. Lower --model\.learning_rate, which is 5e-05"
    ):
        run.fit(Diverging(), data())
    first = next(number for number, loss in enumerate(losses.losses) if not math.isfinite(loss))
    assert first // accumulated == 3
    assert len(losses.losses) == {1: 4, 5: 5, 50: 7}[every]


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_of_them(tmp_path: Path) -> None:
    class Diverging(SequenceClassifier):
        def compute_loss(self, output, labels):
            there = (self.trainer.global_step, self.global_rank) == (3, 1)
            return super().compute_loss(output, labels) * (float("inf") if there else 1.0)

        def on_train_batch_end(self, *args) -> None:
            try:
                super().on_train_batch_end(*args)
            except ValueError as error:
                (tmp_path / f"{self.global_rank}.txt").write_text(str(error))
                raise

    options = {"strategy": "ddp_fork", "devices": 2, "log_every_n_steps": 4, "max_steps": 20}
    with pytest.raises(Exception, match="the loss of step 3 is nan or infinite"):
        trainer(tmp_path, limit_val_batches=0, **options).fit(Diverging(), data(batch_size=8))
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1]


def broken() -> SequenceClassifier:
    model = SequenceClassifier()
    model.configure_model()
    with torch.no_grad():
        model.model.classifier.weight[0, 0] = float("nan")
    return model


def test_weights_that_are_not_finite_are_neither_saved_nor_exported_nor_predicted_from(tmp_path: Path) -> None:
    module = data()
    run = trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "rows.csv"))])
    with pytest.raises(ValueError, match="the model's logits are nan or infinite, so nothing can be predicted"):
        run.predict(broken(), module)
    with pytest.raises(ValueError, match="nothing is written to .*: the model has weights that are nan or infinite"):
        export_model(broken(), module, tmp_path / "model")
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1)
    run = trainer(tmp_path, callbacks=[saver], enable_checkpointing=True, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match="no checkpoint is written after 1 steps: .*Lower --model.learning_rate"):
        run.fit(broken(), module)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".csv", ".safetensors", ".ckpt")]


def test_a_rate_that_is_far_too_high_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_val_batches=0, max_epochs=3)
    with pytest.raises(ValueError, match=r"the loss of step \d+ is nan or infinite. Lower .* which is 1e\+30,"):
        run.fit(SequenceClassifier(learning_rate=1e30), data())


# --- strategies that start processes from a running one ---


class Scaled(SequenceClassifier):
    """Has a weight of its own beside the model's."""

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "scale"):
            self.scale = torch.nn.Parameter(torch.ones(1))

    def compute_loss(self, output, labels):
        return super().compute_loss(output, labels) * self.scale.sum()


@pytest.mark.parametrize(
    ("strategy", "plugins", "model"),
    [
        slow("ddp_notebook", [], SequenceClassifier),
        ("ddp_fork", [AtomicCheckpointIO()], Scaled),
        pytest.param("ddp_spawn", [], Scaled, marks=pytest.mark.slow),
    ],
)
def test_weights_trained_in_processes_of_their_own_come_back(strategy: str, plugins, model, tmp_path: Path) -> None:
    module, trained = data(), model(learning_rate=1e-3)
    saver = ModelCheckpoint(tmp_path / "saved")
    options = {"strategy": strategy, "devices": 2, "plugins": plugins, "callbacks": [saver], "limit_val_batches": 0}
    run = trainer(tmp_path, enable_checkpointing=True, **options)
    run.fit(trained, module)
    saved = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert_same(trained.state_dict(), saved)
    assert len(saved) > 40
    after = run.test(trained, module, verbose=False)
    loaded = model.load_from_checkpoint(saver.best_model_path)
    [expected] = trainer(tmp_path).test(loaded, module, verbose=False)
    assert after == [pytest.approx(expected, abs=1e-6)]


# --- loops that are interrupted, and one after the other ---


class Recorded(SequenceClassifier):
    """Keeps logits and labels of what was seen since a pass began."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.seen = []

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.seen_before, self.seen = getattr(self, "seen", []), []

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.validated, self.seen = self.seen, self.seen_before

    def compute_loss(self, output, labels):
        self.seen.append((output.logits.detach().double(), labels))
        return super().compute_loss(output, labels)

    @staticmethod
    def loss(seen) -> float:
        logits, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
        return float((logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean())


class Failing(Callback):
    """Saves after a batch of training or validation, and interrupts once."""

    def __init__(self, stage: str, batch: int, path: Path, error: type[BaseException]) -> None:
        self.at, self.path, self.error = (stage, batch), path, error

    def _maybe(self, trainer, *at) -> None:
        if self.at == at:
            self.at = None
            trainer.save_checkpoint(self.path)
            raise self.error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._maybe(trainer, "train", batch_idx)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._maybe(trainer, "val", batch_idx)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-true", marks=pytest.mark.slow)])
@pytest.mark.parametrize("resumed", [True, slow(False)])
@pytest.mark.parametrize(
    ("stage", "error"), [slow("train", RuntimeError), slow("val", RuntimeError), ("val", KeyboardInterrupt)]
)
def test_figures_after_an_interruption_are_of_what_was_seen_since(stage, error, resumed, precision, tmp_path) -> None:
    model, module, path = Recorded(learning_rate=1e-3), data(), tmp_path / "a.ckpt"
    failing = Failing(stage, 2, path, error)
    options = {"callbacks": [failing], "num_sanity_val_steps": 0, "precision": precision, "limit_val_batches": 4}
    trainer(tmp_path, precision=precision, limit_val_batches=2).validate(model, module, verbose=False)
    with pytest.raises((error, SystemExit)):
        trainer(tmp_path, **options).fit(model, module)
    model.seen = []
    assert all(part.training for part in model.model.modules())
    run = trainer(tmp_path, **options)
    run.fit(model, module, ckpt_path=path if resumed else None)
    assert run.callback_metrics["val_loss"] == pytest.approx(model.loss(model.validated), abs=1e-6)
    assert len(model.validated) == 4
    if model.seen:
        assert run.callback_metrics["train_loss"] == pytest.approx(model.loss(model.seen), abs=1e-6)
    assert len(model.seen) == (7 if not resumed else 4 if stage == "train" else 0)
    [again] = trainer(tmp_path, precision=precision, limit_val_batches=4).validate(model, module, verbose=False)
    assert again["val_loss"] == pytest.approx(model.loss(model.validated), abs=1e-6)


def test_metrics_of_one_set_have_plain_names_also_after_those_of_two(tmp_path: Path) -> None:
    model = SequenceClassifier()
    run = trainer(tmp_path, limit_val_batches=1)
    both = data(validation_split=["train", "test"])
    run.validate(model, both, verbose=False)
    assert {"val_loss/train", "val_loss/test"} < set(run.callback_metrics)
    [measured] = run.validate(model, data(), verbose=False)
    assert set(measured) == {"val_loss", "val_accuracy", "val_f1"}


@pytest.mark.parametrize("every", [1, 50])
def test_a_checkpoint_that_monitors_the_loss_of_a_step_knows_that_of_its_own_step(every: int, tmp_path: Path) -> None:
    class Recording(SequenceClassifier):
        def compute_loss(self, output, labels):
            loss = super().compute_loss(output, labels)
            losses.append(loss.item())
            return loss

    losses: list[float] = []
    saver = ModelCheckpoint(tmp_path, "{step}", "train_loss_step", save_top_k=-1, every_n_train_steps=2)
    options = {"enable_checkpointing": True, "limit_val_batches": 0, "log_every_n_steps": every}
    trainer(tmp_path, callbacks=[saver], **options).fit(Recording(), data())
    saved = {f"step={step}.ckpt": losses[step - 1] for step in (2, 4, 6)}
    assert {Path(path).name: float(score) for path, score in saver.best_k_models.items()} == pytest.approx(saved)


@pytest.mark.parametrize(
    ("callback", "known"),
    [
        (EarlyStopping("val_loss"), "early stopping is on"),
        (ModelCheckpoint(monitor="val_f1"), "ModelCheckpoint monitors 'val_f1'"),
    ],
)
@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {}])
def test_callbacks_that_monitor_validation_are_refused_before_the_first_step_if_there_is_none(
    callback: Callback, known: str, options: dict, tmp_path: Path
) -> None:
    run = trainer(tmp_path, callbacks=[callback], enable_checkpointing=True, **options)
    with pytest.raises(ValueError, match=f"{known}, but there is no validation. Set --data.validation_split"):
        run.fit(SequenceClassifier(), data(validation_split=0.1 if options else None))
    assert run.global_step == 0


@pytest.mark.parametrize("kind", [partial(EarlyStopping, check_on_train_epoch_end=True), ModelCheckpoint])
def test_a_metric_of_training_that_is_not_logged_is_refused_before_the_first_step(kind, tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[kind(monitor="train_los")], enable_checkpointing=True, limit_val_batches=1)
    with pytest.raises(ValueError, match="monitors 'train_los', but training logs 'train_loss_step', 'train_loss', "):
        run.fit(SequenceClassifier(), data())
    assert run.global_step == 0


# --- what is frozen, and unfrozen later ---


class Watch(Callback):
    """Writes down rates by step and the weights at the start of epochs; saves after a step."""

    def __init__(self, path: Path | None = None, save_after: int = -1) -> None:
        self.rates, self.backbones = [], []
        self.path, self.save_after = path, save_after

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.backbones.append(parameters_to_vector(pl_module.model.bert.parameters()).detach().clone())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.save_after:
            trainer.save_checkpoint(self.path)


class Unfreeze(Callback):
    """Trains the backbone in epoch 1 alone."""

    def setup(self, trainer, pl_module, stage) -> None:
        pl_module.model.base_model.requires_grad_(False)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        pl_module.model.base_model.requires_grad_(trainer.current_epoch == 1)


def test_what_a_callback_unfreezes_is_trained_from_then_on(tmp_path: Path) -> None:
    watch = Watch()
    run = trainer(tmp_path, callbacks=[Unfreeze(), watch], max_epochs=4, limit_val_batches=0)
    run.fit(SequenceClassifier(learning_rate=1e-3, weight_decay=0.1), data())
    changed = [not torch.equal(a, b) for a, b in zip(watch.backbones, watch.backbones[1:], strict=False)]
    assert changed == [False, True, False]


def test_unfreezing_on_several_ranks_is_refused_since_they_would_not_share_its_gradients(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[Unfreeze()], max_epochs=2, limit_val_batches=0, strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match="unfrozen while training on several ranks.*Train on one device"):
        run.fit(SequenceClassifier(), data())


def finetuned(folder: Path, watch: Watch, ckpt_path: Path | None = None) -> SequenceClassifier:
    callback = BackboneFinetuning(1, lambda epoch: 4.0, backbone_initial_ratio_lr=0.1)
    model = SequenceClassifier(learning_rate=1e-3)
    run = trainer(folder, callbacks=[callback, watch], max_epochs=4, limit_val_batches=0)
    run.fit(model, data(), ckpt_path=ckpt_path)
    return model


@pytest.mark.filterwarnings("ignore:.*are frozen")
def test_backbone_finetuning_trains_the_backbone_at_its_own_rates_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "a.ckpt", 10)
    model = finetuned(tmp_path, watch)
    head = [1e-3 * (1 - step / 28) for step in range(28)]
    assert [rates[0] for rates in watch.rates] == pytest.approx(head)
    assert [len(rates) for rates in watch.rates] == [2] * 7 + [3] * 21
    # a tenth of the head's at first, then four times what it was, at most the head's; between these it decays likewise
    set_to = [0.1 * head[7], 0.4 * head[7], head[21]]
    expected = [set_to[step // 7 - 1] * head[step] / head[step - step % 7] for step in range(7, 28)]
    assert [rates[2] for rates in watch.rates[7:]] == pytest.approx(expected)
    changed = [not torch.equal(a, b) for a, b in zip(watch.backbones, watch.backbones[1:], strict=False)]
    assert changed == [False, True, True]
    again = Watch()
    resumed = finetuned(tmp_path, again, tmp_path / "a.ckpt")
    assert [rates[2] for rates in again.rates] == pytest.approx(expected[3:])
    assert_same(resumed.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:.*are frozen")
def test_a_second_fit_trains_the_backbone_that_the_first_one_unfroze_at_the_rates_of_a_run_in_one(tmp_path) -> None:
    rates = []
    for ends in ([4], [2, 4]):
        watch = Watch()
        callback = BackboneFinetuning(1, lambda epoch: 4.0, backbone_initial_ratio_lr=0.1)
        run = trainer(tmp_path, callbacks=[callback, watch], limit_train_batches=2, limit_val_batches=0)
        model = SequenceClassifier(learning_rate=1e-3, lr_scheduler="constant")
        for run.fit_loop.max_epochs in ends:
            run.fit(model, data())
        rates.append([rate for of_step in watch.rates for rate in of_step])
        changed = [not torch.equal(a, b) for a, b in zip(watch.backbones, watch.backbones[1:], strict=False)]
        assert changed == [False, True, True]
    assert rates[0] == pytest.approx(rates[1])


def test_the_learning_rate_finder_may_try_rates_that_diverge_and_its_rate_lasts(tmp_path: Path) -> None:
    class Diverging(SequenceClassifier):
        def compute_loss(self, output, labels):
            tried.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return super().compute_loss(output, labels) * (float("inf") if tried[-1] > 1 else 1.0)

    tried: list[float] = []
    watch, model = Watch(), Diverging()
    finder = LearningRateFinder(min_lr=1e-5, max_lr=1e3, num_training_steps=20, early_stop_threshold=None)
    run = trainer(tmp_path, callbacks=[finder, watch], limit_val_batches=0, log_every_n_steps=1)
    run.fit(model, data(batch_size=8))
    assert max(tried) > 1
    found = finder.optimal_lr.suggestion()
    assert 1e-5 <= found < 1
    assert [rates[0] for rates in watch.rates] == pytest.approx([found * (1 - step / 25) for step in range(25)])


# --- a model that a subclass wraps ---


class Lora(SequenceClassifier):
    """Trains a few weights beside those of the model."""

    def configure_model(self) -> None:
        super().configure_model()
        settings = LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.0, target_modules=["query", "value"])
        self.model = get_peft_model(self.model, settings)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own affair
@pytest.mark.parametrize("padding", [slow("longest"), "packed"])
def test_a_model_with_adapters_is_tested_as_it_was_trained_and_loaded_from_its_checkpoint(padding, tmp_path) -> None:
    module, model = data(padding=padding), Lora(learning_rate=1e-2)
    run = trainer(tmp_path, limit_val_batches=1)
    run.fit(model, module)
    run.save_checkpoint(tmp_path / "a.ckpt")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora" in name or "classifier" in name for name in trained)
    [logged] = run.test(model, module, verbose=False)
    again = Lora.load_from_checkpoint(tmp_path / "a.ckpt")
    assert run.test(again, module, verbose=False) == [logged]
    assert_same(again.state_dict(), model.state_dict())
    batch = PadCollator()([module.test_data[0][row] for row in range(600)])
    labels = batch.pop("labels")
    del batch["index"]
    with pytest.raises(
        ValueError, match=r"wrapped in PeftModel.* for peft: model.model = model.model.merge_and_unload"
    ):
        export_model(model, module, tmp_path / "exported")
    merged = model.model.eval().merge_and_unload()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(merged(**batch).logits, labels)
    assert logged["test_loss"] == pytest.approx(float(loss), abs=1e-5)


def test_attention_is_as_it_was_asked_for_unless_batches_are_packed_which_is_said(tmp_path: Path) -> None:
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "output_attentions": True}
    for options in ({"attn_implementation": "eager"}, {"output_attentions": True}):
        model = SequenceClassifier(model_kwargs=options)
        run = trainer(tmp_path, fast_dev_run=1)
        run.fit(model, data())
        run.test(model, data(), verbose=False)
        attentions = model.model(**inputs).attentions
        assert [tuple(weights.shape[2:]) for weights in attentions] == [(4, 4)] * model.model.config.num_hidden_layers
        with pytest.raises(ValueError, match=f"model_kwargs has '{next(iter(options))}', but packed batches need this"):
            run.test(model, data(padding="packed"), verbose=False)
    chosen = SequenceClassifier(model_kwargs={"attn_implementation": "sdpa"})
    trainer(tmp_path, fast_dev_run=1).fit(chosen, data())
    assert chosen.model.config._attn_implementation == "sdpa"


# --- batch size finders ---


class Sizes(SequenceClassifier):
    """Takes down how many samples each training batch has, in trials too."""

    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), len(batch["labels"])]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("options", [slow({}), {"batch_size": 5}])
def test_training_goes_on_with_the_batch_size_that_lightning_found(tmp_path: Path, options: dict) -> None:
    model, finder = Sizes(), BatchSizeFinder(steps_per_trial=1, init_val=3, max_trials=3)
    module = SmartBatchDataModule(validation_split=0.9, max_length=16, seed=0, **options)
    run = trainer(tmp_path, callbacks=[finder], max_steps=2, limit_val_batches=0)
    run.fit(model, module)
    assert finder.optimal_batch_size == module.batch_size == 12
    assert model.seen[1:] == [6, 12, 12, 12]  # the loader of the first trial was made before Lightning set its size


@pytest.mark.slow
def test_the_rate_falls_to_zero_at_the_last_step_of_the_batch_size_that_lightning_found(tmp_path: Path) -> None:
    watch, finder = Watch(), BatchSizeFinder(steps_per_trial=1, init_val=40, max_trials=1)
    run = trainer(tmp_path, callbacks=[finder, watch], max_epochs=2, limit_val_batches=0)
    run.fit(SequenceClassifier(learning_rate=1.0e-3), data(batch_size=20))
    assert run.global_step == 2 * math.ceil(200 / finder.optimal_batch_size) < 2 * 200 / 20
    expected = [1.0e-3 * (1 - step / run.global_step) for step in range(run.global_step)]
    assert [rates[0] for rates in watch.rates] == pytest.approx(expected)


class Again(LearningRateFinder):
    """Looks for a rate at the start of every epoch, as the class in Lightning's documentation."""

    def on_fit_start(self, *args) -> None:
        pass

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.lr_find(trainer, pl_module)


@pytest.mark.slow
def test_rates_that_are_tried_at_the_start_of_later_epochs_leave_all_steps_to_training(tmp_path: Path) -> None:
    watch, finder = Watch(), Again(min_lr=1e-6, max_lr=1e-3, num_training_steps=15, early_stop_threshold=None)
    run = trainer(tmp_path, callbacks=[finder, watch], limit_val_batches=0, max_epochs=2)
    run.fit(SequenceClassifier(), data(batch_size=8))
    assert run.global_step == len(watch.rates) == 50


@pytest.mark.parametrize("finder", [LearningRateFinder, slow(BatchSizeFinder)])
def test_a_finder_in_a_run_that_resumes_is_refused_since_it_would_start_it_over(finder, tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_val_batches=0, max_steps=1)
    run.fit(SequenceClassifier(learning_rate=0.002), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    run = trainer(tmp_path, callbacks=[finder()], limit_val_batches=0)
    with pytest.raises(ValueError, match=r"would start over .* Leave it out .* learning_rate is 0\.002"):
        run.fit(SequenceClassifier(), data(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_batch_size_that_is_found_in_an_evaluation_leaves_the_model_in_training_mode(stage, tmp_path: Path) -> None:
    model, module = SequenceClassifier(), data(batch_size=4)
    trainer(tmp_path, fast_dev_run=1).fit(model, module)
    run = trainer(tmp_path, callbacks=[BatchSizeFinder(steps_per_trial=1, init_val=4, max_trials=2)])
    getattr(run, stage)(model, module)
    assert module.batch_size == 8
    assert all(part.training for part in model.model.modules())


def test_without_training_batches_nothing_is_trained(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_train_batches=0)
    run.fit(SequenceClassifier(), data())
    assert run.global_step == 0


def test_a_batch_size_finder_beside_a_token_budget_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[BatchSizeFinder()], max_steps=2)
    with pytest.raises(ValueError, match="limited by max_tokens_per_batch, 500. Use one of the two"):
        run.fit(SequenceClassifier(), data(max_tokens_per_batch=500))


class Listener(SequenceClassifier):
    def configure_callbacks(self):
        return []


def test_a_module_whose_configure_callbacks_forgets_super_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Listener.configure_callbacks does not call super\(\).configure_callbacks"):
        trainer(tmp_path, max_steps=1).fit(Listener(), data())
