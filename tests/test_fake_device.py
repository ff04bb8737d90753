"""Tests of a step as a GPU would run it, over fake tensors: they have shapes and types, and no numbers that Python could read.

What reads a number, or makes a shape of numbers, waits for a GPU; here it is an error. The kernel of packed attention
is torch's own for GPUs, whose shapes are worked out without one.
"""

from collections import Counter

import pytest
import torch
from helpers import slow
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
    RobertaConfig,
)

from smartbatch_lightning import SequenceClassifier
from smartbatch_lightning.models import attention
from smartbatch_lightning.models.packing import enable_packing, skip_unread_tokens

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
MODERN = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
BERT, ROBERTA = BertConfig(**SIZES), RobertaConfig(**SIZES)
MODERNBERT = ModernBertConfig(**SIZES, **MODERN, local_attention=16, classifier_pooling="mean")
LLAMA = LlamaConfig(**SIZES, pad_token_id=0)
LENGTHS = (40, 12, 7, 25)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number[function._overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def batch(packed: bool) -> dict:
    labels = torch.zeros(len(LENGTHS), dtype=torch.int64)
    if not packed:
        ids = torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    ids = torch.ones(1, sum(LENGTHS), dtype=torch.int64)
    starts = torch.zeros(len(LENGTHS) + 1, dtype=torch.int32)
    longest = dict.fromkeys(("max_length_q", "max_length_k"), max(LENGTHS))
    starts_of = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
    return {"input_ids": ids, "position_ids": torch.zeros_like(ids), **starts_of, **longest, "labels": labels}


def module_of(config: PretrainedConfig, dtype: torch.dtype, packed: bool) -> SequenceClassifier:
    module = SequenceClassifier(architecture=config.to_dict())
    built = AutoModelForSequenceClassification.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    (enable_packing if packed else skip_unread_tokens)(built)  # which try the model on two samples
    module.model = built
    module.epoch_metrics.of("train", 0, module._make_metrics)
    return module


@pytest.mark.parametrize(
    ("config", "packed", "precision"),
    [
        (BERT, True, "bf16-mixed"),
        (BERT, False, "bf16-mixed"),
        (ROBERTA, True, "bf16-mixed"),
        (MODERNBERT, True, "bf16-mixed"),
        slow(BERT, True, "bf16-true"),
        slow(BERT, False, "bf16-true"),
        slow(ROBERTA, False, "bf16-mixed"),
        slow(ROBERTA, True, "bf16-true"),
        slow(MODERNBERT, False, "bf16-mixed"),
        slow(MODERNBERT, True, "bf16-true"),
        (LLAMA, True, "bf16-mixed"),
        slow(LLAMA, False, "bf16-mixed"),
    ],
    ids=lambda one: one.model_type if isinstance(one, PretrainedConfig) else str(one),
)
def test_a_step_never_waits_for_the_device(config, packed: bool, precision: str, monkeypatch) -> None:
    module = module_of(config, torch.bfloat16 if precision == "bf16-true" else torch.float32, packed)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query: query.dtype == torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Operations() as operations:
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                setattr(owner, name, torch.nn.Parameter(fake.from_tensor(parameter.detach())))
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module.step(batch(packed), "train")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    assert loss.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in module.parameters())
    kernels = [operations.number[name] for name in ("_varlen_attn", "_varlen_attn_backward")]
    assert kernels == [3 * packed, 3 * packed]


def test_what_waits_for_the_device_is_found() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        F.cross_entropy(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)).item()
