"""Results as sections of a report: tables and figures under a title, for both terminal and page."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from smartbatch_lightning.evaluation import figures
from smartbatch_lightning.evaluation.calibration import Calibration
from smartbatch_lightning.evaluation.classification import ClassificationResults, ClassResult
from smartbatch_lightning.evaluation.regression import RegressionResults, TargetResult
from smartbatch_lightning.evaluation.samples import Group, Lengths

_MAX_TARGETS = 4  # with their own figures
_TARGET_FIGURES = ("scatter", "residuals", "quantiles")
# Names of all figures that a report may have.
FIGURES = (
    *("labels", "confusion", "roc", "precision_recall", "reliability", "lengths", *_TARGET_FIGURES),
    *(f"{name}_{number}" for name in _TARGET_FIGURES for number in range(_MAX_TARGETS)),
)


@dataclass(frozen=True)
class Section:
    """A section of a report.

    Attributes:
        title: Title of the section.
        rows: Rows of the section's table; each maps columns to cells.
        figures: Figures by name; files have the same names.
        note: A remark for the reader.
    """

    title: str
    rows: list[dict[str, str]] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    note: str = ""


def classification_sections(
    results: ClassificationResults, multi_label: bool, lengths: Lengths | None
) -> list[Section]:
    """Sections for single-label or multi-label classification."""
    names = [one.name for one in results.classes]
    sections = [
        Section(
            "By label" if multi_label else "By class",
            _without_empty([_class_row(one, "label" if multi_label else "class") for one in results.classes]),
            note="The best threshold has the best F1 on these samples." if results.thresholds else "",
        )
    ]
    if multi_label:
        sections.append(Section("Hits and misses", figures={"labels": figures.label_counts(results.classes)}))
    else:
        sections.append(
            Section(
                "Confusion",
                [
                    {
                        "label": one.label,
                        "predicted as": one.prediction,
                        "samples": f"{one.samples:,}",
                        "of the class": f"{one.share:.1%}",
                    }
                    for one in results.confusions
                ],
                {"confusion": figures.confusion(results.confusion_matrix, names)},
            )
        )
    if results.curves:
        left_out = len(names) > len(results.curves) and (multi_label or len(names) > 2)
        sections.append(
            Section(
                "Curves",
                figures={
                    "roc": figures.roc(results.curves),
                    "precision_recall": figures.precision_recall(results.curves),
                },
                note=f"The {len(results.curves)} classes with the lowest average precision." if left_out else "",
            )
        )
    calibrations = {"as predicted": results.calibration}
    if results.scaled is not None:
        calibrations[f"temperature {results.temperature:.3g}"] = results.scaled
    sections.append(
        Section(
            "Calibration",
            [_calibration_row(name, one) for name, one in calibrations.items()],
            {"reliability": figures.reliability(calibrations)},
            note="Based on the probability of every label."
            if multi_label
            else "Based on the probability of the likeliest class.",
        )
    )
    value = "F1 of a sample" if multi_label else "accuracy"
    return sections + _by_length(results.lengths, lengths, value, share=True)


def regression_sections(results: RegressionResults, lengths: Lengths | None) -> list[Section]:
    """Sections for regression with one or more targets."""
    sections = [Section("By target", [_target_row(one) for one in results.targets])]
    for one in results.targets[:_MAX_TARGETS]:
        labels, predictions = results.values[one.name]
        suffix = "" if len(results.targets) == 1 else f"_{results.targets.index(one)}"
        sections.append(
            Section(
                f"Errors: {one.name}",
                [
                    {
                        "target": f"{part.low:.4g} to {part.high:.4g}",
                        "samples": f"{part.samples:,}",
                        "MAE": f"{part.mae:.4g}",
                        "RMSE": f"{part.rmse:.4g}",
                        "bias": f"{part.bias:+.4g}",
                    }
                    for part in one.quantiles
                ],
                {
                    f"scatter{suffix}": figures.scatter(labels, predictions, one.name),
                    f"residuals{suffix}": figures.residuals(predictions - labels, one.name),
                    f"quantiles{suffix}": figures.quantiles(one.quantiles, one.name),
                },
            )
        )
    return sections + _by_length(results.lengths, lengths, "mean absolute error", share=False)


def _class_row(one: ClassResult, what: str) -> dict[str, str]:
    return {
        what: one.name,
        "support": f"{one.support:,}",
        "predicted": f"{one.predicted:,}",
        "precision": _share(one.precision),
        "recall": _share(one.recall),
        "F1": _share(one.f1),
        "AUROC": _share(one.auroc),
        "average precision": _share(one.average_precision),
        "best threshold": _share(one.best_threshold),
        "best F1": _share(one.best_f1),
    }


def _without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows without the columns that are empty in all of them."""
    kept = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    return [{name: row[name] for name in kept} for row in rows]


def _calibration_row(name: str, one: Calibration) -> dict[str, str]:
    return {
        "probabilities": name,
        "expected calibration error": f"{one.expected_calibration_error:.4f}",
        "log loss": f"{one.log_loss:.4f}",
    }


def _target_row(one: TargetResult) -> dict[str, str]:
    return {
        "target": one.name,
        "MAE": f"{one.mae:.4g}",
        "RMSE": f"{one.rmse:.4g}",
        "bias": f"{one.bias:+.4g}",
        "Pearson": _share(one.pearson),
        "Spearman": _share(one.spearman),
        "R²": _share(one.r2),
    }


def _by_length(groups: Sequence[Group], lengths: Lengths | None, value: str, *, share: bool) -> list[Section]:
    if not groups or lengths is None:
        return []
    rows = [
        {
            lengths.unit: one.name,
            "samples": f"{one.samples:,}",
            value: f"{one.value:.1%}" if share else f"{one.value:.4g}",
        }
        for one in groups
    ]
    figure = figures.groups(groups, f"{value[0].upper()}{value[1:]} by length", lengths.unit, value, share=share)
    note = (
        ""
        if lengths.max_length is None
        else f"Texts of more than {lengths.max_length:,} tokens were truncated to that length."
    )
    return [Section("By length", rows, {"lengths": figure}, note)]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
