"""Optimizers, schedules and what of a model is trained, as they are chosen by arguments."""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_same, begin, cli, finish, kill_after, slow, trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from run_to_be_killed import Dropped
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    get_scheduler,
)

from smartbatch_lightning import PackCollator, PadCollator, SequenceClassifier, SmartBatchDataModule
from smartbatch_lightning.models.layers import encoder_layers

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
TINY = {**SMALL, "vocab_size": 2000}
FAMILIES = {
    "albert": AlbertConfig(**TINY, embedding_size=16),
    "bert": BertConfig(**TINY),
    "distilbert": DistilBertConfig(dim=32, n_layers=3, n_heads=2, hidden_dim=64, vocab_size=2000),
    "electra": ElectraConfig(**TINY, embedding_size=16),
    "modernbert": ModernBertConfig(**TINY, pad_token_id=0, cls_token_id=2, sep_token_id=3),
    "roberta": RobertaConfig(**TINY, max_position_embeddings=514, pad_token_id=1),
}
STEPS = 7  # batches of an epoch
CLASS = "torch.optim.lr_scheduler."


def data(**options) -> SmartBatchDataModule:
    return SmartBatchDataModule(
        **{"validation_split": 0.9, "max_length": 16, "batch_size": 32, "seed": 5, "jitter": 1.0, **options}
    )


def built(family: str, **options) -> SequenceClassifier:
    """A classifier whose model has fresh weights and no dropout."""
    torch.manual_seed(0)
    model = SequenceClassifier(architecture=FAMILIES[family].to_dict(), **options)
    model.configure_model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Rates(Callback):
    """Writes down the rate of each group in every optimizer step; saves after one of them."""

    def __init__(self, path: Path | None = None, save_after: int = -1) -> None:
        self.rates: list[dict[str, float]] = []
        self.path, self.save_after = path, save_after

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.save_after:
            trainer.save_checkpoint(self.path)

    @property
    def first(self) -> list[float]:
        return [next(iter(rates.values())) for rates in self.rates]


def fit(folder: Path, model: SequenceClassifier, *callbacks: Callback, ckpt_path=None, **options) -> Rates:
    rates = next((callback for callback in callbacks if isinstance(callback, Rates)), Rates())
    run = trainer(folder, **{"limit_val_batches": 0, "num_sanity_val_steps": 0, **options})
    run.callbacks += [*callbacks, *([] if rates in callbacks else [rates])]
    run.fit(model, data(), ckpt_path=ckpt_path)
    return rates


# --- optimizers ---


@pytest.mark.slow
def test_an_optimizer_by_class_path_trains_is_in_the_checkpoint_and_is_tested_and_resumed(
    tmp_path, in_a_folder_of_its_own
) -> None:
    Path("run.yaml").write_text(
        "model:\n"
        "  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01, momentum: 0.9, weight_decay: 0.1}}\n"
        f"  lr_scheduler: {{class_path: {CLASS}CosineAnnealingLR, init_args: {{eta_min: 1e-3}}}}\n"
        "data: {max_length: 16, batch_size: 32}\n"
        "trainer: {max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1, default_root_dir: run}\n"
    )
    fitted = cli("fit", "--config=run.yaml")
    [optimizer] = fitted.trainer.optimizers
    assert isinstance(optimizer, SGD)
    assert {(group["name"], group["weight_decay"]) for group in optimizer.param_groups} == {
        ("decay", 0.1),
        ("no_decay", 0.0),
    }
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    path = fitted.trainer.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=True)["hyper_parameters"]
    assert saved["optimizer"]["class_path"] == "torch.optim.SGD"
    tested = cli("test", f"--ckpt_path={path}", "--data.max_length=16", "--trainer.limit_test_batches=1")
    assert tested.model.optimizer([nn.Parameter(torch.zeros(1))]).defaults["momentum"] == 0.9
    resumed = cli("fit", "--config=run.yaml", f"--ckpt_path={path}", "--trainer.max_epochs=2")
    assert resumed.trainer.global_step == 4
    loaded = SequenceClassifier.load_from_checkpoint(path)
    assert isinstance(loaded.configure_optimizer(), SGD)


