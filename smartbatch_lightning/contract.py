"""What a data module and a model tell each other, checked when a run is set up.

Each side has one method for it, so that a foreign data module or model is known by what it is, not by an attribute
that happens to have the same name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import lightning as L
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from smartbatch_lightning.batching import BatchSpec
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.tasks import Task

# What `enable_packing` sets on a model: an attribute of that one, not of the configuration that others may share.
TAKES_PACKED_BATCHES = "takes_packed_batches"

# What a model's configuration holds of how texts were cut that it was trained on, so that others are cut alike.
TEXT_TRUNCATION = "text_truncation"


@dataclass(frozen=True)
class TextData:
    """What a model needs to know of the data.

    Attributes:
        task: Labels and what is learnt of them; None where nothing tells.
        tokenizer: Whose ids the batches hold.
        max_length: Tokens of the longest sample there may be.
        packed: Batches are packed instead of padded.
        evaluation_splits: Names of the sets of each evaluation stage, `val` and `test`, in the order of their loaders.
        train_labels: Gives the labels of the training samples as the task encodes them, (num_samples, ...); or None
            where they are not read.
        spec: What a batch may hold.
        truncation: How longer texts are cut, as the model's configuration holds it.
    """

    task: Task | None
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    packed: bool
    evaluation_splits: dict[str, list[str]] = field(default_factory=dict)
    train_labels: Callable[[], NDArray[Any] | None] = lambda: None
    spec: BatchSpec = field(default_factory=BatchSpec)
    truncation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextModel:
    """What a data module needs to know of the model.

    Attributes:
        tokenizer_name: Name on the Hub or folder of its tokenizer.
        tokenizer_kwargs: What of the model's options is for its tokenizer, such as `revision`.
        config: Its configuration.
        trained_config: The same where it was trained to classify; None where it has not been.
        is_demo: It is the embedded demo's, which knows few words.
        trained_on: Fingerprint of the data that a checkpoint's weights were trained on; None where none tells.
        sample_weights: Gives what each sample counts for in the mean loss, (num_samples,), of encoded labels; or None
            where all count alike. To be asked once the model is built.
    """

    tokenizer_name: str
    tokenizer_kwargs: dict[str, Any]
    config: PretrainedConfig
    trained_config: PretrainedConfig | None
    is_demo: bool
    trained_on: dict[str, Any] | None = None
    sample_weights: Callable[[Tensor], Tensor | None] = lambda labels: None


@runtime_checkable
class SupportsTextData(Protocol):
    """A data module that a `SequenceClassifier` can ask."""

    def text_data(self) -> TextData:
        """What a model needs to know."""
        ...


@runtime_checkable
class SupportsTextModel(Protocol):
    """A module that a `SmartBatchDataModule` can ask."""

    def text_model(self) -> TextModel:
        """What a data module needs to know."""
        ...


def fingerprint_in(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """What a data module has left in a checkpoint of the data that it was trained on."""
    states = [state for state in checkpoint.values() if isinstance(state, dict)]
    return next((state["fingerprint"] for state in states if "fingerprint" in state), None)


def datamodule_of(trainer: L.Trainer | None) -> Any:
    """The data module of a run; None without one. Lightning sets the attribute only where there is one."""
    return getattr(trainer, "datamodule", None)


def text_data_of(trainer: L.Trainer | None) -> TextData | None:
    """What the run's data module tells; None for a foreign one or none."""
    datamodule = datamodule_of(trainer)
    return datamodule.text_data() if isinstance(datamodule, SupportsTextData) else None


def name_of_set(trainer: L.Trainer | None, stage: str, number: int) -> str:
    """Name of a data set of a stage: of its split where the data module tells, else as Lightning counts loaders."""
    data = text_data_of(trainer)
    splits = [] if data is None else data.evaluation_splits.get(stage, [])
    return splits[number] if number < len(splits) else f"dataloader_idx_{number}"


def check_takes_packed_batches(module: L.LightningModule) -> None:
    """Refuses a module whose `transformers` models would read a packed batch as one sample.

    Raises:
        ValueError: None of them was given to `enable_packing`.
    """
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    if models and not any(TAKES_PACKED_BATCHES in vars(model) for model in models):
        raise UsageError(
            f"batches are packed, which {type(models[0]).__name__} of {type(module).__name__} does not support yet. "
            "Call enable_packing(model) from smartbatch_lightning.models.packing, or set --data.padding=longest."
        )


def text_model_of(trainer: L.Trainer | None) -> TextModel | None:
    """What the run's module tells; None for a foreign one or none."""
    module = None if trainer is None else trainer.lightning_module
    return module.text_model() if isinstance(module, SupportsTextModel) else None
