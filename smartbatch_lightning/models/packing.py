"""Attention of packed batches, inside each sample, handed to unchanged `transformers` models.

`transformers` lets attention be supplied by name (`AttentionInterface`) and hands on to it what a model is called with.
Three things more make a classifier take the flat row of tokens that `PackCollator` makes: no mask; position ids from
the model's own first position on; and the first token of each sample where the heads, which classify by token 0, look
for it.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.models.dropout import DropoutAttention, masks_from_torch

_NAME = "smartbatch"
_ENABLED = "takes_packed_batches"
# Families by `model_type`, and the part of the base model whose output the head, or a pooler before it, reads.
_ENCODERS = {
    "albert": "encoder",
    "bert": "encoder",
    "camembert": "encoder",
    "distilbert": "transformer",
    "electra": "encoder",
    "modernbert": "",
    "roberta": "encoder",
    "xlm-roberta": "encoder",
}


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a model is of a family whose batches can be packed."""
    return model.config.model_type in _ENCODERS


def check_packing(model: PreTrainedModel) -> None:
    """Refuses a model of a family whose batches cannot be packed.

    Raises:
        ValueError: It is of another family.
    """
    if not can_pack(model):
        family = model.config.model_type
        raise UsageError(
            f"batches of {family} models cannot be packed; those of {', '.join(_ENCODERS)} models can. Set "
            "--data.padding=longest."
        )


def enable_packing(model: PreTrainedModel) -> None:
    """Lets a model for sequence classification take the batches of `PackCollator`, and padded ones without a wait.

    Attention is `torch.nn.attention.varlen` on a GPU in half precision, which knows no dropout of attention weights;
    elsewhere it is `scaled_dot_product_attention`, sample by sample, with dropout as the model's configuration says.
    Doing it twice does no harm.

    Args:
        model: Of the ALBERT, BERT, CamemBERT, DistilBERT, ELECTRA, ModernBERT, RoBERTa or XLM-RoBERTa family.

    Raises:
        ValueError: It is of another family.
    """
    check_packing(model)
    if _ENABLED in model.__dict__:  # not by the configuration, which other models may share
        return
    model.__dict__[_ENABLED] = True
    model.set_attn_implementation(_NAME)
    model.register_forward_pre_hook(_shift_positions, with_kwargs=True)
    encoder = model.base_model.get_submodule(_ENCODERS[model.config.model_type])
    mean = getattr(model.config, "classifier_pooling", "cls") == "mean"  # ModernBERT's choice
    encoder.register_forward_hook(partial(_pool, mean=mean), with_kwargs=True)


def attention_dropout(model: PreTrainedModel) -> float:
    """Dropout of attention weights in training that a model's configuration asks for."""
    names = ("attention_probs_dropout_prob", "attention_dropout")
    return float(next((getattr(model.config, name) for name in names if hasattr(model.config, name)), 0.0))


def _shift_positions(model: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """RoBERTa and its kin count positions from the padding index on."""
    embedding = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding_idx = getattr(embedding, "padding_idx", None)
    if "cu_seqlens" in inputs and padding_idx is not None:
        inputs = {**inputs, "position_ids": inputs["position_ids"] + padding_idx + 1}
    return args, inputs


def _pool(encoder: Any, args: Any, inputs: dict[str, Any], output: Any, *, mean: bool) -> Any:
    """Turns hidden states of a packed batch, (1, tokens, hidden), into what the heads read, (batch, 1, hidden)."""
    cu_seqlens = inputs.get("cu_seqlens")
    if cu_seqlens is None:
        return output
    hidden = output.last_hidden_state[0]
    if mean:
        lengths = cu_seqlens.diff()
        sample = torch.repeat_interleave(lengths, output_size=len(hidden))
        sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, sample, hidden)
        pooled = sums / lengths[:, None]
    else:
        pooled = hidden[cu_seqlens[:-1]]
    output.last_hidden_state = pooled[:, None]
    return output


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it.

    Args:
        module: The attention layer.
        query: (batch, heads, tokens, head_size), the batch being 1 if it is packed; so are key and value.
        key: As `query`.
        value: As `query`.
        attention_mask: Of a padded batch.
        dropout: Of attention weights.
        scaling: Of the products of queries and keys.
        sliding_window: Tokens on each side that are attended to, and one.
        cu_seqlens: Where each sample of a packed batch starts, and the end. Shape (batch + 1,), int32.
        max_seqlen: Tokens of its longest sample.
        options: What only other implementations use.

    Returns:
        (batch, tokens, heads, head_size), and no attention weights.
    """
    reach = -1 if sliding_window is None else sliding_window - 1
    if cu_seqlens is None:
        if attention_mask is None and reach >= 0:
            attention_mask = _window(query.shape[2], reach, query.device)
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False
        )
        return output, None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        assert max_seqlen is not None
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        attended = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, window_size=(reach, reach)
        )
        assert isinstance(attended, Tensor)
        return attended[None], None
    return _by_sample(query, key, value, cu_seqlens, dropout, scaling, reach), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_sample(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, dropout: float, scaling: float | None, reach: int
) -> Tensor:
    lengths: list[int] = cu_seqlens.diff().tolist()
    outputs = []
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    fast_dropout = dropout > 0 and reach < 0 and query.device.type == "cpu" and query.dtype == torch.float32
    bits = masks_from_torch() if fast_dropout else None
    for q, k, v in zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True):
        if bits is not None:
            dropped: Tensor = DropoutAttention.apply(q[0], k[0], v[0], dropout, scale, bits)  # type: ignore[no-untyped-call]
            outputs.append(dropped[None])
            continue
        length = q.shape[2]
        mask = _window(length, reach, q.device) if 0 <= reach < length - 1 else None
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scale))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _window(length: int, reach: int, device: torch.device) -> Tensor:
    """Which tokens attend to which, (length, length): those at most `reach` apart."""
    place = torch.arange(length, device=device)
    return (place[:, None] - place).abs() <= reach


def _mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """SDPA's mask of a padded batch; a batch without one has none, above all not one of tokens x tokens.

    `transformers` itself would look whether the mask hides anything at all, and wait for the GPU to know.
    """
    if attention_mask is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, **{**options, "allow_is_bidirectional_skip": False})


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
