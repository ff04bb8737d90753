"""Tests of what a run does where nothing is given, by the device that it gets; the devices are pretended."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from transformers import AutoModelForSequenceClassification, BertConfig

from smartbatch_lightning import BatchSpec, PackCollator, SmartBatchDataModule, plan_epoch
from smartbatch_lightning.models.packing import packed_attention
from smartbatch_lightning.precision import with_precision

A100, T4, P100 = (8, 0), (7, 5), (6, 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: A100)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    before = torch.get_float32_matmul_precision()
    yield monkeypatch
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("capability", "precision", "reason"),
    [
        (A100, "bf16-mixed", "computes in bfloat16"),
        (T4, "16-mixed", "computes in float16, and not in bfloat16"),
        (P100, "32-true", "is fast only in float32"),
    ],
)
def test_without_a_precision_the_command_line_takes_the_fastest_of_the_card_and_says_so(
    gpu, capability, precision, reason, caplog
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with caplog.at_level(logging.INFO):
        assert with_precision({"max_epochs": 1, "precision": None}) == {"max_epochs": 1, "precision": precision}
    assert f"Precision: {precision}, since a card {reason}. Set --trainer.precision" in caplog.text
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(
    "options",
    [{"precision": "32-true"}, {"accelerator": "cpu"}, {"plugins": [MixedPrecision("bf16-mixed", "cpu")]}],
)
def test_a_precision_or_another_device_that_is_chosen_stays(gpu, options, caplog) -> None:
    assert with_precision(options) == options
    assert not caplog.text


def test_on_a_cpu_nothing_is_changed(caplog) -> None:
    assert with_precision({"accelerator": "auto"}) == {"accelerator": "auto"}
    assert not caplog.text


@pytest.mark.parametrize(
    ("capability", "precision", "line"),
    [
        (A100, "bf16-mixed", "use FlashAttention, without the model's attention dropout of 0.1"),
        (T4, "16-mixed", "sample by sample: the GPU does not support FlashAttention"),
        (A100, "32-true", "sample by sample: FlashAttention does not support 32-true"),
    ],
)
def test_a_line_says_what_computes_attention_of_packed_batches(capability, precision, line) -> None:
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = AutoModelForSequenceClassification.from_config(config)
    assert line in packed_attention(model, capability, precision)


def reviews() -> np.ndarray:
    """25,000 lengths with the spread of film reviews cut at 400 tokens."""
    return np.random.default_rng(0).lognormal(5.4, 0.7, 25_000).clip(10, 400).astype(np.int64)


@pytest.mark.parametrize("batching", ["smart", "tutorial", "random"])
def test_an_epoch_on_a_gpu_has_at_most_16_shapes_of_padded_batches_by_default(batching: str) -> None:
    data = SmartBatchDataModule(batching=batching, max_length=400)
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    shapes = set()
    for shuffle in (True, False):
        plan = plan_epoch(reviews(), data.spec, shuffle=shuffle)
        widths = data.spec.width(plan.longest(reviews()))
        shapes |= set(zip(widths.tolist(), plan.batch_sizes().tolist(), strict=True))
    assert len(shapes) <= 16
    assert data.spec.width(65) == 96
    data.trainer.strategy.root_device = torch.device("cpu")
    assert data.spec.width(65) == 65


@pytest.mark.parametrize("budget", [4096, 32_768])
def test_an_epoch_of_packed_rows_that_are_filled_up_to_a_budget_has_one_shape(budget: int) -> None:
    spec = BatchSpec(
        "random", max_tokens_per_batch=budget, padding="packed", pad_to_multiple_of=budget, max_length=400, seed=321
    )
    lengths, collate, shapes = reviews(), PackCollator(0, spec), set()
    token_ids = np.ones(400, np.int64)
    for batch in list(plan_epoch(lengths, spec).rank_batches(0))[:: 1 if budget > 8192 else 8]:
        made = collate([{"input_ids": token_ids[:length]} for length in lengths[batch]])
        shapes.add((made["input_ids"].shape, made["cu_seq_lens_q"].shape, made["max_length_q"]))
    assert shapes == {((1, budget), (budget // 128 + 1,), 400)}
