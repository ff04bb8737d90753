"""Real tokens a second and accuracy, beside the peers: the same model, reviews, precision and dropout, in one run.

    SMARTBATCH_IMDB_DIR=... python -m benchmarks.peers                        # MiniLM on a CPU, over a part
    python -m benchmarks.peers --save_lengths imdb_lengths.npy                # once, where IMDB is
    python -m benchmarks.peers --device cuda --lengths imdb_lengths.npy      # BERT-base on a GPU, whole epochs

The contestants are the *Smart Batching Tutorial*'s loop, transformers' `Trainer` with each of its sampling strategies,
and this package under Lightning's `Trainer`, logging and monitor included, as the command line runs it. They take
turns, several times, each time in a process of its own, since what an allocator has kept of another's tensors changes
a CPU's speed; the median counts, and only real tokens do. What is compared is the whole step of each, from batch to
updated weights.

Each trains equally many reviews, in batches drawn evenly by width out of its own plan of all 25,000, so that padding is
that of the full set. On a GPU these are random tokens of IMDB's lengths, and the model is of BERT-base's shape with
random weights, since neither changes the speed; it needs no network, and besides torch, transformers, accelerate and
Lightning only this repository and the file of lengths. There every shape of a batch is met once before the clock runs,
since kernels are chosen and compiled by shape, and transformers is also tried at batches of 64 and 128, without its
look at every loss, with copies that overlap, and compiled. A contestant takes one to two minutes there, of which the
imports of its process may be one; shorter runs than the default show the end of an epoch more than its steps. `--rows`
keeps each row in a file as soon as it is measured, and skips what is in there, so that several short sessions add up.

`--test_reviews` tells the accuracy after training, for which a part must be trained as a whole (`--reviews`,
`--batches 0`). `--attention_dropout 0` shows how much of a CPU's time is the drawing of dropout masks; on a GPU it is 0
for all, since packed batches have none there.
"""

import argparse
import copy
import faulthandler
import json
import logging
import os
import re
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import transformers
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.common import (
    BATCH_SIZE,
    MAX_LENGTH,
    SEED,
    Row,
    imdb_dir,
    imdb_lengths,
    in_fresh_process,
    minilm,
    report,
)
from smartbatch_lightning.batching import BatchSpec, plan_epoch
from smartbatch_lightning.callbacks.training_monitor import TrainingMonitor
from smartbatch_lightning.data.collators import PackCollator, PadCollator
from smartbatch_lightning.data.loader import SmartBatchLoader
from smartbatch_lightning.data.sampler import SmartBatchSampler
from smartbatch_lightning.models.classifier import SequenceClassifier
from smartbatch_lightning.models.flops import Flops, peak_flops, training_flops
from smartbatch_lightning.models.packing import reads_one_token

Int64s = NDArray[np.int64]
GRAPHS, SMALL_BUDGET = "reduce-overhead", 4096  # tokens of some 16 reviews
FIXED, TRANSFORMERS, OURS = "tutorial's loop, fixed padding", "transformers", "smartbatch"


class Reviews(Dataset[dict[str, Any]]):
    """Tokenized reviews in memory."""

    def __init__(self, token_ids: list[NDArray[np.int32]], labels: Int64s) -> None:
        self.token_ids = token_ids
        self.labels = labels
        self.lengths = np.array([len(ids) for ids in token_ids])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self.token_ids[row], "labels": int(self.labels[row])}


