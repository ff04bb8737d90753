"""Figures of an evaluation: confusions, curves, calibration, groups of samples, targets against predictions."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from smartbatch_lightning.evaluation.calibration import Calibration
from smartbatch_lightning.evaluation.classification import ClassResult, Curves
from smartbatch_lightning.evaluation.regression import Quantile
from smartbatch_lightning.evaluation.samples import Group

_INK = "#1f2933"  # colour of all text; in a page it is replaced by that of the surrounding text
_MAIN, _SECOND, _THIRD = "#3787a8", "#d98e33", "#8a8f98"
_STYLE: Any = {
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], _INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is not mathematics
    "svg.fonttype": "none",  # text stays text: browsers have fonts for every script
}
_WIDTH, _HEIGHT = 4.8, 3.6  # inches
_MOST_CLASSES, _MOST_BARS, _MOST_POINTS = 20, 40, 5000
_LONGEST_NAME = 24
_SHADES = LinearSegmentedColormap.from_list("shades", [(0.18, 0.5, 0.62, 0.0), (0.18, 0.5, 0.62, 0.85)])
_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")


@contextmanager
def _style() -> Iterator[None]:
    with rc_context(_STYLE):
        yield


@_style()
def confusion(matrix: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Samples by class and prediction; if there are many classes, only those with the most mistakes."""
    title, shown = "Confusion", np.arange(len(names))
    if len(names) > _MOST_CLASSES:
        wrong = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
        shown = np.sort(np.argsort(-wrong, kind="stable")[:_MOST_CLASSES])
        title += f" of the {_MOST_CLASSES} of {len(names):,} classes with the most mistakes"
        matrix = matrix[np.ix_(shown, shown)]
    size = max(_HEIGHT, 1.6 + 0.38 * len(shown))
    figure, axes = _figure(size + 1.0, size)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.pcolormesh(shares, cmap=_SHADES, vmin=0, vmax=1, edgecolors=_THIRD, linewidth=0.3)
    for row, column in np.ndindex(*matrix.shape):
        if matrix[row, column]:
            count = f"{matrix[row, column]:,}"
            axes.text(column + 0.5, row + 0.5, count, ha="center", va="center", size=9 if len(shown) < 12 else 6)
    axes.invert_yaxis()
    labels = [_plain(names[number]) for number in shown.tolist()]
    axes.set_xticks(np.arange(len(shown)) + 0.5, labels, rotation=0 if len(shown) < 4 else 90)
    axes.set_yticks(np.arange(len(shown)) + 0.5, labels)
    axes.tick_params(length=0)
    axes.set(title=title, xlabel="predicted", ylabel="label")
    return figure


@_style()
def label_counts(classes: Sequence[ClassResult]) -> Figure:
    """Hits, misses and false alarms of each label; if there are many labels, only those with the most mistakes."""
    title, hits = "Hits, misses and false alarms", [round((one.recall or 0) * one.support) for one in classes]
    order = list(range(len(classes)))
    if len(order) > _MOST_BARS:
        wrong = [one.support + one.predicted - 2 * hit for one, hit in zip(classes, hits, strict=True)]
        order = sorted(sorted(order, key=lambda number: -wrong[number])[:_MOST_BARS])
        title += f" of the {_MOST_BARS} of {len(classes):,} labels with the most mistakes"
    figure, axes = _figure(_WIDTH + 2, 1.3 + 0.26 * len(order))
    left = np.zeros(len(order))
    parts = {
        "predicted correctly": [hits[number] for number in order],
        "missed": [classes[number].support - hits[number] for number in order],
        "predicted wrongly": [classes[number].predicted - hits[number] for number in order],
    }
    for (name, counts), color in zip(parts.items(), (_MAIN, _THIRD, _SECOND), strict=True):
        axes.barh(np.arange(len(order)), counts, left=left, color=color, label=name)
        left += counts
    axes.set_yticks(np.arange(len(order)), [_plain(classes[number].name) for number in order])
    axes.invert_yaxis()
    axes.set(title=title, xlabel="samples")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(_THOUSANDS)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@_style()
def roc(curves: Mapping[str, Curves]) -> Figure:
    """ROC curves, one class against all others."""
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=_THIRD, linestyle=":", linewidth=1)
    lines = [(one.false_positive_rate, one.true_positive_rate) for one in curves.values()]
    _curves(axes, lines, list(curves))
    axes.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate")
    return figure


@_style()
def precision_recall(curves: Mapping[str, Curves]) -> Figure:
    """Precision-recall curves, one class against all others."""
    figure, axes = _figure()
    _curves(axes, [(one.recall, one.precision) for one in curves.values()], list(curves))
    axes.set(title="Precision and recall", xlabel="recall", ylabel="precision")
    return figure


