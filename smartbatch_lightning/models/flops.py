"""Floating point operations: how many training needs, and how many a device can do."""

import copy
from typing import NamedTuple

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from smartbatch_lightning.models.packing import supply_attention, takes_attention

# Dense peaks in half precision; NVIDIA's data sheets, and Lightning's table based on them, give peaks with sparsity.
_PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 NVL": 835.5e12,
    "L40S": 362e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
_LENGTH = 64


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak floating point operations per second of a device in one of Lightning's precisions; None if unknown."""
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


class Flops(NamedTuple):
    """Floating point operations of training.

    Attributes:
        per_sample: Operations per sample, independent of its length.
        per_token: Operations per token.
        per_square: Operations per squared length of a sample, for attention.
    """

    per_sample: float
    per_token: float
    per_square: float

    def total(self, samples: float, tokens: float, sum_squared_lengths: float) -> float:
        """Operations for a number of samples with these tokens and sum of squared lengths."""
        return self.per_sample * samples + self.per_token * tokens + self.per_square * sum_squared_lengths


def training_flops(config: PretrainedConfig, *, one_token: bool = False) -> Flops:
    """Floating point operations for training on a sample.

    A forward pass takes `a + b * length + c * length**2`, solved for three lengths; with the backward pass, it is three
    times as much.

    Args:
        config: Configuration of a sequence classification model.
        one_token: Whether the last layer computes only the tokens that the head reads; see `reads_one_token`.
    """
    config = copy.deepcopy(config)  # building a model sets its attention implementation
    with torch.device("meta"):
        shadow = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation="eager"
        )
    counted = []
    by_mask = takes_attention(shadow)
    if by_mask:
        supply_attention(shadow, one_token=one_token)
    for length in (_LENGTH, 2 * _LENGTH, 3 * _LENGTH):
        inputs = {"input_ids": torch.zeros(1, length, dtype=torch.int64, device="meta")}
        if by_mask:  # else the values of positions are read, and meta tensors have none
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with FlopCounterMode(display=False) as counter:
            shadow(**inputs)
        counted.append(counter.get_total_flops())
    per_square = (counted[2] - 2 * counted[1] + counted[0]) / (2 * _LENGTH**2)
    per_token = (counted[1] - counted[0]) / _LENGTH - 3 * _LENGTH * per_square
    per_sample = counted[0] - _LENGTH * per_token - _LENGTH**2 * per_square
    return Flops(3 * per_sample, 3 * per_token, 3 * per_square)
