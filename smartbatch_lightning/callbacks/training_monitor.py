"""Monitors training throughput: tokens, padding, waiting for data, memory and GPU utilization."""

import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from datetime import timedelta
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table
from torch import Tensor, nn

from smartbatch_lightning.console import command_line, echo, table_of
from smartbatch_lightning.contract import text_data_of
from smartbatch_lightning.data.collators import window_lengths
from smartbatch_lightning.data.loader import SmartBatchLoader
from smartbatch_lightning.models.classifier import SequenceClassifier
from smartbatch_lightning.models.flops import peak_flops, training_flops
from smartbatch_lightning.models.packing import reads_one_token
from smartbatch_lightning.progress import between_steps, stands_in_epoch

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]


@dataclass
class Counts:
    """What was trained, over all ranks, and the time it took, excluding validation.

    Attributes:
        samples: Number of samples.
        tokens: Number of tokens, padding included.
        real_tokens: Number of tokens without padding.
        sum_squared_lengths: Sum of the squared lengths of samples or their windows, which determines the cost of
            attention.
        seconds: Training time.
        data_wait_seconds: Time spent waiting for batches.
    """

    samples: int = 0
    tokens: int = 0
    real_tokens: int = 0
    sum_squared_lengths: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(mine - others for mine, others in zip(astuple(self), astuple(other), strict=True)))

    @property
    def padding_ratio(self) -> float:
        """Padding tokens over real tokens."""
        return self.tokens / max(1, self.real_tokens) - 1

    @property
    def real_tokens_per_second(self) -> float:
        """Real tokens per second, over all ranks."""
        return self.real_tokens / self.seconds if self.seconds else 0.0


