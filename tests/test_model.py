"""Tests of the classifier."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from helpers import cli, slow, trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision, Precision
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CamembertConfig,
    DataCollatorWithFlattening,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
)

from smartbatch_lightning import BatchSpec, PackCollator, PadCollator, SequenceClassifier, SmartBatchDataModule, demo
from smartbatch_lightning.callbacks.checkpoint_preflight import CheckpointPreflight
from smartbatch_lightning.data.tokenizers import load_tokenizer
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.tasks import Regression, SingleLabelClassification

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "bert": BertConfig(**SMALL, vocab_size=2000),
    "roberta": RobertaConfig(**SMALL, vocab_size=2000, max_position_embeddings=514, pad_token_id=1),
    "camembert": CamembertConfig(**SMALL, vocab_size=2000, max_position_embeddings=514, pad_token_id=1),
    "distilbert": DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=2000),
    "electra": ElectraConfig(**SMALL, vocab_size=2000, embedding_size=32),
}


class Steps(Callback):
    """Records what each optimizer step was made with."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.fixture
def data() -> SmartBatchDataModule:
    return SmartBatchDataModule(tokenizer=str(demo.model_dir()), max_length=64, seed=1)


@pytest.mark.parametrize("stage", ["test", slow("validate")])
def test_an_evaluation_of_weights_that_are_not_finite_is_refused(stage: str, tmp_path: Path) -> None:
    class Spoilt(SequenceClassifier):
        def configure_model(self) -> None:
            super().configure_model()
            torch.nn.init.constant_(self.model.classifier.weight, torch.nan)

    run = getattr(trainer(tmp_path, limit_test_batches=1, limit_val_batches=1), stage)
    with pytest.raises(
        ValueError, match="_loss is nan, so the other metrics are meaningless. Use a checkpoint from before"
    ):
        run(Spoilt(), SmartBatchDataModule(max_length=16), verbose=False)


@pytest.mark.parametrize(
    "precision",
    [
        Precision(),
        slow(MixedPrecision("bf16-mixed", "cpu")),
        MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256)),
    ],
    ids=lambda plugin: plugin.precision,
)
def test_gradients_are_clipped_by_a_fused_optimizer_in_every_precision(
    precision: Precision, data, tmp_path: Path
) -> None:
    norms: dict[str, list[float]] = {"before": [], "after": []}

    class Measured(SequenceClassifier):
        def configure_gradient_clipping(self, *args, **options) -> None:
            for when in norms:
                gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
                norms[when].append(float(torch.nn.utils.get_total_norm(gradients)))
                if when == "before":
                    super().configure_gradient_clipping(*args, **options)

    run = trainer(tmp_path, plugins=[precision], gradient_clip_val=0.01, max_steps=4, limit_val_batches=0)
    run.fit(Measured(), data)
    assert run.optimizers[0].defaults["fused"]
    assert len(norms["after"]) == 4
    assert all(1 < norm < 1000 for norm in norms["before"])
    assert norms["after"] == pytest.approx([0.01] * 4, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_takes_its_classes_from_the_data(family: str, data, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_config(FAMILIES[family]).base_model.save_pretrained(tmp_path / "model")
    model = SequenceClassifier(str(tmp_path / "model"))
    trainer(tmp_path, limit_train_batches=2, limit_val_batches=1).fit(model, data)
    assert model.label_names == ["negative", "positive"]
    assert model.model.config.label2id == {"negative": 0, "positive": 1}
    assert type(model.model).__name__.endswith("ForSequenceClassification")


def test_dropout_is_on_in_training_and_off_in_evaluation(data, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_config(FAMILIES["bert"]).save_pretrained(tmp_path / "model")

    class Modes(SequenceClassifier):
        seen: set = set()

        def step(self, batch, stage, dataloader_idx=0):
            modes = {module.training for module in self.modules() if isinstance(module, nn.Dropout)}
            self.seen.add((stage, *modes))
            return super().step(batch, stage, dataloader_idx)

    trainer(tmp_path, limit_train_batches=2, limit_val_batches=1).fit(Modes(str(tmp_path / "model")), data)
    assert Modes.seen == {("train", True), ("val", False)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 0.75, 0.5, 0.25]),
        ({"warmup_steps": 2}, [0.0, 0.5, 1.0, 0.5]),
        slow({"warmup_ratio": 0.5}, [0.0, 0.5, 1.0, 0.5]),
        ({"warmup_ratio": 0.3}, [0.0, 0.5, 1.0, 0.5]),
    ],
)
@pytest.mark.parametrize("way", ["epochs", "accumulation", "max_steps"])
def test_the_rate_rises_over_the_warm_up_and_falls_to_zero_at_the_last_step(
    options: dict, expected: list[float], way: str, data, tmp_path: Path
) -> None:
    limits = {
        "epochs": {"max_epochs": 2, "limit_train_batches": 2},
        "accumulation": {"max_epochs": 2, "limit_train_batches": 3, "accumulate_grad_batches": 2},
        "max_steps": {"max_steps": 4, "max_epochs": 50, "limit_train_batches": 3},
    }[way]
    steps = Steps()
    model = SequenceClassifier(learning_rate=1.0e-3, **options)
    run = trainer(tmp_path, limit_val_batches=0, callbacks=[steps], **limits)
    run.fit(model, data)
    rates = [rate / 1.0e-3 for rate in steps.rates]
    if way == "accumulation":
        rates = [rate for number, rate in enumerate(rates) if number % 3 != 1]
    assert rates == pytest.approx(expected)
    assert run.optimizers[0].param_groups[0]["lr"] == 0


