"""A model's output layer, and rescaling its logits."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from smartbatch_lightning.errors import UsageError


def find_output_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that produces the logits: the last one with `num_labels` outputs.

    Raises:
        ValueError: There is none, or it has no bias.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    layers = [layer for layer in layers if layer.out_features == model.config.num_labels]
    if not layers or layers[-1].bias is None:
        raise UsageError(
            f"{type(model).__name__} has no last layer with a bias to fold the mean of standardized targets into. "
            "Train with --data.standardize_targets=false."
        )
    return layers[-1]


@torch.no_grad()
def rescale_logits(model: PreTrainedModel, scale: Sequence[float], shift: Sequence[float]) -> None:
    """Changes the weights of the output layer so that the logits become `logits * scale + shift`.

    Args:
        model: The model; changed in place.
        scale: Factor for each logit.
        shift: Offset for each logit.

    Raises:
        ValueError: As for `find_output_layer`.
    """
    layer = find_output_layer(model)
    by, to = (torch.tensor(values, dtype=torch.float64) for values in (scale, shift))
    weight, bias = layer.weight.cpu().double() * by[:, None], layer.bias.cpu().double() * by + to
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
