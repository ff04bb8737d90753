"""Tasks: one file for each kind."""

from smartbatch_lightning.tasks.multi_label import MultiLabelClassification
from smartbatch_lightning.tasks.regression import Regression
from smartbatch_lightning.tasks.single_label import SingleLabelClassification
from smartbatch_lightning.tasks.task import Task

# By transformers' `problem_type`; a data module also takes the import path of a class.
TASKS: dict[str, type[Task]] = {
    "single_label_classification": SingleLabelClassification,
    "multi_label_classification": MultiLabelClassification,
    "regression": Regression,
}

__all__ = ["TASKS", "MultiLabelClassification", "Regression", "SingleLabelClassification", "Task"]