def test_an_optimizer_that_is_given_in_python_is_left_out_of_checkpoints_and_given_again(tmp_path: Path) -> None:
    make = partial(SGD, lr=0.1)
    fit(tmp_path, SequenceClassifier(optimizer=make), Rates(tmp_path / "a.ckpt", 3))
    assert "optimizer" not in torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    rates = fit(tmp_path, SequenceClassifier(optimizer=make), ckpt_path=tmp_path / "a.ckpt")
    assert rates.first == pytest.approx([0.1 * (1 - step / STEPS) for step in range(3, STEPS)])
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt", optimizer=make)
    assert isinstance(again.configure_optimizer(), SGD)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "LBFGS doesn't support per-parameter options"),
        (list, "optimizer creates a list; give a subclass of torch.optim.Optimizer"),
    ],
)
def test_an_optimizer_that_takes_no_parameter_groups_is_refused(make, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, SequenceClassifier(optimizer=make))


def test_another_optimizer_than_the_checkpoints_is_refused_and_so_are_other_groups(tmp_path: Path) -> None:
    fit(tmp_path, SequenceClassifier(), Rates(tmp_path / "a.ckpt", 3))
    for options, differs in (
        ({"optimizer": partial(SGD, lr=0.1)}, "is not of the type of this run.s, SGD"),
        ({"layer_decay": 0.9}, r"has parameter groups of \[17, 24\] parameters, where this run has \[3, 2, 6"),
        ({"head_learning_rate": 1e-3}, r"has parameter groups of \[17, 24\] parameters, where this run has \["),
    ):
        with pytest.raises(ValueError, match=f"checkpoint's optimizer {differs}.*Set optimizer, layer_decay and head"):
            fit(tmp_path, SequenceClassifier(**options), ckpt_path=tmp_path / "a.ckpt")


# --- the parts of a model ---


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_learns_at_a_constant_factor_of_the_rate_of_the_layer_above(family: str) -> None:
    model = built(family, learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
    groups = model.configure_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    layers = {"albert": 1}.get(family, 3)  # ALBERT's layers have the same weights
    assert len(encoder_layers(model.model)) == layers
    seen = set()
    for name, parameter in model.model.named_parameters():
        inside = re.search(r"(?:layer|layers|albert_layer_groups)\.(\d)\.", name)
        if inside:
            expected = 0.5 ** (layers - int(inside[1]))
        elif "embedding" in name:
            expected = 0.5 ** (layers + 1)
        else:  # pooler, last normalization and head
            expected = 1.0
        assert rates[id(parameter)] == expected, name
        seen.add(expected)
    assert len(seen) == layers + 2
    assert len(rates) == len(list(model.parameters()))


def test_the_head_alone_has_its_own_rate_beside_layer_decay_and_without_it() -> None:
    for options in ({}, {"layer_decay": 0.9}):
        model = built("bert", learning_rate=1e-4, head_learning_rate=1e-3, **options)
        rates = {id(p): group["lr"] for group in model.configure_optimizer().param_groups for p in group["params"]}
        at_rate = {name for name, parameter in model.model.named_parameters() if rates[id(parameter)] == 1e-3}
        assert at_rate == {"classifier.weight", "classifier.bias"}
        assert rates[id(model.model.bert.pooler.dense.weight)] == 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_layers_and_embeddings_stay_as_they_are_and_the_rest_is_trained(family: str, tmp_path: Path) -> None:
    layers = {"albert": 1}.get(family, 2)
    for options, names in (
        ({"freeze_embeddings": True}, r"embedding"),
        ({"freeze_layers": layers}, r"embedding|\.(layer|layers|albert_layer_groups)\.[01]\."),
    ):
        model = built(family, learning_rate=1e-2, **options)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        batch = PadCollator()([{"input_ids": [2, 5 + row, 6, 3], "labels": row % 2} for row in range(4)])
        batch.pop("index", None)
        optimizer = model.configure_optimizer()
        model.step(batch, "train").backward()
        optimizer.step()
        same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
        frozen = {name for name in before if re.search(names, name)}
        assert frozen <= same
        # gradients of zero are those of keys' biases, and of embeddings of other words no whole parameter
        assert {name for name in same - frozen if not name.endswith("bias")} == set()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", {"freeze_layers": 4}, "freeze_layers is 4, but the model has 3 layers"),
        ("albert", {"freeze_layers": 2}, "freeze_layers is 2, but the model has 1 layer"),
        ("bart", {"freeze_layers": 1}, "BartForSequenceClassification has no single stack of layers"),
    ],
)
def test_more_layers_than_there_are_cannot_be_frozen(family: str, options: dict, message: str) -> None:
    bart = BartConfig(vocab_size=2000, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)  # fmt: skip
    model = SequenceClassifier(architecture={**FAMILIES, "bart": bart}[family].to_dict(), **options)
    with pytest.raises(ValueError, match=message):
        model.configure_model()


