"""DeBERTa for packed batches: its attention, which depends on the distances of tokens, is called for each sample."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from smartbatch_lightning.models.pooling import pad, padding_mask


class _Samples(NamedTuple):
    """The samples of a packed batch, passed to attention instead of the distances of tokens.

    Attributes:
        lengths: Tokens of each sample.
        cu_seq_lens: Where each sample starts, and the end. Shape (batch + 1,).
        distances: Token distances as computed by the model, for the longest sample. Shape (1, longest, longest).
    """

    lengths: list[int]
    cu_seq_lens: Tensor
    distances: Tensor | None


def is_deberta(model: PreTrainedModel) -> bool:
    """Whether a model is a DeBERTa, of version 1, 2 or 3."""
    return model.config.model_type in ("deberta", "deberta-v2")


def hook_deberta(model: PreTrainedModel) -> list[RemovableHandle]:
    """Makes a DeBERTa accept packed batches."""
    base_model: Any = model.base_model
    for layer in base_model.encoder.layer:
        attention = layer.attention.self
        attention.forward = partial(_attention, partial(type(attention).forward, attention))
    return [
        model.register_forward_pre_hook(_before_model, with_kwargs=True),
        base_model.embeddings.register_forward_pre_hook(_before_embeddings, with_kwargs=True),
        base_model.encoder.register_forward_pre_hook(_before_encoder, with_kwargs=True),
        base_model.encoder.register_forward_hook(_after_encoder, with_kwargs=True),
    ]


def _before_model(model: Any, args: Any, inputs: dict[str, Any]) -> Any:
    """Passes the bounds of samples in place of the padding mask."""
    if "cu_seq_lens_q" in inputs:
        inputs = {**inputs, "attention_mask": inputs["cu_seq_lens_q"]}
    return args, inputs


def _is_packed(mask: Tensor | None) -> bool:
    return mask is not None and mask.ndim == 1


def _before_embeddings(embeddings: Any, args: Any, inputs: dict[str, Any]) -> Any:
    if _is_packed(inputs.get("mask")):
        inputs = {**inputs, "mask": None}
    return args, inputs


def _before_encoder(encoder: Any, args: Any, inputs: dict[str, Any]) -> Any:
    hidden, mask = args
    if not _is_packed(mask):
        return args, inputs
    lengths = mask.diff().tolist()
    samples = _Samples(lengths, mask, encoder.get_rel_pos(hidden[:, : max(lengths)]))
    return (hidden, mask.new_ones(1, 1, 1, 1)), {**inputs, "relative_pos": samples}


def _after_encoder(encoder: Any, args: Any, inputs: dict[str, Any], output: Any) -> Any:
    samples = inputs.get("relative_pos")
    if samples is not None:
        starts = samples.cu_seq_lens[:-1].clamp(max=output.last_hidden_state.shape[1] - 1)
        output.last_hidden_state = output.last_hidden_state[0, starts][:, None]
        output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)
    return output


def _attention(forward: Any, hidden: Tensor, mask: Tensor, *args: Any, relative_pos: Any = None, **options: Any) -> Any:
    """Attention of one sample at a time on a CPU; on a GPU, where Python would wait for each, of padded samples.

    Args:
        forward: Attention for padded batches.
        hidden: Hidden states; for a packed batch (1, tokens, hidden).
        mask: Padding mask.
        args: Other arguments of `forward`.
        relative_pos: Distances of tokens; for a packed batch its `_Samples`.
        options: Other arguments of `forward`.
    """
    if not isinstance(relative_pos, _Samples):
        return forward(hidden, mask, *args, relative_pos=relative_pos, **options)
    lengths, cu_seq_lens, distances = relative_pos
    if hidden.is_cuda:
        width = max(lengths)
        mask = padding_mask(cu_seq_lens, width)
        pairs = mask[:, None, None] * mask[:, None, :, None]
        padded = pad(hidden[0], cu_seq_lens, width)
        output, _ = forward(padded, pairs, *args, relative_pos=distances, **options)
        rows = torch.cat([torch.arange(length) + number * width for number, length in enumerate(lengths)])
        return output.flatten(0, 1)[None, rows.to(hidden.device)], None
    outputs = [
        forward(
            sample,
            mask,
            *args,
            relative_pos=None if distances is None else distances[..., : sample.shape[1], : sample.shape[1]],
            **options,
        )[0]
        for sample in torch.split(hidden, lengths, 1)
        if sample.shape[1]
    ]
    return torch.cat(outputs, 1), None
