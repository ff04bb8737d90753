"""Attention inside each sample of a packed batch, under a name that `transformers` models take.

It takes padded batches too, where it differs from transformers' own SDPA in one point: it never looks whether a mask
hides anything, for which Python would wait for the GPU in every forward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from smartbatch_lightning.models.dropout import DropoutAttention, bit_generator_from_torch

ATTENTION = "smartbatch"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it.

    Args:
        module: The attention layer.
        query: (batch, heads, tokens, head_size), the batch being 1 if it is packed; so are key and value, perhaps with
            other numbers of tokens.
        key: As `query`.
        value: As `query`.
        attention_mask: Of a padded batch.
        dropout: Of attention weights.
        scaling: Of the products of queries and keys.
        sliding_window: Tokens on each side that are attended to, and one.
        cu_seq_lens_q: Where the queries of each sample of a packed batch start, and the end. Shape (batch + 1,), int32.
        cu_seq_lens_k: The same of keys and values.
        max_length_q: Queries of its longest sample.
        max_length_k: Keys of its longest sample.
        options: What only other implementations use.

    Returns:
        (batch, tokens, heads, head_size), and no attention weights.
    """
    window_radius = -1 if sliding_window is None else sliding_window - 1
    if cu_seq_lens_q is None:
        if attention_mask is None and window_radius >= 0:
            attention_mask = _window(query.shape[2], window_radius, query.device)
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False, **options
        )
        return output, None
    assert cu_seq_lens_k is not None
    if not has_varlen_kernel(query):
        return _sdpa_per_sample(query, key, value, cu_seq_lens_q, cu_seq_lens_k, dropout, scaling, window_radius), None
    assert max_length_q is not None
    assert max_length_k is not None
    # not `tensor[0]`, whose backward pass fills a tensor of zeros and copies into it
    q, k, v = (tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value))
    # A window as wide as the longest sample hides nothing, and keeps to FlashAttention: for full attention torch 2.14
    # and later take cuDNN on Hopper, which prepares a plan for every new number of tokens, some 50 ms long.
    reach = max_length_k if window_radius < 0 else window_radius
    attended = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        scale=scaling,
        window_size=(reach, reach),
    )
    assert isinstance(attended, Tensor)
    return attended.unsqueeze(0), None


def has_varlen_kernel(query: Tensor) -> bool:
    """Whether torch's FlashAttention takes queries of this device, type and head size (the last dimension)."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_properties(query.device).major >= 8  # Ampere; Volta and Turing have none
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sdpa_per_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    dropout: float,
    scaling: float | None,
    window_radius: int,
) -> Tensor:
    keys: list[int] = cu_seq_lens_k.diff().tolist()
    queries = keys if cu_seq_lens_q is cu_seq_lens_k else cu_seq_lens_q.diff().tolist()
    outputs = []
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    fast_dropout = dropout > 0 and window_radius < 0 and query.device.type == "cpu" and query.dtype == torch.float32
    bits = bit_generator_from_torch() if fast_dropout else None
    samples = (torch.split(tensor, lengths, 2) for tensor, lengths in ((query, queries), (key, keys), (value, keys)))
    for q, k, v in zip(*samples, strict=True):
        if bits is not None:
            dropped: Tensor = DropoutAttention.apply(q[0], k[0], v[0], dropout, scale, bits)  # type: ignore[no-untyped-call]
            outputs.append(dropped[None])
            continue
        length = k.shape[2]
        mask = _window(length, window_radius, q.device) if 0 <= window_radius < length - 1 else None
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scale))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _window(length: int, window_radius: int, device: torch.device) -> Tensor:
    """Which tokens attend to which, (length, length): those at most `window_radius` apart."""
    place = torch.arange(length, device=device)
    return (place[:, None] - place).abs() <= window_radius


def _mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """SDPA's mask of a padded batch; a batch without one has none, above all not one of tokens x tokens.

    `transformers` itself would look whether the mask hides anything at all, and wait for the GPU to know.
    """
    if attention_mask is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, **{**options, "allow_is_bidirectional_skip": False})


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, _mask)
