"""The information that a data module and a model exchange, checked when a run is set up.

Each side has one method for this, so that other data modules and models are not mistaken for ours because of an
attribute that happens to have the same name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from smartbatch_lightning.batching import BatchSpec
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.tasks import Task

# Set by `enable_packing` on a model, not on its configuration, which other models may share.
TAKES_PACKED_BATCHES = "takes_packed_batches"

# Field of a trained model's configuration: how texts were tokenized, so that other texts are tokenized in the same way.
TEXT_ENCODING = "text_encoding"


@dataclass(frozen=True)
class TextData:
    """What a model needs to know about the data.

    Attributes:
        task: The task with its labels; None if unknown.
        tokenizer: Tokenizer whose ids the batches contain.
        max_length: Maximum number of tokens in a sample.
        evaluation_splits: Names of the data sets of each evaluation stage, `val` and `test`, in the order of the
            loaders.
        train_labels: Returns the encoded labels of the training samples, (num_samples, ...), or None if they have not
            been read.
        spec: The limits of a batch.
        encoding: How texts are tokenized, as stored in a trained model's configuration.
    """

    task: Task | None
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    evaluation_splits: dict[str, list[str]] = field(default_factory=dict)
    train_labels: Callable[[], NDArray[Any] | None] = lambda: None
    spec: BatchSpec = field(default_factory=BatchSpec)
    encoding: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextModel:
    """What a data module needs to know about the model.

    Attributes:
        tokenizer_name: Name on the Hub or folder of its tokenizer.
        tokenizer_kwargs: The model's options that also apply to its tokenizer, such as `revision`.
        config: Its configuration.
        trained_config: The same if the model was trained to classify, else None.
        trained_on: Fingerprint of the data that a checkpoint's weights were trained on; None if unknown.
        check: Rejects data that does not fit, for example because its classes are not those of the head.
        sample_weights: Returns each sample's weight in the mean loss, (num_samples,), given encoded labels; or None if
            all are equal. Call it only after the model has been built.
    """

    tokenizer_name: str
    tokenizer_kwargs: dict[str, Any]
    config: PretrainedConfig
    trained_config: PretrainedConfig | None
    trained_on: dict[str, Any] | None = None
    check: Callable[["TextData"], None] = lambda data: None
    sample_weights: Callable[[Tensor], Tensor | None] = lambda labels: None


@runtime_checkable
class SupportsTextData(Protocol):
    """A data module that can inform a `SequenceClassifier`."""

    def text_data(self) -> TextData:
        """What a model needs to know about the data."""
        ...


@runtime_checkable
class SupportsTextModel(Protocol):
    """A module that can inform a `SmartBatchDataModule`."""

    def text_model(self) -> TextModel:
        """What a data module needs to know about the model."""
        ...


def fingerprint_in(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The fingerprint of the training data that a data module stored in a checkpoint; None if there is none."""
    states = [state for state in checkpoint.values() if isinstance(state, dict)]
    return next((state["fingerprint"] for state in states if "fingerprint" in state), None)


def datamodule_of(trainer: L.Trainer | None) -> Any:
    """The data module of a run, or None. Lightning sets the attribute only if there is one."""
    return getattr(trainer, "datamodule", None)


def callbacks_of(trainer: L.Trainer | None, *kinds: type[Callback]) -> list[Any]:
    """The callbacks of a run that are of these types."""
    callbacks: list[Callback] = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kinds)]


def text_data_of(trainer: L.Trainer | None) -> TextData | None:
    """The `TextData` of the run's data module; None if it has none, or if there is no data module."""
    datamodule = datamodule_of(trainer)
    return datamodule.text_data() if isinstance(datamodule, SupportsTextData) else None


def validates(trainer: L.Trainer) -> bool:
    """Whether a `fit` has validation, as far as is known before its loaders are created."""
    data = text_data_of(trainer)
    return trainer.enable_validation and (data is None or data.evaluation_splits.get("val") != [])


def name_of_set(trainer: L.Trainer | None, stage: str, number: int) -> str:
    """Name of a stage's data set: that of its split if the data module gives it, else Lightning's loader number."""
    data = text_data_of(trainer)
    splits = [] if data is None else data.evaluation_splits.get(stage, [])
    return splits[number] if number < len(splits) else f"dataloader_idx_{number}"


def check_takes_packed_batches(module: L.LightningModule) -> None:
    """Rejects a module whose `transformers` models would read a packed batch as one sample.

    Raises:
        ValueError: `enable_packing` was called for none of them.
    """
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    if models and not any(TAKES_PACKED_BATCHES in vars(model) for model in models):
        raise UsageError(
            f"batches are packed, which {type(models[0]).__name__} of {type(module).__name__} does not support yet. "
            "Call enable_packing(model) from smartbatch_lightning.models.packing, or set --data.padding=longest."
        )


def text_model_of(trainer: L.Trainer | None) -> TextModel | None:
    """The `TextModel` of the run's module; None if it has none, or if there is no module."""
    module = None if trainer is None else trainer.lightning_module
    return module.text_model() if isinstance(module, SupportsTextModel) else None
