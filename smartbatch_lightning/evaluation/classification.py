"""Evaluating classification: by class, confusions, thresholds, calibration, lengths and the worst mistakes."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import functional as metrics
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_precision_recall_curve,
    binary_roc,
    multilabel_f1_score,
)

from smartbatch_lightning.evaluation.calibration import Calibration, Logits, fit_temperature
from smartbatch_lightning.evaluation.samples import Group, Mistake, text_at

if TYPE_CHECKING:
    from smartbatch_lightning.evaluation.evaluation import Evaluation

_MAX_CURVES, _CURVE_POINTS = 8, 300
_MAX_CONFUSIONS, _MAX_MISTAKES, _MAX_SCORES = 20, 50, 10
_MAX_MATRIX_CLASSES = 100  # maximum number of classes for writing the whole confusion matrix as JSON


@dataclass(frozen=True)
class ClassResult:
    """How well one class, or one label in multi-label tasks, is distinguished from the others.

    Undefined values are None: the recall of a class without samples, the precision of one that is never predicted, and
    areas under curves if all or no samples are of the class.

    Attributes:
        name: Name of the class.
        support: Number of its samples.
        predicted: Number of samples predicted as this class.
        precision: Share of the samples predicted as this class that are of it.
        recall: Share of its samples that are predicted as this class.
        f1: Harmonic mean of precision and recall.
        auroc: Area under the ROC curve, this class against all others.
        average_precision: Area under the precision-recall curve.
        best_threshold: Probability above which predicting this class gives the best F1 on these samples; for
            single-label tasks only with two classes, for the second.
        best_f1: F1 at that threshold.
    """

    name: str
    support: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float | None
    auroc: float | None
    average_precision: float | None
    best_threshold: float | None
    best_f1: float | None


@dataclass(frozen=True)
class Confusion:
    """Samples of one class that were predicted as another.

    Attributes:
        label: Their class.
        prediction: The predicted class.
        samples: Number of such samples.
        share: Their share of the samples of the class.
    """

    label: str
    prediction: str
    samples: int
    share: float


@dataclass(frozen=True)
class Curves:
    """ROC and precision-recall curves of a class, reduced to a few hundred points.

    Attributes:
        false_positive_rate: Shape (points,).
        true_positive_rate: Shape (points,).
        recall: Shape (other points,).
        precision: Shape (other points,).
    """

    false_positive_rate: list[float]
    true_positive_rate: list[float]
    recall: list[float]
    precision: list[float]


@dataclass(frozen=True)
class ClassificationResults:
    """Results of a classification.

    Attributes:
        summary: Metrics over all samples, by name.
        classes: Results for each class.
        confusion_matrix: Number of samples by class (rows) and prediction (columns); for multi-label, by whether they
            have each label (rows) and whether it was predicted (columns), (num_labels, 2, 2).
        confusions: The most frequent confusions, for single-label tasks.
        curves: Curves of the classes with the lowest average precision; with two classes, of the second.
        calibration: Calibration of the unchanged probabilities.
        temperature: Temperature that divides the logits; None if none was requested or found.
        scaled: Calibration at that temperature.
        lengths: Accuracy by length; for multi-label, mean F1 per sample.
        mistakes: The samples with the highest loss.
        notes: Further remarks.
    """

    summary: dict[str, float | None]
    classes: list[ClassResult]
    confusion_matrix: NDArray[np.int64]
    confusions: list[Confusion]
    curves: dict[str, Curves]
    calibration: Calibration
    temperature: float | None
    scaled: Calibration | None
    lengths: list[Group]
    mistakes: list[Mistake]
    notes: list[str]

    @property
    def thresholds(self) -> dict[str, float]:
        """The best threshold of each label that has one."""
        return {one.name: one.best_threshold for one in self.classes if one.best_threshold is not None}

    def to_dict(self) -> dict[str, Any]:
        """All results, ready for JSON; with very many classes, only the most frequent confusions."""
        written = {name: value for name, value in asdict(self).items() if name != "confusion_matrix"}
        if len(self.classes) <= _MAX_MATRIX_CLASSES:
            written["confusion_matrix"] = self.confusion_matrix.tolist()
        return written


def classification_results(evaluation: "Evaluation") -> ClassificationResults:
    """Computes the results of a single-label or multi-label evaluation."""
    with warnings.catch_warnings():
        # torchmetrics warns of classes without samples, which the results show anyway
        warnings.filterwarnings("ignore", message="No (positive|negative) samples")
        return _Measured(evaluation).results()


class _Measured:
    """The arrays of an evaluation as tensors, and everything that differs between single-label and multi-label."""

    def __init__(self, evaluation: "Evaluation") -> None:
        self.evaluation = evaluation
        self.names = evaluation.task.label_names
        self.probabilities = torch.from_numpy(np.ascontiguousarray(evaluation.scores))
        self.labels = torch.from_numpy(np.asarray(evaluation.labels, np.int64))
        self.predicted = torch.from_numpy(np.asarray(evaluation.predicted, np.int64))
        self.multi_label = self.labels.ndim == 2
        self.logits = Logits.from_probabilities(evaluation.scores, np.asarray(evaluation.labels))

    def results(self) -> ClassificationResults:
        matrix = self._metric(metrics.confusion_matrix).numpy()
        classes = self._classes(matrix)
        temperature, notes = self._temperature()
        wrong = self.predicted != self.labels
        right = ~(wrong.any(1) if self.multi_label else wrong)
        lengths = self.evaluation.lengths
        calibration = self.logits.calibration()
        return ClassificationResults(
            summary=self._summary(classes, calibration),
            classes=classes,
            confusion_matrix=matrix,
            confusions=[] if self.multi_label else _confusions(matrix, self.names),
            curves=self._curves(classes),
            calibration=calibration,
            temperature=temperature,
            scaled=None if temperature is None else self.logits.calibration(temperature),
            lengths=[] if lengths is None else lengths.groups(self._by_sample(right).numpy()),
            mistakes=self._mistakes(~right),
            notes=notes,
        )

    def _by_sample(self, right: Tensor) -> Tensor:
        """Whether each sample is predicted correctly; for multi-label, its F1. Shape (num_samples,)."""
        if not self.multi_label:
            return right
        return multilabel_f1_score(
            self.predicted[..., None],
            self.labels[..., None],
            len(self.names),
            average="micro",
            multidim_average="samplewise",
            validate_args=False,
            zero_division=1,
        )

    def _metric(self, metric: Callable[..., Tensor], **options: Any) -> Tensor:
        """A metric of torchmetrics for predicted labels."""
        task, number = "multilabel" if self.multi_label else "multiclass", len(self.names)
        given = {"task": task, "num_labels": number, "num_classes": number, "validate_args": False}
        return metric(self.predicted, self.labels, **given, **options)

    def _summary(self, classes: list[ClassResult], calibration: Calibration) -> dict[str, float | None]:
        aurocs = [one.auroc for one in classes if one.auroc is not None]
        precisions = [one.average_precision for one in classes if one.average_precision is not None]
        if self.multi_label:
            measured = {
                "exact_match": self._metric(metrics.exact_match),
                "f1": self._metric(metrics.f1_score, average="macro"),
                "f1_micro": self._metric(metrics.f1_score, average="micro"),
                "hamming_distance": self._metric(metrics.hamming_distance, average="micro"),
            }
        else:
            measured = {
                "accuracy": self._metric(metrics.accuracy, average="micro"),
                "f1": self._metric(metrics.f1_score, average="macro"),
                "matthews": self._metric(metrics.matthews_corrcoef),
            }
        return {
            **{name: float(value) for name, value in measured.items()},
            "auroc": float(np.mean(aurocs)) if aurocs else None,
            "average_precision": float(np.mean(precisions)) if precisions else None,
            "log_loss": calibration.log_loss,
            "expected_calibration_error": calibration.expected_calibration_error,
        }

    def _classes(self, matrix: NDArray[np.int64]) -> list[ClassResult]:
        if self.multi_label:
            support, predicted = matrix[:, 1].sum(1), matrix[:, :, 1].sum(1)
        else:
            support, predicted = matrix.sum(1), matrix.sum(0)
        precisions, recalls, f1s = (
            self._metric(metric, average="none").tolist()
            for metric in (metrics.precision, metrics.recall, metrics.f1_score)
        )
        decided = self.evaluation.task.names_with_threshold
        results = []
        for number, name in enumerate(self.names):
            scores, truth = self._one_against_all(number)
            ranked = 0 < support[number] < len(truth)
            threshold, at_threshold = _best_threshold(scores, truth) if ranked and name in decided else (None, None)
            results.append(
                ClassResult(
                    name=name,
                    support=int(support[number]),
                    predicted=int(predicted[number]),
                    precision=precisions[number] if predicted[number] else None,
                    recall=recalls[number] if support[number] else None,
                    f1=f1s[number] if predicted[number] or support[number] else None,
                    auroc=float(binary_auroc(scores, truth, validate_args=False)) if ranked else None,
                    average_precision=(
                        float(binary_average_precision(scores, truth, validate_args=False)) if ranked else None
                    ),
                    best_threshold=threshold,
                    best_f1=at_threshold,
                )
            )
        return results

    def _one_against_all(self, number: int) -> tuple[Tensor, Tensor]:
        """Probabilities of a class, and whether each sample is of it. Shapes (num_samples,)."""
        truth = self.labels[:, number] if self.multi_label else (self.labels == number).long()
        return self.probabilities[:, number].contiguous(), truth

    def _curves(self, classes: list[ClassResult]) -> dict[str, Curves]:
        ranked = [number for number, one in enumerate(classes) if one.average_precision is not None]
        if not self.multi_label and len(self.names) == 2:
            ranked = ranked[1:]
        shown = sorted(ranked, key=lambda number: classes[number].average_precision or 0.0)[:_MAX_CURVES]
        return {self.names[number]: _curves_of(*self._one_against_all(number)) for number in sorted(shown)}

    def _temperature(self) -> tuple[float | None, list[str]]:
        asked = self.evaluation.temperature
        if asked != "fit":
            return asked, []
        if self.logits.all_correct():
            return None, [
                "No temperature was fitted: all predictions are correct, so the loss falls as long as the temperature "
                "does."
            ]
        fitted = fit_temperature(self.logits.loss)
        if fitted is None:
            return None, [
                "No temperature was fitted: the loss falls as long as the temperature rises, until all labels are "
                "equally likely."
            ]
        return fitted, []

    def _mistakes(self, wrong: Tensor) -> list[Mistake]:
        losses = self.logits.loss(reduction="none")
        if self.multi_label:
            losses = losses.mean(1)
        rows = wrong.nonzero()[:, 0]
        worst = rows[losses[rows].argsort(descending=True, stable=True)[:_MAX_MISTAKES]].numpy()
        evaluation = self.evaluation
        task, lengths = evaluation.task, evaluation.lengths
        labels = task.decode(np.asarray(evaluation.labels)[worst]).to_pylist()
        predictions = task.decode(evaluation.predicted[worst]).to_pylist()
        mistakes = []
        for sample, label, prediction in zip(worst.tolist(), labels, predictions, strict=True):
            probabilities, likeliest = self.probabilities[sample].topk(min(_MAX_SCORES, len(self.names)))
            scores = zip(likeliest.tolist(), probabilities.tolist(), strict=True)
            mistakes.append(
                Mistake(
                    row=int(evaluation.rows[sample]),
                    label=_written(label),
                    prediction=_written(prediction),
                    loss=float(losses[sample]),
                    scores={self.names[number]: probability for number, probability in scores},
                    length=None if lengths is None else int(lengths.values[sample]),
                    text=text_at(evaluation.texts, sample),
                )
            )
        return mistakes


def _best_threshold(scores: Tensor, truth: Tensor) -> tuple[float | None, float | None]:
    """The threshold with the best F1, midway between the probabilities just above and below it, and that F1."""
    precision, recall, taken = binary_precision_recall_curve(scores, truth, validate_args=False)
    f1 = (2 * precision * recall / (precision + recall)).nan_to_num()[: len(taken)]
    f1[taken <= 0] = -1  # no threshold lies below these
    best = int(f1.argmax())
    if f1[best] < 0:
        return None, None
    below = float(taken[best - 1]) if best else 0.0
    return (float(taken[best]) + below) / 2, float(f1[best])


def _curves_of(scores: Tensor, truth: Tensor) -> Curves:
    false_positive_rate, true_positive_rate, _ = binary_roc(scores, truth, validate_args=False)
    precision, recall, _ = binary_precision_recall_curve(scores, truth, validate_args=False)
    return Curves(*map(_thinned, (false_positive_rate, true_positive_rate, recall, precision)))


def _thinned(points: Tensor) -> list[float]:
    kept = np.unique(np.linspace(0, len(points) - 1, _CURVE_POINTS).astype(np.int64))
    return [round(value, 6) for value in points[kept].tolist()]


def _confusions(matrix: NDArray[np.int64], names: list[str]) -> list[Confusion]:
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    support = matrix.sum(1)
    return [
        Confusion(names[label], names[prediction], int(count), float(count / support[label]))
        for label, prediction in pairs
        if (count := wrong[label, prediction])
    ]


def _written(label: Any) -> str:
    if isinstance(label, list):
        return ", ".join(map(str, label)) or "none"
    return str(label)
