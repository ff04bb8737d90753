"""The command line's default precision: the fastest that the GPU supports in hardware."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.precision import Precision
from lightning.pytorch.utilities import rank_zero_info


def with_precision(options: Mapping[str, Any]) -> dict[str, Any]:
    """Adds `precision` to the arguments of a Trainer on a CUDA GPU, unless it is given, and logs the choice.

    Float32 matrix products are then computed in TF32.
    """
    plugins = options.get("plugins") or []
    plugins = plugins if isinstance(plugins, list | tuple) else [plugins]
    given = options.get("precision") is not None or any(isinstance(plugin, Precision) for plugin in plugins)
    takes_gpu = options.get("accelerator") in (None, "auto", "gpu", "cuda") and torch.cuda.is_available()
    if given or not takes_gpu or options.get("barebones"):
        return dict(options)
    precision, reason = best_precision(torch.cuda.get_device_capability())
    torch.set_float32_matmul_precision("high")
    rank_zero_info(
        f"Precision: {precision}, since {torch.cuda.get_device_name()} {reason}. Set --trainer.precision to change it."
    )
    return {**options, "precision": precision}


def best_precision(capability: tuple[int, int]) -> tuple[str, str]:
    """The precision for GPUs of a CUDA capability, and the reason."""
    if capability >= (8, 0):  # Ampere
        return "bf16-mixed", "computes in bfloat16"
    if capability >= (7, 0):  # Volta, Turing
        return "16-mixed", "computes in float16, and not in bfloat16"
    return "32-true", "is fast only in float32"