def test_weights_decay_but_biases_and_normalisation_do_not() -> None:
    model = SequenceClassifier(weight_decay=0.1, adam_epsilon=1e-7)
    model.configure_model()
    optimizer = model.configure_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["eps"] == 1e-7
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert set(names.values()) == {0.0, 0.1}
    for name, value in names.items():
        assert value == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.1), name


def test_metrics_are_those_of_all_samples_together(data, tmp_path: Path) -> None:
    """Batches are of unequal size, so that a mean over batches would be another number."""
    data.batch_size = 7
    model = SequenceClassifier()
    [logged] = trainer(tmp_path).validate(model, data)
    [rows] = data.validation_data
    batch = PadCollator()([rows[row] for row in range(len(rows))])
    labels = batch.pop("labels")
    batch.pop("index")
    with torch.no_grad():
        output = model.eval()(**batch, labels=labels)
    predicted = output.logits.argmax(1)
    f1 = [2 * ((predicted == c) & (labels == c)).sum() / ((predicted == c).sum() + (labels == c).sum()) for c in (0, 1)]
    assert logged["val_loss"] == pytest.approx(float(output.loss), abs=1e-6)
    assert logged["val_accuracy"] == pytest.approx(float((predicted == labels).float().mean()))
    assert logged["val_f1"] == pytest.approx(float(sum(f1) / 2), abs=1e-6)


@pytest.mark.parametrize("precision", [slow("bf16-true"), slow("16-true")])
def test_losses_and_metrics_in_half_precision_are_those_of_all_logits_in_double(precision: str, tmp_path: Path) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Recorded(SequenceClassifier):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            logits.append(output.logits.double())
            return output

        def test_step(self, batch, batch_idx, dataloader_idx=0) -> None:
            super().test_step(batch, batch_idx, dataloader_idx)
            seen.append((logits.pop(), batch["labels"]))

    logits: list[torch.Tensor] = []
    module = SmartBatchDataModule(max_length=24, batch_size=2, seed=1)
    model = Recorded()
    for _ in range(2):  # the second time with metrics that the Trainer has found on the module
        seen.clear()
        [logged] = trainer(tmp_path, precision=precision).test(model, module, verbose=False)
        all_logits, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
        assert next(model.model.parameters()).dtype in (torch.bfloat16, torch.float16)
        assert len(labels) == 600
        by_hand = all_logits.exp().sum(1).log() - all_logits.gather(1, labels[:, None])[:, 0]
        assert logged["test_loss"] == pytest.approx(float(by_hand.mean()), abs=1e-6)
        assert logged["test_accuracy"] == pytest.approx(
            float((all_logits.argmax(1) == labels).double().mean()), abs=1e-6
        )


