"""The layers of a `transformers` model: the depths of parameters, freezing, gradient checkpointing."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from smartbatch_lightning.errors import UsageError


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model: the longest list of modules in its base model that is not inside another one.

    ALBERT's layers, which share weights, count as one.

    Raises:
        ValueError: It has none, or two stacks, an encoder's and a decoder's.
    """
    found = find_layers(model)
    if found is None:
        raise UsageError(
            f"{type(model).__name__} has no single stack of layers to freeze or to give separate learning rates. Leave "
            "out layer_decay, freeze_layers and freeze_embeddings."
        )
    return found


def find_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """Like `encoder_layers`, but None if there are none."""
    found = [] if model.config.is_encoder_decoder else list(_outermost_lists(model.base_model))
    return max(found, key=len, default=None)


def parameter_depths(model: PreTrainedModel) -> dict[nn.Parameter, int]:
    """Depth of each parameter of the base model.

    Returns:
        0 for embeddings and everything else before the layers, 1 for the first layer and so on; for what follows the
        layers, such as a pooler, their number plus one.
    """
    layers = encoder_layers(model)
    depths = {parameter: depth for depth, layer in enumerate(layers, 1) for parameter in layer.parameters()}
    outside, after_layers = {}, False
    for module in model.base_model.modules():
        after_layers |= module is layers
        for parameter in module.parameters(recurse=False):
            # tables shared by all layers, such as relative positions, may be defined after them
            above = after_layers and not isinstance(module, nn.Embedding)
            outside[parameter] = len(layers) + 1 if above else 0
    return outside | depths


def freeze(model: PreTrainedModel, *, embeddings: bool, layers: int) -> None:
    """Freezes the embeddings, and optionally the first layers; dropout in them stays on.

    Args:
        model: The model; changed in place.
        embeddings: Freeze the embeddings.
        layers: Freeze this many of the first layers, and the embeddings.

    Raises:
        ValueError: There are fewer layers.
    """
    if not embeddings and not layers:
        return
    found = len(encoder_layers(model))
    if layers > found:
        raise UsageError(
            f"freeze_layers is {layers}, but the model has {found} layers with their own weights. Set it to {found} or "
            "less."
        )
    for parameter, depth in parameter_depths(model).items():
        if depth <= layers:
            parameter.requires_grad_(False)


def enable_reversible_gradients(model: PreTrainedModel) -> None:
    """Lets Reformer's layers train on frozen embeddings, where its backward pass would otherwise stop."""
    if model.config.model_type == "reformer":
        model.enable_input_require_grads()  # type: ignore[no-untyped-call]


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Makes a model recompute its layers in the backward pass instead of storing activations.

    Raises:
        ValueError: The model does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise UsageError(
            f"{type(model).__name__} does not support gradient checkpointing. Leave gradient_checkpointing out."
        )
    # newer versions of transformers use another name, and warn of the old one
    renamed = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # these would run the backward pass of frozen layers; only reentrant checkpointing needs them
    model.disable_input_require_grads()  # type: ignore[no-untyped-call]


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)
