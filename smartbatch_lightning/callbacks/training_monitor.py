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
from smartbatch_lightning.progress import between_steps, logs_now, resumes_mid_epoch

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]


@dataclass
class Counts:
    """Samples and tokens trained on, over all ranks, and the time it took, excluding validation.

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

    Between logs, it only counts on the device, without synchronizing. Each log covers the steps since the last one:

    - `throughput/real_tokens_per_second`, over all ranks; padding does not count
    - `throughput/padding_ratio`: padding tokens over real tokens
    - `throughput/data_wait`: fraction of the time that rank 0 waited for a batch; only with a `SmartBatchDataModule`
    - `throughput/peak_memory_gib`: peak GPU memory allocated by PyTorch, else peak memory of the process
    - `throughput/model_flops_utilization`: floating point operations that the real tokens need, forward and backward,
      over the GPUs' peak, as in *PaLM* (Chowdhery et al., 2022, appendix B): three times those of a forward pass, as
      counted by PyTorch. Only logged if the peak is known and all layers are trained

    Every epoch, it logs `train_padding_ratio`, `train_seconds` and `train_real_tokens_per_second`, all excluding
    validation. When training ends, it prints a table of all epochs, with losses, metrics and times, including epochs
    before a resume.

    Attributes:
        command: The command that started the run.
    """

    def __init__(self) -> None:
        self.command = command_line()
        self._epochs: dict[int, tuple[Counts, dict[str, float]]] = {}  # by number, as recorded last
        self._trainer: L.Trainer | None = None  # during training

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the device."""
        if trainer.is_global_zero:
            device = trainer.strategy.root_device
            name = (
                torch.cuda.get_device_name(device)
                if device.type == "cuda"
                else f"{(threads := torch.get_num_threads())} CPU thread{'s' if threads > 1 else ''}"
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
            with suppress(Exception):  # there are many kinds of models, and a run must not fail because of this
                self._flops = training_flops(model.config, one_token=reads_one_token(model))
        self._start = perf_counter()
        self._data_wait = 0.0
        self._loader = _loader(trainer)
        self._loader_seconds = 0.0 if self._loader is None else self._loader.data_wait_seconds
        self._before_log = Counts()
        self._before_epoch = Counts()
        self._trainer, self._number, self._has_ended = trainer, trainer.current_epoch, False
        known = self._number + resumes_mid_epoch(trainer)
        self._epochs = {number: record for number, record in self._epochs.items() if number < known}
        if self._number in self._epochs:  # the epoch is resumed, without an on_train_epoch_start
            self._before_epoch -= self._epochs[self._number][0]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records where the epoch starts; by now the metrics of the previous one are known."""
        if self._has_ended:
            self._record(trainer)
        self._number, self._has_ended = trainer.current_epoch, False
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
        if not between_steps(trainer):
            return
        for samples, tokens, sums in self._accumulated:
            self._samples += samples
            self._tokens += tokens
            self._on_device += sums
        self._accumulated.clear()
        if trainer.loggers and logs_now(trainer) and trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock during validation."""
        self._validation_start = perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock again."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validating += perf_counter() - self._validation_start

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the epoch's padding, time and throughput."""
        self._record(trainer)
        self._has_ended = True
        epoch, _ = self._epochs[self._number]
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
        """Records the metrics of the last epoch, unless a restarted run had nothing left to train in it."""
        if self._has_ended:
            self._record(trainer)
        self._trainer = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prints the table and what batching saved, on rank 0, after the progress bar is removed."""
        if stage != "fit" or not trainer.is_global_zero or not any(counts.samples for counts, _ in self.epochs):
            return
        echo(_table(self._epochs, self.total))
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
            if path != last and last:
                echo(f"Last checkpoint: {last}")

    @property
    def epochs(self) -> list[tuple[Counts, dict[str, float]]]:
        """Counts and last metrics of each epoch; if it was resumed, training metrics cover only the part since then."""
        return list(self._epochs.values())

    @property
    def total(self) -> Counts:
        """The sum of all epochs."""
        return Counts(*map(sum, zip(*(astuple(counts) for counts, _ in self.epochs), strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """The epochs, for a resumed run's table, and the command, for the model card."""
        if self._trainer is not None:
            self._record(self._trainer)
        epochs = {number: (asdict(counts), metrics) for number, (counts, metrics) in self._epochs.items()}
        return {"epochs": epochs, "command": self.command}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the epochs."""
        self._epochs = {number: (Counts(**counts), metrics) for number, (counts, metrics) in state["epochs"].items()}

    def _record(self, trainer: L.Trainer) -> None:
        """Records the epoch's counts, unless it has ended, and the latest metrics.

        After a resume, metrics are those of the checkpoint until they are computed again.
        """
        before = self.epochs[-1][1] if self._epochs else {}
        counts = self._epochs[self._number][0] if self._has_ended else self._snapshot(trainer) - self._before_epoch
        known = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._epochs[self._number] = (counts, before | known)

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
            flops = self._flops.total(window.samples, window.real_tokens, window.sum_squared_lengths)
            logged["model_flops_utilization"] = flops / window.seconds / (self._peak * trainer.world_size)
        # straight to the loggers, like Lightning's LearningRateMonitor: `log` would move each figure to the device and
        # back, and wait for it every time
        figures = {f"throughput/{name}": value for name, value in logged.items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step - 1)

    def _snapshot(self, trainer: L.Trainer, read: Callable[[Tensor], list[int]] = Tensor.tolist) -> Counts:
        """The counts so far; waits for the other ranks, and once for the device, in `read`."""
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
    epochs = checkpoint.get("callbacks", {}).get(TrainingMonitor.__qualname__, {}).get("epochs", {})
    return list(epochs.values())[-1][1] if epochs else {}


def _table(epochs: dict[int, tuple[Counts, dict[str, float]]], total: Counts) -> Table:
    """A row for each epoch, and a last one for the total."""
    rows = [(str(number), counts, metrics) for number, (counts, metrics) in epochs.items()]
    names = [name for name in sorted(rows[-1][2]) if name == "train_loss" or name.startswith("val_")]
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
    """Peak memory in bytes; NaN on Windows, where Python cannot measure it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return math.nan
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
