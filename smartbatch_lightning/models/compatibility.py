"""Whether a model fits the data: its labels, its longest input, its vocabulary and how its batches are made."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from smartbatch_lightning.contract import TextData
from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.models.packing import check_packing
from smartbatch_lightning.tasks.config import check_problem_type, label_names_from_config
from smartbatch_lightning.tasks.standardization import Standardization


def is_fine_tuned(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a model with a trained classification head."""
    return any("SequenceClassification" in kind for kind in config.architectures or [])


def check_labels(source: str, config: PretrainedConfig, label_names: list[str], task_fields: Mapping[str, Any]) -> None:
    """Refuses a model whose labels are not the data's, by name and order, or that was trained for another task.

    Args:
        source: The model, for messages.
        config: Its configuration.
        label_names: Of the data.
        task_fields: What a configuration holds of the data's task.

    Raises:
        ValueError: It is such a model.
    """
    if task_fields.get("problem_type") is not None:
        check_problem_type(config, task_fields["problem_type"])
    trained = label_names_from_config(config)
    if trained != label_names:
        raise UsageError(
            f"{source} classifies into {join_quoted(trained)}, but the data has {join_quoted(label_names)}. Use the "
            "data it was trained for, or a checkpoint trained for these, loaded with "
            "SequenceClassifier.load_from_checkpoint; where only the names differ, set --data.label_names to "
            "the model's."
        )
    own, others = (Standardization.from_fields(fields) for fields in (config.to_dict(), task_fields))
    if own != others:
        raise UsageError(
            f"{source} has learnt {_described(own)}, but the data has {_described(others)}. Set "
            "--data.standardize_targets, the training data and the seed as they were; or load a checkpoint with "
            "SequenceClassifier.load_from_checkpoint, which knows them."
        )


def _described(standardization: Standardization | None) -> str:
    if standardization is None:
        return "targets that are not standardised"
    return f"targets standardised by the mean {standardization.mean} and the deviation {standardization.std}"


def check_head(source: str, config: PretrainedConfig, label_names: list[str]) -> None:
    """Refuses a fine-tuned classifier whose head is for another number of labels."""
    trained = label_names_from_config(config)
    if is_fine_tuned(config) and len(trained) != len(label_names):
        raise UsageError(
            f"{source} classifies into {join_quoted(trained)}, but the data has {join_quoted(label_names)}. Use the "
            "data it was trained for, or the base model that it was fine-tuned from."
        )


def check_inputs(model: PreTrainedModel, data: TextData) -> None:
    """Refuses packed batches of a model that cannot take them, and data that the embedding tables have no rows for.

    The latter would be an assertion in a kernel on a GPU.
    """
    if data.packed:
        check_packing(model)
    longest = _longest_input(model)
    if longest is not None and data.max_length > longest:
        raise UsageError(
            f"max_length is {data.max_length}, but the model takes {longest} tokens at most. Set --data.max_length to "
            f"{longest} or less."
        )
    if len(data.tokenizer) > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer {data.tokenizer.name_or_path} has {len(data.tokenizer)} tokens, but the model knows "
            f"{model.config.vocab_size}. Give the data module the model's own tokenizer."
        )


def _longest_input(model: PreTrainedModel) -> int | None:
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and models like it count positions from the padding index on
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    longest: int | None = model.config.to_dict().get("max_position_embeddings")
    return longest
