"""A trained classifier as an ordinary `transformers` folder, for whoever has never heard of this package."""

from pathlib import Path
from typing import Any

import lightning as L
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedTokenizerBase

from smartbatch_lightning.console import command_line, say
from smartbatch_lightning.data.datamodule import SmartBatchDataModule
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.models.classifier import SequenceClassifier

_OF_DATA = ("max_length", "batch_size", "max_tokens_per_batch", "batching", "padding", "jitter", "seed")
_OF_TRAINER = ("max_epochs", "max_steps", "precision", "gradient_clip_val", "accumulate_grad_batches", "world_size")
_OF_MODEL = ("learning_rate", "adam_epsilon", "weight_decay", "warmup_steps", "warmup_ratio")


class ModelExport(Callback):
    """Writes the model as an ordinary `transformers` folder when `fit` ends, with the weights that it ends with.

    Args:
        folder: Where to; None for not at all.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds out before training whether this is a run that can be exported."""
        datamodule = getattr(trainer, "datamodule", None)
        if self.folder is None:
            return
        if not isinstance(pl_module, SequenceClassifier) or not isinstance(datamodule, SmartBatchDataModule):
            raise UsageError(
                "ModelExport writes a SequenceClassifier trained on a SmartBatchDataModule, but this run has "
                f"{type(pl_module).__name__} and {type(datamodule).__name__}. Call save_pretrained of the model and of "
                "the tokenizer instead."
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes it, on rank 0."""
        datamodule = getattr(trainer, "datamodule", None)
        if self.folder is None or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, SequenceClassifier)  # on_fit_start has seen to it
        assert isinstance(datamodule, SmartBatchDataModule)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        export_model(pl_module, datamodule, self.folder, metrics, command_line())


def export_model(
    model: SequenceClassifier,
    data: SmartBatchDataModule,
    folder: str | Path,
    metrics: dict[str, float] | None = None,
    command: str | None = None,
) -> None:
    """Writes weights as safetensors, the configuration with the names of the classes, the tokenizer and a model card.

    `transformers.pipeline("text-classification", folder, truncation=True)` gives what `predict` does: the tokenizer's
    longest input is set to the data's `max_length`.

    Args:
        model: Trained, and built.
        data: What it was trained on; its tokenizer and settings are written.
        folder: Where to.
        metrics: By name, for the card.
        command: That trained it, for the card.
    """
    assert model.model is not None, "a model is exported after it has been built"
    folder = Path(folder)
    model.model.save_pretrained(folder)
    tokenizer: PreTrainedTokenizerBase = type(data.tokenizer).from_pretrained(data.tokenizer.name_or_path)
    tokenizer.model_max_length = data.max_length
    tokenizer.save_pretrained(folder)
    _card(model, data, folder.resolve().name, metrics or {}, command).save(folder / "README.md")
    say(f"Wrote the model to {folder}")


def _card(
    model: SequenceClassifier, data: SmartBatchDataModule, name: str, metrics: dict[str, float], command: str | None
) -> ModelCard:
    pretrained = Path(model.pretrained).name if Path(model.pretrained).is_dir() else model.pretrained
    share = data.validation_split
    validation = f"{share:.0%} of {data.train_split}" if isinstance(share, float) else str(share)
    evaluated = {name: value for name, value in metrics.items() if name.startswith(("val_", "test_"))}
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=data.source,
                dataset_name=data.source,
                dataset_split=data.test_split if metric.startswith("test_") else validation,
                metric_type=metric.partition("_")[2],
                metric_name=metric,
                metric_value=value,
            )
            for metric, value in evaluated.items()
        ],
    )
    settings: dict[str, Any] = {name: getattr(data, name) for name in _OF_DATA}
    settings |= {name: getattr(model, name) for name in _OF_MODEL}
    if data.trainer is not None and data.trainer.global_step:  # it has trained the model
        settings |= {name: getattr(data.trainer, name) for name in _OF_TRAINER}
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        f"`{pretrained}` fine-tuned on `{data.source}` to tell {', '.join(model.label_names)}, with "
        "smartbatch-lightning.",
        "```python\nfrom transformers import pipeline\n\n"
        f'classify = pipeline("text-classification", "{name}", truncation=True)  # at {data.max_length} tokens\n```',
        "## Metrics",
        _table("metric", evaluated) if evaluated else "Not measured.",
        "## Settings",
        _table("setting", settings),
    ]
    if command:
        sections += ["## Command", f"```bash\n{command}\n```"]
    return ModelCard("\n\n".join(sections) + "\n")


def _table(heading: str, values: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {f'{value:.4f}' if isinstance(value, float) and heading == 'metric' else value} |"
        for name, value in values.items()
    ]
    return "\n".join([f"| {heading} | value |", "| --- | --- |", *rows])
