"""Figures of an evaluation: confusions, curves, calibration, groups of samples, targets against predictions."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from smartbatch_lightning.evaluation.calibration import Calibration
from smartbatch_lightning.evaluation.classification import ClassResult, Curves
from smartbatch_lightning.evaluation.regression import Quantile
from smartbatch_lightning.evaluation.samples import Group
from smartbatch_lightning.plots import MAIN, SECOND, THIRD, THOUSANDS, drawing, plain

_WIDTH, _HEIGHT = 4.8, 3.6  # inches
_MAX_CLASSES, _MAX_BARS, _MAX_POINTS = 20, 40, 5000
_SHADES = LinearSegmentedColormap.from_list("shades", [(0.18, 0.5, 0.62, 0.0), (0.18, 0.5, 0.62, 0.85)])


@drawing()
def confusion(matrix: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Samples by class and prediction; if there are many classes, only those with the most mistakes."""
    title, shown = "Confusion", np.arange(len(names))
    if len(names) > _MAX_CLASSES:
        wrong = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
        shown = np.sort(np.argsort(-wrong, kind="stable")[:_MAX_CLASSES])
        title += f" of the {_MAX_CLASSES} of {len(names):,} classes with the most mistakes"
        matrix = matrix[np.ix_(shown, shown)]
    size = max(_HEIGHT, 1.6 + 0.38 * len(shown))
    figure, axes = _figure(size + 1.0, size)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.pcolormesh(shares, cmap=_SHADES, vmin=0, vmax=1, edgecolors=THIRD, linewidth=0.3)
    for row, column in np.ndindex(*matrix.shape):
        if matrix[row, column]:
            count = f"{matrix[row, column]:,}"
            axes.text(column + 0.5, row + 0.5, count, ha="center", va="center", size=9 if len(shown) < 12 else 6)
    axes.invert_yaxis()
    labels = [plain(names[number]) for number in shown.tolist()]
    axes.set_xticks(np.arange(len(shown)) + 0.5, labels, rotation=0 if len(shown) < 4 else 90)
    axes.set_yticks(np.arange(len(shown)) + 0.5, labels)
    axes.tick_params(length=0)
    axes.set(title=title, xlabel="predicted", ylabel="label")
    return figure


@drawing()
def label_counts(classes: Sequence[ClassResult]) -> Figure:
    """Hits, misses and false alarms of each label; if there are many labels, only those with the most mistakes."""
    title, hits = "Hits, misses and false alarms", [round((one.recall or 0) * one.support) for one in classes]
    order = list(range(len(classes)))
    if len(order) > _MAX_BARS:
        wrong = [one.support + one.predicted - 2 * hit for one, hit in zip(classes, hits, strict=True)]
        order = sorted(sorted(order, key=lambda number: -wrong[number])[:_MAX_BARS])
        title += f" of the {_MAX_BARS} of {len(classes):,} labels with the most mistakes"
    figure, axes = _figure(_WIDTH + 2, 1.3 + 0.26 * len(order))
    left = np.zeros(len(order))
    parts = {
        "predicted correctly": [hits[number] for number in order],
        "missed": [classes[number].support - hits[number] for number in order],
        "predicted wrongly": [classes[number].predicted - hits[number] for number in order],
    }
    for (name, counts), color in zip(parts.items(), (MAIN, THIRD, SECOND), strict=True):
        axes.barh(np.arange(len(order)), counts, left=left, color=color, label=name)
        left += counts
    axes.set_yticks(np.arange(len(order)), [plain(classes[number].name) for number in order])
    axes.invert_yaxis()
    axes.set(title=title, xlabel="samples")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(THOUSANDS)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@drawing()
def roc(curves: Mapping[str, Curves]) -> Figure:
    """ROC curves, one class against all others."""
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=THIRD, linestyle=":", linewidth=1)
    lines = [(one.false_positive_rate, one.true_positive_rate) for one in curves.values()]
    _curves(axes, lines, list(curves))
    axes.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate")
    return figure


