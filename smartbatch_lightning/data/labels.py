"""Which task a run has: the data's, or that of a trained model."""

from collections.abc import Mapping

from datasets import Dataset
from transformers import PretrainedConfig

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.registry import look_up
from smartbatch_lightning.tasks import TASKS, Task


def find_task_class(problem_type: str) -> type[Task]:
    """The class of a task, by its name or import path.

    Raises:
        ValueError: There is none, or it lacks something of the protocol `Task`.
    """
    task_class = look_up(problem_type, TASKS, "problem_type")
    lacking = [name for name in vars(Task) if not name.startswith("_") and not hasattr(task_class, name)]
    if lacking or not isinstance(task_class, type):
        lacks = f"lacks {join_quoted(lacking)}" if lacking else "is no class"
        raise UsageError(f"problem_type is {problem_type!r}, which {lacks}; give a class with all of `tasks.Task`.")
    return task_class


def find_task(
    task_class: type[Task],
    given: Task | None,
    splits: Mapping[str, Dataset],
    train_split: str,
    label_column: str,
    trained_config: PretrainedConfig | None,
    *,
    training: bool,
) -> Task | None:
    """In training the task of the data; elsewhere the one that the model was trained for, where it says.

    Where both have the same labels, they stand in the order of the model's.

    Args:
        task_class: Of the task.
        given: That of names that the user gave.
        splits: All splits.
        train_split: Name of the split to train on.
        label_column: Name of the column of labels.
        trained_config: Configuration of what the model was trained to classify, if it was.
        training: The run trains; labels may then be others than the model's.

    Returns:
        None where nothing tells.

    Raises:
        ValueError: The labels cannot be learnt, or the model was trained for others.
    """
    trained = None if trained_config is None else task_class.from_config(trained_config)
    labelled = train_split in splits and label_column in splits[train_split].column_names
    task = given
    if task is None and labelled and (training or trained is None):
        task = task_class.from_dataset(splits[train_split], label_column, train_split)
    if task is None or trained is None:
        return task or trained
    if training and sorted(task.label_names) != sorted(trained.label_names):
        return task  # the model decides whether it can learn these
    return task.aligned_with(trained)
