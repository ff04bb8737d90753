"""Tests of a step as a GPU would run it, over fake tensors: they have shapes and types, and no numbers that Python could read.

What reads a number, or makes a shape of numbers, waits for a GPU; here it is an error, or counted. The kernel of packed
attention is torch's own for GPUs, whose shapes are worked out without one.
"""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from helpers import slow
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
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

from smartbatch_lightning import (
    BatchSpec,
    PackCollator,
    PadCollator,
    SequenceClassifier,
    SmartBatchSampler,
    TrainingMonitor,
)
from smartbatch_lightning.data.loader import SmartBatchLoader
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
    module.epoch_metrics.for_data_set("train", 0, module._make_metrics)
    return module


@pytest.mark.parametrize(
    ("config", "packed", "precision"),
    [
        (BERT, True, "bf16-mixed"),
        slow(BERT, False, "bf16-mixed"),
        slow(ROBERTA, True, "bf16-mixed"),
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


# --- a step under Lightning ---

STEPS, EVERY = 5, 2
DEVICE = torch.device("meta")  # stands for a GPU: its tensors too have no numbers, and unlike fake ones a device


class Gpu(CUDAAccelerator):
    """Lightning's, without a driver."""

    is_available = staticmethod(lambda: True)
    parse_devices = staticmethod(lambda devices: [0])
    get_parallel_devices = staticmethod(lambda devices: [DEVICE])

    def setup(self, trainer) -> None: ...

    def setup_device(self, device) -> None: ...

    def teardown(self) -> None: ...


class Waits(TorchDispatchMode):
    """Counts, by batch, where Python waits for a GPU: numbers that it reads, and copies that are not `non_blocking`.

    What makes a shape of numbers waits too, and is an error here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[int] = Counter()
        self.batch = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].device == DEVICE:
            self.number[self.batch] += 1
            return int(args[0].dtype != torch.bool)
        if name in ("_to_copy", "copy_"):
            source, target = args[name == "copy_"], kwargs.get("device") or args[0].device
            non_blocking = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
            self.number[self.batch] += source.device != target and not non_blocking
            if source.device == DEVICE and target.type == "cpu":
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return function(*args, **kwargs)


class Ended(Exception):  # noqa: N818 - it is no error
    """Ends a run without the end of its epoch, at which metrics are computed."""


class Batches(Callback):
    """Tells which batch it is."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        assert batch["input_ids"].device == DEVICE
        self.waits.batch = batch_idx
        if batch_idx == STEPS:
            raise Ended


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: h100.name)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # else no autocast
    monkeypatch.setattr(torch, "meta", torch.cuda, raising=False)  # for its random state
    autocast = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and autocast(kind))
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query: query.device == DEVICE)
    tolist = torch.Tensor.tolist  # a copy that is read, which such tensors refuse
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda one: [99] * len(one.cpu()) if one.device == DEVICE else tolist(one)
    )
    with torch.autograd.set_multithreading_enabled(False):  # else with a thread for each GPU
        yield


@pytest.mark.parametrize(
    ("config", "packed", "precision"),
    [
        (BERT, True, "bf16-mixed"),
        slow(BERT, False, "bf16-mixed"),
        slow(BERT, True, "bf16-true"),
        slow(BERT, False, "bf16-true"),
        (LLAMA, True, "bf16-true"),
        slow(LLAMA, False, "bf16-mixed"),
    ],
    ids=lambda one: one.model_type if isinstance(one, PretrainedConfig) else str(one),
)
def test_a_run_waits_for_the_gpu_once_in_a_step_that_logs_and_never_in_others(
    config, packed: bool, precision: str, gpu, tmp_path: Path
) -> None:
    module = module_of(config, torch.bfloat16 if precision == "bf16-true" else torch.float32, packed)
    module.epoch_metrics.clear()
    lengths = np.random.default_rng(0).integers(5, 40, 16 * (STEPS + 2))
    rows = [{"input_ids": np.ones(length, np.int64), "labels": 1} for length in lengths]
    sampler = SmartBatchSampler(lengths, BatchSpec("random"))
    loader = SmartBatchLoader(rows, batch_sampler=sampler, collate_fn=PackCollator() if packed else PadCollator())
    waits = Waits()
    with waits:
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                setattr(owner, name, torch.nn.Parameter(parameter.detach().to(DEVICE)))
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, buffer.to(DEVICE))
        run = L.Trainer(
            default_root_dir=tmp_path,
            accelerator=Gpu(),
            devices=1,
            precision=precision,
            max_epochs=1,
            gradient_clip_val=1.0,
            log_every_n_steps=EVERY,
            logger=CSVLogger(tmp_path),
            callbacks=[Batches(waits), TrainingMonitor()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with pytest.raises(Ended):
            run.fit(module, loader)
    del waits.number[0], waits.number[STEPS]  # where metrics are made, and the end
    assert {batch: number for batch, number in waits.number.items() if number} == {EVERY - 1: 1, 2 * EVERY - 1: 1}
