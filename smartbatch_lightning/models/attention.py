"""Attention within each sample of a packed batch, registered under a name that `transformers` models accept.

It also handles padded batches. There it differs from transformers' own SDPA in one respect: it never checks whether a
mask hides anything, which would make Python wait for the GPU in every forward pass.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.models.dropout import DropoutAttention, bit_generator_from_torch

ATTENTION = "smartbatch"
_TAKES_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.13
FLASH_CAPABILITY = (8, 0)  # CUDA capability of Ampere; Volta and Turing have no FlashAttention

_NOT_PACKED = ("softcap", "s_aux", "position_bias", "attention_mask")  # arguments of some models' attention


class KeysAndValues(Exception):  # noqa: N818 - it is not an error
    """Raised to end a layer's forward pass at its attention, with the keys and values."""


def attention_forward(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    only_keys_and_values: bool = False,
    keys_and_values: tuple[Tensor, Tensor] | None = None,
    tokens_read: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it.

    Args:
        layer: The attention layer.
        query: (batch, heads, tokens, head_size), where batch is 1 if packed.
        key: Like `query`, possibly with fewer heads.
        value: Like `key`, possibly with another head size.
        attention_mask: Mask of a padded batch.
        dropout: Dropout probability of attention weights.
        scaling: Factor for the products of queries and keys.
        sliding_window: Number of tokens attended to on each side, plus one.
        is_causal: Whether tokens attend only to themselves and earlier ones; by default the layer's `is_causal`.
        cu_seq_lens_q: Where the queries of each sample of a packed batch start, and the end. Shape (batch + 1,), int32.
        cu_seq_lens_k: The same for keys and values.
        max_length_q: Number of queries of its longest sample.
        max_length_k: Number of keys of its longest sample.
        only_keys_and_values: End the layer here by raising `KeysAndValues`.
        keys_and_values: Keys and values of all tokens, if `query`, (batch, heads, 1, head_size), and `attention_mask`
            are only for `tokens_read`.
        tokens_read: Positions of these tokens, (batch,), in the row if the batch is packed.
        options: Arguments that only other implementations use.

    Returns:
        The output (batch, tokens, heads, head_size), and None for the attention weights.

    Raises:
        ValueError: The layer needs something that attention in packed batches does not support.
    """
    if only_keys_and_values:
        raise KeysAndValues(key, value)
    causal = getattr(layer, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None and attention_mask.ndim == 2:  # `_mask`'s replacement for no mask
        sliding_window = sliding_window or attention_mask.shape[1] + (not causal)  # excluding the token itself
        attention_mask = None
    radius = -1 if sliding_window is None else sliding_window - 1
    if keys_and_values is None:
        tokens_read = None  # layers before the last one compute all tokens
    else:
        key, value = keys_and_values
    if cu_seq_lens_q is None:
        if attention_mask is None and (radius >= 0 or (tokens_read is not None and causal)):
            place = torch.arange(key.shape[2], device=query.device)
            attention_mask = _visible(place if tokens_read is None else tokens_read[:, None], place, radius, causal)
            attention_mask = attention_mask.view(-1, 1, query.shape[2], len(place))
        output, _ = sdpa_attention_forward(
            layer, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=causal, **options
        )
        return output, None
    assert cu_seq_lens_k is not None
    assert max_length_q is not None
    assert max_length_k is not None
    asked = {**options, "attention_mask": attention_mask}
    if met := [name for name in _NOT_PACKED if asked.get(name) is not None]:
        raise UsageError(
            f"{type(layer).__name__} has {join_quoted(met)}, which attention in packed batches does not support. Use "
            "padded batches."
        )
    cu_seq_lens, max_lengths = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
    if tokens_read is None:
        return _packed(query, key, value, cu_seq_lens, max_lengths, dropout, scaling, radius, causal), None
    # the keys seen by each sample's query are contiguous, between keys that no query sees
    first, end = cu_seq_lens_k[:-1], cu_seq_lens_k[1:]
    if radius >= 0:
        first = torch.maximum(first, tokens_read - radius)
    if causal or radius >= 0:
        end = torch.minimum(end, tokens_read + 1 + (0 if causal else radius))
    bounds = torch.stack((first, end), 1).flatten()
    of_keys = torch.cat((cu_seq_lens_k[:1], bounds, cu_seq_lens_k[-1:])).to(torch.int32)
    of_queries = torch.arange(len(of_keys), dtype=torch.int32, device=query.device) // 2
    attended = _packed(
        query.transpose(0, 2), key, value, (of_queries, of_keys), (1, max_length_k), dropout, scaling, -1, False
    )
    return attended.transpose(0, 1), None


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: tuple[Tensor, Tensor],
    max_lengths: tuple[int, int],
    dropout: float,
    scaling: float | None,
    radius: int,
    causal: bool,
) -> Tensor:
    """Attention within each sample of a row, (1, tokens, heads, head_size)."""
    if torch.is_autocast_enabled(query.device.type):  # as in SDPA; rotated queries and keys are float32
        query, key, value = (tensor.to(torch.get_autocast_dtype(query.device.type)) for tensor in (query, key, value))
    if not has_varlen_kernel(query) or query.shape[-1] != value.shape[-1]:
        looped: Tensor = _sdpa_per_sample(query, key, value, *cu_seq_lens, dropout, scaling, radius, causal)
        return looped
    # not `tensor[0]`, whose backward pass fills a tensor of zeros and copies into it
    q, k, v = (tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value))
    # A window as wide as the longest sample hides nothing and makes torch use FlashAttention: for full attention, torch
    # 2.14 and later use cuDNN on Hopper, which takes about 50 ms to plan every new number of tokens.
    reach = max_lengths[1] if radius < 0 else radius
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1] and _TAKES_GROUPED_HEADS:
        options["enable_gqa"] = True
    elif q.shape[1] != k.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    attended = varlen_attn(
        q,
        k,
        v,
        *cu_seq_lens,
        *max_lengths,
        scale=scaling,
        window_size=(reach, 0 if causal else reach),
        **options,
    )
    assert isinstance(attended, Tensor)
    return attended.unsqueeze(0)


def has_varlen_kernel(query: Tensor) -> bool:
    """Whether torch's FlashAttention supports queries of this device, dtype and head size (the last dimension)."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_properties(query.device).major >= FLASH_CAPABILITY[0]
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
    radius: int,
    causal: bool,
) -> Tensor:
    keys: list[int] = cu_seq_lens_k.diff().tolist()
    queries = keys if cu_seq_lens_q is cu_seq_lens_k else cu_seq_lens_q.diff().tolist()
    outputs = []
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    key, value = (repeat_kv(tensor, query.shape[1] // tensor.shape[1]) for tensor in (key, value))
    full = radius < 0 and not causal
    fast_dropout = dropout > 0 and full and query.device.type == "cpu" and query.dtype == torch.float32
    bits = bit_generator_from_torch() if fast_dropout else None
    samples = (torch.split(tensor, lengths, 2) for tensor, lengths in ((query, queries), (key, keys), (value, keys)))
    for q, k, v in zip(*samples, strict=True):
        if not q.shape[2]:
            continue
        if bits is not None:
            one = (tensor.squeeze(0) for tensor in (q, k, v))
            dropped: Tensor = DropoutAttention.apply(*one, dropout, scale, bits)  # type: ignore[no-untyped-call]
            outputs.append(dropped.unsqueeze(0))
            continue
        hides = 0 <= radius < k.shape[2] - 1
        place = torch.arange(k.shape[2], device=q.device)
        mask = _visible(place, place, radius, causal) if hides else None
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout, scale=scale, is_causal=causal and mask is None
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _visible(queries: Tensor, keys: Tensor, radius: int, causal: bool) -> Tensor:
    """Which keys (keys,) the tokens at positions (..., queries) see, (..., queries, keys): at most `radius` away."""
    distance = queries[..., None] - keys
    near = distance.abs() <= (radius if radius >= 0 else len(keys))
    return near & (distance >= 0) if causal else near


def _mask(*, attention_mask: Tensor | None = None, local_size: int | None = None, **options: Any) -> Tensor | None:
    """SDPA's mask for a padded batch; without a padding mask, None, never a mask of tokens x tokens.

    For models with a sliding window, a tensor of the shape (0, window) is returned instead of None, since not every
    model passes its window to attention. `transformers` itself would check whether a mask hides anything, and wait for
    the GPU.
    """
    if attention_mask is None and not options.get("use_vmap"):  # set for masks defined by the model
        return None if local_size is None else torch.empty(0, local_size)
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(attention_mask=attention_mask, local_size=local_size, **{**options, **skips})


def _without_positions(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps what `transformers` does before `_mask`, leaving out position ids, which `_mask` does not need.

    Otherwise, in every forward pass of a decoder without an attention mask, `transformers` would wait for the GPU to
    check whether positions restart anywhere.
    """
    place = list(inspect.signature(preprocess).parameters).index("position_ids") - 1

    @wraps(preprocess)
    def preprocess_arguments(config: Any, *args: Any, **options: Any) -> Any:
        if config._attn_implementation == ATTENTION and len(args) > place:
            args = (*args[:place], None, *args[place + 1 :])
        return preprocess(config, *args, **options)

    return preprocess_arguments


with suppress(AttributeError, ValueError):  # another version of transformers may do this elsewhere, and wait
    masking_utils._preprocess_mask_arguments = _without_positions(masking_utils._preprocess_mask_arguments)
AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, _mask)