def test_frozen_layers_are_trained_around_on_two_ranks(tmp_path: Path) -> None:
    model = SequenceClassifier(learning_rate=1e-2, freeze_layers=1)
    model.configure_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = trainer(tmp_path, limit_val_batches=0, strategy="ddp_fork", devices=2, max_steps=2)
    run.fit(model, data())
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            assert torch.equal(parameter, before[name]) == ("embeddings" in name or ".layer.0." in name), name


@pytest.mark.parametrize(
    ("options", "callback"),
    [
        ({"freeze_layers": 1}, BackboneFinetuning(1)),
        ({"layer_decay": 0.9}, BackboneFinetuning(1)),
        ({"head_learning_rate": 0.1}, LearningRateFinder()),
        ({"optimizer": partial(SGD, lr=0.1)}, LearningRateFinder()),
    ],
)
def test_callbacks_that_would_undo_rates_or_freezing_are_refused(options: dict, callback, tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[callback], limit_val_batches=0)
    with pytest.raises(ValueError, match=f"{type(callback).__name__} would undo '{next(iter(options))}'"):
        run.fit(SequenceClassifier(**options), data())


@pytest.mark.parametrize("collator", [PadCollator, PackCollator])
@pytest.mark.parametrize("family", ["bert", *(slow(family) for family in sorted(FAMILIES.keys() - {"albert", "bert"}))])
def test_checkpointed_gradients_are_those_that_are_kept(family: str, collator) -> None:
    rows = [{"input_ids": [2, *range(5, 6 + 2 * row), 3], "labels": row % 2} for row in range(4)]
    gradients, operations = [], []
    for checkpointing in (False, True):
        model = built(family, gradient_checkpointing=checkpointing)
        with FlopCounterMode(display=False) as counter:
            model.step(collator()(rows), "train").backward()
        operations.append(counter.get_total_flops())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    # of packed ModernBERT the last layer computes one token of each sample, and there is less to compute again
    least = 1.1 if (family, collator) == ("modernbert", PackCollator) else 1.2
    assert operations[1] > least * operations[0]  # layers are computed again
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=0)


def test_frozen_layers_are_not_computed_again_when_gradients_are_checkpointed() -> None:
    batch = PadCollator()([{"input_ids": [2, 5, 6, 3], "labels": row % 2} for row in range(4)])
    operations = []
    for layers in (0, 2):
        model = built("bert", gradient_checkpointing=True, freeze_layers=layers)
        with FlopCounterMode(display=False) as counter:
            model.step(batch, "train").backward()
        operations.append(counter.get_total_flops())
    assert operations[1] < 0.6 * operations[0]


