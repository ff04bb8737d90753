"""Files of decision thresholds by label."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.storage import atomic_write, reporting_write_errors
from smartbatch_lightning.tasks.task import Task

THRESHOLDS_FILE = "thresholds.json"


def read_thresholds(path: str | Path, task: Task | None = None) -> dict[str, float]:
    """Reads thresholds by label.

    Args:
        path: The file, or a folder with a `thresholds.json`.
        task: The task whose labels they are for; None if it is not known yet.

    Raises:
        ValueError: The file cannot be read, has a value not in [0, 1], or a label to which the task applies no
            threshold.
    """
    path = Path(path) / THRESHOLDS_FILE if Path(path).is_dir() else Path(path)
    try:
        thresholds = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the thresholds {path} cannot be read: {error}. Create them with smartbatch evaluate --thresholds=best."
        ) from error
    if not isinstance(thresholds, dict):
        raise UsageError(f"the thresholds {path} hold {type(thresholds).__name__}; give numbers by label.")
    for name, value in thresholds.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not 0 <= value <= 1:
            raise UsageError(
                f"the thresholds {path} have {value!r} for {join_quoted([name])}; give a number from 0 to 1."
            )
    names = [*thresholds] if task is None else task.names_with_threshold
    if unknown := [name for name in thresholds if name not in names]:
        known = "only to several labels or the second of two classes. Leave thresholds out"
        if names:
            known = f"here to {join_quoted(names)}. Remove the others from the file, or give another file"
        raise UsageError(f"the thresholds {path} are for {join_quoted(unknown)}, but thresholds apply {known}.")
    return {name: float(value) for name, value in thresholds.items()}


def write_thresholds(thresholds: Mapping[str, float], path: Path) -> None:
    """Writes a file for `read_thresholds`.

    Raises:
        ValueError: The file cannot be written.
    """
    text = json.dumps(dict(thresholds), indent=2, ensure_ascii=False) + "\n"
    with reporting_write_errors(path, "Free some space, or give another folder."):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda tmp_path: tmp_path.write_text(text, encoding="utf-8"))