def test_packed_batches_train_and_measure_as_padded_ones_do(tmp_path: Path) -> None:
    """The same batches, without dropout: the losses on the way, the metrics and the predictions are the same."""

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            losses.append(float(outputs["loss"]))

    results = []
    for padding in ("longest", "packed"):
        losses: list[float] = []
        torch.manual_seed(0)
        model = SequenceClassifier()
        model.configure_model()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        data = SmartBatchDataModule(max_length=64, seed=1, padding=padding)
        run = trainer(tmp_path, limit_train_batches=6, limit_val_batches=3, callbacks=[Losses()])
        run.fit(model, data)
        measured = {**run.callback_metrics, **run.test(model, data, verbose=False)[0]}
        predictions = torch.cat([batch["probabilities"] for batch in run.predict(model, data)])
        results.append((losses, {name: float(value) for name, value in measured.items()}, predictions))
    (losses, measured, predictions), packed = results
    assert packed[0] == pytest.approx(losses, abs=1e-5)
    assert packed[1] == pytest.approx(measured, abs=1e-4)
    order = [predictions[:, 0].sort().values, packed[2][:, 0].sort().values]
    torch.testing.assert_close(*order, atol=1e-4, rtol=0)


def test_packed_batches_of_a_loader_that_is_handed_over_are_classified_as_padded_ones_are(tmp_path: Path) -> None:
    rows = [{"input_ids": [2, 5 + row, 6, *range(7, 7 + row), 3]} for row in range(8)]
    predicted = []
    for collator in (PadCollator(), PackCollator()):
        loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collator)
        predicted.append(trainer(tmp_path).predict(SequenceClassifier(), loader))
    for padded, packed in zip(*predicted, strict=True):
        torch.testing.assert_close(packed["probabilities"], padded["probabilities"], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("padding", ["longest", "packed"])
def test_a_compiled_model_is_compiled_once_for_batches_of_all_widths(padding: str, tmp_path: Path) -> None:
    graphs: list[tuple[int, int]] = []

    class Graphs(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            graphs.append((batch["input_ids"].shape[1], torch._dynamo.utils.counters["stats"]["unique_graphs"]))

    torch._dynamo.reset()
    data = SmartBatchDataModule(validation_split=0.9, max_length=200, batch_size=8, padding=padding, seed=0)
    run = trainer(tmp_path, limit_train_batches=10, limit_val_batches=0, callbacks=[Graphs()])
    run.fit(SequenceClassifier(compile=True), data)
    assert len({width for width, _ in graphs}) >= 5
    assert graphs[-1][1] == graphs[0][1] > 0


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_cuda_graphs_and_accumulated_gradients_are_refused_together(data, tmp_path: Path) -> None:
    run = trainer(tmp_path, accumulate_grad_batches=2)
    with pytest.raises(
        ValueError, match="compile is 'reduce-overhead', whose CUDA graphs would overwrite the gradients"
    ):
        run.fit(SequenceClassifier(compile="reduce-overhead"), data)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize(("how", "compiled"), [(False, 0), (True, "each layer"), ("default", 1)])
def test_each_layer_or_the_whole_model_is_compiled(how: bool | str, compiled: int | str) -> None:
    module = SequenceClassifier(compile=how)
    module.configure_model()
    found = [part for part in module.model.modules() if part._compiled_call_impl is not None]
    assert len(found) == (module.model.config.num_hidden_layers if compiled == "each layer" else compiled)


def test_a_run_logs_loss_accuracy_and_f1_of_every_stage(data, tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_train_batches=2)
    run.fit(SequenceClassifier(), data)
    assert {"train_loss", "train_accuracy", "train_f1", "val_loss", "val_accuracy", "val_f1"} <= set(
        run.callback_metrics
    )
    assert set(run.test(run.lightning_module, data)[0]) == {"test_loss", "test_accuracy", "test_f1"}


def test_metrics_optimizer_schedule_and_step_can_each_be_overridden(data, tmp_path: Path) -> None:
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassRecall

    class Own(SequenceClassifier):
        def configure_metrics(self, num_labels):
            return MetricCollection({"recall": MulticlassRecall(num_labels)})

        def configure_optimizer(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

        def configure_scheduler(self, optimizer, num_steps):
            return torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1, num_steps)

        def compute_loss(self, output, labels):
            return 2 * super().compute_loss(output, labels)

        def step(self, batch, stage, dataloader_idx=0):
            stages.append(stage)
            return super().step(batch, stage, dataloader_idx)

    stages: list[str] = []
    steps = Steps()
    run = trainer(tmp_path, limit_train_batches=2, limit_val_batches=1, callbacks=[steps])
    run.fit(Own(), data)
    assert steps.rates == [0.05, 0.05]
    assert stages[-3:] == ["train", "train", "val"]
    assert run.callback_metrics["val_loss"] > 1.2  # twice the log of 2
    assert "val_recall" in run.callback_metrics
    assert "val_accuracy" not in run.callback_metrics


def test_a_plain_dataloader_is_enough_when_the_number_of_labels_is_given(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 5, 6, 2], "labels": row % 3} for row in range(8)]
    loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=PadCollator())
    AutoModelForSequenceClassification.from_config(FAMILIES["bert"]).base_model.save_pretrained(tmp_path / "model")
    model = SequenceClassifier(str(tmp_path / "model"), num_labels=3)
    trainer(tmp_path).fit(model, loader)
    assert len(model.label_names) == 3