def test_a_model_that_knows_no_gradient_checkpointing_is_refused() -> None:
    model = SequenceClassifier(architecture=FAMILIES["albert"].to_dict(), gradient_checkpointing=True)
    with pytest.raises(
        ValueError, match="AlbertForSequenceClassification does not support gradient checkpointing. Leave"
    ):
        model.configure_model()


# --- schedules ---


def shares(name: str, steps: int, warmup: int, **options) -> list[float]:
    """Rates of a schedule of transformers over so many steps, by its own factory."""
    optimizer = SGD([torch.zeros(1)], lr=1e-3)
    schedule = get_scheduler(name, optimizer, warmup, steps, options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("name", "warmup", "options"),
    [
        slow("linear", 2, {}),
        slow("cosine", 2, {"num_cycles": 1.0}),
        ("cosine_with_restarts", 0, {"num_cycles": 2}),
        slow("polynomial", 2, {"power": 2.0}),
        slow("constant", 0, {}),
        slow("constant_with_warmup", 3, {}),
        slow("inverse_sqrt", 2, {"timescale": 4}),
        slow("cosine_with_min_lr", 1, {"min_lr_rate": 0.1}),
        slow("cosine_warmup_with_min_lr", 2, {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", 2, {"num_decay_steps": 4}),
    ],
)
def test_every_schedule_of_transformers_goes_as_its_own_trainer_would_let_it(name, warmup, options, tmp_path) -> None:
    model = SequenceClassifier(learning_rate=1e-3, lr_scheduler=name, lr_scheduler_kwargs=options, warmup_steps=warmup)
    assert fit(tmp_path, model).first == shares(name, STEPS, warmup, **options)


@pytest.mark.parametrize(
    ("class_path", "init_args", "expected"),
    [
        ("CosineAnnealingLR", {}, [(1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]),
        ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0}, [1 - step / STEPS for step in range(STEPS)]),
        slow("PolynomialLR", {"power": 2.0}, [(1 - step / STEPS) ** 2 for step in range(STEPS)]),
        slow("ConstantLR", {"factor": 0.5}, [0.5] * STEPS),
        slow("ExponentialLR", {"gamma": 0.5}, [0.5**step for step in range(STEPS)]),
        ("StepLR", {"step_size": 3}, [1, 1, 1, 0.1, 0.1, 0.1, 0.01]),
    ],
)
def test_a_schedule_of_torch_goes_by_step_and_ends_with_training_unless_it_is_told(
    class_path, init_args, expected, tmp_path: Path
) -> None:
    scheduler = {"class_path": CLASS + class_path, "init_args": init_args}
    rates = fit(tmp_path, SequenceClassifier(learning_rate=1e-3, lr_scheduler=scheduler)).first
    assert rates == pytest.approx([1e-3 * share for share in expected])


def test_one_cycle_rises_to_each_groups_own_rate_and_ends_with_training(tmp_path: Path) -> None:
    model = SequenceClassifier(
        learning_rate=1e-3, head_learning_rate=1e-2, lr_scheduler={"class_path": f"{CLASS}OneCycleLR"}
    )
    rates = fit(tmp_path, model).rates
    assert max(rate["backbone_decay"] for rate in rates) == pytest.approx(1e-3, rel=0.02)
    assert max(rate["head_decay"] for rate in rates) == pytest.approx(1e-2, rel=0.02)
    assert rates[-1]["head_decay"] == pytest.approx(1e-2 / 25 / 1e4)


def halved(optimizer) -> ExponentialLR:
    return ExponentialLR(optimizer, gamma=0.5)


def test_a_schedule_that_is_given_in_python_gets_the_number_of_steps_where_it_asks_for_it(tmp_path: Path) -> None:
    for make, last in (
        (partial(OneCycleLR, max_lr=1e-3), 1e-3 / 25 / 1e4),
        (partial(CosineAnnealingLR, T_max=4), 5e-5 * (1 + math.cos(math.pi * (STEPS - 1) / 4)) / 2),
        (halved, 5e-5 / 2 ** (STEPS - 1)),
    ):
        assert fit(tmp_path, SequenceClassifier(lr_scheduler=make)).first[-1] == pytest.approx(last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "cosin"}, "lr_scheduler is 'cosin'; choose one of 'linear', .*or give an import path"),
        ({"lr_scheduler": "greedy"}, "lr_scheduler is 'greedy'; choose one of"),
        ({"lr_scheduler": "os.getcwd"}, "lr_scheduler is os.getcwd with the arguments {}"),
        ({"lr_scheduler": {"class_path": "torch.optim.Nothing"}}, "which cannot be imported"),
        ({"lr_scheduler": {"init_args": {}}}, "lr_scheduler has 'init_args'; give class_path and init_args"),
        ({"lr_scheduler": {"class_path": f"{CLASS}StepLR"}}, "missing a required argument: 'step_size'"),
        ({"lr_scheduler": {"class_path": f"{CLASS}StepLR", "init_args": {"size": 3}}}, "'step_size'|'size'"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "linear with the arguments .*'num_cycles'"),
        ({"lr_scheduler_kwargs": {"num_warmup_steps": 2}}, "num_warmup_steps is set by warmup_steps or warmup_ratio"),
        ({"lr_scheduler_kwargs": {"last_epoch": 2}}, "last_epoch is set by the Trainer"),
        ({"lr_scheduler": "constant", "warmup_steps": 2}, "warmup_steps is 2 .*constant, which has no warm-up"),
        ({"lr_scheduler": "reduce_lr_on_plateau", "warmup_ratio": 0.1}, "which has no warm-up"),
        ({"lr_scheduler": {"class_path": f"{CLASS}LinearLR"}, "warmup_steps": 1}, "which has no warm-up"),
        (
            {"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"monitor": "val_f1"}},
            "mode is missing: max if a higher val_f1 is better",
        ),
        (
            {
                "lr_scheduler": f"{CLASS}OneCycleLR",
                "lr_scheduler_kwargs": {"max_lr": 1e-3},
                "layer_decay": 0.9,
            },
            "lr_scheduler has max_lr, one learning rate for all parameters, together with layer_decay",
        ),
        ({"layer_decay": 0.0}, "layer_decay is 0.0; give a factor above 0"),
        ({"layer_decay": 1.1}, "layer_decay is 1.1"),
        ({"layer_decay": math.nan}, "layer_decay is nan"),
        ({"head_learning_rate": -1.0}, "head_learning_rate is -1.0; give a number that is 0 or more"),
        (
            {"gradient_checkpointing": True, "compile": True},
            "compile is True, but gradient_checkpointing needs uncompiled",
        ),
        ({"freeze_layers": -1}, "freeze_layers is -1; give 0 or more"),
        ({"optimizer": SGD, "learning_rate": 5e-5}, "learning_rate is 5e-05, .*but optimizer is given"),
        ({"optimizer": SGD, "weight_decay": 0.1}, "weight_decay 0.1, which are for AdamW, but optimizer is given"),
    ],
)
def test_what_an_optimizer_or_schedule_does_not_take_is_refused_when_it_is_given(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        slow({"lr_scheduler": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler": "builtins.id"}, "lr_scheduler builtins.id creates a int"),
    ],
)
def test_what_a_schedule_itself_refuses_ends_in_one_line(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, SequenceClassifier(**options))


def test_training_without_an_end_is_refused_only_where_the_schedule_needs_one(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            trainer.should_stop = trainer.global_step == 3

    for options in ({"lr_scheduler": "constant"}, {"lr_scheduler": "inverse_sqrt", "warmup_steps": 2}):
        assert len(fit(tmp_path, SequenceClassifier(**options), Stop(), max_epochs=-1).rates) == 3
    for options in ({}, {"lr_scheduler": f"{CLASS}LinearLR"}, {"lr_scheduler": "inverse_sqrt", "warmup_ratio": 0.1}):
        with pytest.raises(ValueError, match="ends at the last step, but training has no end"):
            fit(tmp_path, SequenceClassifier(**options), max_epochs=-1)


def test_learning_rates_are_logged_by_the_names_of_their_groups(tmp_path: Path) -> None:
    model = SequenceClassifier(layer_decay=0.9, head_learning_rate=1e-3)
    monitor = LearningRateMonitor()
    fit(tmp_path, model, monitor, logger=CSVLogger(tmp_path), max_steps=2, log_every_n_steps=1)
    layers = model.model.config.num_hidden_layers
    parts = ["embeddings", *(f"layer_{number}" for number in range(layers)), "top", "head"]
    assert set(monitor.lrs) == {f"lr-AdamW/{part}_{kind}" for part in parts for kind in ("decay", "no_decay")}


# --- going by validation ---


class Losses(SequenceClassifier):
    """Has the validation losses that it is given."""

    def __init__(self, losses: list[float], **options) -> None:
        super().__init__(learning_rate=1e-3, **options)
        self.losses = losses

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val_given", self.losses[self.current_epoch])


def plateau(losses: list[float], **options) -> Losses:
    settings = {"monitor": "val_given", "mode": "min", "factor": 0.1, "patience": 0, **options}
    return Losses(losses, lr_scheduler="reduce_lr_on_plateau", lr_scheduler_kwargs=settings)


def test_a_plateau_lowers_the_rate_after_the_validation_that_is_no_better(tmp_path: Path) -> None:
    model = plateau([1.0, 0.5, 0.6, 0.7, 0.4])
    options = {"max_epochs": 5, "limit_val_batches": 1, "limit_train_batches": 1}
    assert fit(tmp_path, model, **options).first == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4, 1e-5])
    losses = [1.0, 1.0, 1.0, 1.0]
    sparse = fit(tmp_path, plateau(losses), **{**options, "max_epochs": 4}, check_val_every_n_epoch=2).first
    assert sparse == pytest.approx([1e-3] * 4)  # validated after epochs 1 and 3, of which the first is the best
    by_class = Losses(
        losses,
        lr_scheduler={"class_path": f"{CLASS}ReduceLROnPlateau", "init_args": {"patience": 0, "threshold": 0.99}},
    )
    assert fit(tmp_path, by_class, **{**options, "max_epochs": 3}).first == pytest.approx([1e-3, 1e-3, 1e-4])


