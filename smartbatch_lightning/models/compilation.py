"""Compiling models with `torch.compile`."""

import lightning as L
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from smartbatch_lightning.errors import UsageError, join_quoted

_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def compile_model(model: PreTrainedModel, how: bool | str) -> None:
    """Compiles a model for batches of any width.

    Args:
        model: The model; compiled in place.
        how: A mode of `torch.compile` for the whole model; or True to compile its layers: since they are alike, one
            compilation serves all, which takes a third of the time, and large batches are as fast.
    """
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if isinstance(how, str):
        model.compile(mode=how, dynamic=True)
        return
    for module in layers or [model]:
        module.compile(dynamic=True)


def check_mode(how: bool | str, gradient_checkpointing: bool) -> None:
    """Rejects a mode that `torch.compile` does not have, and compilation together with gradient checkpointing."""
    if how and gradient_checkpointing:
        raise UsageError(f"compile is {how!r}, but gradient_checkpointing needs uncompiled layers. Use one of them.")
    if isinstance(how, str):
        from torch._inductor import list_mode_options  # takes a second to import

        if how not in list_mode_options():
            raise UsageError(f"compile is {how!r}; give true, false, or one of {join_quoted(list_mode_options())}.")


def check_compilation(how: bool | str, trainer: L.Trainer) -> None:
    """Rejects CUDA graphs if gradients are accumulated."""
    if how in _CUDA_GRAPH_MODES and trainer.accumulate_grad_batches > 1:
        raise UsageError(
            f"compile is {how!r}, whose CUDA graphs would overwrite the gradients that accumulate_grad_batches keeps. "
            "Set --model.compile=true."
        )
