"""An evaluation as a self-contained HTML page."""

from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from smartbatch_lightning.plots import as_svg

if TYPE_CHECKING:
    from smartbatch_lightning.evaluation.evaluation import Evaluation

_NAMES = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "f1": "macro F1",
    "f1_micro": "micro F1",
    "hamming_distance": "Hamming distance",
    "matthews": "Matthews",
    "auroc": "mean AUROC",
    "average_precision": "mean average precision",
    "log_loss": "log loss",
    "expected_calibration_error": "calibration error",
    "rmse": "RMSE",
    "mae": "MAE",
    "bias": "bias",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "r2": "R²",
}


def page(evaluation: "Evaluation") -> str:
    """The page; names and texts are escaped."""
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, trim_blocks=True)
    results = evaluation.results
    return environment.get_template("page.html.jinja").render(
        title=evaluation.title,
        samples=f"{len(evaluation.scores):,}",
        tiles=[
            (_NAMES.get(name, name), f"{value:.4g}") for name, value in results.summary.items() if value is not None
        ],
        sections=[
            {
                "title": section.title,
                "note": section.note,
                "rows": section.rows,
                "figures": [_drawn(figure) for figure in section.figures.values()],
            }
            for section in evaluation.sections
        ],
        notes=results.notes,
        mistakes=results.mistakes,
        of_classes=not evaluation.is_regression,
        unit="" if evaluation.lengths is None else evaluation.lengths.unit,
    )


def _drawn(figure: Any) -> dict[str, Any]:
    """A figure for the page; on narrow screens, small figures shrink and large ones scroll."""
    width = round(96 * figure.get_figwidth())
    return {"svg": Markup(as_svg(figure)), "width": width, "least": 280 if width < 500 else round(0.8 * width)}