def test_a_plateau_goes_by_the_loss_of_the_first_of_several_validation_sets(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_val_batches=1)
    run.fit(SequenceClassifier(lr_scheduler="reduce_lr_on_plateau"), data(validation_split=["test", "train"]))
    [config] = run.lr_scheduler_configs
    assert (config.monitor, config.scheduler.best) == ("val_loss/test", float(run.callback_metrics["val_loss/test"]))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize("hook", ["validation", slow("epoch end"), slow("step")])
def test_a_plateau_is_resumed_as_if_nothing_had_happened(hook: str, tmp_path: Path) -> None:
    losses = [1.0, 2.0, 2.0, 0.5, 2.0]
    options = {"max_epochs": 5, "limit_val_batches": 1, "limit_train_batches": 2}
    saver = {
        "validation": ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1),
        "epoch end": ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        "step": ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, every_n_train_steps=1),
    }[hook]
    whole = fit(tmp_path, plateau(losses), saver, enable_checkpointing=True, **options).first
    assert whole == pytest.approx([1e-3] * 4 + [1e-4] * 2 + [1e-5] * 4)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == (10 if hook == "step" else 5)
    for path in checkpoints[::3]:
        done = torch.load(path, weights_only=True)["global_step"]
        resumed = fit(tmp_path / "again", plateau(losses), ckpt_path=path, **options)
        assert resumed.first == whole[done:], path.name


