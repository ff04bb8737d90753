"""The task in a model's configuration."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.tasks.labels import LabelEncoder

_LABEL_TYPE = "label_type"  # how labels are written in the data; next to `id2label`


def label_names_from_config(config: PretrainedConfig) -> list[str]:
    """Names of a model's outputs, in order."""
    return [name for _, name in sorted((int(number), str(name)) for number, name in (config.id2label or {}).items())]


def problem_type_of(config: PretrainedConfig) -> str:
    """The `problem_type` that a model's head was trained for; as in transformers, a single output means regression."""
    several = len(label_names_from_config(config)) > 1
    return config.problem_type or ("single_label_classification" if several else "regression")


def check_problem_type(config: PretrainedConfig, problem_type: str) -> None:
    """Rejects a model that was trained for another task.

    Raises:
        ValueError: The task differs.
    """
    if (trained := problem_type_of(config)) != problem_type:
        hint = "" if config.problem_type else f" {missing_problem_type_hint(problem_type)}"
        raise UsageError(
            f"the model was trained for {trained}, not for {problem_type}. Use a model trained for it, or one that is "
            f"not fine-tuned; or set --data.problem_type.{hint}"
        )


def missing_problem_type_hint(problem_type: str) -> str:
    """The remedy for a model whose configuration does not name its task, as for many models on the Hub."""
    return (
        f"If the model was trained for {problem_type} and its configuration does not say so, set "
        f'--model.model_kwargs=\'{{"problem_type": "{problem_type}"}}\'.'
    )


def labels_from_config(config: PretrainedConfig, problem_type: str) -> LabelEncoder | None:
    """The labels that a model was trained for; None if another library's model has only `LABEL_0` and so on.

    Raises:
        ValueError: It was trained for another task.
    """
    check_problem_type(config, problem_type)
    names, label_type = label_names_from_config(config), config.to_dict().get(_LABEL_TYPE)
    if len(set(names)) < len(names):
        raise UsageError(
            f"the model's configuration has the class names {join_quoted(names)}, two of which are the same. Give each "
            "class its own name in id2label."
        )
    if label_type is None and all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return None
    return LabelEncoder(tuple(names), label_type or "text")


def labels_in_config(labels: LabelEncoder, problem_type: str) -> dict[str, Any]:
    """Configuration fields read by `labels_from_config`."""
    return {**names_in_config(labels.names), "problem_type": problem_type, _LABEL_TYPE: labels.label_type}


def names_in_config(names: Sequence[str]) -> dict[str, Any]:
    """Names of outputs in both directions, as in a configuration."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
