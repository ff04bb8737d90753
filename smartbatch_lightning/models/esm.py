"""ESM for packed batches: its embeddings are scaled by each sample's share of masked tokens, not by the row's."""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

_MASKED_IN_TRAINING = 0.15 * 0.8  # the share for which ESM's `token_dropout` makes up, as in transformers


def drops_masked_tokens(config: PretrainedConfig) -> bool:
    """Whether a model's embeddings depend on the share of masked tokens, as with ESM's `token_dropout`."""
    return bool(getattr(config, "token_dropout", False))


def embed(embeddings: Any, input_ids: Tensor, position_ids: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """Embeddings of a packed batch, which are those of each sample by itself. Shape (1, tokens, hidden).

    Args:
        embeddings: The model's embedding layer.
        input_ids: (1, tokens).
        position_ids: (1, tokens).
        cu_seq_lens: Where each sample starts, and the end. Shape (batch + 1,).
    """
    masked = input_ids[0] == embeddings.mask_token_id
    lengths = cu_seq_lens.diff()
    sample = torch.repeat_interleave(lengths, output_size=len(masked))
    counts = lengths.new_zeros(len(lengths)).index_add(0, sample, masked.to(lengths.dtype))
    kept = (1 - counts.float() / lengths.clamp(min=1))[sample]
    words = embeddings.word_embeddings(input_ids)
    scaled = words.masked_fill(masked[:, None], 0) * ((1 - _MASKED_IN_TRAINING) / kept)[:, None]
    embedded: Tensor = embeddings(inputs_embeds=scaled.to(words.dtype), position_ids=position_ids)
    return embedded
