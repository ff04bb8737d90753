"""Evaluation: compares predictions with labels, and reports results as tables, JSON, figures and a page."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from smartbatch_lightning.console import echo, printable, table_of
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.evaluation import sections
from smartbatch_lightning.evaluation.classification import ClassificationResults, classification_results
from smartbatch_lightning.evaluation.page import page
from smartbatch_lightning.evaluation.regression import RegressionResults, regression_results
from smartbatch_lightning.evaluation.samples import Lengths
from smartbatch_lightning.plots import as_png
from smartbatch_lightning.storage import write_into
from smartbatch_lightning.tasks import MultiLabelClassification, Regression, SingleLabelClassification, Task
from smartbatch_lightning.tasks.thresholds import THRESHOLDS_FILE, write_thresholds

_MAX_ROWS, _MAX_MISTAKES, _LINES_PER_TEXT = 30, 3, 4  # in the terminal


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Evaluates a model's predictions against the labels.

    In a notebook: `evaluation = Evaluation.from_table("predictions.parquet")`, then `evaluation.show()` and
    `evaluation.figures()`.

    Attributes:
        task: The task; its label names are those of the outputs.
        scores: Probabilities (num_samples, num_labels); for regression, predictions (num_samples,), or
            (num_samples, num_targets) for several targets.
        labels: As encoded by the task: class ids (num_samples,); whether each sample has each label
            (num_samples, num_labels); or targets, with the shape of `scores`.
        predicted_labels: Predictions, with the shape of `labels`; by default the most likely class, or the labels with
            a probability above 0.5.
        texts: The samples' texts; any sequence that can be indexed.
        lengths: The samples' lengths.
        index: Row of each sample in the data; by default 0, 1, 2 and so on.
        title: What was evaluated, such as the name of a split.
        temperature: Divide the logits by this before checking calibration; `fit` finds the value with the lowest loss
            on these samples.

    Raises:
        ValueError: There are no samples, an array has the wrong shape, or a number is not finite or not a probability.
    """

    task: Task
    scores: NDArray[Any]
    labels: NDArray[Any]
    predicted_labels: NDArray[Any] | None = None
    texts: Sequence[str] | None = None
    lengths: Lengths | None = None
    index: NDArray[np.integer] | None = None
    title: str = "Evaluation"
    temperature: float | Literal["fit"] | None = None

    def __post_init__(self) -> None:
        _check_task(self.task)
        self._check_shapes()
        _check_finite(self.scores, "score", self.rows)
        _check_finite(self.labels, "label", self.rows)
        if not self.is_regression:
            self._check_probabilities()
        _check_temperature(self.temperature, self.is_regression)

    @classmethod
    def from_table(cls, path: str | Path, **options: Any) -> "Evaluation":
        """Reads a table of predictions written by `predict`.

        Args:
            path: A Parquet or CSV file, or a folder of Parquet files.
            options: Arguments of `read_predictions`, such as the columns of labels and texts.

        Raises:
            ValueError: The table lacks something that is needed; the message says what it has.
        """
        from smartbatch_lightning.evaluation.prediction_table import read_predictions

        return read_predictions(path, **options)

    @property
    def is_regression(self) -> bool:
        """Whether numbers are predicted."""
        return isinstance(self.task, Regression)

    @property
    def rows(self) -> NDArray[np.integer]:
        """Row of each sample in the data. Shape (num_samples,)."""
        return np.arange(len(self.scores)) if self.index is None else self.index

    @property
    def predicted(self) -> NDArray[Any]:
        """Encoded predictions, with the shape of `labels`."""
        if self.predicted_labels is not None:
            return self.predicted_labels
        return self.task.predict_labels(self.scores)

    @cached_property
    def results(self) -> ClassificationResults | RegressionResults:
        """All results."""
        return regression_results(self) if self.is_regression else classification_results(self)

    @cached_property
    def sections(self) -> list[sections.Section]:
        """Tables and figures, in order."""
        if isinstance(self.results, RegressionResults):
            return sections.regression_sections(self.results, self.lengths)
        multi_label = isinstance(self.task, MultiLabelClassification)
        return sections.classification_sections(self.results, multi_label, self.lengths)

    def to_dict(self) -> dict[str, Any]:
        """All results, ready for JSON."""
        return {
            "title": self.title,
            "samples": len(self.scores),
            "label_names": self.task.label_names,
            **self.results.to_dict(),
        }

    def figures(self) -> dict[str, Figure]:
        """All figures, by name."""
        return {name: figure for section in self.sections for name, figure in section.figures.items()}

    def scalars(self) -> dict[str, float]:
        """Metrics for a logger: those over all samples, and with up to a hundred classes, the F1 of each."""
        results, scalars = self.results, dict(self.results.summary)
        if isinstance(results, ClassificationResults) and len(results.classes) <= 100:
            scalars |= {f"f1/{one.name}": one.f1 for one in results.classes}
        return {name: value for name, value in scalars.items() if value is not None}

    def html(self) -> str:
        """A self-contained page with everything."""
        return page(self)

    def save(self, folder: str | Path, thresholds: Mapping[str, float] | None = None) -> list[Path]:
        """Writes `evaluation.json`, `evaluation.html` and a PNG for each figure; returns their paths.

        Files of an earlier report in the folder are removed.

        Args:
            folder: Folder to write to.
            thresholds: Thresholds by label, for `predict`; written to `thresholds.json`.

        Raises:
            ValueError: The folder cannot be written.
        """

        def write(tmp_folder: Path) -> None:
            tmp_folder.mkdir(parents=True)
            written = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
            (tmp_folder / "evaluation.json").write_text(written + "\n", encoding="utf-8")
            (tmp_folder / "evaluation.html").write_text(self.html(), encoding="utf-8")
            for name, figure in self.figures().items():
                as_png(figure, tmp_folder / f"{name}.png")
            if thresholds is not None:
                write_thresholds(thresholds, tmp_folder / THRESHOLDS_FILE)

        return write_into(Path(folder), write, [THRESHOLDS_FILE, *(f"{name}.png" for name in sections.FIGURES)])

    def show(self) -> None:
        """Prints the tables, remarks and the worst mistakes."""
        echo(f"{self.title}: {len(self.scores):,} samples. {self.summary_line()}")
        for section in self.sections:
            if section.rows:
                echo("")
                echo(table_of(section.rows[:_MAX_ROWS], section.title))
                if len(section.rows) > _MAX_ROWS:
                    echo(f"... and {len(section.rows) - _MAX_ROWS:,} more.")
        for note in self.results.notes:
            echo(note)
        self._show_mistakes()

    def summary_line(self) -> str:
        """Metrics over all samples, on one line."""
        values = self.results.summary.items()
        return ", ".join(f"{name} {value:.4g}" for name, value in values if value is not None) + "."

    def _show_mistakes(self) -> None:
        mistakes = self.results.mistakes
        echo("")
        echo("The worst mistakes:" if mistakes else "There are no mistakes.")
        for one in mistakes[:_MAX_MISTAKES]:
            echo(f"row {one.row:,}: {one.label}, predicted as {one.prediction}, loss {one.loss:.4g}")
            for line in textwrap.wrap(printable(one.text or ""), 78, max_lines=_LINES_PER_TEXT, placeholder=" ..."):
                echo(f"  {line}")

    def _check_shapes(self) -> None:
        samples, outputs = len(self.scores), len(self.task.label_names)
        if not samples:
            raise UsageError("there are no samples to evaluate. Give one or more.")
        scores = (samples,) if self.is_regression and outputs == 1 else (samples, outputs)
        labels = (samples,) if isinstance(self.task, SingleLabelClassification) else scores
        for name, found, expected in (
            ("scores", self.scores, scores),
            ("labels", self.labels, labels),
            ("predicted_labels", self.predicted_labels, labels),
            ("index", self.index, (samples,)),
            ("lengths", None if self.lengths is None else self.lengths.values, (samples,)),
        ):
            if found is not None and np.shape(found) != expected:
                raise UsageError(f"{name} has the shape {np.shape(found)}; give {expected}, for {outputs} outputs.")
        if self.texts is not None and len(self.texts) != samples:
            raise UsageError(f"there are {len(self.texts):,} texts for {samples:,} samples; give one for each.")

    def _check_probabilities(self) -> None:
        outside = (self.scores < 0) | (self.scores > 1)
        if outside.any():
            sample, number = np.argwhere(outside)[0]
            raise UsageError(
                f"row {self.rows[sample]} has {self.scores[sample, number]:g} for {self.task.label_names[number]!r}, "
                "which is not a probability. Give numbers from 0 to 1."
            )
        if isinstance(self.task, SingleLabelClassification):
            sums = self.scores.sum(axis=1)
            if (wrong := np.abs(sums - 1) > 0.01).any():
                sample = int(wrong.argmax())
                raise UsageError(
                    f"the probabilities of row {self.rows[sample]} sum to {sums[sample]:.4g}, but for single-label "
                    "tasks they have to sum to 1. For multi-label tasks, give labels as lists, with a delimiter, or "
                    "one column each."
                )
            if self.labels.min() < 0 or self.labels.max() >= len(self.task.label_names):
                raise UsageError(
                    f"labels are from {self.labels.min()} to {self.labels.max()}; give class numbers from 0 to "
                    f"{len(self.task.label_names) - 1}."
                )


def _check_task(task: Task) -> None:
    if not isinstance(task, SingleLabelClassification | MultiLabelClassification | Regression):
        raise UsageError(
            f"{type(task).__name__} cannot be evaluated. Give a single-label, multi-label or regression task."
        )


def _check_finite(values: NDArray[Any], what: str, rows: NDArray[np.integer]) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        where = np.argwhere(~finite)[0]
        raise UsageError(f"row {rows[where[0]]} has the {what} {values[tuple(where)]}. Give a finite number.")


def _check_temperature(temperature: float | str | None, is_regression: bool) -> None:
    if temperature is None or (temperature == "fit" and not is_regression):
        return
    if is_regression:
        raise UsageError("a temperature is given, which is for probabilities, but numbers are predicted. Leave it out.")
    if isinstance(temperature, str) or not 0 < temperature < math.inf:
        raise UsageError(f"temperature is {temperature!r}; give a number above 0, or fit.")