@pytest.mark.slow
def test_a_plateau_that_is_resumed_with_other_settings_goes_by_these(tmp_path: Path) -> None:
    options = {"max_epochs": 4, "limit_val_batches": 1, "limit_train_batches": 1}
    fit(tmp_path, plateau([1.0] * 4), Rates(tmp_path / "a.ckpt", 3), **options)
    model = plateau([1.0] * 4, factor=0.5)
    model.learning_rate = 2e-3
    rates = fit(tmp_path, model, ckpt_path=tmp_path / "a.ckpt", **options).first
    assert rates == pytest.approx([2e-3 * 0.1 * 0.5])  # what the checkpoint's was lowered by stays


def test_a_plateau_without_validation_or_with_a_metric_that_is_not_logged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which needs validation, but there is none. Set --data.validation_split"):
        fit(tmp_path, plateau([1.0]), limit_val_batches=0)
    rates = Rates()
    with pytest.raises(
        ValueError, match="monitors 'val_accurac', but validation logs .*'val_accuracy'.*Set its monitor"
    ):
        fit(tmp_path, plateau([1.0], monitor="val_accurac"), rates, limit_val_batches=1, num_sanity_val_steps=1)
    assert not rates.rates
    model, module = plateau([1.0], monitor="val_loss"), data(validation_split=["test", "train"])
    run = trainer(tmp_path, limit_val_batches=1)
    with pytest.raises(ValueError, match="monitors 'val_loss', but validation logs .*'val_loss/test'"):
        run.fit(model, module)


