"""The task of a run: from the data, or from a trained model."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.registry import look_up
from smartbatch_lightning.tasks import TASKS, Regression, Task
from smartbatch_lightning.tasks.config import problem_type_of
from smartbatch_lightning.tasks.detection import detect_problem_type
from smartbatch_lightning.tasks.source import LabelColumns, LabelSource

_DEFAULT_PROBLEM_TYPE = "single_label_classification"


def find_task_class(problem_type: str) -> type[Task]:
    """The class of a task, by its name or import path.

    Raises:
        ValueError: There is none, or it lacks members of the protocol `Task`.
    """
    task_class = look_up(problem_type, TASKS, "problem_type")
    abstract = getattr(task_class, "__abstractmethods__", ())
    members = [name for name in vars(Task) if not name.startswith("_")]
    lacking = [name for name in members if name in abstract or not hasattr(task_class, name)]
    if lacking or not isinstance(task_class, type):
        lacks = f"lacks {join_quoted(lacking)}" if lacking else "is not a class"
        raise UsageError(
            f"problem_type is {problem_type!r}, which {lacks}; give a class with all members of `tasks.Task`."
        )
    return task_class


@dataclass(frozen=True)
class TaskOptions:
    """A user's settings for the task.

    Attributes:
        problem_type: Name or import path of the task; by default inferred from the training labels.
        label_names: Names of the labels; by default those in the data.
        source: Where the labels are in the data.
        standardize_targets: Standardize the targets of a regression.

    Raises:
        ValueError: There is no such task, or the label names are not valid.
    """

    problem_type: str | None
    label_names: tuple[str, ...] | None
    source: LabelSource
    standardize_targets: bool = False

    def __post_init__(self) -> None:
        task_class = find_task_class(self.problem_type or _DEFAULT_PROBLEM_TYPE)
        # a single name may be that of a regression target
        if self.label_names is not None and (self.problem_type is not None or len(self.label_names) != 1):
            task_class.from_names(self.label_names, self.source)

    def find(
        self, train_labels: LabelColumns | None, trained_config: PretrainedConfig | None, *, training: bool
    ) -> Task | None:
        """Finds the task: when training, that of the data; otherwise the one that the model was trained for, if known.

        If both have the same labels, they are in the model's order.

        Args:
            train_labels: Labels of the training split, if it exists and has labels.
            trained_config: Configuration of the model, if it was trained to classify.
            training: Whether the run trains; its labels may then differ from the model's.

        Returns:
            The task; None if it is unknown.

        Raises:
            ValueError: The labels cannot be learnt, or the model was trained for others.
        """
        problem_type = self.problem_type
        if problem_type is None:
            found = _DEFAULT_PROBLEM_TYPE if train_labels is None else detect_problem_type(train_labels)
            problem_type = found if training or trained_config is None else problem_type_of(trained_config)
            train_labels = train_labels if found == problem_type else None
        task_class = find_task_class(problem_type)
        trained = None if trained_config is None else task_class.from_config(trained_config)
        task = None if self.label_names is None else task_class.from_names(self.label_names, self.source)
        if task is None and train_labels is not None and (training or trained is None):
            task = task_class.from_columns(train_labels)
        if self.standardize_targets and not isinstance(task or trained, Regression | None):
            raise UsageError(
                f"standardize_targets is true, but problem_type is {problem_type!r}, which has no targets. Set "
                "--data.problem_type=regression if labels are numbers; otherwise leave standardize_targets out."
            )
        if task is None or trained is None:
            return task or trained
        if training and sorted(task.label_names) != sorted(trained.label_names):
            return task  # the model decides whether it can learn these
        return task.aligned_with(trained)