class TrainingMonitor(Callback):
    """Logs training throughput in real tokens and what limits it, every `log_every_n_steps` and every epoch.

    In between, it only counts on the device, without synchronising. During training it logs, for the steps since it
    last logged:

    - `throughput/real_tokens_per_second`, over all ranks; padding does not count
    - `throughput/padding_ratio`: padding tokens over real tokens
    - `throughput/data_wait`: fraction of the time that rank 0 waited for a batch; only with a `SmartBatchDataModule`
    - `throughput/peak_memory_gib`: peak GPU memory allocated by PyTorch, else peak memory of the process
    - `throughput/model_flops_utilization`: floating point operations that the real tokens need, forward and backward,
      over the GPUs' peak, as in *PaLM* (Chowdhery et al., 2022, appendix B): three times those of a forward pass, as
      counted by PyTorch. Only logged if the peak is known and all layers are trained

    Every epoch, it logs `train_padding_ratio`, `train_seconds` and `train_real_tokens_per_second`, without validation.
    When training ends, a table of all epochs is printed, with losses, metrics and times, including those before a
    resume.

    Attributes:
        epochs: Counts and final metrics of each epoch. For an epoch that was interrupted, training loss and metrics
            cover only the part after the resume.
        command: The command that started the run.
    """

    def __init__(self) -> None:
        self.epochs: list[tuple[Counts, dict[str, float]]] = []
        self.command = command_line()
        self._trainer: L.Trainer | None = None
        self._epoch: Counts | None = None
        self._unfinished_epoch: tuple[int, Counts, dict[str, float]] | None = None
        self._restored_metrics: dict[str, float] = {}  # known when the checkpoint was written
        # the unfinished epoch of a resumed run, as it was in the checkpoint, until training continues
        self._goes_on: list[tuple[Counts, dict[str, float]]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the device."""
        if trainer.is_global_zero:
            device = trainer.strategy.root_device
            name = (
                torch.cuda.get_device_name(device)
                if device.type == "cuda"
                else f"{torch.get_num_threads()} CPU threads"
            )
            echo(f"Training on {name}" + (f", one of {trainer.world_size} ranks" if trainer.world_size > 1 else ""))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts counting."""
        self._samples = self._tokens = 0
        self._accumulated: list[tuple[int, int, Tensor]] = []  # batches whose optimizer step has not been taken yet
        self._on_device = torch.zeros(2, dtype=torch.int64, device=pl_module.device)
        self._validating = 0.0
        self._last_step = trainer.global_step
        self._peak = peak_flops(trainer.strategy.root_device, str(trainer.precision))
        model = pl_module.model if isinstance(pl_module, SequenceClassifier) else None
        self._flops = None
        if self._peak and model is not None and _trains_all_layers(model):
            with suppress(Exception):  # there are many kinds of models, and a run must not fail because of a figure
                self._flops = training_flops(model.config, one_token=reads_one_token(model))
        self._start = perf_counter()
        self._data_wait = 0.0
        self._loader = _loader(trainer)
        self._loader_seconds = 0.0 if self._loader is None else self._loader.data_wait_seconds
        self._before_log = Counts()
        self._before_epoch = Counts()
        self._goes_on.clear()
        if self._unfinished_epoch is not None:
            (epoch, counts, metrics), self._unfinished_epoch = self._unfinished_epoch, None
            if epoch == trainer.current_epoch:  # it is resumed, without an on_train_epoch_start
                self._goes_on.append((counts, metrics))
            else:  # it had finished
                self.epochs.append((counts, metrics))
        elif stands_in_epoch(trainer) and len(self.epochs) > trainer.current_epoch:  # cut short by the previous run
            self._goes_on.append(self.epochs.pop())
        for counts, _ in self._goes_on:
            self._before_epoch -= counts
        self._trainer, self._epoch = trainer, None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records where the epoch starts; by now the metrics of the previous one are known."""
        self._close_epoch()
        self._before_epoch = self._snapshot(trainer)
        if not self._samples:  # the first epoch, after other callbacks may have run batches
            self._before_log = self._before_epoch
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batches of an optimizer step, without waiting for the device; logs in the same steps as Lightning.

        Batches of an unfinished optimizer step are not counted, since a resumed run trains them again.
        """
        lengths = window_lengths(batch)
        if lengths is None:
            return
        sums = torch.stack((lengths.sum(), lengths.square().sum()))
        self._accumulated.append((len(batch.get("window_counts", lengths)), batch["input_ids"].numel(), sums))
        self._goes_on.clear()
        if not between_steps(trainer):
            return
        for samples, tokens, sums in self._accumulated:
            self._samples += samples
            self._tokens += tokens
            self._on_device += sums
        self._accumulated.clear()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step
        if trainer.loggers and every and step % every == 0 and step != self._last_step:
            self._last_step = step
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock during validation."""
        self._validation_start = perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock again."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validating += perf_counter() - self._validation_start

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the epoch."""
        self._goes_on.clear()
        self._epoch = epoch = self._snapshot(trainer) - self._before_epoch
        if epoch.real_tokens:
            pl_module.log_dict(
                {
                    "train_padding_ratio": epoch.padding_ratio,
                    "train_seconds": epoch.seconds,
                    "train_real_tokens_per_second": epoch.real_tokens_per_second,
                },
                rank_zero_only=True,
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the last epoch, also if a restarted run had nothing left to train in it."""
        self._close_epoch()
        self.epochs += self._goes_on
        self._trainer = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prints the table and what batching saved, on rank 0, after the progress bar is removed."""
        if stage != "fit" or not trainer.is_global_zero or not any(counts.samples for counts, _ in self.epochs):
            return
        echo(_table(self.epochs, self.total))
        data = text_data_of(trainer)
        if data and not data.spec.window_pooling:
            tokens, fixed = self.total.tokens, self.total.samples * data.max_length
            echo(
                f"Tokens computed: {tokens:,}. Padding everything to {data.max_length} takes {fixed:,}: "
                f"{1 - tokens / fixed:.1%} saved."
            )
        saver = trainer.checkpoint_callback
        if isinstance(saver, ModelCheckpoint):
            best, last = saver.best_model_path, saver.last_model_path
            if path := (best or last) if saver.monitor else (last or best):
                echo(f"Checkpoint: {path}")

    @property
    def total(self) -> Counts:
        """The sum of all epochs."""
        return Counts(*map(sum, zip(*(astuple(counts) for counts, _ in self.epochs), strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """The epochs, for a resumed run's table, and the command, for the model card."""
        ended = self._ended_epoch()
        state: dict[str, Any] = {
            "epochs": [(asdict(counts), metrics) for counts, metrics in [*self.epochs, *ended]],
            "command": self.command,
        }
        if self._trainer is not None and not ended:
            started = self._snapshot(self._trainer) - self._before_epoch
            state["unfinished_epoch"] = (self._trainer.current_epoch, asdict(started), self._metrics())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the epochs."""
        self.epochs = [(Counts(**counts), metrics) for counts, metrics in state["epochs"]]
        self._restored_metrics = self.epochs[-1][1] if self.epochs else {}
        if "unfinished_epoch" in state:
            epoch, counts, self._restored_metrics = state["unfinished_epoch"]
            self._unfinished_epoch = (epoch, Counts(**counts), self._restored_metrics)

    def _ended_epoch(self) -> list[tuple[Counts, dict[str, float]]]:
        """The finished epoch that is not in `epochs` yet, with its metrics so far; empty if there is none."""
        if self._epoch is None or self._trainer is None:
            return []
        return [(self._epoch, self._metrics())]

    def _metrics(self) -> dict[str, float]:
        """The current metrics; after a resume, those from the checkpoint until they are computed again."""
        assert self._trainer is not None
        known = {name: float(value) for name, value in self._trainer.callback_metrics.items()}
        return self._restored_metrics | known

    def _close_epoch(self) -> None:
        self.epochs += self._ended_epoch()
        self._epoch = None

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        read = pl_module.read_losses if isinstance(pl_module, SequenceClassifier) else Tensor.tolist
        before, self._before_log = self._before_log, self._snapshot(trainer, read)
        window = self._before_log - before
        logged = {
            "real_tokens_per_second": window.real_tokens_per_second,
            "padding_ratio": window.padding_ratio,
            "peak_memory_gib": _peak_memory(pl_module.device) / 2**30,
        }
        if self._loader is not None:
            logged["data_wait"] = window.data_wait_seconds / window.seconds
        if self._peak and self._flops:
            flops = self._flops.of(window.samples, window.real_tokens, window.sum_squared_lengths)
            logged["model_flops_utilization"] = flops / window.seconds / (self._peak * trainer.world_size)
        # straight to the loggers, like Lightning's LearningRateMonitor: `log` would move each figure to the device and
        # back, and wait for it every time
        figures = {f"throughput/{name}": value for name, value in logged.items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step - 1)

    def _snapshot(self, trainer: L.Trainer, read: Callable[[Tensor], list[int]] = Tensor.tolist) -> Counts:
        """What was trained so far; waits for the other ranks, and once for the device, in `read`."""
        here = nn.functional.pad(self._on_device, (2, 0))
        here[0], here[1] = self._samples, self._tokens  # without a wait, unlike a copy of a new tensor
        counted = trainer.strategy.reduce(here, reduce_op="sum")
        assert isinstance(counted, Tensor)
        samples, tokens, real_tokens, squares = read(counted)
        seconds = perf_counter() - self._start - self._validating
        loader = _loader(trainer)
        if loader is not self._loader:  # recreated, and counting from 0
            self._loader, self._loader_seconds = loader, 0.0
        if loader is not None:
            self._data_wait += loader.data_wait_seconds - self._loader_seconds
            self._loader_seconds = loader.data_wait_seconds
        return Counts(samples, tokens, real_tokens, squares, seconds, self._data_wait)


def metrics_in(checkpoint: dict[str, Any]) -> dict[str, float]:
    """The metrics stored in a checkpoint by a `TrainingMonitor`; empty without one."""
    state = checkpoint.get("callbacks", {}).get(TrainingMonitor.__qualname__, {})
    if "unfinished_epoch" in state:
        metrics: dict[str, float] = state["unfinished_epoch"][2]
        return metrics
    return state["epochs"][-1][1] if state.get("epochs") else {}


def _table(epochs: list[tuple[Counts, dict[str, float]]], total: Counts) -> Table:
    """A row for each epoch, and a last one for the total."""
    names = [name for name in sorted(epochs[-1][1]) if name == "train_loss" or name.startswith("val_")]
    rows = [(str(number), counts, metrics) for number, (counts, metrics) in enumerate(epochs)]
    return table_of(
        [
            {
                "epoch": title,
                "samples": f"{counts.samples:,}",
                **{name.replace("_", " "): f"{metrics[name]:.4f}" if name in metrics else "" for name in names},
                "training time": str(timedelta(seconds=round(counts.seconds))),
                "real tokens/s": f"{counts.real_tokens_per_second:,.0f}",
                "padding": f"{counts.padding_ratio:.2%}",
            }
            for title, counts, metrics in (rows if len(rows) == 1 else [*rows, ("all", total, {})])
        ]
    )


def _loader(trainer: L.Trainer) -> SmartBatchLoader | None:
    """The training loader, if it measures the time spent waiting for batches."""
    return loader if isinstance(loader := trainer.train_dataloader, SmartBatchLoader) else None


def _trains_all_layers(model: nn.Module) -> bool:
    """Whether no layer is frozen, neither below trained ones nor under an adapter; embeddings take no operations."""
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    weights = (parameter for layer in layers for parameter in layer.parameters(recurse=False) if parameter.ndim > 1)
    return all(weight.requires_grad for weight in weights)


def _peak_memory(device: torch.device) -> float:
    """Peak memory in bytes; NaN on Windows, where Python cannot tell it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return math.nan
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