@drawing()
def precision_recall(curves: Mapping[str, Curves]) -> Figure:
    """Precision-recall curves, one class against all others."""
    figure, axes = _figure()
    _curves(axes, [(one.recall, one.precision) for one in curves.values()], list(curves))
    axes.set(title="Precision and recall", xlabel="recall", ylabel="precision")
    return figure


@drawing()
def reliability(calibrations: Mapping[str, Calibration]) -> Figure:
    """Share of correct predictions against predicted probability; larger points mean more predictions."""
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=THIRD, linestyle=":", linewidth=1)
    for (name, one), color in zip(calibrations.items(), (MAIN, SECOND), strict=False):
        x, y, counts = (
            np.array([getattr(part, field) for part in one.bins]) for field in ("probability", "observed", "count")
        )
        axes.plot(x, y, color=color, linewidth=1)
        axes.scatter(x, y, 8 + 92 * counts / counts.max(), color=color, label=name, alpha=0.8)
    axes.set(title="Reliability", xlabel="predicted probability", ylabel="observed frequency")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    if len(calibrations) > 1:
        axes.legend(loc="upper left")
    return figure


@drawing()
def groups(of: Sequence[Group], title: str, xlabel: str, ylabel: str, *, share: bool = False) -> Figure:
    """Mean values of groups of samples, for example by length."""
    figure, axes = _figure()
    axes.plot(np.arange(len(of)), [one.value for one in of], "o-", color=MAIN, clip_on=False)
    axes.set_xticks(np.arange(len(of)), [one.name for one in of], rotation=45, ha="right")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.margins(y=0.2)
    if share:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0.0), min(high, 1.0))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=2))
    return figure


@drawing()
def scatter(labels: NDArray[np.float64], predictions: NDArray[np.float64], name: str) -> Figure:
    """Predictions against targets; if there are very many samples, a random part of them."""
    figure, axes = _figure()
    shown = np.arange(len(labels))
    if len(shown) > _MAX_POINTS:
        shown = np.random.default_rng(0).choice(shown, _MAX_POINTS, replace=False)
    ends = [min(labels.min(), predictions.min()), max(labels.max(), predictions.max())]
    axes.plot(ends, ends, color=THIRD, linestyle=":", linewidth=1)
    axes.scatter(labels[shown], predictions[shown], 6, color=MAIN, alpha=0.4, linewidths=0, rasterized=True)
    axes.set(title=plain(name), xlabel="target", ylabel="prediction")
    return figure


@drawing()
def residuals(errors: NDArray[np.float64], name: str) -> Figure:
    """Histogram of errors."""
    figure, axes = _figure()
    axes.hist(errors, bins=min(50, max(5, len(errors) // 10)), color=MAIN)
    axes.axvline(0, color=THIRD, linestyle=":", linewidth=1)
    axes.set(title=f"Errors: {plain(name)}", xlabel="prediction minus target", ylabel="samples")
    axes.yaxis.set_major_formatter(THOUSANDS)
    return figure


@drawing()
def quantiles(of: Sequence[Quantile], name: str) -> Figure:
    """Mean absolute error and bias by target."""
    figure, axes = _figure()
    axes.bar(np.arange(len(of)), [one.mae for one in of], color=MAIN, width=0.8, label="mean absolute error")
    axes.plot(np.arange(len(of)), [one.bias for one in of], "o-", color=SECOND, label="bias")
    axes.axhline(0, color=THIRD, linewidth=1)
    axes.set_xticks(np.arange(len(of)), [f"{one.low:.3g} to {one.high:.3g}" for one in of], rotation=45, ha="right")
    axes.set(title=f"Errors by target: {plain(name)}", xlabel="target")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _figure(width: float = _WIDTH, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _curves(axes: Axes, lines: Sequence[tuple[Sequence[float], Sequence[float]]], names: Sequence[str]) -> None:
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for (x, y), name, color in zip(lines, names, colors, strict=False):
        axes.plot(x, y, color=MAIN if len(names) == 1 else color, linewidth=1.5, label=plain(name))
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