@dataclass
class Setting:
    """What is the same for all contestants."""

    device: str
    reviews: Reviews
    test: Reviews | None
    config: Any
    pretrained: str | None
    precision: str
    batches: int
    budget: int
    workers: int

    def model(self) -> PreTrainedModel:
        """The model before training: the same weights every time."""
        torch.manual_seed(SEED)
        config = copy.deepcopy(self.config)
        if self.pretrained is None:
            model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                self.pretrained, config=config, dtype=torch.float32
            )
        built: PreTrainedModel = model.train()
        return built

    @property
    def gpu(self) -> bool:
        """It is one."""
        return self.device == "cuda"

    def drawn(
        self, plan: list[Int64s], width: Callable[[Int64s], int], shape: Callable[[Int64s], object]
    ) -> tuple[list[Int64s], list[Int64s]]:
        """Batches to warm up with, and those that are timed, evenly by width out of a plan; all where no number is set.

        Args:
            plan: Batches of all reviews.
            width: Of a batch.
            shape: What kernels are chosen by.
        """
        timed = plan
        if self.batches:
            # as many reviews for everyone, however large the batches are
            wanted = min(len(plan), max(1, round(self.batches * BATCH_SIZE * len(plan) / len(self.reviews))))
            by_width = sorted(plan, key=width)
            even = [by_width[int((number + 0.5) / wanted * len(plan))] for number in range(wanted)]
            timed = [even[number] for number in np.random.default_rng(SEED).permutation(wanted)]
        if not self.gpu:
            return timed[:1], timed
        of_each_shape = list({shape(batch): batch for batch in timed}.values())
        return [*timed[:3], *of_each_shape], timed


@dataclass
class Clock:
    """Times the batches after the warm-up, as a callback's methods tell it where they end.

    Attributes:
        device: What to wait for.
        warmups: Batches that are not timed.
        started: When the timed ones began.
        seconds: What they took.
        data_wait: Share of training in which a batch was waited for, where a contestant tells.
    """

    device: str
    warmups: int
    started: float = 0.0
    seconds: float = 0.0
    data_wait: float | None = None

    def batch_ended(self, number: int) -> None:
        """Starts the clock when the last batch of the warm-up has ended."""
        if number == self.warmups - 1:
            self._wait()
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.started = perf_counter()

    def training_ended(self) -> None:
        """Stops it."""
        self._wait()
        self.seconds = perf_counter() - self.started

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@dataclass
class Contestant:
    """A way to train.

    Attributes:
        name: For the table.
        plan: Batches of all reviews.
        padding: How they become tensors.
        train: Trains a model on batches, and tells the clock.
    """

    name: str
    plan: Callable[[], list[Int64s]]
    padding: str
    train: "Training"
    multiple: int = 1

    def width(self, lengths: Int64s) -> int:
        """Tokens that a batch of these lengths takes, over its samples."""
        if self.padding == "max_length":
            return MAX_LENGTH
        if self.padding == "packed":
            return int(lengths.mean())
        return min(-(-int(lengths.max()) // self.multiple) * self.multiple, MAX_LENGTH)

    def shape(self, lengths: Int64s) -> tuple[int, int]:
        """What kernels are chosen by: width and samples; of packed batches the power of two that holds the samples."""
        return (0, len(lengths).bit_length()) if self.padding == "packed" else (self.width(lengths), len(lengths))

    def run(self, setting: Setting) -> Row:
        """Trains once."""
        lengths = setting.reviews.lengths
        warmups, timed = setting.drawn(
            self.plan(), lambda batch: self.width(lengths[batch]), lambda batch: self.shape(lengths[batch])
        )
        clock = Clock(setting.device, len(warmups))
        model = self.train(setting, [*warmups, *timed], self.padding, clock)
        real = sum(int(lengths[batch].sum()) for batch in timed)
        tokens, squares = 0, 0
        for batch in timed:
            inside = lengths[batch] if self.padding == "packed" else np.full(len(batch), self.width(lengths[batch]))
            tokens += int(inside.sum())
            squares += int((inside**2).sum())
        flops = training_flops(setting.config, one_token=reads_one_token(model))
        return {
            "steps": len(timed),
            "samples": sum(map(len, timed)),
            "seconds": clock.seconds,
            "real_tokens_per_second": real / clock.seconds,
            "tokens_over_real": tokens / real,
            "operations": flops.total(sum(map(len, timed)), tokens, squares) / real,
            "data_wait": clock.data_wait,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if setting.device == "cuda" else None,
            "mfu": _utilization(setting, flops, lengths[np.concatenate(timed)], clock.seconds),
            "accuracy": None if setting.test is None else accuracy(model, setting.test, setting.device),
        }


def _utilization(setting: Setting, flops: Flops, lengths: Int64s, seconds: float) -> float | None:
    peak = peak_flops(torch.device(setting.device), setting.precision)
    if peak is None:
        return None
    needed = flops.total(len(lengths), int(lengths.sum()), int((lengths**2).sum()))
    return needed / seconds / peak


@torch.no_grad()
def accuracy(model: PreTrainedModel, reviews: Reviews, device: str) -> float:
    """Share of reviews that are classified rightly."""
    model.to(device).eval()  # type: ignore[arg-type]
    plan = plan_epoch(reviews.lengths, BatchSpec(batch_size=64), shuffle=False)
    right = 0
    for batch in plan.rank_batches(0):
        inputs = PadCollator()([reviews[int(row)] for row in batch])
        labels = inputs.pop("labels")
        logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        right += int((logits.argmax(1).cpu() == labels).sum())
    return right / len(reviews)


Training = Callable[[Setting, list[Int64s], str, Clock], PreTrainedModel]


# --- the tutorial's loop ---


def tutorial_loop(
    setting: Setting, batches: list[Int64s], padding: str, clock: Clock, *, tuned: bool = False
) -> PreTrainedModel:
    """A bare loop over tensors that are ready, with everything that the tutorial's has; tuned, it waits for nothing."""
    fixed = "max_length" if padding == "max_length" else "longest"
    collator = PadCollator(0, BatchSpec(padding=fixed, max_length=MAX_LENGTH))
    ready = [collator([setting.reviews[int(row)] for row in batch]) for batch in batches]
    model: PreTrainedModel = setting.model().to(setting.device)  # type: ignore[arg-type]
    if tuned and setting.gpu:
        ready = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in ready]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, eps=1e-8, fused=tuned)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(ready))  # type: ignore[no-untyped-call]
    half = torch.autocast(setting.device, torch.bfloat16) if setting.precision == "bf16-mixed" else nullcontext()
    total = 0.0
    for number, batch in enumerate(ready):
        with half:
            loss = model(**{name: tensor.to(setting.device, non_blocking=tuned) for name, tensor in batch.items()}).loss
        if not tuned:
            total += loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        clock.batch_ended(number)
    clock.training_ended()
    return model


