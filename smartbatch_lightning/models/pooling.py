"""How a head that was made for padded batches reads packed ones."""

from collections.abc import Callable

import torch
from torch import Tensor


def first_token(hidden: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """The first token of each sample: hidden states (tokens, hidden) -> (batch, hidden)."""
    return hidden[cu_seq_lens[:-1]]


def mean(hidden: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """The mean over each sample's tokens: hidden states (tokens, hidden) -> (batch, hidden)."""
    lengths = cu_seq_lens.diff()
    sample = torch.repeat_interleave(lengths, output_size=len(hidden))
    sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, sample, hidden)
    return sums / lengths[:, None]


# By the `classifier_pooling` of a model's configuration; heads without one read the first token.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cls": first_token, "mean": mean}
