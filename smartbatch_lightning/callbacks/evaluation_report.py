"""Reports on what a model does well and where it fails, after a test or validation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from smartbatch_lightning.console import echo
from smartbatch_lightning.contract import datamodule_of, name_of_set, text_data_of
from smartbatch_lightning.data.collators import batch_lengths
from smartbatch_lightning.data.texts import TextDataModule
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.evaluation.evaluation import Evaluation
from smartbatch_lightning.evaluation.samples import Lengths, Texts
from smartbatch_lightning.models.classifier import SequenceClassifier
from smartbatch_lightning.plots import drawing
from smartbatch_lightning.storage import check_writable

_STAGES = {TrainerFn.TESTING: "test", TrainerFn.VALIDATING: "val"}


class EvaluationReport(Callback):
    """Writes and logs an `Evaluation` of each data set that `test` and `validate` run on.

    The report is written to the subfolder `test` or `val` of the given folder; with several data sets, each gets its
    own subfolder there. TensorBoard and W&B receive figures and metrics, other loggers only metrics. Validation during
    `fit` is not reported.

    Args:
        folder: Folder for the report; None for no report.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._logits: Tensor | None = None  # of the current batch
        self._batches: dict[int, list[dict[str, Tensor]]] = {}  # by index of the data set
        self._hook: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Rejects a run that cannot be reported, before anything is evaluated.

        Raises:
            ValueError: The module is not a `SequenceClassifier`, or the folder cannot be written.
        """
        if not self._reports(trainer):
            return
        assert self.folder is not None
        if not isinstance(pl_module, SequenceClassifier):
            raise UsageError(
                f"EvaluationReport reports on a SequenceClassifier, but this run has {type(pl_module).__name__}. Leave "
                "out --evaluation.folder, or create an Evaluation from its predictions."
            )
        if trainer.is_global_zero:
            check_writable(self.folder, "Set another --evaluation.folder.")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts collecting logits with a forward hook, which works even if `step` is overridden."""
        self._batches.clear()
        if self._reports(trainer):
            self._hook = pl_module.register_forward_hook(self._keep)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps labels, lengths and rows with the logits, on the device."""
        if not self._reports(trainer):
            return
        if self._logits is None:
            raise UsageError(
                f"{type(pl_module).__name__} evaluated a batch without calling self(...), but the report needs its "
                "logits. Leave out --evaluation.folder, or call self(...) in step."
            )
        kept = {"logits": self._logits, "labels": batch["labels"]}
        if "index" in batch:
            kept["index"] = batch["index"]
        if (lengths := batch_lengths(batch)) is not None:
            kept["lengths"] = lengths
        self._batches.setdefault(dataloader_idx, []).append(kept)
        self._logits = None

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gathers the results of all ranks, and writes and logs the reports on rank 0."""
        if not self._reports(trainer):
            return
        self._release()
        assert isinstance(pl_module, SequenceClassifier)  # checked in setup
        numbers = sorted(self._batches)
        for number in numbers:
            gathered = _gathered(self._batches.pop(number), trainer.world_size)
            if trainer.is_global_zero:
                self._report(trainer, pl_module, number, gathered, several=len(numbers) > 1)

    # `validate` is reported like `test`
    on_validation_start = on_test_start
    on_validation_batch_end = on_test_batch_end
    on_validation_end = on_test_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Discards the results of an interrupted evaluation."""
        self._release()
        self._batches.clear()

    def _reports(self, trainer: L.Trainer) -> bool:
        return self.folder is not None and trainer.state.fn in _STAGES

    def _keep(self, module: L.LightningModule, inputs: Any, output: Any) -> None:
        self._logits = output.logits.detach()

    def _release(self) -> None:
        self._logits = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _report(
        self, trainer: L.Trainer, model: SequenceClassifier, number: int, kept: dict[str, Tensor], *, several: bool
    ) -> None:
        assert trainer.state.fn is not None
        assert self.folder is not None
        stage, data = _STAGES[trainer.state.fn], text_data_of(trainer)
        split = name_of_set(trainer, stage, number)
        name = f"{stage}/{split}" if several else stage
        index = kept["index"].cpu().numpy() if "index" in kept else None
        lengths = kept["lengths"].cpu().numpy() if "lengths" in kept else None
        datamodule = datamodule_of(trainer)
        if lengths is not None and index is not None and isinstance(datamodule, TextDataModule):
            lost_tokens = datamodule.data_sets(trainer.state.fn.value)[number].table.lost_tokens
            lengths += 0 if lost_tokens is None else lost_tokens[index]
        max_length = None if data is None or data.spec.window_pooling else data.max_length
        evaluation = Evaluation(
            model.task,
            model.task.scores(kept["logits"]).cpu().numpy(),
            model.task.metric_labels(kept["labels"]).cpu().numpy(),
            texts=None if index is None else _texts_of(trainer, split, index),
            lengths=None if lengths is None else Lengths(lengths, "tokens", max_length),
            index=index,
            title=name,
        )
        evaluation.show()
        paths = evaluation.save(Path(self.folder) / name)
        echo("Wrote " + ", ".join(map(str, paths)))
        _log(trainer, evaluation, f"evaluation/{name}", [path for path in paths if path.suffix == ".png"])


def _texts_of(trainer: L.Trainer, split: str, rows: NDArray[np.integer]) -> Sequence[str] | None:
    datamodule = datamodule_of(trainer)
    if not isinstance(datamodule, TextDataModule) or split not in datamodule.splits:
        return None
    dataset, columns = datamodule.splits[split], datamodule.text_columns
    if not set(columns) <= set(dataset.column_names):
        return None
    texts = dataset.select_columns(columns)

    def read(sample: int) -> list[Any]:
        row = texts[int(rows[sample])]
        return [row[column] for column in columns]

    return Texts(len(rows), read)


def _gathered(batches: list[dict[str, Tensor]], ranks: int) -> dict[str, Tensor]:
    """The results of all ranks, in row order, each row once."""
    kept = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    if ranks > 1:
        kept = {name: torch.cat(gather_all_tensors(values)) for name, values in kept.items()}
    if "index" in kept:
        _, first = np.unique(kept["index"].cpu().numpy(), return_index=True)
        order = torch.from_numpy(first).to(kept["index"].device)
        kept = {name: values[order] for name, values in kept.items()}
    return kept


def _log(trainer: L.Trainer, evaluation: Evaluation, name: str, pictures: Sequence[Path]) -> None:
    scalars = {f"{name}/{metric}": value for metric, value in evaluation.scalars().items()}
    for logger in trainer.loggers:
        logger.log_metrics(scalars, trainer.global_step)
        if isinstance(logger, TensorBoardLogger):
            with drawing():
                for title, figure in evaluation.figures().items():
                    logger.experiment.add_figure(f"{name}/{title}", figure, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            for picture in pictures:
                logger.log_image(f"{name}/{picture.stem}", [str(picture)])
