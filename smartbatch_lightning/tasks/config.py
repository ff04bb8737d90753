"""What a model's configuration says of its task."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.tasks.labels import LabelType

LABEL_TYPE = "label_type"  # how labels stand in the data, beside `id2label`


def label_type_of(config: PretrainedConfig) -> LabelType:
    """How labels stood in the data that a model was trained on."""
    label_type: LabelType = config.to_dict().get(LABEL_TYPE, "text")
    return label_type


def label_names_from_config(config: PretrainedConfig) -> list[str]:
    """Names of a model's outputs, in their order."""
    return [name for _, name in sorted((int(number), str(name)) for number, name in (config.id2label or {}).items())]


def problem_type_of(config: PretrainedConfig) -> str:
    """What a model with a trained head was trained for; as in transformers, one output alone is a regression."""
    several = len(label_names_from_config(config)) > 1
    return config.problem_type or ("single_label_classification" if several else "regression")


def check_problem_type(config: PretrainedConfig, problem_type: str) -> None:
    """Refuses a model that was trained for another task.

    Raises:
        ValueError: It was.
    """
    if (trained := problem_type_of(config)) != problem_type:
        raise UsageError(
            f"the model was trained for {trained}, not for {problem_type}. Give a model that was, or one that is not "
            "fine-tuned; or set --data.problem_type."
        )


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether outputs have no names but `LABEL_0`, `LABEL_1` and so on."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def names_in_config(names: Sequence[str]) -> dict[str, Any]:
    """Names of outputs both ways, as a configuration holds them."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