@_style()
def reliability(calibrations: Mapping[str, Calibration]) -> Figure:
    """Share of correct predictions against predicted probability; larger points mean more predictions."""
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=_THIRD, linestyle=":", linewidth=1)
    for (name, one), color in zip(calibrations.items(), (_MAIN, _SECOND), strict=False):
        x, y, counts = (
            np.array([getattr(part, field) for part in one.bins]) for field in ("probability", "observed", "count")
        )
        axes.plot(x, y, color=color, linewidth=1)
        axes.scatter(x, y, 8 + 92 * counts / counts.max(), color=color, label=name, alpha=0.8)
    axes.set(title="Reliability", xlabel="predicted probability", ylabel="share that came true")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    if len(calibrations) > 1:
        axes.legend(loc="upper left")
    return figure


@_style()
def groups(of: Sequence[Group], title: str, xlabel: str, ylabel: str, *, share: bool = False) -> Figure:
    """Mean values of groups of samples, for example by length."""
    figure, axes = _figure()
    axes.plot(np.arange(len(of)), [one.value for one in of], "o-", color=_MAIN, clip_on=False)
    axes.set_xticks(np.arange(len(of)), [one.name for one in of], rotation=45, ha="right")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.margins(y=0.2)
    if share:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0.0), min(high, 1.0))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=2))
    return figure


@_style()
def scatter(labels: NDArray[np.float64], predictions: NDArray[np.float64], name: str) -> Figure:
    """Predictions against targets; if there are very many samples, a random part of them."""
    figure, axes = _figure()
    shown = np.arange(len(labels))
    if len(shown) > _MOST_POINTS:
        shown = np.random.default_rng(0).choice(shown, _MOST_POINTS, replace=False)
    ends = [min(labels.min(), predictions.min()), max(labels.max(), predictions.max())]
    axes.plot(ends, ends, color=_THIRD, linestyle=":", linewidth=1)
    axes.scatter(labels[shown], predictions[shown], 6, color=_MAIN, alpha=0.4, linewidths=0, rasterized=True)
    axes.set(title=_plain(name), xlabel="target", ylabel="prediction")
    return figure


@_style()
def residuals(errors: NDArray[np.float64], name: str) -> Figure:
    """Histogram of errors."""
    figure, axes = _figure()
    axes.hist(errors, bins=min(50, max(5, len(errors) // 10)), color=_MAIN)
    axes.axvline(0, color=_THIRD, linestyle=":", linewidth=1)
    axes.set(title=f"Errors: {_plain(name)}", xlabel="prediction minus target", ylabel="samples")
    axes.yaxis.set_major_formatter(_THOUSANDS)
    return figure


@_style()
def quantiles(of: Sequence[Quantile], name: str) -> Figure:
    """Mean absolute error and bias by target."""
    figure, axes = _figure()
    axes.bar(np.arange(len(of)), [one.mae for one in of], color=_MAIN, width=0.8, label="mean absolute error")
    axes.plot(np.arange(len(of)), [one.bias for one in of], "o-", color=_SECOND, label="bias")
    axes.axhline(0, color=_THIRD, linewidth=1)
    axes.set_xticks(np.arange(len(of)), [f"{one.low:.3g} to {one.high:.3g}" for one in of], rotation=45, ha="right")
    axes.set(title=f"Errors by target: {_plain(name)}", xlabel="target")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def as_svg(figure: Figure) -> str:
    """A figure for a page, with text in the colour of the surrounding text."""
    content = io.StringIO()
    with drawing():
        figure.savefig(
            content,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]),
        )
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # names that other figures on the page also have, and that nothing refers to
    return re.sub(r'<g id="[a-zA-Z_]+\d*_?\d+">', "<g>", svg)


def as_png(figure: Figure, path: object) -> None:
    """Writes a figure to a PNG file."""
    with drawing():
        figure.savefig(path, format="png", dpi=150)  # type: ignore[arg-type]


@contextmanager
def drawing() -> Iterator[None]:
    """A common style, without warnings about characters missing in matplotlib's font, which browsers have."""
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font|Matplotlib currently does not support")
        yield


def _figure(width: float = _WIDTH, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _curves(axes: Axes, lines: Sequence[tuple[Sequence[float], Sequence[float]]], names: Sequence[str]) -> None:
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for (x, y), name, color in zip(lines, names, colors, strict=False):
        axes.plot(x, y, color=_MAIN if len(names) == 1 else color, linewidth=1.5, label=_plain(name))
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")


def _plain(name: str) -> str:
    """A name without special meaning to matplotlib, shortened if it is long."""
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 3]}..."
    name = " ".join(name.split())
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name  # legends omit names that begin with _
