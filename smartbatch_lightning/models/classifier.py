"""SequenceClassifier: a pretrained transformer with a classification head, AdamW and linear warm-up."""

import json
import math
import os
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from smartbatch_lightning import demo
from smartbatch_lightning.errors import UsageError, cause
from smartbatch_lightning.models.compatibility import check_head, check_inputs, check_labels, names_of_labels
from smartbatch_lightning.models.packing import attention_dropout, can_pack, enable_packing

Batch = dict[str, Any]
Stage = Literal["train", "val", "test"]

_COUNTED_TOGETHER = 50  # batches


class SequenceClassifier(L.LightningModule):
    """Fine-tunes BERT or one of its kin to classify texts.

    Takes any `transformers` model for sequence classification, and any batch of its inputs with `labels`; it knows
    nothing of how batches were made. The model is built in `configure_model`, when the Trainer knows the data: the
    number of classes and their names come from the data module unless they are given. A checkpoint carries the
    architecture, so that loading one needs neither the Hub nor the pretrained weights.

    To do things differently, override `compute_loss`, `make_metrics`, `make_optimizer`, `make_scheduler` or the whole
    `step`.

    Args:
        pretrained: Name on the Hugging Face Hub or folder written by `save_pretrained`; `demo` for the small BERT of
            the embedded demo.
        num_labels: Number of classes; by default the data module's.
        learning_rate: Peak learning rate of AdamW.
        adam_epsilon: AdamW's term for numerical stability.
        weight_decay: AdamW's decay of weights; biases and normalisation layers are never decayed.
        warmup_steps: Optimizer steps over which the learning rate rises from 0.
        warmup_ratio: The same as a share of all optimizer steps; give one of the two.
        compile: Compile the model with `torch.compile`, for batches of any width at once.
        architecture: A model's configuration as `PretrainedConfig.to_dict` gives it, for fresh weights; checkpoints
            fill it in.

    Attributes:
        model: The `transformers` model; None until `configure_model`.
    """

    model: PreTrainedModel | None

    def __init__(
        self,
        pretrained: str = "demo",
        num_labels: int | None = None,
        *,
        learning_rate: float = 5e-5,
        adam_epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        warmup_ratio: float = 0.0,
        compile: bool = False,  # noqa: A002 - the field's word
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if warmup_steps and warmup_ratio:
            raise UsageError(f"warmup_steps is {warmup_steps} and warmup_ratio {warmup_ratio}; set one of them to 0.")
        if warmup_steps < 0 or not 0 <= warmup_ratio <= 1:
            raise UsageError(
                f"warmup_steps is {warmup_steps} and warmup_ratio {warmup_ratio}; give steps of 0 or more, or a share "
                "between 0 and 1."
            )
        self.pretrained = pretrained
        self.num_labels = num_labels
        self.learning_rate = learning_rate
        self.adam_epsilon = adam_epsilon
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.warmup_ratio = warmup_ratio
        self.compiled = compile
        self.architecture = architecture
        self.model = None
        self._uncounted: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": [], "test": []}

    # --- what a subclass may want to do differently ---

    def step(self, batch: Batch, stage: Stage) -> Tensor:
        """Loss of a batch, which is counted in the metrics of its stage.

        Args:
            batch: Inputs of the model and `labels` (batch,).
            stage: `train`, `val` or `test`.

        Returns:
            The mean loss over the samples of the batch, a scalar.
        """
        output = self(**model_inputs(batch))
        labels = batch["labels"]
        loss = self.compute_loss(output, labels)
        mean_loss: MeanMetric = getattr(self, f"{stage}_loss")
        # once for each sample: without its checks for NaN, torchmetrics (1.9) ignores weights
        mean_loss.update(loss.detach().expand(len(labels)))
        self._uncounted[stage].append((output.logits.detach(), labels))
        if len(self._uncounted[stage]) >= _COUNTED_TOGETHER:
            self._count(stage)
        return loss

    def compute_loss(self, output: SequenceClassifierOutput, labels: Tensor) -> Tensor:
        """Mean loss over the samples of a batch, a scalar: the model's own cross-entropy.

        Args:
            output: The model's, with `logits` (batch, num_labels).
            labels: Numbers of the classes, (batch,).
        """
        assert output.loss is not None, "a batch without labels has no loss"
        return output.loss

    def make_metrics(self, num_labels: int) -> MetricCollection:
        """Metrics of logits and labels, computed over each epoch of each stage; logged as `val_accuracy` and so on."""
        accuracy = MulticlassAccuracy(num_labels, average="micro")
        f1 = MulticlassF1Score(num_labels, average="macro")
        return MetricCollection({"accuracy": accuracy, "f1": f1})

    def make_optimizer(self) -> Optimizer:
        """AdamW; parameters of one dimension, which are biases and normalisation layers, are not decayed."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
        optimizer = AdamW(groups, lr=self.learning_rate, eps=self.adam_epsilon, fused=fused)
        # A fused optimizer undoes a gradient scaler's scaling as it steps, too late for clipping, which Lightning
        # therefore refuses in mixed precision, even without a scaler. Without this mark the scaler does it before.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def make_scheduler(self, optimizer: Optimizer, num_steps: int) -> LRScheduler:
        """Linear rise over the warm-up, then linear decay to 0 at the last of `num_steps` optimizer steps."""
        warmup_steps = self.warmup_steps or math.ceil(self.warmup_ratio * num_steps)
        schedule: LRScheduler = get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
            optimizer, warmup_steps, num_steps
        )
        return schedule

    # --- Lightning's hooks ---

    def configure_model(self) -> None:
        """Builds the model for the data's classes where there is none yet, and checks that it fits the data."""
        datamodule = getattr(self._trainer, "datamodule", None)
        label_names: list[str] | None = getattr(datamodule, "label_names", None)
        if self.model is None:
            model = (
                self._pretrained_model(label_names) if self.architecture is None else _fresh_model(self.architecture)
            )
            if model.config.problem_type is None and len(names_of_labels(model.config)) > 1:
                # else the first forward says so, and is compiled for nothing
                model.config.problem_type = "single_label_classification"
            # transformers hands out models in eval mode, and Lightning leaves modes alone: dropout would stay off
            self.model = model.train()
            if self.compiled:
                self.model.compile(dynamic=True)  # once for batches of all widths
            self.hparams["architecture"] = json.loads(model.config.to_json_string(use_diff=False))
            metrics = self.make_metrics(len(self.label_names))
            for stage in ("train", "val", "test"):
                setattr(self, f"{stage}_loss", MeanMetric(nan_strategy="disable"))  # checks wait for the GPU
                setattr(self, f"{stage}_metrics", metrics.clone(prefix=f"{stage}_"))
        check_labels("the model", self.model.config, label_names)
        check_inputs(self.model, datamodule)
        if can_pack(self.model):
            enable_packing(self.model)

    def on_fit_start(self) -> None:
        """Says so where packed batches go without a dropout that the model's configuration asks for."""
        packed = getattr(getattr(self.trainer, "datamodule", None), "padding", None) == "packed"
        dropout = 0.0 if self.model is None else attention_dropout(self.model)
        if packed and dropout and self.device.type == "cuda" and "16" in str(self.trainer.precision):
            rank_zero_info(
                f"The model's attention weights have a dropout of {dropout:g}, which packed batches on a GPU train "
                "without; the other dropouts are as configured."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its schedule over exactly the optimizer steps that will run."""
        num_steps = self.trainer.estimated_stepping_batches
        if math.isinf(num_steps):
            raise UsageError(
                "the learning rate falls to 0 at the last step, but training has no end. Set --trainer.max_epochs or "
                "--trainer.max_steps."
            )
        optimizer = self.make_optimizer()
        scheduler = self.make_scheduler(optimizer, int(num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Output of the model for its own inputs, such as `input_ids` and `attention_mask` (batch, length)."""
        if self.model is None:
            raise RuntimeError("the model is not built yet. Run it with a Trainer, or call configure_model() first.")
        output: SequenceClassifierOutput = self.model(**inputs)
        return output

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draws the random state of the step, that of dropout, from seed, epoch, batch and rank.

        A checkpoint holds no random state: without this, a resumed run would go on with another one.
        """
        words = (int(os.environ.get("PL_GLOBAL_SEED", 0)), self.current_epoch, batch_idx, self.global_rank)
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
        # not torch.manual_seed, which takes half a millisecond to remember it for devices that are not in use
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a training batch, with the weight that it has in its optimizer step."""
        loss = self.step(batch, "train")
        # where Lightning hands it to a logger; in every other step the call alone would cost 0.3 ms
        every: int = getattr(self.trainer, "log_every_n_steps", 0)
        if every and (self.trainer.global_step + 1) % every == 0:
            self.log("train_loss_step", loss.detach(), on_step=True, on_epoch=False, batch_size=len(batch["labels"]))
        weight: float = batch.get("loss_weight", 1.0)
        return loss * weight

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Metrics of a validation batch."""
        self.step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Metrics of a test batch."""
        self.step(batch, "test")

    def on_train_epoch_end(self) -> None:
        """Logs the metrics of the epoch."""
        self._log_metrics("train")

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of the validation."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of the test."""
        self._log_metrics("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Probabilities (batch, num_labels), float32, and `index` (batch,), each sample's row, if batches have it."""
        logits = self(**model_inputs(batch, without=("labels",))).logits
        rows = {"index": batch["index"]} if "index" in batch else {}
        return {**rows, "probabilities": logits.float().softmax(-1)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint for other classes, before its weights are found not to fit."""
        saved = checkpoint.get("hyper_parameters", {}).get("architecture")
        if saved is not None and self.model is not None:
            check_labels("the checkpoint", AutoConfig.for_model(**saved), self.label_names)

    # --- the rest ---

    def _count(self, stage: Stage) -> None:
        """Counts in the metrics what has come together; many batches at once, since most metrics wait for the GPU."""
        if batches := self._uncounted[stage]:
            logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            batches.clear()
            getattr(self, f"{stage}_metrics").update(logits, labels)

    def _log_metrics(self, stage: Stage) -> None:
        """Logs what has been counted; here and not in each step, where it would cost 1.4 ms."""
        self._count(stage)
        counted: dict[str, Metric] = {f"{stage}_loss": getattr(self, f"{stage}_loss")}
        counted |= dict(getattr(self, f"{stage}_metrics").items())
        self.log_dict({name: metric for name, metric in counted.items() if metric.update_called})

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of the logits; none of a pretrained model before `configure_model`."""
        if self.model is not None:
            return names_of_labels(self.model.config)
        return [] if self.architecture is None else names_of_labels(AutoConfig.for_model(**self.architecture))

    def _pretrained_model(self, label_names: list[str] | None) -> PreTrainedModel:
        name = str(demo.model_dir()) if self.pretrained == "demo" else self.pretrained
        labels: dict[str, Any] = {}
        if label_names is not None:
            labels["id2label"] = dict(enumerate(label_names))
            labels["label2id"] = {label: number for number, label in enumerate(label_names)}
        elif self.num_labels is not None:
            labels["num_labels"] = self.num_labels
        if label_names and self.num_labels not in (None, len(label_names)):
            raise UsageError(
                f"num_labels is {self.num_labels}, but the data has {len(label_names)} classes: {label_names}. Leave "
                "num_labels out; it is taken from the data."
            )
        try:
            config = AutoConfig.from_pretrained(name)
            check_head(name, config, label_names)
            # in float32 whatever the weights are stored in: training in half precision is the Trainer's business
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=torch.float32, **labels
            )
        except OSError as error:
            raise UsageError(
                f"the model {name!r} is neither a folder here nor to be had from the Hub: {cause(error)} Give the path "
                "of a folder written by save_pretrained, or a name on the Hub and a network."
            ) from error
        return model


def _fresh_model(config: dict[str, Any]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
        AutoConfig.for_model(**config)
    )
    return model


def model_inputs(batch: Batch, without: tuple[str, ...] = ()) -> Batch:
    """What of a batch is for the model: all but the row numbers and the weight of its loss."""
    return {name: value for name, value in batch.items() if name not in ("index", "loss_weight", *without)}
