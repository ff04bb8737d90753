"""Whether a model fits the data: labels, maximum length, vocabulary and batches."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from smartbatch_lightning.contract import TextData
from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.families import depends_on_width, pad_token_of, setting, vocabulary_size
from smartbatch_lightning.models.packing import check_packing
from smartbatch_lightning.tasks.config import check_problem_type, label_names_from_config
from smartbatch_lightning.tasks.standardization import Standardization


def is_fine_tuned(config: PretrainedConfig) -> bool:
    """Whether a configuration belongs to a model with a trained classification head."""
    return any("SequenceClassification" in kind for kind in config.architectures or [])


def check_labels(source: str, config: PretrainedConfig, label_names: list[str], task_fields: Mapping[str, Any]) -> None:
    """Refuses a model whose labels differ from the data's in name or order, or that was trained for another task.

    Args:
        source: The model, for messages.
        config: Its configuration.
        label_names: Label names of the data.
        task_fields: Configuration fields of the data's task.
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
    """Refuses a fine-tuned classifier whose head has another number of labels."""
    trained = label_names_from_config(config)
    if is_fine_tuned(config) and len(trained) != len(label_names):
        raise UsageError(
            f"{source} classifies into {join_quoted(trained)}, but the data has {join_quoted(label_names)}. Use the "
            "data it was trained for, or the base model that it was fine-tuned from."
        )


def adopt_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Sets a model's padding token to that of the batches, since heads look for the last token that is not padding.

    Args:
        config: The model's configuration; changed in place.
        tokenizer: The tokenizer with which batches are padded; None if unknown.
    """
    before = pad_token_of(config)
    if tokenizer is None or tokenizer.pad_token_id in (None, before):
        return
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    rank_zero_info(
        f"Padding is {tokenizer.pad_token!r}, token {tokenizer.pad_token_id}, for the model too, whose configuration "
        f"had {'none' if before is None else f'token {before}'}."
    )


def check_inputs(model: PreTrainedModel, data: TextData) -> None:
    """Refuses packed batches for a model without support, and data for which the embedding tables lack rows.

    On a GPU, the latter would fail in a kernel assertion. Warns of a model whose results depend on the batch.
    """
    if data.packed:
        check_packing(model)
    longest = _longest_input(model)
    if longest is not None and data.max_length > longest:
        raise UsageError(
            f"max_length is {data.max_length}, but the model takes {longest} tokens at most. Set --data.max_length to "
            f"{longest} or less."
        )
    known = setting(model.config.get_text_config(), "vocab_size")  # CANINE hashes characters
    if known is not None and (needed := vocabulary_size(data.tokenizer)) > known:
        raise UsageError(
            f"the tokenizer {data.tokenizer.name_or_path} has {needed} tokens, but the model has {known}. Give the "
            "data module the model's own tokenizer."
        )
    if model.config.model_type == "xmod" and model.config.default_language is None:
        raise UsageError(
            f"the model has adapters for the languages {join_quoted(model.config.languages)}. Set "
            "--model.model_kwargs.default_language to the one of the texts."
        )
    if model.config.model_type == "reformer":
        _check_reformer_width(model.config, data)
    reason = depends_on_width(model.config, data.max_length)
    if reason is not None and not data.spec.fixed_width:
        rank_zero_warn(
            f"{model.config.model_type} models have {reason}, so their result for a text depends on the other texts in "
            "its batch. To get the same result in every batch, set --data.padding=max_length, and call the pipeline of "
            "the exported model with padding='max_length'."
        )


def _check_reformer_width(config: PretrainedConfig, data: TextData) -> None:
    """Refuses batch widths at which Reformer cannot train; it needs all positions or a multiple of its chunks."""
    lengths = {"lsh": config.lsh_attn_chunk_length, "local": config.local_attn_chunk_length}
    multiple = math.lcm(*(lengths[kind] for kind in set(config.attn_layers)))
    width = math.prod(config.axial_pos_shape) if config.axial_pos_embds else multiple
    if data.max_length % width or not data.spec.fixed_width:
        raise UsageError(
            f"reformer models train on batches that are {'' if config.axial_pos_embds else 'a multiple of '}{width} "
            f"tokens wide. Set --data.padding=max_length and --data.max_length to {width}."
        )


def _longest_input(model: PreTrainedModel) -> int | None:
    """Number of tokens for which a model has positions; None if unlimited."""
    config = model.config.get_text_config()
    limits = [setting(config, "max_position_embeddings")]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and vars(module).get("padding_idx") is not None:
            # RoBERTa and models like it count positions from the padding index on
            limits.append(module.weight.shape[0] - module.padding_idx - 1)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