# --- transformers ---


def grouped(lengths: Int64s, batch_size: int = BATCH_SIZE) -> list[Int64s]:
    """`group_by_length`."""
    sampler = LengthGroupedSampler(batch_size, lengths=lengths.tolist(), generator=torch.Generator().manual_seed(SEED))
    return np.split(np.array(list(sampler)), range(batch_size, len(lengths), batch_size))


def rebalanced(lengths: Int64s) -> list[Int64s]:
    """`batch_rebalance`, on one rank without accumulation."""
    from transformers.trainer_pt_utils import BatchRebalanceSampler  # since 5.20

    sampler = BatchRebalanceSampler(lengths.tolist(), BATCH_SIZE, dp_size=1, grad_accum=1, seed=SEED, rank=0)
    return [np.array(batch) for batch in sampler]


class _TrainerClock(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.batch_ended(state.global_step - 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.training_ended()


def transformers_trainer(
    setting: Setting,
    batches: list[Int64s],
    padding: str,
    clock: Clock,
    *,
    compiled: bool = False,
    tuned: bool = False,
    attention: str | None = None,
) -> PreTrainedModel:
    """The `Trainer` of transformers with its own collator, on given batches: with its defaults, or tuned."""
    vocabulary = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=vocabulary, pad_token="[PAD]", unk_token="[UNK]"
    )
    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if setting.device == "cuda" else None)

    class OnBatches(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            loader: DataLoader[Any] = DataLoader(
                setting.reviews,
                batch_sampler=[batch.tolist() for batch in batches],
                collate_fn=collator,
                num_workers=setting.workers,
                pin_memory=setting.device == "cuda",
            )
            prepared: DataLoader[Any] = self.accelerator.prepare(loader)
            return prepared

    os.environ["ACCELERATE_DYNAMO_USE_DYNAMIC"] = "true"  # else it is compiled for every width anew
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=1,
            learning_rate=5e-5,
            max_grad_norm=1.0,
            bf16=setting.precision == "bf16-mixed",
            use_cpu=setting.device == "cpu",
            logging_steps=50,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            torch_compile=compiled,
            logging_nan_inf_filter=not tuned,
            accelerator_config={"non_blocking": tuned},
            seed=SEED,
        )
        model = setting.model()
        if attention is not None:
            model.set_attn_implementation(attention)
        trainer = OnBatches(model, arguments, train_dataset=setting.reviews, callbacks=[_TrainerClock(clock)])
        trainer.train()
    assert isinstance(trainer.model, PreTrainedModel)
    return trainer.model


