"""Whether a model fits the data: labels, maximum length, vocabulary and batches."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from smartbatch_lightning.contract import TextData
from smartbatch_lightning.errors import UsageError, join_quoted, root_cause_message
from smartbatch_lightning.families import depends_on_width, end_token_read, pad_token_of, vocabulary_size
from smartbatch_lightning.models.packing import can_be_tested, check_packing, logits_of
from smartbatch_lightning.tasks.config import check_problem_type, label_names_from_config
from smartbatch_lightning.tasks.labels import other_labels_error
from smartbatch_lightning.tasks.standardization import Standardization

_MIN_TOKENS, _MAX_TOKENS = 4, 8  # number of different tokens used to test a model
_NEGLIGIBLE_DIFFERENCE = 1e-5  # relative to the effect of another first token


def is_fine_tuned(config: PretrainedConfig) -> bool:
    """Whether a configuration belongs to a model with a trained classification head."""
    return any("SequenceClassification" in kind for kind in config.architectures or [])


def check_labels(source: str, config: PretrainedConfig, label_names: list[str], task_fields: Mapping[str, Any]) -> None:
    """Rejects a model whose labels differ from the data's in name or order, or that was trained for another task.

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
        raise other_labels_error(source, trained, label_names)
    own, others = (Standardization.from_fields(fields) for fields in (config.to_dict(), task_fields))
    if own != others:
        raise UsageError(
            f"{source} has learnt {_described(own)}, but the data has {_described(others)}. Set "
            "--data.standardize_targets, the training data and the seed as they were; or load a checkpoint with "
            "SequenceClassifier.load_from_checkpoint, which knows them."
        )


def _described(standardization: Standardization | None) -> str:
    if standardization is None:
        return "targets that are not standardized"
    return f"targets standardized by the mean {standardization.mean} and the deviation {standardization.std}"


def check_head(source: str, config: PretrainedConfig, label_names: list[str]) -> None:
    """Rejects a fine-tuned classifier whose head does not have the same number of labels."""
    trained = label_names_from_config(config)
    if is_fine_tuned(config) and len(trained) != len(label_names):
        raise UsageError(
            f"{source} classifies into {join_quoted(trained)}, but the data has {join_quoted(label_names)}. Use the "
            "data it was trained for, or the base model that it was fine-tuned from."
        )


def adopt_tokenizer(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Rejects a tokenizer with more tokens than a model, and makes its padding token the model's.

    Heads look for the last token that is not padding.

    Args:
        config: The model's configuration; changed in place.
        tokenizer: The tokenizer with which batches are padded; None if unknown.

    Raises:
        ValueError: The tokenizer has more tokens than the model.
    """
    if tokenizer is None:
        return
    known = getattr(config.get_text_config(), "vocab_size", None)  # CANINE hashes characters
    if known is not None and (needed := vocabulary_size(tokenizer)) > known:
        raise UsageError(
            f"the tokenizer {tokenizer.name_or_path} has {needed} tokens, but the model has {known}. Give the data "
            "module the model's own tokenizer, without the tokens that were added to it."
        )
    before = pad_token_of(config)
    if tokenizer.pad_token_id in (None, before):
        return
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    rank_zero_info(
        f"Padding is {tokenizer.pad_token!r}, token {tokenizer.pad_token_id}, for the model too, whose configuration "
        f"had {'none' if before is None else f'token {before}'}."
    )


def check_inputs(model: PreTrainedModel, data: TextData) -> None:
    """Rejects data that a model cannot process, and a model that ignores all but the first token of a text.

    On a GPU, an id without a row in an embedding table would fail in a kernel assertion. Warns of a model whose results
    depend on the batch.
    """
    if data.spec.packed:
        check_packing(model)
    check_max_length(data.max_length, _longest_input(model))
    if model.config.model_type == "xmod" and model.config.default_language is None:
        raise UsageError(
            f"the model has adapters for the languages {join_quoted(model.config.languages)}. Set "
            "--model.model_kwargs.default_language to the language of the texts."
        )
    if model.config.model_type == "reformer":
        _check_reformer_width(model.config, data)
    reason = depends_on_width(model.config, data.max_length)
    if reason is None:
        _check_reads_texts(model)
    elif not data.spec.fixed_width:
        rank_zero_warn(
            f"{model.config.model_type} models have {reason}, so their result for a text depends on the other texts in "
            "its batch. To get the same result in every batch, set --data.padding=max_length, and call the pipeline of "
            "the exported model with padding='max_length'."
        )


def check_max_length(max_length: int, longest: int | None) -> None:
    """Rejects a `max_length` beyond the number of positions of a model, which is None if unlimited."""
    if longest is not None and max_length > longest:
        raise UsageError(
            f"max_length is {max_length}, but the model takes {longest} tokens at most. Set --data.max_length to "
            f"{longest} or less."
        )


def positions(config: PretrainedConfig) -> int | None:
    """Number of positions in a configuration; None if unlimited. Models like RoBERTa use slightly fewer."""
    number = getattr(config.get_text_config(), "max_position_embeddings", None)
    return number if isinstance(number, int) and number > 0 else None


def _check_reads_texts(model: PreTrainedModel) -> None:
    """Rejects a model that fails on a text, or whose result depends only on the first token.

    The model is run on a few tokens, unless its weights are sharded or not loaded yet. The first token's hidden states
    are compared too, since a head with extreme weights gives all texts nearly the same logits.
    """
    if not isinstance(model, PreTrainedModel) or not can_be_tested(model):
        return
    end, size = end_token_read(model.config), getattr(model.config.get_text_config(), "vocab_size", _MAX_TOKENS)
    tokens = [token for token in range(min(size, _MAX_TOKENS)) if token not in (end, pad_token_of(model.config))]
    if len(tokens) < _MIN_TOKENS:
        return
    (one, other), text, another = tokens[:2], tokens[2::2], tokens[3::2]
    rows = [[one, *text], [one, *another[: len(text)], *text[len(another) :]], [other, *text]]
    ids = torch.tensor([[*row, *([] if end is None else [end])] for row in rows], device=model.device)
    compared: list[Tensor] = []

    def keep(base: nn.Module, args: Any, output: Any) -> None:
        if output[0].ndim > 2:
            compared.append(output[0][:, 0].float())

    hook = model.base_model.register_forward_hook(keep)
    try:
        logits = logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    except Exception as error:  # there are many kinds of models
        raise UsageError(
            f"{type(model).__name__} fails on a short text: {root_cause_message(error)} Correct its configuration, for "
            "example with --model.model_kwargs."
        ) from error
    finally:
        hook.remove()
    by_others, by_first = ([(rows[0] - rows[row]).abs().max() for rows in (logits, *compared)] for row in (1, 2))
    if all(others < _NEGLIGIBLE_DIFFERENCE * first for others, first in zip(by_others, by_first, strict=True)):
        causal = getattr(model.config.get_text_config(), "is_decoder", False)
        how = ", with is_decoder=true in its configuration. Set --model.model_kwargs.is_decoder=false" if causal else ""
        raise UsageError(f"{type(model).__name__} reads only the first token of a text{how or '. Use another model'}.")


def _check_reformer_width(config: PretrainedConfig, data: TextData) -> None:
    """Rejects batch widths at which Reformer cannot train; it needs all its positions or a multiple of its chunks."""
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
    limits = [positions(model.config)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and vars(module).get("padding_idx") is not None:
            # RoBERTa and models like it count positions from the padding index on
            limits.append(module.weight.shape[0] - module.padding_idx - 1)
    return min((limit for limit in limits if limit is not None), default=None)
