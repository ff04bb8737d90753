"""Metrics by name and class, and which of them tells the best weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as tm
from helpers import trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassRecall

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule
from smartbatch_lightning.tasks import MultiLabelClassification, Regression, SingleLabelClassification
from smartbatch_lightning.tasks.metrics import build_metrics

THREE = SingleLabelClassification.from_names(["a", "b", "c"])
TWO = SingleLabelClassification.from_names(["no", "yes"])
LABELS = MultiLabelClassification.from_names(["a", "b", "c"])
SCORE = Regression.from_names(["score"])


def computed(metrics, task, scores, labels) -> dict[str, float]:
    collection = build_metrics(metrics, task)
    collection.update(scores, labels)
    return {name: float(value) for name, value in collection.compute().items()}


def test_names_are_scikit_learns_and_classes_torchmetrics_with_or_without_their_task() -> None:
    scores = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    labels = torch.arange(50) % 3
    spec = {"class_path": "torchmetrics.classification.MulticlassFBetaScore", "init_args": {"beta": 2.0}}
    metrics = ["accuracy", "balanced_accuracy", "f1", "MatthewsCorrCoef", "MulticlassCohenKappa", "roc_auc", spec]
    values = computed(metrics, THREE, scores, labels)
    found = scores.argmax(1)
    recalls = [float((found[labels == k] == k).double().mean()) for k in range(3)]
    assert values["accuracy"] == pytest.approx(float((found == labels).double().mean()))
    assert values["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert values["MatthewsCorrCoef"] == pytest.approx(float(tm.multiclass_matthews_corrcoef(scores, labels, 3)))
    assert values["MulticlassFBetaScore"] == pytest.approx(float(tm.multiclass_fbeta_score(scores, labels, 2.0, 3)))
    assert list(values) == [
        "MatthewsCorrCoef", "MulticlassCohenKappa", "MulticlassFBetaScore", "accuracy", "balanced_accuracy", "f1",
        "roc_auc",
    ]  # fmt: skip


def test_one_name_may_stand_alone() -> None:
    scores, labels = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0])
    assert computed("accuracy", TWO, scores, labels) == {"accuracy": 0.5}


def test_a_binary_metric_of_two_classes_is_of_the_second() -> None:
    """As in GLUE, where F1 is that of `equivalent` and of `duplicate`."""
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3], [0.1, 0.9]])
    labels = torch.tensor([0, 1, 0, 1, 1])
    values = computed({"f1": "BinaryF1Score", "auc": "BinaryAUROC"}, TWO, scores, labels)
    assert values["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))  # right twice, once too much, once missed
    assert values["auc"] == pytest.approx(5 / 6)  # of 6 pairs one stands the wrong way round


def test_of_two_classes_it_is_said_once_which_is_the_second(caplog: pytest.LogCaptureFixture) -> None:
    task = SingleLabelClassification.from_names(["wanted", "spam"])
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        for _ in range(2):
            build_metrics(["f1", "BinaryF1Score"], task)
    [message] = caplog.messages
    assert message.startswith("BinaryF1Score is for 'spam', the second class. Set --data.label_names")


def test_metrics_that_an_override_leaves_out_are_refused(tmp_path: Path) -> None:
    class Own(SequenceClassifier):
        def configure_metrics(self, num_labels: int) -> MetricCollection:
            return MetricCollection({"mine": MulticlassRecall(num_labels)})

    class More(Own):
        def configure_metrics(self, num_labels: int) -> MetricCollection:
            return MetricCollection(
                [super().configure_metrics(num_labels), SequenceClassifier.configure_metrics(self, 2)]
            )

    data = SmartBatchDataModule(max_length=16)
    with pytest.raises(ValueError, match="metrics has 'accuracy', but Own overrides configure_metrics without them"):
        trainer(tmp_path, fast_dev_run=True).fit(Own(metrics=["accuracy"]), data)
    run = trainer(tmp_path, fast_dev_run=True)
    run.fit(More(metrics=["accuracy"]), data)
    assert {"val_mine", "val_accuracy"} <= run.callback_metrics.keys()


def test_several_labels_and_targets_have_theirs() -> None:
    scores = torch.tensor([[0.9, 0.2, 0.6], [0.1, 0.8, 0.4]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 1]])
    assert computed(["f1_micro", "hamming_loss"], LABELS, scores, labels) == pytest.approx(
        {"f1_micro": 2 / 3, "hamming_loss": 2 / 6}
    )
    values = computed(
        {"spearmanr": "spearman", "rmse": "rmse"}, SCORE, torch.tensor([1.0, 2, 4]), torch.tensor([1.0, 3, 2])
    )
    assert values == pytest.approx({"spearmanr": 0.5, "rmse": (5 / 3) ** 0.5}, rel=1e-5)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        # as an untrusted checkpoint could have it
        (
            [{"class_path": "os.system", "init_args": {"command": "exit"}}],
            "'os.system', which is not a torchmetrics.Metric",
        ),
        (["f2"], "metrics has 'f2', which is neither one of 'accuracy'"),
        (["matthews"], "metrics has 'matthews', .*'matthews_correlation'"),
        ("f1,accuracy", r"metrics is 'f1,accuracy'; give several as a list, \[f1,accuracy\]"),
        (["torchmetrics.Nothing"], "metrics is 'torchmetrics.Nothing', which cannot be imported"),
        ([{"class_path": "F1Score", "args": {}}], "give a name, or class_path and init_args"),
        (["f1", "f1"], "the name 'f1', which appears twice"),
        ({"loss": "f1"}, "the name 'loss', which is reserved"),
        ([""], "the name '', which cannot name a metric"),
        ("[{class_path:F1Score}]", "put a space after each colon and comma"),
    ],
)
def test_what_is_no_metric_is_refused_before_anything_is_loaded(metrics, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassifier("not/there", metrics=metrics)


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        (THREE, "PearsonCorrCoef"),
        (THREE, "MultilabelF1Score"),
        (THREE, "BinaryF1Score"),
        (THREE, "mse"),
        (THREE, "MulticlassROC"),
        (THREE, {"class_path": "F1Score", "init_args": {"average": "none"}}),
        (THREE, {"class_path": "F1Score", "init_args": {"averag": "macro"}}),
        (LABELS, "PearsonCorrCoef"),
        (LABELS, "matthews_correlation_of_pairs"),
        (SCORE, "f1"),
        (SCORE, "MulticlassAccuracy"),
    ],
)
def test_a_metric_that_does_not_fit_the_task_is_refused_in_one_line(task, metric) -> None:
    with pytest.raises(ValueError, match="does not fit|which is neither one of") as refused:
        build_metrics([metric], task)
    assert "\n" not in str(refused.value)


def test_a_metric_for_classes_is_said_to_be_for_classes_where_numbers_are_predicted() -> None:
    with pytest.raises(ValueError, match="does not fit regression with 1 output: it is for classes or labels. Give"):
        build_metrics(["f1"], SCORE)


def data(**options) -> SmartBatchDataModule:
    return SmartBatchDataModule(max_length=16, batch_size=16, validation_split=0.9, seed=1, **options)


FAST = {"limit_train_batches": 2, "limit_val_batches": 2}


def test_metrics_that_are_given_are_logged_in_place_of_the_tasks(tmp_path: Path) -> None:
    run = trainer(tmp_path, **FAST)
    run.fit(SequenceClassifier(metrics=["cohen_kappa", "f1_weighted"]), data())
    validated = {name for name in run.callback_metrics if name.startswith("val_")}
    assert validated == {"val_loss", "val_cohen_kappa", "val_f1_weighted"}


def test_a_wrong_name_of_a_metric_is_told_before_the_first_step(tmp_path: Path) -> None:
    class Steps(Callback):
        def on_train_batch_start(self, *_) -> None:
            raise AssertionError("a step was taken")

    Steps.__module__ = "lightning.pytorch.callbacks"  # what another callback logs cannot be known
    for callback in (ModelCheckpoint(tmp_path, monitor="val_f2"), EarlyStopping("val_f2")):
        run = trainer(tmp_path, callbacks=[callback, Steps()], enable_checkpointing=True, **FAST)
        with pytest.raises(
            ValueError, match="'val_f2' is monitored, .* are 'val_loss'.* add the metric to --model.metrics"
        ):
            run.fit(SequenceClassifier(), data())