# --- this package ---


class _Given(SmartBatchSampler):
    """Yields given batches."""

    def __init__(self, batches: list[Int64s], lengths: Int64s) -> None:
        self.batches = batches
        super().__init__(lengths, BatchSpec(batch_size=BATCH_SIZE))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches)


class _Timed(Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        self.clock.batch_ended(number)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.clock.training_ended()


class _Built(SequenceClassifier):
    """The package's classifier around the setting's model."""

    setting: Setting

    def _load_model(self) -> tuple[PreTrainedModel, set[str]]:
        return self.setting.model(), set()


def lightning_trainer(
    setting: Setting,
    batches: list[Int64s],
    padding: str,
    clock: Clock,
    *,
    compiled: bool | str = False,
    multiple: int = 1,
    callbacks: tuple[Callback, ...] = (),
    watched: Literal["not", "logged", "shown"] = "logged",
) -> PreTrainedModel:
    """The package under Lightning's `Trainer`, not watched at all, logged, or with the progress bar besides."""
    spec = BatchSpec(padding=padding, max_length=MAX_LENGTH, pad_to_multiple_of=multiple)
    collator = PackCollator(0, spec) if padding == "packed" else PadCollator(0, spec)
    loader = SmartBatchLoader(
        setting.reviews,
        batch_sampler=_Given(batches, setting.reviews.lengths),
        collate_fn=collator,
        num_workers=setting.workers,
        pin_memory=setting.device == "cuda",
    )
    module = _Built(num_labels=2, compile=compiled)
    module.setting = setting
    monitor = TrainingMonitor()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="gpu" if setting.device == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            precision=setting.precision,  # type: ignore[arg-type]
            plugins=[LightningEnvironment()],  # else Lightning starts MPI where mpi4py is installed
            gradient_clip_val=1.0,
            callbacks=[
                *([] if watched == "not" else [monitor]),
                *([RichProgressBar(refresh_rate=5)] if watched == "shown" else []),  # as the command line draws it
                *callbacks,
                _Timed(clock),
            ],
            logger=False if watched == "not" else [TensorBoardLogger(folder), CSVLogger(folder)],
            enable_checkpointing=False,
            enable_progress_bar=watched == "shown",
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
    if monitor.epochs:
        clock.data_wait = monitor.total.data_wait_seconds / monitor.total.seconds
    assert module.model is not None
    return module.model


def contestants(setting: Setting, args: argparse.Namespace) -> list[Contestant]:
    """All of them, the first being the tutorial's fixed padding; for a GPU or its dry run also those that are tuned."""
    compiled, tuned = args.compile, setting.gpu or args.dry_run
    lengths = setting.reviews.lengths
    multiple = 8 if setting.gpu else 1

    def planned(batching: str, padding: str = "longest", budget: int | None = None) -> list[Int64s]:
        spec = BatchSpec(
            batching,
            None if budget else BATCH_SIZE,
            budget,
            padding,
            pad_to_multiple_of=1 if padding == "packed" else multiple,
            max_length=MAX_LENGTH,
            seed=SEED,
        )
        plan = plan_epoch(lengths, spec)
        return list(plan.rank_batches(0))

    shuffled = partial(planned, "random")
    loops = [
        Contestant(FIXED, shuffled, "max_length", tutorial_loop),
        Contestant("tutorial's loop, smart batching", partial(planned, "tutorial"), "longest", tutorial_loop),
    ]
    theirs = [
        Contestant(f"{TRANSFORMERS}, random", shuffled, "longest", transformers_trainer, multiple),
        Contestant(
            f"{TRANSFORMERS}, group_by_length", partial(grouped, lengths), "longest", transformers_trainer, multiple
        ),
        Contestant(
            f"{TRANSFORMERS}, batch_rebalance", partial(rebalanced, lengths), "longest", transformers_trainer, multiple
        ),
    ]

    def our(batching: str, padding: str, budget: int | None = None, how: bool | str = False) -> Contestant:
        name = f"{OURS}, {batching}, {padding}"
        name += f", {budget:,} tokens" if budget else ""
        name += ", CUDA graphs" if how == GRAPHS else ", compiled" if how else ""
        rounded = (budget or 1) if how == GRAPHS else 1 if padding == "packed" else multiple
        train = partial(lightning_trainer, compiled=how, multiple=rounded)
        return Contestant(name, partial(planned, batching, padding, budget), padding, train, multiple)

    ours = [
        our("random", "max_length"),
        our("random", "longest"),
        our("tutorial", "longest"),
        our("smart", "longest"),
        our("random", "packed"),
        our("smart", "packed"),
        our("random", "longest", setting.budget),
        our("smart", "longest", setting.budget),
        our("random", "packed", setting.budget),
        our("smart", "packed", setting.budget),
    ]
    if compiled:
        ours += [our("smart", "longest", None, True), our("random", "packed", setting.budget, True)]
    if tuned:
        train = partial(tutorial_loop, tuned=True)
        loops.append(
            Contestant("tutorial's loop, smart batching, tuned", partial(planned, "tutorial"), "longest", train)
        )
        ours.append(our("random", "packed", SMALL_BUDGET))
        if compiled:
            ours.append(our("random", "packed", SMALL_BUDGET, GRAPHS))
        attentions = [None, *(["flash_attention_2"] if find_spec("flash_attn") else [])]
        for size, attention, how in product((16, 64, 128), attentions, (False, True) if compiled else (False,)):
            name = f"{TRANSFORMERS}, group_by_length, {size}, tuned"
            name += f", {attention}" if attention else ""
            name += ", compiled" if how else ""
            train = partial(transformers_trainer, compiled=how, tuned=True, attention=attention)
            theirs.append(Contestant(name, partial(grouped, lengths, size), "longest", train, multiple))
    elif compiled:
        train = partial(transformers_trainer, compiled=True)
        name = f"{TRANSFORMERS}, group_by_length, compiled"
        theirs.append(Contestant(name, partial(grouped, lengths), "longest", train, multiple))
    return [*loops, *theirs, *ours]


def run_one(args: argparse.Namespace, name: str) -> Row:
    """Lets one contestant train once."""
    quiet()
    faulthandler.dump_traceback_later(args.patience, exit=True)  # says where it hangs
    setting = made(args)
    [contestant] = [one for one in contestants(setting, args) if one.name == name]
    with redirect_stdout(StringIO()):  # the monitor's table
        row = contestant.run(setting)
    faulthandler.cancel_dump_traceback_later()
    return row


def compare(args: argparse.Namespace, names: list[str]) -> list[Row]:
    """Lets the contestants take turns; medians of what is timed."""
    runs: dict[str, list[Row]] = {name: [] for name in names}
    if args.rows and args.rows.exists():
        for line in map(json.loads, args.rows.read_text().splitlines()):
            if line["name"] in runs:
                runs[line["name"]].append(line["row"])
    left = sum(max(0, args.repeats - len(done)) for done in runs.values())
    print(f"{left} runs are left of {args.repeats * len(names)}; on a GPU one takes a minute or two.", file=sys.stderr)
    for turn in range(args.repeats):
        for name in names:
            if len(runs[name]) > turn:
                continue
            try:
                row = in_fresh_process(run_one, args, name)
            except Exception as error:  # the others are not to be lost
                print(f"{name}: {error!r}", file=sys.stderr, flush=True)
                continue
            runs[name].append(row)
            line = json.dumps({"name": name, "row": row})
            if args.rows:
                with args.rows.open("a") as file:
                    file.write(line + "\n")
            if args.device == "cuda":  # where a session may end before all have run
                print(line, flush=True)
    rows = []
    for name, measured in runs.items():
        if not measured:
            continue
        speeds = [row["real_tokens_per_second"] for row in measured]
        fastest = measured[speeds.index(max(speeds))]  # what disturbs a run only slows it
        rows.append({"": name, **fastest, "spread": (max(speeds) - min(speeds)) / statistics.median(speeds)})
    fixed = rows[0] if rows[0][""] == FIXED else None
    best = max([row["real_tokens_per_second"] for row in rows if row[""].startswith(TRANSFORMERS)], default=None)
    operations = [row.pop("operations") for row in rows]
    for row, mine in zip(rows, operations, strict=True):
        row["expected_over_fixed"] = operations[0] / mine if fixed else None
        row["over_fixed"] = row["real_tokens_per_second"] / fixed["real_tokens_per_second"] if fixed else None
        row["over_best_peer"] = row["real_tokens_per_second"] / best if best else None
    return rows


def quiet() -> None:
    """Lets libraries say nothing but errors, for the tables' sake."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore")


def token_ids(split: str, rows: int) -> Reviews:
    """Reviews of IMDB, tokenized; the first of a shuffle where not all are wanted."""
    from smartbatch_lightning import SmartBatchDataModule

    data = SmartBatchDataModule(imdb_dir(), minilm(), max_length=MAX_LENGTH)
    table = data.token_table(data.splits[split])
    labels = np.array(data.splits[split]["label"])
    chosen = np.random.default_rng(SEED).permutation(len(table))[:rows] if rows else np.arange(len(table))
    return Reviews([np.array(table[int(row)]["input_ids"]) for row in chosen], labels[chosen])


def main() -> None:
    """Runs everybody and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", type=Path, help="file of IMDB's lengths, for random tokens and BERT-base")
    parser.add_argument("--save_lengths", type=Path, help="only write that file")
    parser.add_argument("--dry_run", action="store_true", help="a tiny model, and whatever else a GPU would run")
    parser.add_argument("--reviews", type=int, default=0, help="reviews that are planned; 0 for all")
    parser.add_argument("--test_reviews", type=int, default=0, help="reviews that tell the accuracy; 0 for none")
    parser.add_argument("--batches", type=int, help="timed batches of 16; 0 for the whole plan")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=Path, help="file that keeps each row; what is in there is not measured again")
    parser.add_argument("--patience", type=float, default=3600, help="seconds, imports included, until one is given up")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="bf16-mixed on a GPU, else 32-true")
    parser.add_argument("--max_tokens_per_batch", type=int, help="the budget")
    parser.add_argument("--attention_dropout", type=float, help="for all; 0.1 on a CPU, 0 on a GPU")
    parser.add_argument("--compile", action="store_true", help="compiled contestants too")
    parser.add_argument("--only", help="measure only rows whose names match this")
    args = parser.parse_args()
    if args.attention_dropout is None:
        args.attention_dropout = 0.0 if args.device == "cuda" else 0.1
    if args.save_lengths:
        args.save_lengths.parent.mkdir(parents=True, exist_ok=True)
        np.save(args.save_lengths, imdb_lengths().astype(np.int16))
        return
    quiet()
    setting = made(args)
    names = [one.name for one in contestants(setting, args)]
    rows = compare(args, [name for name in names if args.only is None or re.search(args.only, name)])
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    model = "MiniLM" if setting.pretrained else "BERT-base's shape"
    title = f"{model}, {setting.precision}, attention dropout {args.attention_dropout:g}"
    report("peers", {title: [{name: row[name] for name in columns} for row in rows]})


def made(args: argparse.Namespace) -> Setting:
    """The setting that the arguments ask for."""
    gpu = args.device == "cuda"
    if args.lengths:
        tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = BertConfig(**(tiny if args.dry_run else {}))  # type: ignore[arg-type]
        lengths = np.load(args.lengths).astype(np.int64)
        random = np.random.default_rng(SEED)
        reviews = Reviews(
            [random.integers(1000, config.vocab_size, length).astype(np.int32) for length in lengths],
            random.integers(0, 2, len(lengths)),
        )
        pretrained, test = None, None
    else:
        pretrained = minilm()
        config = AutoConfig.from_pretrained(pretrained)
        reviews = token_ids("train", args.reviews)
        test = token_ids("test", args.test_reviews) if args.test_reviews else None
    config.attention_probs_dropout_prob = args.attention_dropout
    return Setting(
        device=args.device,
        reviews=reviews,
        test=test,
        config=config,
        pretrained=pretrained,
        precision=args.precision or ("bf16-mixed" if gpu else "32-true"),
        batches=args.batches if args.batches is not None else (512 if gpu else 8),
        budget=args.max_tokens_per_batch or (32_768 if gpu else 6_400),
        workers=2 if gpu else 0,
    )


if __name__ == "__main__":
    main()
