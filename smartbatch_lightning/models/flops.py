"""Floating point operations: those that training takes, and those that a device can do."""

import copy

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, PretrainedConfig

# Dense peaks in half precision; NVIDIA's data sheets, and Lightning's table after them, give these with sparsity.
_PEAK_FLOPS = {"H200": 989.4e12, "H100 NVL": 835.5e12}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Floating point operations a second of a device, at most, in one of Lightning's precisions; None if not known."""
    if device.type != "cuda":
        return None
    half = "16" in precision
    name = torch.cuda.get_device_name(device)
    for known, peak in _PEAK_FLOPS.items():
        if half and known in name:
            return peak
    return get_available_flops(
        device, torch.bfloat16 if "bf16" in precision else torch.float16 if half else torch.float32
    )


def training_flops(config: PretrainedConfig) -> tuple[float, float]:
    """Floating point operations of training on a sample: those by token, and those by squared token.

    A forward pass takes `a * length + b * length**2`, solved for two lengths; with the backward pass it is three times
    as much.
    """
    config = copy.deepcopy(config)  # it takes up the kind of attention
    with torch.device("meta"):
        shadow = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation="eager"
        )
    counted = []
    for length in (64, 128):
        with FlopCounterMode(display=False) as counter:
            shadow(input_ids=torch.zeros(1, length, dtype=torch.int64, device="meta"))
        counted.append(counter.get_total_flops() / length)
    per_square = (counted[1] - counted[0]) / 64
    return 3 * (counted[0] - 64 * per_square), 3 * per_square
