"""What a GPU can do, what of it a training step takes, and whether the packed path is right there.

    python -m benchmarks.gpu --lengths imdb_lengths.npy                      # all parts, some four minutes
    python -m benchmarks.gpu --lengths imdb_lengths.npy checks levers        # some of them

Needs no network: BERT's shapes with random weights, and random tokens of IMDB's lengths (`benchmarks.peers
--save_lengths`). Each row is printed as a line of JSON as soon as it is there.

- `ceilings`: copies and matrix products of BERT-base's shapes, which no step can be faster than
- `attention`: `varlen_attn` over a packed batch, and SDPA over padded ones, the first time a width is met and later
- `checks`: packed against padded in bfloat16, filled rows against others, CUDA graphs and dropout
- `levers`: a bare step, eager and compiled in several ways
- `waits`: how often Python waits for the GPU in a step under Lightning
- `profile`: the kernels of a compiled step that take longest
"""

import argparse
import copy
import json
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from benchmarks import peers
from benchmarks.common import MAX_LENGTH, SEED, Row, card
from smartbatch_lightning.batching import BatchSpec, plan_epoch
from smartbatch_lightning.data.collators import PackCollator, PadCollator
from smartbatch_lightning.models.compilation import compile_model
from smartbatch_lightning.models.flops import peak_flops, training_flops
from smartbatch_lightning.models.packing import enable_packing

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}

Batch = dict[str, Any]


class Bench:
    """Device, sizes and the batches of a plan.

    Args:
        device: `cuda`, or `cpu` for a dry run with tiny sizes.
        lengths: Of the samples. Shape (num_samples,).
        ways: Levers whose names match this are tried.
    """

    def __init__(self, device: str, lengths: NDArray[np.integer], ways: str = "") -> None:
        self.device = device
        self.ways = ways
        self.lengths = lengths
        self.small = device == "cpu"

    def say(self, part: str, **row: Any) -> None:
        """Prints a row."""
        print(json.dumps({"part": part, **{name: _rounded(value) for name, value in row.items()}}), flush=True)

    def wait(self) -> None:
        """Until the device has done all."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int = 20) -> float:
        """Of a call, the mean of many after three that do not count."""
        for _ in range(3):
            run()
        self.wait()
        start = perf_counter()
        for _ in range(repeats):
            run()
        self.wait()
        return (perf_counter() - start) / repeats

    def config(self, sizes: dict[str, int], dropout: float = 0.1) -> BertConfig:
        """BERT's, without dropout of attention weights, which packed batches do not have on a GPU."""
        sizes = TINY if self.small else sizes
        config = BertConfig(
            **sizes,  # type: ignore[arg-type]
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=0.0,
        )
        config.problem_type = "single_label_classification"
        return config

    def model(self, config: BertConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """With the same weights every time."""
        torch.manual_seed(SEED)
        with torch.device(self.device):
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(copy.deepcopy(config), dtype=dtype)  # type: ignore[no-untyped-call]
        enable_packing(model)
        model.train()
        return model

    def batches(self, budget: int, *, filled: bool, number: int) -> list[Batch]:
        """Packed batches of a token budget, on the device."""
        spec = BatchSpec(
            "random",
            max_tokens_per_batch=budget,
            padding="packed",
            pad_to_multiple_of=budget if filled else 1,
            max_length=MAX_LENGTH,
            seed=SEED,
        )
        plan = list(plan_epoch(self.lengths, spec).rank_batches(0))
        random = np.random.default_rng(SEED)
        return [self.tensors(PackCollator(0, spec), rows, random) for rows in plan[:number]]

    def tensors(self, collator: Any, rows: NDArray[np.int64], random: np.random.Generator) -> Batch:
        """A batch of random tokens."""
        samples = [
            {"input_ids": random.integers(1000, 30_000, self.lengths[row]), "labels": int(row) % 2} for row in rows
        ]
        batch = collator(samples)
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def ceilings(bench: Bench) -> None:
    """Copies and matrix products."""
    half = torch.bfloat16
    megabytes = 1 if bench.small else 4096
    source = torch.randn(megabytes * 2**18, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source))
    bench.say("ceilings", what="copy, read and written", terabytes_per_second=2 * source.nbytes / seconds / 1e12)
    for hidden, inner in ((64, 128),) if bench.small else ((768, 3072), (1024, 4096)):
        for tokens in (64,) if bench.small else (4096, 32_768):
            shapes = {
                "one of q, k, v": (hidden, hidden),
                "qkv": (hidden, 3 * hidden),
                "up": (hidden, inner),
                "down": (inner, hidden),
            }
            for name, (inputs, outputs) in shapes.items():
                x = torch.randn(tokens, inputs, device=bench.device, dtype=half)
                w = torch.randn(outputs, inputs, device=bench.device, dtype=half)
                g = torch.randn(tokens, outputs, device=bench.device, dtype=half)
                runs = {"forward": lambda: x @ w.T, "of inputs": lambda: g @ w, "of weights": lambda: g.T @ x}  # noqa: B023
                flops = 2 * tokens * inputs * outputs
                rates = {of: flops / bench.seconds(run) / 1e12 for of, run in runs.items()}
                bench.say("ceilings", what=f"product, {name}", hidden=hidden, tokens=tokens, teraflops=rates)


