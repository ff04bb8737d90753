"""Attention with dropout on a CPU, where torch spends most of the time drawing the masks one number at a time."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

_BITS = 16  # of each number that is drawn: probabilities are kept to 1/65,536


def bit_generator_from_torch() -> np.random.SFC64:
    """A fast source of random bits, seeded from torch's generator, so that `torch.manual_seed` decides."""
    return np.random.SFC64(int(torch.randint(2**63 - 1, ()).item()))


class DropoutAttention(torch.autograd.Function):
    """Attention of one sample with dropout of its weights, by the same formulas as torch's, in half the time.

    Four weights share 64 random bits; the gradient of the softmax takes the row sums from the output, as in
    *FlashAttention* (Dao et al., 2022), instead of a pass over the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, probability: float, scale: float, bits: np.random.SFC64
    ) -> Tensor:
        """Output, (heads, tokens, head_size), as are query, key and value."""
        scores = torch.baddbmm(query.new_zeros(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=scale)
        weights = torch.softmax(scores, dim=-1)
        drawn = bits.random_raw(-(-weights.numel() * _BITS // 64)).view(np.uint16)[: weights.numel()]
        kept = torch.from_numpy(drawn >= round(probability * 2**_BITS)).view(weights.shape)
        output = torch.bmm(weights * kept, value).div_(1 - probability)
        ctx.save_for_backward(query, key, value, weights, kept, output)
        ctx.probability, ctx.scale = probability, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, weights, kept, output = ctx.saved_tensors
        [gradient] = gradients
        row_sums = (gradient * output).sum(dim=-1, keepdim=True)
        gradient = gradient / (1 - ctx.probability)
        of_value = torch.bmm((weights * kept).transpose(1, 2), gradient)
        of_scores = torch.bmm(gradient, value.transpose(1, 2)).mul_(kept).sub_(row_sums).mul_(weights)
        of_query = torch.bmm(of_scores, key).mul_(ctx.scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), query).mul_(ctx.scale)
        return of_query, of_key, of_value, None, None, None