# --- checkpoints ---


@pytest.fixture
def checkpoint(data, tmp_path: Path) -> Path:
    run = trainer(tmp_path, limit_train_batches=2, limit_val_batches=0)
    AutoModelForSequenceClassification.from_config(FAMILIES["bert"]).base_model.save_pretrained(tmp_path / "model")
    run.fit(SequenceClassifier(str(tmp_path / "model"), learning_rate=1e-3), data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    (tmp_path / "model").rename(tmp_path / "gone")
    return tmp_path / "run.ckpt"


def test_a_checkpoint_loads_without_the_pretrained_model_and_with_weights_only(
    checkpoint: Path, tmp_path: Path
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    model = SequenceClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    assert model.learning_rate == 1e-3
    assert model.label_names == ["negative", "positive"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name])
    data = SmartBatchDataModule(tokenizer=str(demo.model_dir()), max_length=64, seed=1)
    first = trainer(tmp_path).test(model, data, weights_only=True)
    assert first == trainer(tmp_path).test(model, data, ckpt_path=checkpoint, weights_only=True)


@pytest.mark.parametrize(
    ("problem_type", "num_labels"), [("multi_label_classification", 3), ("regression", 1), (None, 1)]
)
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_model_of_another_task_predicts_what_it_was_trained_for(problem_type, num_labels, by_hand, tmp_path) -> None:
    config = BertConfig(**SMALL, vocab_size=2000, problem_type=problem_type, num_labels=num_labels)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    data = SmartBatchDataModule(tokenizer=str(demo.model_dir()), max_length=64)
    data.setup("predict")
    given = {"dataloaders": data.predict_dataloader()} if by_hand else {"datamodule": data}
    model = SequenceClassifier(str(tmp_path / "model"))
    predicted = trainer(tmp_path, limit_predict_batches=1).predict(model, **given)[0]
    batch = next(iter(data.predict_dataloader()))
    logits = model.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if problem_type == "multi_label_classification":
        torch.testing.assert_close(predicted["probabilities"], logits.sigmoid(), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(predicted["predictions"], logits[:, 0], rtol=1e-5, atol=1e-5)
    data = SmartBatchDataModule(tokenizer=str(demo.model_dir()), problem_type="single_label_classification")
    with pytest.raises(ValueError, match=f"trained for {problem_type or 'regression'}, not for single_label"):
        trainer(tmp_path).predict(model, data)


def test_a_metric_with_the_name_of_the_loss_is_refused(data, tmp_path: Path) -> None:
    class Named(SequenceClassifier):
        def configure_metrics(self, num_labels: int) -> MetricCollection:
            return MetricCollection({"loss": MulticlassAccuracy(num_labels)})

    with pytest.raises(ValueError, match="'loss', the name of the mean loss"):
        trainer(tmp_path, fast_dev_run=1).fit(Named(), data)


def test_a_module_that_another_loop_trains_needs_no_trainer(data) -> None:
    data.setup("fit")
    model = SequenceClassifier(num_labels=2)
    model.configure_model()
    assert model.training_step(next(iter(data.train_dataloader())), 0).isfinite()


def test_a_batch_without_labels_is_refused_by_what_it_has() -> None:
    batch = {"input_ids": torch.tensor([[2, 5, 3]]), "target": torch.tensor([1])}
    with pytest.raises(ValueError, match="a batch for val has 'input_ids', 'target', but no 'labels'"):
        SequenceClassifier(num_labels=2).step(batch, "val")


def test_a_checkpoint_for_other_labels_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "stars.csv").write_text("text,label\n" + "\n".join(f"film,{row % 3}" for row in range(30)))
    data = SmartBatchDataModule({"train": str(tmp_path / "stars.csv")}, str(demo.model_dir()), test_split="train")
    unknown = "row 0 .*has the label '0', which is not one of the 2 classes: 'negative', 'positive'"
    with pytest.raises(ValueError, match=unknown):
        trainer(tmp_path).test(SequenceClassifier.load_from_checkpoint(checkpoint), data)
    (tmp_path / "gone").rename(tmp_path / "model")
    message = r"the checkpoint classifies into 'negative', 'positive', but the data has '0', '1', '2'.*Use the data"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).test(SequenceClassifier(str(tmp_path / "model")), data, ckpt_path=checkpoint)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_trained_model_takes_no_texts_of_another_tokenizer(command: str, checkpoint: Path, tmp_path: Path) -> None:
    cased = AutoTokenizer.from_pretrained(demo.model_dir(), do_lower_case=False)
    data = SmartBatchDataModule(tokenizer=cased, max_length=24, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="same tokens as the one that the model was trained with"):
        getattr(trainer(tmp_path), command)(SequenceClassifier.load_from_checkpoint(checkpoint), data)
    assert not list(tmp_path.rglob("*.npy")), "it was refused only after tokenizing"


