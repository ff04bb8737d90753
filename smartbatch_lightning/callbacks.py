"""What watches a run and writes down what came of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from rich.console import Console
from torch import Tensor

from smartbatch_lightning.errors import UsageError


class PaddingSummary(Callback):
    """Counts what was trained on, logs the padding of each epoch, and says at the end what batching saved.

    Logs `train_padding_ratio`: tokens that are padding, over real tokens.

    Attributes:
        samples: Samples trained by all ranks since training started, up to the last whole epoch.
        tokens: Their tokens, with padding.
        real_tokens: Their tokens, without.
    """

    samples = tokens = real_tokens = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts counting anew."""
        self.samples = self.tokens = self.real_tokens = 0
        self._epoch = torch.zeros(3, dtype=torch.int64, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Counts a batch, on its device, without waiting for it."""
        mask = batch["attention_mask"]
        self._epoch[0] += mask.shape[0]
        self._epoch[1] += mask.numel()
        self._epoch[2] += mask.sum()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the padding of the epoch over all ranks."""
        counted = trainer.strategy.reduce(self._epoch, reduce_op="sum")
        assert isinstance(counted, Tensor)
        samples, tokens, real_tokens = counted.tolist()
        self._epoch.zero_()
        self.samples += samples
        self.tokens += tokens
        self.real_tokens += real_tokens
        pl_module.log("train_padding_ratio", tokens / max(1, real_tokens) - 1, sync_dist=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the balance, on rank 0."""
        if not trainer.is_global_zero:
            return
        epochs = trainer.current_epoch
        _say(f"Trained {self.samples:,} samples in {epochs} {'epoch' if epochs == 1 else 'epochs'}.")
        max_length = getattr(getattr(trainer, "datamodule", None), "max_length", None)
        if self.samples and max_length:
            fixed = self.samples * max_length
            _say(
                f"Tokens computed: {self.tokens:,}, of which {self.real_tokens:,} real. Padding everything to "
                f"{max_length} takes {fixed:,}: {1 - self.tokens / fixed:.1%} saved."
            )
        measured = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        if measured:
            _say("Validation: " + ", ".join(f"{name} {value:.4f}" for name, value in measured.items()))
        if path := getattr(trainer.checkpoint_callback, "best_model_path", ""):
            _say(f"Checkpoint: {path}")


class PredictionWriter(BasePredictionWriter):
    """Writes predictions as one table, a row a sample in the order of the input.

    Columns: `index`, the row in the split; `label`, the likeliest class; and a `probability_NAME` for each class.

    Args:
        path: File to write, as Parquet or CSV by its ending.

    Raises:
        ValueError: The ending is another.
    """

    def __init__(self, path: str = "predictions.parquet") -> None:
        super().__init__(write_interval="epoch")
        self.path = Path(path)
        if self.path.suffix not in (".parquet", ".csv"):
            raise UsageError(
                f"the predictions' path {path} ends in {self.path.suffix!r}; let it end in .parquet or .csv."
            )

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[dict[str, Tensor]],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gathers all ranks' predictions, brings them into order and writes them, on rank 0."""
        index = torch.cat([batch["index"] for batch in predictions]).cpu()
        probabilities = torch.cat([batch["probabilities"] for batch in predictions]).cpu()
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, (index, probabilities))
            index, probabilities = (torch.cat(part) for part in zip(*parts, strict=True))
        if not trainer.is_global_zero:
            return
        order = index.argsort()
        columns = probabilities[order].numpy()
        names = getattr(pl_module, "label_names", None) or [str(number) for number in range(columns.shape[1])]
        table = pa.table(
            {
                "index": index[order].numpy(),
                "label": [names[number] for number in columns.argmax(axis=1)],
                **{f"probability_{name}": columns[:, number] for number, name in enumerate(names)},
            }
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.suffix == ".csv":
            pyarrow.csv.write_csv(table, self.path)
        else:
            pyarrow.parquet.write_table(table, self.path)
        _say(f"Wrote {len(table):,} predictions to {self.path}")


def _say(line: str) -> None:
    Console(soft_wrap=True, markup=False, highlight=False).print(line)
