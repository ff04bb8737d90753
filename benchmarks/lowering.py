"""How many kernels a packed training step launches on a GPU and how many bytes they move: counted, not timed.

    python -m benchmarks.lowering          # the table of docs/gpu.md

Needs a GPU of any kind, since torch has no backward pass of CUDA tensors without one, but runs nothing on it: BERT-base
trains a batch of 32,768 tokens of fake tensors, which have shapes and no numbers, on an H100 that is pretended. What
runs eagerly is counted operation by operation; what is compiled is lowered by Inductor up to its fused kernels, none of
which is then made. A kernel reads each of its inputs and writes each of its outputs once, at best.
"""

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import make_boxed_func  # type: ignore[attr-defined]
from torch._inductor import compile_fx, scheduler
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification, BertConfig

from benchmarks.common import MAX_LENGTH
from benchmarks.gpu import BASE, loss_of
from smartbatch_lightning.models import attention
from smartbatch_lightning.models.compilation import compile_model
from smartbatch_lightning.models.packing import supply_attention

TOKENS, SAMPLES = 32_768, 129
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    type="cuda",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    warp_size=32,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    gcnArchName="",
    L2_cache_size=50 * 2**20,
)


class Lowered(Exception):  # noqa: N818 - it is no error
    """Ends a compilation where kernels are fused, for what it is raised with: their number and bytes."""


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the kernels of what runs, and the bytes that they read and write.

    Attributes:
        kernels: Operations that are no views, and kernels of compiled graphs.
        bytes: That these move.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = self.bytes = 0
        self._in_graph = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._in_graph:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            storages = {tensor.untyped_storage()._cdata for tensor in given}
            written = [leaf for leaf in tree_leaves(_written(function, args, kwargs or {})) if isinstance(leaf, Tensor)]
            made = [
                leaf
                for leaf in tree_leaves(result)
                if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in storages
            ]
            if (made or written) and "empty" not in function._overloadpacket.__name__:
                self.kernels += 1
                self.bytes += sum(map(_bytes, (*given, *written, *made)))
        return result

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True, so that what runs under it is compiled."""
        return True

    def lowered(self, graph: Any, inputs: Any, **options: Any) -> Any:
        """Stands for Inductor's compilation of a graph: counts what it would run whenever the graph is called."""
        try:
            compile_fx.compile_fx_inner(copy.deepcopy(graph), inputs, **options)
        except Exception as error:
            kernels, moved = _reason(error).args

        def run(*args: Any) -> Any:
            self.kernels += kernels
            self.bytes += moved
            self._in_graph = True
            try:
                return graph.forward(*args)
            finally:
                self._in_graph = False

        return make_boxed_func(run)


def _reason(error: Exception) -> Lowered:
    """What an error was raised for."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Lowered):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        raise error
    return cause


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()) if tensor.is_cuda else 0


def _written(function: Any, args: Any, kwargs: Any) -> list[Any]:
    """What of its arguments an operation changes."""
    arguments = function._schema.arguments
    named = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    changed = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    return [named.get(name) for name in changed]


def _stop_when_fused(graph: GraphLowering) -> None:
    graph.init_wrapper_code()
    graph._update_scheduler()
    nodes = [node for node in graph.scheduler.nodes if not isinstance(node, scheduler.NopKernelSchedulerNode)]
    moved = [node.get_read_write_buffers_sizes() for node in nodes]
    raise Lowered(sum(size > 0 for size in moved), sum(moved))


@contextmanager
def pretended_h100(meter: Meter) -> Iterator[None]:
    """An H100, for which Inductor hands graphs to the meter."""
    properties: dict[str, Any] = {
        "get_device_properties": lambda *args: H100,
        "get_device_capability": lambda *args: (H100.major, H100.minor),
        "get_device_name": lambda *args: H100.name,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *args, **options: True,
    }
    with (
        mock.patch.multiple(torch.cuda, **properties),
        mock.patch.object(CudaInterface, "get_device_properties", properties["get_device_properties"]),
        mock.patch.object(CudaInterface, "is_bf16_supported", properties["is_bf16_supported"]),
        mock.patch.object(CudaInterface.Worker, "get_device_properties", properties["get_device_properties"]),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
        mock.patch.object(compile_fx, "compile_fx", partial(compile_fx.compile_fx, inner_compile=meter.lowered)),
        mock.patch.object(GraphLowering, "compile_to_module", _stop_when_fused),
        mock.patch.object(scheduler, "has_triton", return_value=True),
        inductor_config.patch(joint_graph_constant_folding=False),  # which would compute
        torch.autograd.set_multithreading_enabled(False),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def batch() -> dict[str, Any]:
    """A packed batch, on the GPU."""
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    starts = torch.zeros(SAMPLES + 1, dtype=torch.int32)
    longest = dict.fromkeys(("max_length_q", "max_length_k"), MAX_LENGTH)
    return {
        "input_ids": ids,
        "position_ids": torch.zeros_like(ids),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts),
        **longest,
        "labels": torch.zeros(SAMPLES, dtype=torch.int64),
    }


def sliced(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
    """Attention of slices of a batch of one, as a row was made of it before."""
    q, k, v = (tensor.transpose(0, 1)[None][0].transpose(0, 1) for tensor in (q, k, v))
    return varlen_attn(q, k, v, *args, **options)


def step(*, one_token: bool = True, compiled: bool | str = False, half: bool = False, slices: bool = False) -> Meter:
    """Forward, backward, clipping and AdamW of one batch."""
    torch.compiler.reset()
    meter = Meter()
    with pretended_h100(meter), mock.patch.object(attention, "varlen_attn", sliced if slices else varlen_attn):
        with torch.device("cuda"):
            config = BertConfig(**BASE, attention_probs_dropout_prob=0.0)  # type: ignore[arg-type]
            dtype = torch.bfloat16 if half else torch.float32
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
            inputs = batch()
        supply_attention(model, one_token=one_token)
        model.train()
        if compiled:
            compile_model(model, compiled)
        optimizer = AdamW(model.parameters(), fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # which makes its state
        optimizer.zero_grad()
        with meter:
            with torch.autocast("cuda", torch.bfloat16, enabled=not half):
                loss, _ = loss_of(model, inputs)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return meter


WAYS: dict[str, dict[str, Any]] = {  # each with what stands before it
    "none": {"one_token": False, "slices": True},
    "no slices of a batch of one": {"one_token": False},
    "the last layer computes the tokens that are read": {},
    "`compile: true`": {"compiled": True},
    "`bf16-true`": {"compiled": True, "half": True},
}


def main() -> None:
    """Prints the table."""
    print("| levers | kernels | GB | fewer bytes |\n| --- | ---: | ---: | ---: |")
    before = None
    for name, options in WAYS.items():
        meter = step(**options)
        before = before or meter.bytes
        print(
            f"| {name} | {meter.kernels:,} | {meter.bytes / 1e9:.1f} | {100 * (1 - meter.bytes / before):.0f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
