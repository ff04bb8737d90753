"""Which tokens the head of a classifier reads, and how heads for padded batches read packed ones."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

# By the `classifier_pooling` of a configuration.
_NAMED = {"cls": "first", "bos": "first", "mean": "mean", "late": "all"}


def head_pooling(model: PreTrainedModel) -> str:
    """Which tokens of a sample the head of a classifier reads.

    Returns:
        `first`, its first token; `last`, its last token that is not padding, as decoders do; `mean`, the mean over its
        tokens; or `all` of its tokens.
    """
    named = getattr(model.config.get_text_config(), "classifier_pooling", None)
    if named is not None:
        return _NAMED.get(named, "all")
    causal = any(getattr(layer, "is_causal", False) for layer in model.base_model.modules())
    return "last" if causal or isinstance(model, GenericForSequenceClassification) else "first"


def tokens_read(pooling: str, input_ids: Tensor, pad_token_id: int | None, cu_seq_lens: Tensor | None) -> Tensor:
    """Position of the token of each sample that a head reads, in a packed batch's row or in its own. Shape (batch,).

    Args:
        pooling: `first` or `last`.
        input_ids: (batch, length), or (1, tokens) if packed.
        pad_token_id: Treated as padding by heads that read the last token, even at the end of a text.
        cu_seq_lens: Where each sample of a packed batch starts, and the end. Shape (batch + 1,); None if it is padded.
    """
    pad_token_id, device = -1 if pad_token_id is None else pad_token_id, input_ids.device
    place = torch.arange(input_ids.shape[1], device=device)
    if cu_seq_lens is None:
        if pooling == "first":
            return place.new_zeros(len(input_ids))
        return place.expand_as(input_ids).mul(input_ids != pad_token_id).argmax(1)
    starts = cu_seq_lens[:-1].long().clamp(max=len(place) - 1)  # the last sample may be empty
    if pooling == "first":
        return starts
    sample = torch.repeat_interleave(cu_seq_lens.diff(), output_size=len(place))
    found = torch.where(input_ids[0] != pad_token_id, place, 0)
    return starts.scatter_reduce(0, sample, found, "amax")


def pick(tensor: Tensor, tokens: Tensor) -> Tensor:
    """One token of each sample: (batch, length, ...), or (1, length, ...) for all of them -> (batch, 1, ...)."""
    samples = torch.arange(len(tokens), device=tokens.device) if len(tensor) > 1 else 0
    return tensor[samples, tokens][:, None]


def mean(hidden: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """The mean over each sample's tokens: hidden states (tokens, hidden) -> (batch, hidden); 0 for an empty sample.

    Sums in float32, since in half precision small terms added to a large sum are lost.
    """
    lengths = cu_seq_lens.diff()
    sample = torch.repeat_interleave(lengths, output_size=len(hidden))
    exact = hidden.float()
    sums = exact.new_zeros(len(lengths), hidden.shape[1]).index_add(0, sample, exact)
    return (sums / lengths.clamp(min=1)[:, None]).to(hidden.dtype)


def pad(hidden: Tensor, cu_seq_lens: Tensor, width: int) -> Tensor:
    """All tokens of each sample: hidden states (tokens, hidden) -> (batch, width, hidden), see `padding_mask`."""
    place = cu_seq_lens[:-1, None] + torch.arange(width, device=hidden.device)
    return hidden[place.clamp(max=len(hidden) - 1)]


def padding_mask(cu_seq_lens: Tensor, width: int) -> Tensor:
    """Mask of the real tokens of padded samples, (batch, width), int64; an empty sample has one."""
    lengths = cu_seq_lens.diff().clamp(min=1)
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).long()