def test_a_checkpoint_says_if_another_model_is_named_beside_it(checkpoint: Path, minilm: str) -> None:
    with pytest.warns(UserWarning, match="the model is the checkpoint's, .*minilm.* is used only for its tokenizer"):
        loaded = SequenceClassifier.load_from_checkpoint(checkpoint, pretrained=minilm)
    assert loaded.model.config.hidden_size != AutoConfig.from_pretrained(minilm).hidden_size


@pytest.mark.filterwarnings("ignore:the model is the checkpoint's")
def test_a_checkpoint_and_another_models_tokenizer_are_refused_together(checkpoint: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(demo.model_dir(), do_lower_case=False).save_pretrained(tmp_path / "cased")
    BertForSequenceClassification(AutoConfig.from_pretrained(demo.model_dir())).save_pretrained(tmp_path / "cased")
    for command in ("test", "export"):
        with pytest.raises(ValueError, match="cased does not split texts into the same tokens .*--model.pretrained"):
            cli(
                command, "--data.max_length=64", f"--ckpt_path={checkpoint}", f"--model.pretrained={tmp_path / 'cased'}"
            )


def test_a_finetuned_folder_for_another_number_of_labels_is_refused(data, tmp_path: Path) -> None:
    config = BertConfig(**SMALL, vocab_size=2000, num_labels=5)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "five")
    with pytest.raises(ValueError, match="five classifies into .*LABEL_4.*, but the data has"):
        trainer(tmp_path).fit(SequenceClassifier(str(tmp_path / "five")), data)
    with pytest.raises(
        ValueError, match="num_labels is 2, but .*five' classifies into .*LABEL_4.*. Leave num_labels out"
    ):
        SequenceClassifier(str(tmp_path / "five"), num_labels=2).configure_model()


