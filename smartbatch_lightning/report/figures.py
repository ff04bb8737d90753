"""Figures of a report: classes, lengths, tokens by strategy, widths of batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from smartbatch_lightning.plots import MAIN, SECOND, THIRD, THOUSANDS, drawing, plain

_MAX_BARS, _MAX_POINTS = 40, 50_000


@drawing()
def classes(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Samples of each class, by split; if there are very many classes, only the largest."""
    bars = [
        (f"{split}: {plain(name)}", count) for split, of_split in counts.items() for name, count in of_split.items()
    ]
    title = "Samples of each class"
    if len(bars) > _MAX_BARS:
        title += f", the {_MAX_BARS} largest of {len(bars):,}"
        bars = sorted(bars, key=lambda bar: -bar[1])[:_MAX_BARS]
    figure, [axes] = _figure(1, height=1.4 + 0.35 * len(bars))
    drawn = axes.barh([name for name, _ in bars], [count for _, count in bars], color=MAIN)
    axes.bar_label(drawn, labels=[f"{count:,}" for _, count in bars], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=title, xlabel="samples")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_formatter(THOUSANDS)
    return figure


@drawing()
def lengths(tokens: NDArray[np.integer], max_length: int) -> Figure:
    """Lengths of the samples, in data order and sorted; if there are very many, a regular subset."""
    figure, panels = _figure(2)
    every = -(-len(tokens) // _MAX_POINTS)
    for axes, title, shown in zip(panels, ("in data order", "sorted"), (tokens, np.sort(tokens)), strict=True):
        axes.plot(np.arange(len(shown))[::every], shown[::every], ".", markersize=1, color=MAIN)
        axes.axhline(max_length, color=THIRD, linewidth=1, linestyle="--")
        _frame(axes, f"Lengths {title}", "sample", "tokens", max(max_length, int(tokens.max())))
    return figure


@drawing()
def tokens(computed: Mapping[str, int], real: int) -> Figure:
    """Tokens per epoch by strategy: real ones and padding."""
    figure, [axes] = _figure(1, height=1.3 + 0.4 * len(computed))
    names = list(computed)
    axes.barh(names, [real] * len(names), color=MAIN, label="real tokens")
    padding = axes.barh(names, [total - real for total in computed.values()], left=real, color=SECOND, label="padding")
    axes.bar_label(padding, labels=[f"{total:,}" for total in computed.values()], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set(title="Tokens of an epoch", xlabel="tokens")
    axes.xaxis.set_major_formatter(THOUSANDS)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@drawing()
def widths(of_batches: Mapping[str, NDArray[np.int64]], max_length: int) -> Figure:
    """Widths of an epoch's batches in order, by strategy."""
    figure, panels = _figure(len(of_batches))
    for axes, (name, shown) in zip(panels, of_batches.items(), strict=True):
        axes.plot(shown, ".", markersize=3, color=MAIN)
        _frame(axes, f"Widths of batches: {name}", "batch of the epoch", "tokens", max(max_length, int(shown.max())))
    return figure


def _figure(columns: int, height: float = 3.6) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(9, height), layout="constrained")
    panels: Any = figure.subplots(1, columns, squeeze=False)
    return figure, panels[0]


def _frame(axes: Axes, title: str, xlabel: str, ylabel: str, most: int) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.05 * most))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(THOUSANDS)
    axes.yaxis.set_major_formatter(THOUSANDS)
