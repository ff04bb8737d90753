"""Attention inside each sample of a packed batch, under a name that `transformers` models take.

It takes padded batches too, where it differs from transformers' own SDPA in one point: it never looks whether a mask
hides anything, for which Python would wait for the GPU in every forward.
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
FLASH_CAPABILITY = (8, 0)  # of CUDA: Ampere; Volta and Turing have no FlashAttention

_NOT_PACKED = ("softcap", "s_aux", "position_bias", "attention_mask")  # what some models ask of attention besides


class KeysAndValues(Exception):  # noqa: N818 - it is no error
    """Ends a layer at its attention, for the keys and values that it is raised with."""


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
        query: (batch, heads, tokens, head_size), the batch being 1 if it is packed.
        key: As `query`, perhaps with fewer heads.
        value: As `key`, perhaps with another head size.
        attention_mask: Of a padded batch.
        dropout: Of attention weights.
        scaling: Of the products of queries and keys.
        sliding_window: Tokens on each side that are attended to, and one.
        is_causal: Tokens attend to those before them alone; by default what the layer says.
        cu_seq_lens_q: Where the queries of each sample of a packed batch start, and the end. Shape (batch + 1,), int32.
        cu_seq_lens_k: The same of keys and values.
        max_length_q: Queries of its longest sample.
        max_length_k: Keys of its longest sample.
        only_keys_and_values: End the layer here by `KeysAndValues`.
        keys_and_values: Those of all tokens, where `query` (batch, heads, 1, head_size) is of `tokens_read` alone, and
            so is `attention_mask`.
        tokens_read: Where these stand, (batch,), in the row if the batch is packed.
        options: What only other implementations use.

    Returns:
        (batch, tokens, heads, head_size), and no attention weights.

    Raises:
        ValueError: The layer asks for what its kernels cannot do in packed batches.
    """
    if only_keys_and_values:
        raise KeysAndValues(key, value)
    causal = getattr(layer, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None and attention_mask.ndim == 2:  # of `_mask`, in place of none
        sliding_window = sliding_window or attention_mask.shape[1] + (not causal)  # counted without the token itself
        attention_mask = None
    radius = -1 if sliding_window is None else sliding_window - 1
    if keys_and_values is None:
        tokens_read = None  # a layer before the last one, which computes all
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
            f"{type(layer).__name__} has {join_quoted(met)}, which attention in packed batches does not support"
        )
    cu_seq_lens, max_lengths = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
    if tokens_read is None:
        return _packed(query, key, value, cu_seq_lens, max_lengths, dropout, scaling, radius, causal), None
    # the keys of each sample that its query sees stand side by side, between others that no query sees
    first, end = cu_seq_lens_k[:-1], cu_seq_lens_k[1:]
    if radius >= 0:
        first = torch.maximum(first, tokens_read - radius)
    if causal or radius >= 0:
        end = torch.minimum(end, tokens_read + 1 + (0 if causal else radius))
    bounds = torch.stack((first, end), 1).flatten().to(torch.int32)
    of_keys = F.pad(F.pad(bounds, (1, 0)), (0, 1), value=key.shape[2])
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
    """Attention inside each sample of a row, (1, tokens, heads, head_size)."""
    if torch.is_autocast_enabled(query.device.type):  # as SDPA does; queries and keys that were rotated are float32
        query, key, value = (tensor.to(torch.get_autocast_dtype(query.device.type)) for tensor in (query, key, value))
    if not has_varlen_kernel(query) or query.shape[-1] != value.shape[-1]:
        looped: Tensor = _sdpa_per_sample(query, key, value, *cu_seq_lens, dropout, scaling, radius, causal)
        return looped
    # not `tensor[0]`, whose backward pass fills a tensor of zeros and copies into it
    q, k, v = (tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value))
    # A window as wide as the longest sample hides nothing, and keeps to FlashAttention: for full attention torch 2.14
    # and later take cuDNN on Hopper, which prepares a plan for every new number of tokens, some 50 ms long.
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
    """Whether torch's FlashAttention takes queries of this device, type and head size (the last dimension)."""
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
    """Which keys (keys,) tokens at some places (..., queries) see, (..., queries, keys): at most `radius` apart."""
    distance = queries[..., None] - keys
    near = distance.abs() <= (radius if radius >= 0 else len(keys))
    return near & (distance >= 0) if causal else near


def _mask(*, attention_mask: Tensor | None = None, local_size: int | None = None, **options: Any) -> Tensor | None:
    """SDPA's mask of a padded batch; a batch without one has none, above all not one of tokens x tokens.

    In its stand (0, window), since not every model tells attention of its window. `transformers` itself would look
    whether a mask hides anything at all, and wait for the GPU to know.
    """
    if attention_mask is None and not options.get("use_vmap"):  # which masks of a model's own making have
        return None if local_size is None else torch.empty(0, local_size)
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(attention_mask=attention_mask, local_size=local_size, **{**options, **skips})


def _without_positions(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """What `transformers` does before `_mask`, which needs no positions, without waiting for the GPU to look at them.

    In every forward of a decoder without an attention mask it would ask whether they start again anywhere.
    """
    place = list(inspect.signature(preprocess).parameters).index("position_ids") - 1

    @wraps(preprocess)
    def preprocess_arguments(config: Any, *args: Any, **options: Any) -> Any:
        if config._attn_implementation == ATTENTION and len(args) > place:
            args = (*args[:place], None, *args[place + 1 :])
        return preprocess(config, *args, **options)

    return preprocess_arguments


with suppress(AttributeError, ValueError):  # of a transformers that does this elsewhere, and waits
    masking_utils._preprocess_mask_arguments = _without_positions(masking_utils._preprocess_mask_arguments)
AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, _mask)
