"""Evaluating regression: errors over all samples, by target, by length, and the worst ones."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.regression import (
    mean_absolute_error,
    mean_squared_error,
    pearson_corrcoef,
    r2_score,
    spearman_corrcoef,
)

from smartbatch_lightning.evaluation.samples import Group, Mistake, quantile_parts, text_at

if TYPE_CHECKING:
    from smartbatch_lightning.evaluation.evaluation import Evaluation

_MAX_ERRORS = 50


@dataclass(frozen=True)
class TargetResult:
    """How well one target is predicted.

    Undefined values are None: correlations and R² if the target or the prediction is the same for all samples.

    Attributes:
        name: Name of the target.
        mae: Mean absolute error.
        rmse: Root mean squared error.
        bias: Mean of prediction minus target.
        pearson: Pearson correlation.
        spearman: Spearman correlation.
        r2: Coefficient of determination.
        quantiles: Errors by quantile of the target, from low to high.
    """

    name: str
    mae: float
    rmse: float
    bias: float
    pearson: float | None
    spearman: float | None
    r2: float | None
    quantiles: list["Quantile"]


@dataclass(frozen=True)
class Quantile:
    """Errors of samples with similar targets.

    Attributes:
        low: Smallest target.
        high: Largest target.
        samples: Number of samples.
        mae: Mean absolute error.
        rmse: Root mean squared error.
        bias: Mean of prediction minus target.
    """

    low: float
    high: float
    samples: int
    mae: float
    rmse: float
    bias: float


@dataclass(frozen=True)
class RegressionResults:
    """Results of a regression.

    Attributes:
        summary: Metrics of a single target; for several, the means of the errors.
        targets: Results for each target.
        values: Targets and predictions for each target, for figures. Shapes (num_samples,).
        lengths: Mean absolute error by length, over all targets.
        mistakes: The largest errors; for several targets, by squared error relative to each target's variance.
        notes: Further remarks.
    """

    summary: dict[str, float | None]
    targets: list[TargetResult]
    values: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    lengths: list[Group]
    mistakes: list[Mistake]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All results except the values, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "values"}


def regression_results(evaluation: "Evaluation") -> RegressionResults:
    """Computes the results of a regression."""
    names = evaluation.task.label_names
    predictions = np.asarray(evaluation.scores, np.float64).reshape(-1, len(names))
    labels = np.asarray(evaluation.labels, np.float64).reshape(-1, len(names))
    columns = {name: (labels[:, number], predictions[:, number]) for number, name in enumerate(names)}
    targets = [_target(name, *values) for name, values in columns.items()]
    errors = predictions - labels
    lengths = evaluation.lengths
    if len(targets) == 1:
        [only] = targets
        summary = {name: getattr(only, name) for name in ("rmse", "mae", "bias", "pearson", "spearman", "r2")}
    else:
        summary = {name: float(np.mean([getattr(one, name) for one in targets])) for name in ("rmse", "mae")}
    undefined = [one.name for one in targets if one.pearson is None]
    return RegressionResults(
        summary=summary,
        targets=targets,
        values=columns,
        lengths=[] if lengths is None else lengths.groups(np.abs(errors).mean(1)),
        mistakes=_mistakes(evaluation, labels, predictions),
        notes=[f"No correlation: all targets or all predictions of {name!r} are the same." for name in undefined],
    )


def _target(name: str, labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> TargetResult:
    predicted, target = torch.from_numpy(predictions.copy()), torch.from_numpy(labels.copy())
    varies = float(np.ptp(labels)) > 0
    correlates = varies and float(np.ptp(predictions)) > 0
    return TargetResult(
        name,
        *_errors(labels, predictions),
        pearson=float(pearson_corrcoef(predicted, target)) if correlates else None,
        spearman=float(spearman_corrcoef(predicted, target)) if correlates else None,
        r2=float(r2_score(predicted, target)) if varies else None,
        quantiles=[
            Quantile(
                float(labels[part].min()),
                float(labels[part].max()),
                int(part.sum()),
                *_errors(labels[part], predictions[part]),
            )
            for part in quantile_parts(labels)
        ],
    )


def _errors(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean absolute error, root mean squared error and bias."""
    predicted, target = torch.from_numpy(predictions.copy()), torch.from_numpy(labels.copy())
    absolute, squared = mean_absolute_error(predicted, target), mean_squared_error(predicted, target, squared=False)
    return float(absolute), float(squared), float((predictions - labels).mean())


def _mistakes(evaluation: "Evaluation", labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> list[Mistake]:
    errors = predictions - labels
    spread = labels.std(0) if errors.shape[1] > 1 else np.ones(1)
    losses = np.square(errors / np.where(spread > 0, spread, 1)).mean(1)
    names, lengths = evaluation.task.label_names, evaluation.lengths
    return [
        Mistake(
            row=int(evaluation.rows[sample]),
            label=_written(labels[sample]),
            prediction=_written(predictions[sample]),
            loss=float(losses[sample]),
            scores=dict(zip(names, errors[sample].tolist(), strict=True)),
            length=None if lengths is None else int(lengths.values[sample]),
            text=text_at(evaluation.texts, sample),
        )
        for sample in np.argsort(-losses, kind="stable")[:_MAX_ERRORS].tolist()
        if losses[sample] > 0
    ]


def _written(values: NDArray[np.float64]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
