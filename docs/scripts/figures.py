"""Draws how sentences fill batches, for the pages about the idea: python docs/scripts/figures.py."""

import random
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

SENTENCES = [
    "Un film lent .",
    "On rit du début à la fin , et on en redemande .",
    "Magnifique !",
    "Les deux acteurs jouent bien .",
    "Le scénario ne tient pas debout , quel dommage .",
    "À éviter .",
    "La musique est belle .",
    "Je le conseille à tous .",
]
BATCH_SIZE = 2
COLORS = ["#7fb3d5", "#f5b971", "#8fc9a1", "#c9a5d8"]
PADDING = "#e4e4e4"
Batch = list[list[str]]  # words by sentence


def main() -> None:
    """Writes the figures beside the pages."""
    folder = Path(__file__).parents[1]
    tokens = [sentence.split() for sentence in SENTENCES]
    by_length = sorted(tokens, key=len)
    longest = max(map(len, tokens))
    shuffled, uniform = _batches(tokens), _batches(by_length)
    random.Random(2).shuffle(uniform)
    figures = {
        "fixed": (shuffled, [longest] * len(shuffled)),
        "dynamic": (shuffled, [max(map(len, batch)) for batch in shuffled]),
        "uniform": (uniform, [max(map(len, batch)) for batch in uniform]),
    }
    for name, (batches, widths) in figures.items():
        figure, axes = plt.subplots(figsize=(10, 3.6))
        _draw(axes, batches, widths, longest, words=True)
        _save(figure, folder / f"{name}.png")

    figure, axes = plt.subplots(figsize=(10, 2.1))
    _draw_packed(axes, shuffled)
    _save(figure, folder / "packed.png")

    figure, panels = plt.subplots(1, 3, figsize=(10, 2.4))
    names = {"fixed": "fixed padding", "dynamic": "dynamic padding", "uniform": "uniform length"}
    for axes, (name, (batches, widths)) in zip(panels, figures.items(), strict=True):
        _draw(axes, batches, widths, longest, words=False)
        axes.set_title(f"{names[name]}\n{axes.get_title()}", fontsize=9)
    _save(figure, folder / "padding.png")


def _batches(tokens: list[list[str]]) -> list[Batch]:
    return [tokens[first : first + BATCH_SIZE] for first in range(0, len(tokens), BATCH_SIZE)]


def _draw(axes: Axes, batches: list[Batch], widths: list[int], longest: int, *, words: bool) -> None:
    """Draws a row for each sentence, and a gap between batches; the title counts the tokens."""
    top = 0.0
    for batch, width, color in zip(batches, widths, COLORS, strict=True):
        for sentence in batch:
            for column in range(width):
                word = sentence[column] if column < len(sentence) else ""
                _cell(axes, column, top, word if words else "", color if word else PADDING)
            top += 1
        top += 0.4
    real = sum(len(sentence) for batch in batches for sentence in batch)
    total = sum(width * len(batch) for batch, width in zip(batches, widths, strict=True))
    axes.set_title(f"{total} tokens, {total - real} of them padding", fontsize=10)
    _frame(axes, longest, top - 0.4)


def _draw_packed(axes: Axes, batches: list[Batch]) -> None:
    """Draws each batch as one row; a darker edge stands where a sentence starts."""
    for number, (batch, color) in enumerate(zip(batches, COLORS, strict=True)):
        column = 0
        for sentence in batch:
            axes.plot([column, column], [number * 1.4, number * 1.4 + 1], color="black", linewidth=3)
            for word in sentence:
                _cell(axes, column, number * 1.4, word, color, size=6)
                column += 1
    total = sum(len(sentence) for batch in batches for sentence in batch)
    axes.set_title(f"{total} tokens, none of them padding", fontsize=10)
    _frame(axes, max(sum(map(len, batch)) for batch in batches), len(batches) * 1.4 - 0.4)


def _cell(axes: Axes, column: int, top: float, word: str, color: str, size: float = 7) -> None:
    axes.add_patch(Rectangle((column, top), 1, 1, facecolor=color, edgecolor="white"))
    if word:
        axes.text(column + 0.5, top + 0.5, word, ha="center", va="center", fontsize=size, clip_on=True)


def _frame(axes: Axes, width: float, height: float) -> None:
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
