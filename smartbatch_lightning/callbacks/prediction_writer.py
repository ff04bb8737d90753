"""Predictions as a table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from smartbatch_lightning.console import echo
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.models.classifier import SequenceClassifier
from smartbatch_lightning.storage import atomic_write, check_writable, refused


class PredictionWriter(BasePredictionWriter):
    """Writes predictions as one table, a row a sample in the order of the input.

    Columns: `index`, the row in the split, and those of the task: for single labels `label`, the likeliest class as it
    stands in the data, and a `probability_NAME` for each class; for several labels `labels`, a list, in CSV as JSON,
    or a text with their delimiter, and a `probability_NAME` for each; for a regression `prediction`, or a
    `prediction_NAME` for each target. In CSV a text that a spreadsheet would take for a
    formula, one that begins with `=`, `+`, `-`, `@`, a tab or a carriage return, has a `'` before it; not in Parquet.

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

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses predictions whose columns are unknown, before any is made, unless another callback writes them.

        Raises:
            ValueError: The module is no `SequenceClassifier`.
        """
        if stage == "predict" and not isinstance(pl_module, SequenceClassifier):
            writers = [one for one in trainer.callbacks if isinstance(one, BasePredictionWriter)]  # type: ignore[attr-defined]
            if all(isinstance(writer, PredictionWriter) for writer in writers):
                raise UsageError(
                    f"PredictionWriter writes predictions of a SequenceClassifier, but this run has "
                    f"{type(pl_module).__name__}. Give a BasePredictionWriter of your own by --trainer.callbacks."
                )
        elif stage == "predict" and trainer.is_global_zero:
            check_writable(self.path.parent, "Give another path by --predictions.path.")

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[dict[str, Tensor]],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gathers all ranks' predictions, brings them into order and writes them, on rank 0."""
        if not isinstance(pl_module, SequenceClassifier):
            return  # another callback writes them
        predicted = {name: torch.cat([batch[name] for batch in predictions]).cpu() for name in predictions[0]}
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, predicted)
            predicted = {name: torch.cat([part[name] for part in parts]) for name in predicted}
        if not trainer.is_global_zero:
            return
        order = predicted["index"].argsort()
        rows = {name: values[order].numpy() for name, values in predicted.items()}
        table = pa.table({"index": rows.pop("index"), **pl_module.task.prediction_columns(rows)})
        with refused(self.path, "Make room, or give another path by --predictions.path."):
            if self.path.suffix == ".csv":
                safe = _without_formulas(_without_lists(table))
                atomic_write(self.path, lambda tmp_path: pyarrow.csv.write_csv(safe, tmp_path))
            else:
                atomic_write(self.path, lambda tmp_path: pyarrow.parquet.write_table(table, tmp_path))
        echo(f"Wrote {len(table):,} predictions to {self.path}")


def _without_lists(table: pa.Table) -> pa.Table:
    """Lists as JSON, since CSV has none."""
    for number, column in enumerate(table.columns):
        if pa.types.is_list(column.type):
            written = pa.array([json.dumps(row, ensure_ascii=False) for row in column.to_pylist()], pa.string())
            table = table.set_column(number, table.column_names[number], written)
    return table


def _without_formulas(table: pa.Table) -> pa.Table:
    for number, column in enumerate(table.columns):
        if pa.types.is_string(column.type):
            escaped = pc.replace_substring_regex(column, r"\A([=+\-@\t\r])", r"'\1")
            table = table.set_column(number, table.column_names[number], escaped)
    return table