# --- resumes ---


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler": "cosine", "layer_decay": 0.8, "head_learning_rate": 1e-2},
        slow({"lr_scheduler": {"class_path": f"{CLASS}OneCycleLR"}, "layer_decay": 0.8}),
        slow({"lr_scheduler": partial(ExponentialLR, gamma=0.9), "freeze_layers": 1}),
        {"lr_scheduler": "reduce_lr_on_plateau", "gradient_checkpointing": True},
    ],
    ids=["cosine", "one cycle", "exponential", "plateau"],
)
def test_a_run_with_other_rates_resumed_after_a_step_ends_with_the_same_weights(options: dict, tmp_path: Path) -> None:
    def model() -> Dropped:
        torch.manual_seed(0)
        return Dropped(learning_rate=1e-3, **options)

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == STEPS + 3:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    settings = {"max_epochs": 2, "limit_val_batches": 1}
    whole = model()
    fit(tmp_path, whole, Save(), **settings)
    resumed = model()
    rates = fit(tmp_path, resumed, ckpt_path=tmp_path / "a.ckpt", **settings)
    assert len(rates.rates) == STEPS - 3
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.slow
def test_a_run_with_a_cosine_and_layer_decay_that_was_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    options = {"schedule": "cosine", "layer_decay": 0.8, "epochs": 1}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(begin(whole, **options), whole)
    kill_after(begin(killed, **options), killed, 9, 0.0)
    finish(begin(killed, **options), killed)
    assert_same(torch.load(killed / "weights.pt"), torch.load(whole / "weights.pt"))


@pytest.mark.slow
def test_a_run_resumed_with_a_schedule_of_another_kind_goes_on_with_that(tmp_path: Path) -> None:
    kinds = {
        "linear": [1 - step / STEPS for step in range(STEPS)],
        f"{CLASS}CosineAnnealingLR": [(1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)],
        "reduce_lr_on_plateau": [1.0] * STEPS,
    }
    names = list(kinds)
    for before, after in zip(names, names[1:] + names[:1], strict=True):
        path = tmp_path / f"{after}.ckpt"
        fit(tmp_path, SequenceClassifier(learning_rate=1e-3, lr_scheduler=before), Rates(path, 3), limit_val_batches=1)
        model = SequenceClassifier(learning_rate=1e-3, lr_scheduler=after)
        rates = fit(tmp_path, model, ckpt_path=path, limit_val_batches=1).first
        assert rates == pytest.approx([1e-3 * share for share in kinds[after][3:]])
