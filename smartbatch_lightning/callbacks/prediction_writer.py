"""Predictions as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from smartbatch_lightning.console import say
from smartbatch_lightning.errors import UsageError


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
        say(f"Wrote {len(table):,} predictions to {self.path}")