@pytest.mark.filterwarnings("ignore:.*LOAD REPORT")
def test_the_head_of_a_token_classifier_is_replaced(tmp_path: Path) -> None:
    pretrained = BertForTokenClassification(BertConfig(**SMALL, vocab_size=2000, num_labels=5))
    pretrained.save_pretrained(tmp_path / "tagger")
    model = SequenceClassifier(str(tmp_path / "tagger"), num_labels=3)
    model.configure_model()
    assert model.model.classifier.weight.shape == (3, SMALL["hidden_size"])
    embeddings = model.model.bert.embeddings.word_embeddings
    assert torch.equal(embeddings.weight, pretrained.bert.embeddings.word_embeddings.weight)


# --- what it refuses ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_steps is 5 and warmup_ratio 0.1; set one of them to 0"),
        ({"warmup_steps": -1}, "give 0 or more steps"),
        ({"warmup_ratio": 1.5}, "a fraction between 0 and 1"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; give a number that is 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; give a number"),
        ({"adam_epsilon": float("inf")}, "adam_epsilon is inf; give a number"),
        ({"compile": "quick"}, "compile is 'quick'; give true, false, or one of 'default'"),
    ],
)
def test_warm_ups_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(**options)


def test_a_number_of_labels_that_is_not_the_datas_is_refused(data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_labels is 3, but the data has 2 classes.*Leave num_labels out"):
        trainer(tmp_path).fit(SequenceClassifier(num_labels=3), data)


def test_training_without_an_end_is_refused(data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training has no end. Set --trainer.max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(SequenceClassifier(), data)


def long_reviews() -> dict[str, list[dict[str, str]]]:
    reviews = [{"text": "a fine film " * 200, "label": label} for label in ("negative", "positive")]
    return {"train": reviews, "validation": reviews}


@pytest.mark.parametrize(("family", "longest"), [("bert", 128), ("roberta", 126)])
def test_samples_longer_than_the_model_takes_are_refused(family: str, longest: int, tmp_path: Path) -> None:
    config = FAMILIES[family].__class__.from_dict(FAMILIES[family].to_dict() | {"max_position_embeddings": 128})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "short")
    data = SmartBatchDataModule(long_reviews(), str(demo.model_dir()), max_length=127 if family == "roberta" else 129)
    with pytest.raises(
        ValueError, match=f"but the model takes {longest} tokens at most. Set --data.max_length to {longest}"
    ):
        trainer(tmp_path).fit(SequenceClassifier(str(tmp_path / "short")), data)


def test_a_tokenizer_with_more_words_than_the_model_is_refused(minilm: str, tmp_path: Path) -> None:
    data = SmartBatchDataModule(long_reviews(), minilm)
    with pytest.raises(ValueError, match="has 30522 tokens, but the model has .*the model's own tokenizer"):
        trainer(tmp_path).fit(SequenceClassifier(), data)


def test_a_model_name_without_a_network_says_how_to_use_a_folder(data, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="'bert-base-uncased' was not found locally or on the Hub.*written by save_pretrained"
    ):
        trainer(tmp_path).fit(SequenceClassifier("bert-base-uncased"), data)


def copied(folder: str, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


@pytest.mark.parametrize(
    ("content", "model_kwargs", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", {}, "cannot be loaded: .* Check that its files"),
        (
            None,
            {"hidden_size": 64},
            "the shapes of 'bert.embeddings.LayerNorm.bias', .* Correct these, or check that its files",
        ),
        (None, {"hidden_act": "none"}, "cannot be loaded with model_kwargs .*Correct these, or check that its files"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_weights_that_are_not_whole_or_do_not_fit_are_refused_in_one_line(
    content, model_kwargs, message: str, base: str, tmp_path: Path
) -> None:
    folder = copied(base, tmp_path)
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(str(folder), num_labels=2, model_kwargs=model_kwargs).configure_model()


@pytest.mark.parametrize(
    ("changes", "model_kwargs", "message"),
    [
        (
            {"hidden_dropout_prob": None},
            {},
            "the configuration of .* cannot be used: .*hidden_dropout_prob.*config.json",
        ),
        ({"id2label": {"a": "0"}}, {}, "the configuration of .* cannot be used: ValueError.*Correct its config.json"),
        (
            {},
            {"hidden_dropout_prob": None},
            "cannot be used, with model_kwargs .*hidden_dropout_prob.*Correct these, or",
        ),
        (
            {},
            {"low_cpu_mem_usage": True},
            "has 'low_cpu_mem_usage', which is neither in the configuration .* nor one of 'revision', .*or leave it out",
        ),
        (
            {},
            {"device_map": "auto"},
            "has 'device_map', but the Trainer places the model on devices. Leave .*--trainer",
        ),
        ({}, {"torch_dtype": "bfloat16"}, "'torch_dtype', which transformers now calls dtype. Rename it"),
        ({}, {"id2label": {0: "no", 1: "yes"}}, "has 'id2label', but the classes are those of the data.*label_names"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_in_one_line(
    changes, model_kwargs, message: str, base: str, tmp_path: Path
) -> None:
    path = copied(base, tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UsageError, match=message):
        SequenceClassifier(str(path.parent), num_labels=2, model_kwargs=model_kwargs).configure_model()


@pytest.mark.parametrize("adapted", [False, slow(True)])
def test_the_weights_of_a_variant_are_loaded_and_its_checkpoint_is_too(
    adapted: bool, data, base: str, tmp_path: Path
) -> None:
    folder = copied(base, tmp_path)
    weights = load_file(folder / "model.safetensors")
    doubled = {name: weight * 2 for name, weight in weights.items()}
    save_file(doubled, folder / "model.fp16.safetensors", metadata={"format": "pt"})
    options = {"peft_config": {"peft_type": "LORA"}} if adapted else {}
    kwargs = {"variant": "fp16", "use_safetensors": True}
    model = SequenceClassifier(str(folder), learning_rate=0.0, model_kwargs=kwargs, **options)
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, data)
    word = "embeddings.word_embeddings.weight"
    assert torch.equal(model.model.bert.get_parameter(word), doubled[word])
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    for one, other in zip(run.predict(model, data), run.predict(again, data), strict=True):
        torch.testing.assert_close(one["probabilities"], other["probabilities"])


def test_a_checkpoint_is_loaded_whatever_its_model_was_told_to_return(data, tmp_path: Path) -> None:
    model = SequenceClassifier(model_kwargs={"return_dict": False})
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    for one, other in zip(run.predict(model, data), run.predict(again, data), strict=True):
        torch.testing.assert_close(one["probabilities"], other["probabilities"])


@pytest.mark.filterwarnings("default")
def test_weights_of_the_layers_for_which_the_model_has_no_place_are_named(base: str, tmp_path: Path) -> None:
    folder = copied(base, tmp_path)
    weights = load_file(folder / "model.safetensors")
    harmless = {"cls.predictions.bias": torch.zeros(3)}
    harmless["encoder.layer.0.attention.self.bias"] = torch.ones(9, 9)  # a causal mask, as old versions saved it
    of_layer = {"encoder.layer.0.attention.self.distance_embedding.weight": torch.zeros(127, 16)}
    save_file({**weights, **harmless, **of_layer}, folder / "model.safetensors", {"format": "pt"})
    message = r"has 'encoder.layer.0.attention.self.distance_embedding.weight', which Bert.* does not have"
    with pytest.warns(UserWarning, match=message):
        SequenceClassifier(str(folder), num_labels=2).configure_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save_file({**weights, **harmless}, folder / "model.safetensors", {"format": "pt"})
        SequenceClassifier(str(folder), num_labels=2).configure_model()


def test_weights_of_something_else_are_no_pretrained_model(base: str, tmp_path: Path) -> None:
    folder = copied(base, tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({f"other.{name}": one for name, one in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="has no weights for BertForSequenceClassification"):
        SequenceClassifier(str(folder), num_labels=2).configure_model()


def test_nothing_is_predicted_by_a_head_that_is_not_among_the_weights(base: str, tmp_path: Path) -> None:
    folder = copied(base, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    run = trainer(tmp_path, callbacks=[CheckpointPreflight()])
    with pytest.raises(ValueError, match="has not been trained to classify"):
        run.predict(SequenceClassifier(str(folder)), SmartBatchDataModule("demo", max_length=16, batch_size=64))


def test_a_folder_of_adapters_is_told_from_one_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="holds only adapters.*adapter=false"):
        SequenceClassifier(str(tmp_path), num_labels=2).configure_model()


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "t5", slow("mpnet"), slow("roberta")])
def test_a_folder_without_a_tokenizer_is_refused_and_not_read_by_one_that_knows_no_words(family, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ValueError, match="has no tokenizer, .*tokenizer.save_pretrained|tokenizer .* was not found"):
        load_tokenizer(str(tmp_path), 16, {})


def test_a_vocabulary_that_has_a_word_twice_leaves_an_id_out_and_is_used_as_it_is(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "film", "fine", "dull", "odd"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    data = SmartBatchDataModule(
        [{"text": "odd film", "label": 0}, {"text": "dull", "label": 1}],
        str(tmp_path),
        max_length=8,
        validation_split=0,
    )
    data.setup("fit")
    assert data.train_data[0]["input_ids"].tolist() == [2, 9, 6, 3]
    model = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 10 tokens, but the model has 9"):
        trainer(tmp_path).fit(SequenceClassifier(str(tmp_path)), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": 5}, "pretrained is of the type int; give a name or a folder"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3'; give a number that is 0 or more"),
    ],
)
def test_arguments_of_another_type_are_refused_at_once(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(**options)


def test_classes_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'x', 'x', two of which are the same"):
        SingleLabelClassification.from_config(BertConfig(id2label={0: "x", 1: "x"}))


def test_labels_that_are_not_one_for_each_sample_are_refused() -> None:
    model = SequenceClassifier(num_labels=2)
    model.configure_model()
    with pytest.raises(ValueError, match=r"labels have the shape \(2, 3\), but the loss of these logits takes \(2,\)"):
        model.training_step({"input_ids": torch.ones(2, 3).long(), "labels": torch.zeros(2, 3).long()}, 0)


def test_a_column_of_targets_is_refused_instead_of_being_paired_with_every_prediction() -> None:
    with pytest.raises(ValueError, match=r"labels have the shape \(4, 1\), but the loss of these logits takes \(4,\)"):
        Regression(("score",)).compute_loss(torch.zeros(4, 1), torch.zeros(4, 1))


def test_samples_in_a_row_without_their_bounds_are_refused() -> None:
    model = SequenceClassifier(num_labels=2)
    model.configure_model()
    tokens = [{"input_ids": [2, 5, 3]}, {"input_ids": [2, 6, 7, 3]}]
    with pytest.raises(ValueError, match="several samples in a row, but does not say where each begins"):
        model.predict_step(DataCollatorWithFlattening()(tokens), 0)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(tokens)
    assert len(model.predict_step(batch, 0)["probabilities"]) == 2


@pytest.mark.slow
def test_a_classifier_is_exported_by_torch_with_the_logits_that_it_has(data, tmp_path: Path) -> None:
    model = SequenceClassifier()
    trainer(tmp_path, fast_dev_run=1).fit(model, data)
    model.eval()
    inputs = {"input_ids": torch.randint(5, 50, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    inputs["attention_mask"][0, 4:] = 0
    program = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits)


def test_a_model_that_is_not_built_says_how_to_build_it() -> None:
    with pytest.raises(RuntimeError, match="not built yet. Run it with a Trainer, or call configure_model"):
        SequenceClassifier()(input_ids=torch.ones(1, 3, dtype=torch.long))


# --- padding ---


def test_padding_does_not_change_the_logits(minilm: str, imdb: Path) -> None:
    """Real weights on real reviews, each alone and in a padded batch, float32."""
    reviews = load_dataset("parquet", data_files=str(imdb / "test.parquet"), split="train").select(
        range(0, 25_000, 1000)
    )
    data = SmartBatchDataModule("demo", minilm, max_length=256)
    rows = data.token_table(reviews)
    model = SequenceClassifier(minilm)
    model.configure_model()
    model.eval()
    pad = PadCollator(0, BatchSpec(pad_to_multiple_of=8))
    with torch.no_grad():
        together = model(**pad([rows[row] for row in range(len(rows))])).logits
        alone = torch.cat([model(**PadCollator()([rows[row]])).logits for row in range(len(rows))])
    assert len(set(rows.lengths.tolist())) > 10
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
