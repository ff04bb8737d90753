"""`smartbatch evaluate`."""

import re
from pathlib import Path
from typing import Literal

from transformers import AutoConfig

from smartbatch_lightning.console import echo
from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.evaluation.classification import ClassificationResults
from smartbatch_lightning.evaluation.evaluation import Evaluation
from smartbatch_lightning.storage import check_writable
from smartbatch_lightning.tasks.config import label_names_from_config
from smartbatch_lightning.tasks.thresholds import THRESHOLDS_FILE, read_thresholds, write_thresholds

# The label options as in other commands, where they are among the data's, unless quoted: then they are in the table.
_OF_THE_DATA = re.compile(r"(?<!['\"\w])--data\.(?=label_(column|delimiter|names)\b)")


def evaluate(
    predictions: str,
    label_column: str | list[str] = "label",
    text_column: str | list[str] | None = None,
    folder: str = "evaluation",
    label_delimiter: str | None = None,
    label_names: list[str] | None = None,
    thresholds: str | None = None,
    model_folder: str | None = None,
    temperature: float | Literal["fit"] | None = None,
    title: str | None = None,
) -> None:
    """Evaluates a table of predictions: prints tables, and writes JSON, figures and an HTML page to a folder.

    Args:
        predictions: The table, as written by predict: a Parquet or CSV file, or a folder of Parquet files.
        label_column: Label column; or several, one for each label or target.
        text_column: Text column or columns; needed to show the texts of the worst mistakes and accuracy by length.
        folder: Where evaluation.html, evaluation.json and the figures are written.
        label_delimiter: Separator for several labels in one string.
        label_names: Class names in the order of the integer ids in the label column.
        thresholds: `best` writes the threshold with the best F1 for each label to thresholds.json in the folder; or a
            file of such thresholds to apply, which is copied to the folder. Choose and apply them on different samples.
        model_folder: Folder of an exported model; thresholds.json is also written next to its config.json.
        temperature: Divide the logits by this before checking calibration; `fit` finds the value with the lowest loss
            on these samples.
        title: Title of the report; by default the name of the table.

    Raises:
        ValueError: The table lacks something that is needed, or the folder cannot be written.
    """
    if not predictions:
        raise UsageError("predictions is empty. Give a Parquet or CSV file written by predict.")
    check_writable(folder, "Set another --folder.")
    if model_folder is not None and thresholds != "best":
        raise UsageError(
            f"model_folder is {model_folder!r}, but there are no thresholds to write there. Set --thresholds=best, or "
            "leave model_folder out."
        )
    try:
        evaluation = Evaluation.from_table(
            predictions,
            label_column=label_column,
            label_delimiter=label_delimiter,
            label_names=label_names,
            text_column=text_column,
            thresholds=None if thresholds == "best" else thresholds,
            temperature=temperature,
            title=title,
        )
    except UsageError as error:
        raise UsageError(_OF_THE_DATA.sub("--", str(error)).replace(" or --data.problem_type", "")) from error
    if thresholds == "best" and not evaluation.task.names_with_threshold:
        raise UsageError(
            "thresholds=best needs a multi-label task or two classes, but here the outputs are "
            f"{join_quoted(evaluation.task.label_names)}. Leave it out."
        )
    if model_folder is not None:
        _check_model(model_folder, evaluation.task.label_names)
    by_label = None
    if thresholds == "best":
        assert isinstance(evaluation.results, ClassificationResults)
        by_label = evaluation.results.thresholds
    elif thresholds is not None:
        by_label = read_thresholds(thresholds, evaluation.task)
    evaluation.show()
    paths = evaluation.save(folder, by_label)
    if model_folder is not None and by_label is not None:
        paths.append(Path(model_folder) / THRESHOLDS_FILE)
        write_thresholds(by_label, paths[-1])
    echo("Wrote " + ", ".join(map(str, paths)))


def _check_model(folder: str, names: list[str]) -> None:
    """Rejects a folder without a model, or with a model for other labels."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"model_folder {folder} has no config.json of a model. Give the folder of an exported model."
        ) from error
    if sorted(label_names_from_config(config)) != sorted(names):
        raise UsageError(
            f"the model in {folder} has the labels {join_quoted(label_names_from_config(config))}, but the predictions "
            f"have {join_quoted(names)}. Give the folder of the model that made them."
        )
