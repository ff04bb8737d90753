"""Thresholds of probabilities by label: their file, and the labels that they predict."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.storage import atomic_write, refused
from smartbatch_lightning.tasks.multi_label import THRESHOLD, MultiLabelClassification
from smartbatch_lightning.tasks.single_label import SingleLabelClassification
from smartbatch_lightning.tasks.task import Task

FILE_NAME = "thresholds.json"


def names_with_threshold(task: Task) -> list[str]:
    """Labels for which a threshold decides: of several labels a sample each one, of two classes the second.

    Of more classes, and of a regression, there are none.
    """
    if isinstance(task, MultiLabelClassification):
        return task.label_names
    if isinstance(task, SingleLabelClassification) and len(task.label_names) == 2:
        return task.label_names[1:]
    return []


def predict_labels(
    task: Task, probabilities: NDArray[Any], thresholds: Mapping[str, float] | None = None
) -> NDArray[Any]:
    """Numbers of the predicted labels, as `task.decode` takes them.

    Args:
        task: Of single labels or of several.
        probabilities: (num_samples, num_labels).
        thresholds: By label, the probability above which it is predicted, by default 0.5; without any, the likeliest
            class of single labels.

    Returns:
        (num_samples,) for single labels, else (num_samples, num_labels).
    """
    names, thresholds = names_with_threshold(task), thresholds or {}
    if not isinstance(task, MultiLabelClassification) and not thresholds:
        return np.asarray(probabilities.argmax(axis=1))
    limits = np.array([thresholds.get(name, THRESHOLD) for name in names])
    if isinstance(task, MultiLabelClassification):
        return np.asarray(probabilities > limits)
    return np.asarray(probabilities[:, 1] > limits[0], np.int64)


def read_thresholds(path: str | Path, task: Task) -> dict[str, float]:
    """Thresholds by label.

    Args:
        path: The file, or the folder that holds it as `thresholds.json`.
        task: For whose labels they are.

    Raises:
        ValueError: It cannot be read, names a label for which there is no threshold, or one is not in [0, 1].
    """
    path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    try:
        thresholds = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the thresholds {path} cannot be read: {error}. Write them by smartbatch evaluate --thresholds=best."
        ) from error
    if not isinstance(thresholds, dict):
        raise UsageError(f"the thresholds {path} hold {type(thresholds).__name__}; give numbers by label.")
    names = names_with_threshold(task)
    if unknown := [name for name in thresholds if name not in names]:
        known = join_quoted(names) if names else f"none: there are {len(task.label_names):,} outputs, of one label each"
        raise UsageError(
            f"the thresholds {path} are for {join_quoted(unknown)}; labels that a threshold decides on are {known}."
        )
    for name, value in thresholds.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not 0 <= value <= 1:
            raise UsageError(
                f"the thresholds {path} have {value!r} for {join_quoted([name])}; give a number from 0 to 1."
            )
    return {name: float(value) for name, value in thresholds.items()}


def write_thresholds(thresholds: Mapping[str, float], path: Path) -> None:
    """Writes what `read_thresholds` reads.

    Raises:
        ValueError: There is no room.
    """
    text = json.dumps(dict(thresholds), indent=2, ensure_ascii=False) + "\n"
    with refused(path, "Make room, or give another folder."):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda tmp_path: tmp_path.write_text(text, encoding="utf-8"))
