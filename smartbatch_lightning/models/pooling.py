"""How a head that was made for padded batches reads packed ones."""

from collections.abc import Callable

import torch
from torch import Tensor


def first_token(hidden: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """The first token of each sample: hidden states (tokens, hidden) -> (batch, hidden); any of an empty one."""
    return hidden[cu_seq_lens[:-1].clamp(max=len(hidden) - 1)]


def mean(hidden: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """The mean over each sample's tokens: hidden states (tokens, hidden) -> (batch, hidden); 0 of an empty one.

    Summed in float32, since half precision forgets what is added to a sum of many.
    """
    lengths = cu_seq_lens.diff()
    sample = torch.repeat_interleave(lengths, output_size=len(hidden))
    exact = hidden.float()
    sums = exact.new_zeros(len(lengths), hidden.shape[1]).index_add(0, sample, exact)
    return (sums / lengths.clamp(min=1)[:, None]).to(hidden.dtype)


# By the `classifier_pooling` of a model's configuration; heads without one read the first token.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cls": first_token, "mean": mean}