def attention_kernels(bench: Bench) -> None:
    """Packed attention, and what new widths cost SDPA."""
    if bench.small:
        return
    for heads in (12, 16):
        [batch] = bench.batches(32_768, filled=True, number=1)
        cu, longest = batch["cu_seq_lens_q"], batch["max_length_q"]
        q, k, v = (
            torch.randn(32_768, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        gradient = torch.randn_like(q)
        window = (longest, longest)

        def forward() -> Tensor:
            attended = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window)  # noqa: B023
            assert isinstance(attended, Tensor)
            return attended

        def both() -> None:
            torch.autograd.grad(forward(), (q, k, v), gradient)  # noqa: B023

        flops = 4 * heads * 64 * float(cu.diff().square().sum())
        forward_s, both_s = bench.seconds(forward), bench.seconds(both)
        bench.say(
            "attention",
            what="varlen_attn",
            heads=heads,
            forward_ms=1e3 * forward_s,
            both_ms=1e3 * both_s,
            teraflops=3.5 * flops / both_s / 1e12,
        )
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        first: list[float] = []
        later: list[float] = []
        for turn in range(2):
            for width in range(200, 216):
                q, k, v = (
                    torch.randn(16, 12, width, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                    for _ in range(3)
                )
                mask = torch.ones(16, 1, width, width, device="cuda", dtype=torch.bool)
                mask[:, :, :, width - 3 :] = False
                bench.wait()
                start = perf_counter()
                with sdpa_kernel(backend):
                    F.scaled_dot_product_attention(q, k, v, mask).sum().backward()  # type: ignore[no-untyped-call]
                bench.wait()
                (later if turn else first).append(perf_counter() - start)
        medians = {"first_ms": 1e3 * float(np.median(first)), "later_ms": 1e3 * float(np.median(later))}
        bench.say("attention", what=f"padded, {backend.name}, a width met first and later", **medians)


def checks(bench: Bench) -> None:
    """Whether packed batches give what padded ones give."""
    config = bench.config(BASE, dropout=0.0)
    model = bench.model(config)
    rows = np.arange(24)
    spec = BatchSpec(padding="packed", max_tokens_per_batch=16_384, pad_to_multiple_of=16_384, max_length=MAX_LENGTH)
    kinds = {
        "padded": PadCollator(0, BatchSpec(max_length=MAX_LENGTH)),
        "packed": PackCollator(),
        "filled": PackCollator(0, spec),
    }

    def results(collator: Any, half: bool) -> tuple[Tensor, Tensor]:
        batch = bench.tensors(collator, rows, np.random.default_rng(SEED))
        model.zero_grad()
        with torch.autocast(bench.device, torch.bfloat16, enabled=half):
            loss, logits = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return logits.detach().float(), torch.cat(gradients)

    exact = results(kinds["padded"], False)
    for kind, collator in kinds.items():
        for half in (True, False):
            got = results(collator, half)
            distances = [float((mine - right).norm() / right.norm()) for mine, right in zip(got, exact, strict=True)]
            bench.say(
                "checks",
                what=f"{kind}, {'bf16' if half else 'float32'}, against padded in float32",
                logits=distances[0],
                gradients=distances[1],
            )
    if bench.small:
        return
    model = bench.model(bench.config(TINY, dropout=0.1))
    model.compile(mode="reduce-overhead", dynamic=True)
    [batch] = bench.batches(4096, filled=True, number=1)
    losses = []
    for seed in (1, 2, 3, 1, 2, 3, 1, 2, 3):
        torch.cuda.manual_seed(seed)
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        model.zero_grad()
    same = len(set(losses[3:6])) == 3 and losses[3:6] == losses[6:9]
    bench.say("checks", what="CUDA graphs draw dropout by the seed set before", holds=same, losses=losses)


def loss_of(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and logits of a batch."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "num_samples")}
    logits = model(**inputs).logits[: len(batch["labels"])].float()
    return F.cross_entropy(logits, batch["labels"]), logits


def profile(bench: Bench) -> None:
    """Kernels of a step."""
    if bench.small:
        return
    for how in ("layers", None):
        torch.compiler.reset()
        model = bench.model(bench.config(BASE))
        if how:
            compile_model(model, True)
        step = _stepper(bench, model, False)
        batches = bench.batches(32_768, filled=True, number=5)
        for batch in batches[:3]:
            step(batch)
        bench.wait()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            for batch in batches[3:]:
                step(batch)
            bench.wait()
        kernels = sorted(recorded.key_averages(), key=lambda one: -one.self_device_time_total)
        total = sum(one.self_device_time_total for one in kernels) / 2e3
        bench.say("profile", what=how or "eager", ms=total, kernels=sum(one.count for one in kernels) / 2)
        for one in kernels[:24]:
            bench.say("profile", kernel=one.key[:90], ms=one.self_device_time_total / 2e3, calls=one.count / 2)


class _Waits(Callback):
    """Counts the warnings of synchronizing calls, by step."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self.caught = caught
        self.seen: list[int] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        self.seen.append(len(self.caught))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def waits(bench: Bench) -> None:
    """Steps 1 to 60 under Lightning, of which the fiftieth logs."""
    if bench.small:
        return
    random = np.random.default_rng(SEED)
    reviews = peers.Reviews(
        [random.integers(1000, 30_000, length).astype(np.int32) for length in bench.lengths[:2000]],
        random.integers(0, 2, 2000),
    )
    setting = peers.Setting(
        "cuda", reviews, None, bench.config(BASE), None, "bf16-mixed", batches=0, budget=0, workers=0
    )
    batches = np.split(np.arange(960), 60)
    for padding in ("packed", "longest"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            counted = _Waits(caught)
            clock = peers.Clock("cuda", 1)
            with redirect_stdout(StringIO()):
                peers.lightning_trainer(setting, batches, padding, clock, callbacks=(counted,))
        by_step = np.diff(counted.seen)
        logging = int(by_step.argmax())
        places = Counter(
            f"{Path(one.filename).name}:{one.lineno}"
            for one in caught[counted.seen[logging] : counted.seen[logging + 1]]
        )
        bench.say(
            "waits",
            what=padding,
            median=float(np.median(by_step)),
            most=int(by_step.max()),
            in_step=logging + 2,
            steps_without=int((by_step == 0).sum()),
            places=dict(places),
        )


def levers(bench: Bench) -> None:
    """A bare step in several ways."""
    ways: list[tuple[str, dict[str, int], int, bool | str, bool, bool]] = [
        ("eager", BASE, 32_768, False, False, False),
        ("by layer", BASE, 32_768, True, False, False),
        ("by layer, filled", BASE, 32_768, True, True, False),
        ("by layer, filled, bf16 weights", BASE, 32_768, True, True, True),
        ("by layer, filled", LARGE, 32_768, True, True, False),
        ("eager", BASE, 4096, False, False, False),
        ("by layer", BASE, 4096, True, False, False),
        ("whole", BASE, 4096, "default", True, False),
        ("whole, CUDA graphs", BASE, 4096, "reduce-overhead", True, False),
    ]
    for name, sizes, budget, how, filled, masters in ways:
        if not re.search(bench.ways, name):
            continue
        try:
            row = timed_steps(bench, sizes, budget, how, filled, masters)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"[:300]}
        bench.say("levers", what=name, model="large" if sizes is LARGE else "base", tokens=budget, **row)


def timed_steps(bench: Bench, sizes: dict[str, int], budget: int, how: bool | str, filled: bool, masters: bool) -> Row:
    """Milliseconds of a step, and what is made of the device."""
    torch.compiler.reset()
    config = bench.config(sizes)
    budget = 1024 if bench.small else budget
    batches = bench.batches(budget, filled=filled, number=4 if bench.small else 12)
    model = bench.model(config, torch.bfloat16 if masters else torch.float32)
    if how:
        compile_model(model, how)
    step = _stepper(bench, model, masters)
    start = perf_counter()
    for batch in batches[:3]:
        step(batch)
    bench.wait()
    warmup = perf_counter() - start
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rounds = 1 if bench.small else 2 if budget > 8192 else 6
    start = perf_counter()
    for _ in range(rounds):
        for batch in batches:
            step(batch)
    issued = perf_counter() - start
    bench.wait()
    seconds = (perf_counter() - start) / (rounds * len(batches))
    lengths = np.concatenate([batch["cu_seq_lens_q"].diff()[: len(batch["labels"])].cpu().numpy() for batch in batches])
    real = int(lengths.sum()) / len(batches)
    squares = float((lengths.astype(float) ** 2).sum()) / len(batches)
    flops = training_flops(config, one_token=True).total(len(lengths) / len(batches), real, squares) / seconds
    peak = peak_flops(torch.device(bench.device), "bf16-mixed")
    return {
        "ms": 1e3 * seconds,
        "host_ms": 1e3 * issued / (rounds * len(batches)),
        "real_tokens_per_second": real / seconds,
        "mfu": flops / peak if peak else None,
        "warmup_s": warmup,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if bench.device == "cuda" else None,
    }


def _stepper(bench: Bench, model: Any, masters: bool) -> Callable[[Batch], None]:
    """Forward, backward, clipping and AdamW; with bfloat16 weights AdamW's are kept in float32."""
    weights = list(model.parameters())
    kept = [weight.detach().float() for weight in weights] if masters else weights
    optimizer = AdamW(kept, lr=5e-5, fused=True)

    def step(batch: Batch) -> None:
        with torch.autocast(bench.device, torch.bfloat16, enabled=not masters):
            loss, _ = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if masters:
            for weight, master in zip(weights, kept, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
        torch.nn.utils.clip_grad_norm_(kept, 1.0)
        optimizer.step()
        if masters:
            torch._foreach_copy_([weight.data for weight in weights], kept)
        model.zero_grad()

    return step


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return value


PARTS: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings,
    "attention": attention_kernels,
    "checks": checks,
    "levers": levers,
    "waits": waits,
    "profile": profile,
}


def main() -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; by default all")
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a dry run with tiny sizes")
    parser.add_argument("--ways", default="", help="levers whose names match this")
    args = parser.parse_args()
    bench = Bench(args.device, np.load(args.lengths).astype(np.int64), args.ways)
    print(json.dumps({"card": card()}), flush=True)
    for name in args.parts or PARTS:
        try:
            PARTS[name](bench)
        except Exception:  # the others are not to be lost
            traceback.print_exc()


if __name__ == "__main__":
    main()
