"""Whether a model fits the data: its classes, its longest input and its vocabulary."""

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.models.packing import check_packing


def names_of_labels(config: PretrainedConfig) -> list[str]:
    """Names of the classes, in the order of the logits."""
    return [name for _, name in sorted((int(number), str(name)) for number, name in (config.id2label or {}).items())]


def check_labels(source: str, config: PretrainedConfig, label_names: list[str] | None) -> None:
    """Refuses a model whose classes are not the data's, by name and order."""
    trained = names_of_labels(config)
    if label_names is not None and trained != label_names:
        raise UsageError(
            f"{source} classifies into {trained}, but the data has {label_names}. Use the data it was trained for, "
            "or a checkpoint trained for these; where only the names differ, set --data.label_names to the model's."
        )


def check_head(source: str, config: PretrainedConfig, label_names: list[str] | None) -> None:
    """Refuses a fine-tuned classifier whose head is for another number of classes, or for these in another order."""
    trained = names_of_labels(config)
    fine_tuned = any("SequenceClassification" in kind for kind in config.architectures or [])
    if not fine_tuned or label_names is None or trained == label_names:
        return
    if len(trained) != len(label_names) or sorted(trained) == sorted(label_names):
        raise UsageError(
            f"{source} classifies into {trained}, but the data has {label_names}. Use the data it was trained for, "
            "or the base model that it was fine-tuned from."
        )


def check_inputs(model: PreTrainedModel, datamodule: Any) -> None:
    """Refuses packed batches of a model that cannot take them, and data that the embedding tables have no rows for.

    The latter would be an assertion in a kernel on a GPU.
    """
    if getattr(datamodule, "padding", None) == "packed":
        check_packing(model)
    longest = _longest_input(model)
    max_length = getattr(datamodule, "max_length", None)
    if longest is not None and max_length is not None and max_length > longest:
        raise UsageError(
            f"max_length is {max_length}, but the model takes {longest} tokens at most. Set --data.max_length to "
            f"{longest} or less."
        )
    tokenizer = getattr(datamodule, "tokenizer", None)
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, but the model knows "
            f"{model.config.vocab_size}. Give the data module the model's own tokenizer."
        )


def _longest_input(model: PreTrainedModel) -> int | None:
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from the padding index on
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(model.config, "max_position_embeddings", None)
