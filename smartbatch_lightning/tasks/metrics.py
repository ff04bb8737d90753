"""torchmetrics metrics by name."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torchmetrics
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification.base import _ClassificationTaskWrapper

from smartbatch_lightning.errors import UsageError, root_cause_message
from smartbatch_lightning.registry import look_up
from smartbatch_lightning.tasks.task import Task

MetricSpecs = str | Sequence[str | Mapping[str, Any]] | Mapping[str, str | Mapping[str, Any]]

_PREFIXES = {"single_label_classification": "Multiclass", "multi_label_classification": "Multilabel"}
_MACRO, _MICRO, _WEIGHTED = {"average": "macro"}, {"average": "micro"}, {"average": "weighted"}
# torchmetrics classes and their options, by the names used in scikit-learn and `evaluate`.
_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "accuracy": ("Accuracy", _MICRO),
    "balanced_accuracy": ("Accuracy", _MACRO),
    "f1": ("F1Score", _MACRO),
    "f1_micro": ("F1Score", _MICRO),
    "f1_weighted": ("F1Score", _WEIGHTED),
    "precision": ("Precision", _MACRO),
    "recall": ("Recall", _MACRO),
    "matthews_correlation": ("MatthewsCorrCoef", {}),
    "cohen_kappa": ("CohenKappa", {}),
    "roc_auc": ("AUROC", _MACRO),
    "average_precision": ("AveragePrecision", _MACRO),
    "exact_match": ("ExactMatch", {}),
    "hamming_loss": ("HammingDistance", _MICRO),
    "mse": ("MeanSquaredError", {}),
    "rmse": ("MeanSquaredError", {"squared": False}),
    "mae": ("MeanAbsoluteError", {}),
    "r2": ("R2Score", {}),
    "pearson": ("PearsonCorrCoef", {}),
    "spearman": ("SpearmanCorrCoef", {}),
}


def named_specs(metrics: MetricSpecs) -> dict[str, tuple[str, dict[str, Any]]]:
    """Class and options of each metric, by logged name.

    Args:
        metrics: Names, classes, or `class_path` with `init_args`; or a mapping from logged names to these. A single
            name needs no list.

    Raises:
        ValueError: One is none of these, or two have the same name.
    """
    if isinstance(metrics, str):
        if metrics.startswith(("[", "{")):  # which YAML did not take for a list, as in [{class_path:F1Score}]
            raise UsageError(f"metrics is the text {metrics!r}; in YAML, put a space after each colon and comma.")
        if "," in metrics:
            raise UsageError(f"metrics is {metrics!r}; give several as a list, [{metrics}].")
        metrics = [metrics]
    items = list(metrics.items()) if isinstance(metrics, Mapping) else [(None, metric) for metric in metrics]
    specs: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, metric in items:
        options: dict[str, Any] = {}
        if isinstance(metric, Mapping):
            if "class_path" not in metric or set(metric) - {"class_path", "init_args"}:
                raise UsageError(f"metrics has {dict(metric)}; give a name, or class_path and init_args.")
            metric, options = metric["class_path"], dict(metric.get("init_args") or {})
        name = name or str(metric).rpartition(".")[2]
        if name in specs or name == "loss" or not str(name).isidentifier():
            wrong = "appears twice" if name in specs else "is reserved" if name == "loss" else "cannot name a metric"
            raise UsageError(
                f"metrics has the name {name!r}, which {wrong}. Give "
                "it another name, such as {f2: {class_path: FBetaScore, init_args: {beta: 2.0}}}."
            )
        specs[name] = (str(metric), options)
        _candidates(str(metric))
    return specs


def build_metrics(metrics: MetricSpecs, task: Task) -> MetricCollection:
    """Creates metrics of a task's scores and labels.

    Classes are found by name with or without the prefix `Multiclass` or `Multilabel`. With two classes, a `Binary...`
    metric gets the probability of the second.

    Args:
        metrics: As for `named_specs`.
        task: The task.

    Raises:
        ValueError: A metric does not fit the task, or is not a single number.
    """
    return MetricCollection({name: _build(name, *spec, task) for name, spec in named_specs(metrics).items()})


def _candidates(metric: str, prefixes: Sequence[str] = ("Multiclass", "Multilabel", "")) -> list[type[Metric]]:
    """Classes that a name may refer to, the likeliest first."""
    if "." in metric:
        kind: Any = look_up(metric, {}, "metrics")
        if not (inspect.isclass(kind) and issubclass(kind, Metric)):  # a checkpoint may name it, and may not run code
            raise UsageError(f"metrics has {metric!r}, which is not a torchmetrics.Metric. Give a class that is one.")
        return [kind]
    name = _NAMES[metric][0] if metric in _NAMES else metric
    places = (torchmetrics.classification, torchmetrics.regression, torchmetrics)
    found = [vars(place).get(prefix + name) for prefix in prefixes for place in places]
    classes = [one for one in found if inspect.isclass(one) and issubclass(one, Metric)]
    if not classes:
        raise UsageError(
            f"metrics has {metric!r}, which is neither one of {', '.join(map(repr, sorted(_NAMES)))}, nor a "
            "torchmetrics class for this task. Correct the name."
        )
    return classes


def _build(name: str, metric: str, options: dict[str, Any], task: Task) -> Metric:
    problem_type = task.config_fields().get("problem_type", "")
    kind = _candidates(metric, (_PREFIXES.get(problem_type, ""), ""))[0]
    options = {**_NAMES.get(metric, ("", {}))[1], **options}
    known = inspect.signature(kind.__init__).parameters
    num_labels = len(task.label_names)
    for option in ("num_classes", "num_labels", "num_outputs"):
        if option in known and (option != "num_outputs" or num_labels > 1):
            options.setdefault(option, num_labels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for example that all predictions will be saved
            binary = kind.__name__.startswith("Binary") and problem_type == "single_label_classification"
            if binary and num_labels == 2:
                _log_positive_class(kind.__name__, task.label_names[1])
                kind = _for_second_class(kind)
            built = kind(**options)
            _try(built, task, problem_type)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        outputs = f"{num_labels} output{'s' if num_labels > 1 else ''}"
        cause = root_cause_message(error)
        if issubclass(kind, _ClassificationTaskWrapper):  # chooses among classes for classes or labels
            cause = "it is for classes or labels."
        raise UsageError(
            f"the metric {name} is {kind.__name__}, which does not fit {problem_type} with {outputs}: "
            f"{cause} Give another, or other init_args."
        ) from error
    return built


@cache
def _log_positive_class(metric: str, name: str) -> None:
    rank_zero_info(f"{metric} is for {name!r}, the second class. Set --data.label_names to change the order.")


def _for_second_class(kind: type[Metric]) -> type[Metric]:
    """A binary metric that takes the probabilities of both classes. torchmetrics' wrappers do not count updates."""

    def update(self: Metric, preds: Tensor, target: Tensor) -> None:
        kind.update(self, preds[:, 1], target)

    return type(kind.__name__, (kind,), {"update": update})


def _try(metric: Metric, task: Task, problem_type: str) -> None:
    """Tests a metric on a task's scores and labels, then resets it.

    Raises:
        ValueError: It is not a single number.
        Exception: Whatever torchmetrics raises.
    """
    num_labels = len(task.label_names)
    logits = torch.linspace(-1, 1, 8 * num_labels).reshape(8, num_labels)
    labels = torch.arange(8) % num_labels
    if problem_type == "multi_label_classification":
        labels = labels[:, None] == torch.arange(num_labels)
    elif problem_type == "regression":
        labels = task.scores(logits).square()
    metric.update(task.scores(logits), task.metric_labels(labels))
    result = metric.compute()
    metric.reset()
    if not isinstance(result, Tensor) or result.numel() != 1:
        raise ValueError("it gives more than one number, as with average=none or a curve")
