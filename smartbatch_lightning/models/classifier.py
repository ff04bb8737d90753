"""SequenceClassifier: a pretrained transformer with a classification head, its optimizer and schedule."""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MetricCollection
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from smartbatch_lightning.checkpointing import (
    AtomicCheckpointIO,
    drop_unsavable,
    saved_arguments,
    verified_checkpoint,
)
from smartbatch_lightning.contract import (
    TEXT_ENCODING,
    TextData,
    TextModel,
    callbacks_of,
    fingerprint_in,
    text_data_of,
)
from smartbatch_lightning.errors import UsageError, check_at_least, did_you_mean, join_quoted, nearest
from smartbatch_lightning.models.adapters import (
    FINGERPRINT,
    Adapters,
    add_adapters,
    check_same_adapters,
    check_same_base,
    is_quantized,
    plain_peft_config,
)
from smartbatch_lightning.models.compatibility import (
    adopt_tokenizer,
    check_inputs,
    check_labels,
    check_max_length,
    is_fine_tuned,
    positions,
)
from smartbatch_lightning.models.compilation import check_compilation, check_mode, compile_model
from smartbatch_lightning.models.dropout import use_fast_dropout
from smartbatch_lightning.models.finite import REMEDY, TrainingLosses, check_weights
from smartbatch_lightning.models.layers import checkpoint_gradients, enable_reversible_gradients, freeze
from smartbatch_lightning.models.lifecycle import ModelLifecycle, returns_weights
from smartbatch_lightning.models.metrics import (
    EpochMetrics,
    Stage,
    StageMetrics,
    summed_in_float32,
)
from smartbatch_lightning.models.monitored import (
    STEP_LOSS,
    Mode,
    check_logged_in_training,
    check_validates,
    find_monitored,
    step_loss_is_monitored,
    validation_name,
)
from smartbatch_lightning.models.optimizer import (
    OptimizerCallable,
    build_optimizer,
    check_callbacks,
    check_same_groups,
    check_settings,
)
from smartbatch_lightning.models.packing import (
    BUILTIN_ATTENTION,
    attention_dropout,
    enable_packing,
    packed_attention,
    skip_unread_tokens,
)
from smartbatch_lightning.models.schedule import (
    Schedule,
    adds_parameters,
    adopt_learning_rates,
    check_validation,
    lightning_config,
    sync_schedule,
)
from smartbatch_lightning.models.source import ModelSource
from smartbatch_lightning.progress import (
    logs_now,
    respect_early_stopping,
    restore_loaders,
    total_steps,
    trained_steps,
)
from smartbatch_lightning.registry import look_up, takes_argument
from smartbatch_lightning.seeds import run_seed, seed_is_given
from smartbatch_lightning.tasks import TASKS, Task
from smartbatch_lightning.tasks.config import label_names_from_config, problem_type_of
from smartbatch_lightning.tasks.losses import LossOptions
from smartbatch_lightning.tasks.metrics import build_metrics, named_specs

Batch = dict[str, Any]

_ARCHITECTURE = "architecture"  # key among the weights passed between processes
# That of the checkpoint from which a module is being created; a subclass may not have the argument `architecture`.
_architecture_to_load: ContextVar[dict[str, Any] | None] = ContextVar("_architecture_to_load", default=None)


class SequenceClassifier(L.LightningModule):
    """Fine-tunes BERT, or another pretrained transformer, to classify texts.

    Works with any `transformers` sequence classification model and any batch of its inputs with `labels`, including
    packed batches from the data module. The model is built in `configure_model`, once the Trainer knows the data: the
    data module supplies the task and the label names. Overrides of `configure_model` are called once, unless a strategy
    shards the model there. A checkpoint contains the architecture, so loading one needs neither the Hub nor the
    pretrained weights.

    To customize it, override `compute_loss`, `configure_metrics`, `configure_optimizer`, `configure_scheduler` or the
    whole `step`.

    Args:
        pretrained: Name on the Hugging Face Hub or folder written by `save_pretrained`; `demo` for the small BERT of
            the built-in demo.
        num_labels: Number of classes; by default the data module's.
        learning_rate: Peak learning rate of AdamW, by default 5e-5; not together with `optimizer`.
        adam_epsilon: AdamW's term for numerical stability.
        weight_decay: AdamW's weight decay; never applied to biases and normalization layers.
        optimizer: Optimizer to use instead of AdamW, by `class_path` and `init_args`, with its own learning rate and
            weight decay; in Python a function of the parameter groups, such as
            `functools.partial(torch.optim.SGD, lr=0.1)`. Biases and normalization layers are not decayed here either.
        lr_scheduler: Learning rate schedule: a transformers name (`lr_scheduler_type`), such as `cosine`,
            `constant_with_warmup` or `reduce_lr_on_plateau`; or a torch class by `class_path` and `init_args`; in
            Python also a function of the optimizer. It steps with the optimizer and ends with training unless its
            arguments say otherwise; `ReduceLROnPlateau` steps after each validation, depending on its `monitor`, by
            default the loss.
        lr_scheduler_kwargs: Extra arguments for a schedule given by name.
        warmup_steps: Optimizer steps over which the learning rate warms up from 0.
        warmup_ratio: The same as a fraction of all optimizer steps; set only one of the two.
        class_weights: Weight of each class in the loss, by name, or `balanced`; the loss is the weighted mean over a
            whole optimizer step, across batches and ranks. See `LossOptions`.
        pos_weight: For multi-label tasks, the weight of positive samples, by label name or one for all, or `balanced`.
        label_smoothing: Probability mass that is moved from each label to all classes.
        focal_gamma: Exponent of the focal loss; 0 for the plain loss.
        metrics: Metrics to use instead of the task's: names such as `accuracy`, `f1_micro` or `matthews_correlation`,
            torchmetrics classes, or `class_path` with `init_args`; or a mapping from logged names to these. The first
            one decides which weights are best.
        layer_decay: Layer-wise learning rate decay: each layer's rate relative to the layer above, such as 0.9; the
            head has `learning_rate`, the embeddings the lowest rate (*ELECTRA*, Clark et al., 2020).
        head_learning_rate: Learning rate of the classification head, if different.
        freeze_embeddings: Freeze the embeddings.
        freeze_layers: Freeze the embeddings and this many of the first layers.
        gradient_checkpointing: Recompute layers in the backward pass instead of storing activations: less memory for a
            third more time; not together with `compile`.
        peft_config: Train peft adapters, such as LoRA, and the head instead of all weights: `peft_type` and its
            options, such as `{peft_type: LORA, r: 8}`; or `class_path` and `init_args`; in Python also a
            `peft.PeftConfig`. Checkpoints then hold only what is trained; the rest is loaded from `pretrained`.
        compile: Compile the layers with `torch.compile`, once for all layers and batch widths; or a `torch.compile`
            mode for the whole model, such as `reduce-overhead`, which replays small batches as CUDA graphs and needs
            rows of one shape (`padding: packed` with `pad_to_multiple_of`).
        model_kwargs: Extra arguments for `from_pretrained`, such as `revision`, `variant`, `attn_implementation` or the
            configuration's dropout rates; not those that place the model, such as `device_map`. Weights are float32
            unless you set `dtype` (or, with `peft_config`, `quantization_config`).
        architecture: A model configuration, as from `PretrainedConfig.to_dict`, for a model with fresh weights; set by
            checkpoints.

    Attributes:
        model: The `transformers` model; None until `configure_model` has built it.
        adapters: The adapters added by `peft_config`; None without it.
    """

    model: PreTrainedModel | None

    def __init__(
        self,
        pretrained: str = "demo",
        num_labels: int | None = None,
        *,
        learning_rate: float | None = None,
        adam_epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: str | dict[str, Any] | Callable[[Optimizer], Any] = "linear",
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        warmup_steps: int = 0,
        warmup_ratio: float = 0.0,
        class_weights: Literal["balanced"] | dict[str, float] | None = None,
        pos_weight: Literal["balanced"] | float | dict[str, float] | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        metrics: str | list[str | dict[str, Any]] | dict[str, str | dict[str, Any]] | None = None,
        layer_decay: float = 1.0,
        head_learning_rate: float | None = None,
        freeze_embeddings: bool = False,
        freeze_layers: int = 0,
        gradient_checkpointing: bool = False,
        peft_config: dict[str, Any] | Any | None = None,
        compile: bool | str = False,  # noqa: A002 - the field's word
        model_kwargs: dict[str, Any] | None = None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not isinstance(pretrained, str | Path):
            raise UsageError(f"pretrained is of the type {type(pretrained).__name__}; give a name or a folder.")
        check_at_least(0, freeze_layers=freeze_layers)
        check_mode(compile, gradient_checkpointing)
        self.pretrained = pretrained
        self.num_labels = num_labels
        self.learning_rate = learning_rate
        self.adam_epsilon = adam_epsilon
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_kwargs = lr_scheduler_kwargs or {}
        self.warmup_steps = warmup_steps
        self.warmup_ratio = warmup_ratio
        self.loss_options = LossOptions(class_weights, pos_weight, label_smoothing, focal_gamma)
        self.metrics = metrics
        if metrics is not None:
            named_specs(metrics)  # rejects what is not a metric
        self.layer_decay = layer_decay
        self.head_learning_rate = head_learning_rate
        self.freeze_embeddings = freeze_embeddings
        self.freeze_layers = freeze_layers
        self.gradient_checkpointing = gradient_checkpointing
        self.peft_config = None if peft_config is None else plain_peft_config(peft_config)
        self.adapters: Adapters | None = None
        check_settings(self, self._schedule)
        if optimizer is None and learning_rate is None:
            self.learning_rate = 5e-5
        resolved = {"learning_rate": self.learning_rate, "peft_config": self.peft_config}
        self.hparams.update({name: value for name, value in resolved.items() if name in self.hparams})
        self.compiled = compile
        self.model_kwargs = model_kwargs or {}
        self.architecture = architecture or _architecture_to_load.get()
        _architecture_to_load.set(None)  # not for another classifier that a subclass has
        self.model = None
        self._task: Task | None = None
        self.epoch_metrics = EpochMetrics()
        self._frozen: list[nn.Parameter] = []  # with several ranks, which synchronize only the gradients of the others
        self._losses = TrainingLosses()
        self._seed = run_seed()
        self._scheduled_steps: float | None = None
        self._trained_on: dict[str, Any] | None = None

    # --- methods to override ---

    def step(self, batch: Batch, stage: Stage, dataloader_idx: int = 0) -> Tensor:
        """Computes the loss of a batch and updates the metrics of its stage.

        Args:
            batch: Inputs of the model and `labels` (batch, ...).
            stage: `train`, `val` or `test`.
            dataloader_idx: Index of the data set, if the stage has several.

        Returns:
            The mean loss over the samples of the batch, a scalar.
        """
        if "labels" not in batch:
            raise UsageError(f"a batch for {stage} has {join_quoted(batch)}, but no 'labels'. Add them in its loader.")
        output = self(**forward_kwargs(batch))
        assert output.logits is not None
        labels = batch["labels"]
        if labels.dtype in (torch.bfloat16, torch.float16):
            raise UsageError(
                f"Lightning has rounded the targets of a regression to {labels.dtype}, as it does in half precision "
                "without autocast. Set --trainer.precision=bf16-mixed or 32-true."
            )
        if labels.dtype == torch.bool:
            labels = labels.to(output.logits.dtype)  # the dtype that multi-label losses take
        loss = self.compute_loss(output, labels)
        self.epoch_metrics.for_data_set(stage, dataloader_idx, self._make_metrics).update(loss, output.logits, labels)
        return loss

    def compute_loss(self, output: SequenceClassifierOutput, labels: Tensor) -> Tensor:
        """Mean loss over the samples of a batch, a scalar; by default the task's, such as cross-entropy.

        With `class_weights`, the mean is weighted by `task.sample_weights(labels)`.

        Args:
            output: The model's output, with `logits` (batch, num_labels).
            labels: As encoded by the task: (batch,), or floats 0 and 1 for multi-label, (batch, num_labels).
        """
        assert output.logits is not None
        return self.task.compute_loss(output.logits, labels)

    def configure_metrics(self, num_labels: int) -> MetricCollection:
        """Returns the metrics, computed for each epoch of each stage and logged as `val_accuracy` and so on.

        They take scores and labels; scores are probabilities (batch, num_labels), or predictions for regression.
        """
        return build_metrics(self.metrics, self.task) if self.metrics else self.task.configure_metrics()

    def configure_optimizer(self) -> Optimizer:
        """Returns AdamW or the given `optimizer`; parameters of one dimension (biases, normalization) are not decayed.

        Frozen parameters are included, and skipped until they are unfrozen, unless a callback such as
        `BackboneFinetuning` adds them later; weight decay then applies to all that it adds.
        """
        added = adds_parameters(self._trainer) or self.adapters is not None
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad or not added]
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
        settings: Any = {"lr": self.learning_rate, "eps": self.adam_epsilon, "weight_decay": self.weight_decay}
        make = self.optimizer or partial(AdamW, **settings, fused=fused)
        optimizer: Any = build_optimizer(make, trained, self._transformer, self.layer_decay, self.head_learning_rate)
        # A fused optimizer unscales a scaler's gradients as it steps, too late for clipping, which Lightning therefore
        # rejects in mixed precision, even without a scaler. Without this attribute, the scaler unscales them before.
        optimizer._step_supports_amp_scaling = False
        return optimizer  # type: ignore[no-any-return]

    def configure_scheduler(self, optimizer: Optimizer, num_steps: int | None) -> LRScheduler:
        """Returns the given `lr_scheduler`; by default linear decay to 0 at the last of `num_steps` optimizer steps.

        `num_steps` is None if training has no end; an override is not called then.
        """
        return self._schedule(optimizer, num_steps)

    # --- building the model and calling it ---

    def configure_callbacks(self) -> list[Callback]:
        """Adds a callback that must run before all others; an override must call `super().configure_callbacks()`."""
        if not ModelLifecycle.runs_in(self.trainer):
            self.trainer.callbacks.insert(0, ModelLifecycle())  # type: ignore[attr-defined]
        return []

    def setup(self, stage: str) -> None:
        """Makes checkpoints load without running code and be written atomically, unless a `CheckpointIO` is given.

        Lightning itself would run code in a checkpoint loaded by URL.

        Raises:
            ValueError: An override of `configure_callbacks` does not call `super().configure_callbacks()`.
        """
        if not ModelLifecycle.runs_in(self.trainer):
            raise UsageError(
                f"{type(self).__name__}.configure_callbacks does not call super().configure_callbacks(), which adds "
                "the callback that builds the model. Call it there, and return your own callbacks."
            )
        self.epoch_metrics.clear()  # of an earlier run, which may have been interrupted
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit":
            check_compilation(self.compiled, self.trainer)
            check_callbacks(self.trainer, self)
            drop_unsavable(self, self.hparams)
            self._seed = run_seed(self.trainer)

    def configure_model(self) -> None:
        """Builds the model for the data's labels if there is none yet, and checks that it fits the data."""
        if self.model is None:
            self.model = self._build()
            self._store_architecture()
        if self.adapters is not None and self._strategy_loads:
            self.strict_loading = False  # checkpoints lack the pretrained weights
        self.match_data()

    def match_data(self) -> None:
        """Checks that the built model fits the data, and enables packed batches."""
        self._task = None
        data = text_data_of(self._trainer)
        if data is None:
            return
        assert self.model is not None
        if data.task is not None:
            check_labels("the model", self.model.config, data.task.label_names, data.task.config_fields())
        adopt_tokenizer(self.model.config, data.tokenizer)  # again if the model was built for other data
        check_inputs(self.model, data)
        if data.encoding and self.trainer.state.fn == TrainerFn.FITTING:
            setattr(self.model.config, TEXT_ENCODING, data.encoding)
        if data.spec.packed:
            self._enable_packing()
        if self.hparams.get("architecture"):  # not of a model that a subclass has made
            self._store_architecture()

    def _store_architecture(self) -> None:
        self.hparams["architecture"] = json.loads(self._transformer.config.to_json_string(use_diff=False))

    def _build(self) -> PreTrainedModel:
        model, fresh = self._load_model()
        model.config.problem_type = problem_type_of(model.config)  # type: ignore[assignment]
        # transformers returns models in eval mode, and Lightning does not change modes: dropout would stay off
        model.train()
        use_fast_dropout(model)
        if self.peft_config is not None:
            self.adapters = add_adapters(model, self.peft_config, fresh)
            # sharded checkpoints are loaded into this copy
            self.register_buffer(FINGERPRINT, self.adapters.fingerprint.clone())
        if "attn_implementation" not in self.model_kwargs:
            skip_unread_tokens(model)
        freeze(model, embeddings=self.freeze_embeddings, layers=self.freeze_layers)
        enable_reversible_gradients(model)
        if self.gradient_checkpointing:
            checkpoint_gradients(model)
        if self.compiled:
            compile_model(model, self.compiled)
        return model

    def _load_model(self) -> tuple[PreTrainedModel, set[str]]:
        """The model as transformers makes it, and the names of freshly initialized weights."""
        data = text_data_of(self._trainer)
        task, tokenizer = (None, None) if data is None else (data.task, data.tokenizer)
        return self._source.load(self.num_labels, task, tokenizer, untrained_needs_labels=self._trainer is not None)

    def _enable_packing(self) -> None:
        asked = [name for name in ("attn_implementation", "output_attentions") if self.model_kwargs.get(name)]
        if self.model_kwargs.get("attn_implementation") not in (None, *BUILTIN_ATTENTION):
            asked.remove("attn_implementation")  # a kernel that supports packed batches
        if asked:
            raise UsageError(
                f"model_kwargs has {join_quoted(asked)}, but packed batches need this package's attention, which does "
                "not return attention weights, or a kernel such as flash_attention_2. Leave that out, or set "
                "--data.padding=longest."
            )
        enable_packing(self._transformer)

    def forward(self, **inputs: Any) -> SequenceClassifierOutput:
        """Runs the model on its inputs, such as `input_ids` and `attention_mask` (batch, length).

        Inputs whose names the model does not know are dropped, except flags such as `output_attentions`.

        Logits (batch, num_labels) are returned in float32 even in half precision, and pooled if samples have several
        windows.
        """
        if self.model is None:
            raise RuntimeError("the model is not built yet. Run it with a Trainer, or call configure_model() first.")
        if "cu_seq_lens_q" in inputs:
            self._enable_packing()  # without a data module, packed batches are not known in advance
        elif _is_flattened(inputs):
            raise UsageError(
                "the batch has several samples in a row, but does not say where each begins. Use "
                "DataCollatorWithFlattening(return_flash_attn_kwargs=True), or PackCollator."
            )
        num_samples = inputs.pop("num_samples", None)
        window_counts, window_pooling = (inputs.pop(name, None) for name in ("window_counts", "window_pooling"))
        kind: Any = type(self._transformer)
        named = _named_inputs(kind)
        if "input_ids" in named:  # otherwise it takes any argument
            inputs = {name: value for name, value in inputs.items() if name in named or isinstance(value, bool)}
        output: SequenceClassifierOutput = self.model(**inputs)
        if output.logits is not None:
            # half precision has too few digits for losses and metrics; and CUDA graphs overwrite their outputs
            output.logits = output.logits[:num_samples].to(
                torch.promote_types(output.logits.dtype, torch.float32), copy=True
            )
            if window_counts is not None:  # `unsafe` saves a check that waits for the device
                output.logits = torch.segment_reduce(output.logits, window_pooling, lengths=window_counts, unsafe=True)
        return output

    # --- training ---

    def on_fit_start(self) -> None:
        """Rejects runs that cannot be trained or monitored; logs which attention packed batches use on a GPU."""
        check_validates(self, ModelCheckpoint, EarlyStopping)
        for callback in callbacks_of(self.trainer, ModelCheckpoint, EarlyStopping):
            if (callback.monitor or "").startswith("val_"):
                self.monitored(callback.monitor, callback.mode)
        if type(self) is SequenceClassifier:  # a subclass may log anything
            check_logged_in_training(self, ["loss", *map(str, self._make_metrics().metrics)])
        if self.adapters is not None:
            rank_zero_info(str(self.adapters))
        elif self.model is self._transformer and is_quantized(self.model):
            raise UsageError(
                "the model's weights are in 8 or 4 bits and cannot be trained. Set --model.peft_config, such as "
                "{peft_type: LORA}."
            )
        if self.model_kwargs.get("attn_implementation") == "flex_attention" and attention_dropout(self._transformer):
            raise UsageError(
                "attn_implementation is flex_attention, which has no dropout, but the model has attention dropout. "
                "Leave it out, or set the attention dropout to 0 in --model.model_kwargs."
            )
        self._frozen = [p for p in self.parameters() if not p.requires_grad and self.trainer.world_size > 1]
        adopt_learning_rates(self.trainer)
        data = text_data_of(self._trainer)
        if data and data.spec.packed and self.model is not None and self.device.type == "cuda":
            capability = torch.cuda.get_device_capability(self.device)
            rank_zero_info(packed_attention(self._transformer, capability, str(self.trainer.precision)))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns the optimizer, and a schedule over exactly the optimizer steps that will run."""
        num_steps = total_steps(self.trainer)
        endless = math.isinf(num_steps)
        if endless and (self._overrides("configure_scheduler") or self._schedule.needs_end):
            raise UsageError(
                "the learning rate schedule ends at the last step, but training has no end. Set --trainer.max_epochs "
                "or --trainer.max_steps; or --model.lr_scheduler=constant."
            )
        self._scheduled_steps = num_steps
        optimizer = self.configure_optimizer()
        scheduler = self.configure_scheduler(optimizer, None if endless else int(num_steps))
        monitor = self._schedule.monitor or validation_name(self.trainer, "loss")
        return {"optimizer": optimizer, "lr_scheduler": lightning_config(scheduler, monitor)}  # type: ignore[return-value]

    def on_train_start(self) -> None:
        """Moves schedule and loaders to where training continues, after a resume or in a second `fit`."""
        respect_early_stopping(self.trainer)
        check_validation(self.trainer)
        self._losses = TrainingLosses()
        restore_loaders(self.trainer)
        if trained_steps(self.trainer):
            self._sync_schedule()

    def on_train_epoch_start(self) -> None:
        """Resets metrics; by now, callbacks may have changed learning rates and unfrozen parameters."""
        self.epoch_metrics.start("train")
        if total_steps(self.trainer) != self._scheduled_steps:  # a finder has changed the batch size
            self._sync_schedule()
        adopt_learning_rates(self.trainer)

    def _sync_schedule(self) -> None:
        # not in a finder's trial, which runs without the run's callbacks
        if not self._overrides("configure_optimizers") and ModelLifecycle.runs_in(self.trainer):
            self._scheduled_steps = total_steps(self.trainer)
            sync_schedule(self.trainer, self.configure_optimizer, self.configure_scheduler)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Sets the random state of the step, used by dropout, from seed, epoch, batch and rank.

        Checkpoints do not store the random state, so a resumed run would otherwise continue with a different one.

        Raises:
            ValueError: Parameters were unfrozen after several ranks had been set up.
        """
        if any(parameter.requires_grad for parameter in self._frozen):
            raise UsageError(
                "parameters were unfrozen while training on several ranks, which do not synchronize gradients of "
                "parameters that were frozen when fit started. Train on one device; or unfreeze between two fits."
            )
        words = (self._seed, self.current_epoch, batch_idx, self.global_rank)
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
        # not torch.manual_seed, which takes half a millisecond to store the seed for unused devices
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a training batch, multiplied by its weight in the optimizer step."""
        loss = self.step(batch, "train")
        if self._trainer is not None:
            self._losses.add(self._trainer.global_step, loss)
            if step_loss_is_monitored(self.trainer):
                self._log_step_loss(loss.detach(), batch)
        weight: float = batch.get("loss_weight", 1.0)
        return loss * weight

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Logs the loss when Lightning logs; doing so in every step would cost 0.3 ms and a wait for the device."""
        logged = logs_now(self.trainer)
        if logged or self._losses.is_full:
            self.read_losses()
        if logged and self._losses.last is not None and not step_loss_is_monitored(self.trainer):
            # a tensor on the CPU, since Lightning reads the values of the progress bar in every step
            self._log_step_loss(self._losses.last, batch)

    def _log_step_loss(self, loss: Tensor, batch: Batch) -> None:
        self.log(STEP_LOSS, loss, prog_bar=True, on_step=True, on_epoch=False, batch_size=len(batch["labels"]))

    def read_losses(self, numbers: Tensor | None = None) -> list[int]:
        """Reads the losses that were not read yet from the device, together with whole numbers, with a single wait.

        Args:
            numbers: Shape (n,), int64; None for none.

        Raises:
            ValueError: A loss is not finite.
        """
        return self._losses.read(self.trainer, numbers, self._divergence_remedy())

    def _divergence_remedy(self) -> str:
        if self.optimizer is not None:
            return "Lower the lr of --model.optimizer, or --trainer.gradient_clip_val."
        return f"Lower --model.learning_rate, which is {self.learning_rate:g}, or --trainer.gradient_clip_val."

    def on_train_epoch_end(self) -> None:
        """Logs the metrics of the epoch, and rejects losses that are not finite."""
        self.read_losses()
        self.epoch_metrics.log(self, "train")

    # --- evaluation and prediction ---

    def on_validation_epoch_start(self) -> None:
        """Resets metrics."""
        self.epoch_metrics.start("val")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Updates loss and metrics with a validation batch."""
        self.step(batch, "val", dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of the validation."""
        self.epoch_metrics.log(self, "val")

    def on_test_epoch_start(self) -> None:
        """Resets metrics."""
        self.epoch_metrics.start("test")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Updates loss and metrics with a test batch."""
        self.step(batch, "test", dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of the test."""
        self.epoch_metrics.log(self, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The task's predictions, and `index` (batch,), the row of each sample, if batches have it.

        For single-label and multi-label tasks, the predictions are `probabilities` (batch, num_labels), float32.
        """
        logits = self(**forward_kwargs(batch)).logits
        if not logits.isfinite().all():  # no extra wait: predictions are fetched from the device anyway
            raise UsageError(f"the model's logits are nan or infinite, so nothing can be predicted. {REMEDY}")
        rows = {"index": batch["index"]} if "index" in batch else {}
        return {**rows, **self.task.predict(logits)}

    def _make_metrics(self) -> StageMetrics:
        with summed_in_float32():
            metrics = self.configure_metrics(len(self.label_names))
            if ignored := [name for name in named_specs(self.metrics or []) if name not in metrics]:
                raise UsageError(
                    f"metrics has {join_quoted(ignored)}, but {type(self).__name__} overrides configure_metrics "
                    "without them. Leave metrics out, or include what super().configure_metrics returns."
                )
            return StageMetrics(metrics, self.task).to(self.device)

    def monitored(self, name: str | None = None, mode: Mode | None = None) -> tuple[str, Mode]:
        """The validation metric that decides which weights are best.

        Args:
            name: Its logged name, such as `val_accuracy`; by default the first of `metrics`, or the task's choice.
            mode: `min` or `max`; by default the metric's own.

        Returns:
            Its name (with several validation sets, for the first one) and `min` or `max`.

        Raises:
            ValueError: There is no such metric, or its mode is unknown.
        """
        metrics = self._make_metrics().metrics
        higher_is_better = {"loss": False, **{str(key): metric.higher_is_better for key, metric in metrics.items()}}
        default = next(iter(named_specs(self.metrics)), "loss") if self.metrics else self.task.monitored
        return find_monitored(self, higher_is_better, default if default in metrics else "loss", name, mode)

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the seed of dropout, and refuses to save weights that are not finite."""
        checkpoint["dropout_seed"] = self._seed
        what = f"no checkpoint is written after {self.trainer.global_step} steps"
        check_weights(checkpoint["state_dict"].values(), what, self._divergence_remedy())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adopts the checkpoint's seed unless one is given; rejects a checkpoint for other labels."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._check_resumable(checkpoint)
        if not seed_is_given():
            self._seed = checkpoint.get("dropout_seed", self._seed)
        self._trained_on = fingerprint_in(checkpoint)
        self._task = None
        hyperparameters = checkpoint.get("hyper_parameters", {})
        check_same_adapters(hyperparameters.get("peft_config"), self.peft_config)
        if self.adapters is not None and self._strategy_loads:
            check_same_base(self.get_buffer(FINGERPRINT), self.adapters, self.pretrained)
        # used by an evaluation without training data
        self.hparams.update({name: hyperparameters.get(name) for name in self.loss_options.to_balance})
        saved = hyperparameters.get("architecture")
        if saved is not None and self.model is not None:
            config = self._source.checkpoint_config(saved)
            check_labels("the checkpoint", config, self.label_names, self.model.config.to_dict())
        elif saved is not None:  # a subclass may not have this argument
            self.architecture = saved

    def _check_resumable(self, checkpoint: dict[str, Any]) -> None:
        """Rejects an optimizer that cannot load the checkpoint's state; a schedule of another type is recreated."""
        states = checkpoint.get("optimizer_states")
        if states is None and not self._strategy_loads:
            raise UsageError(
                "the checkpoint has only weights, as written with save_weights_only=True, so training cannot resume "
                "from it. Start from its weights with SequenceClassifier.load_from_checkpoint."
            )
        if self.model is None or not states or self._overrides("configure_optimizers"):
            return
        check_same_groups(
            states[0]["param_groups"], self.configure_optimizer(), more_follow=adds_parameters(self._trainer)
        )
        if self.trainer.lr_scheduler_configs or self._overrides("configure_scheduler"):
            return  # a tuner restores this run's own state
        if not (self._schedule.by_validation and "num_bad_epochs" in (checkpoint["lr_schedulers"] or [{}])[0]):
            checkpoint["lr_schedulers"] = []  # the schedule is recreated

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> Any:
        """Lightning's method with `weights_only` always true, since loading a checkpoint could otherwise run code.

        For a model with its own code, give `model_kwargs={"trust_remote_code": True}` again.

        Raises:
            ValueError: The checkpoint does not exist, is damaged, or is not a checkpoint.
        """
        lightnings = inspect.signature(super().load_from_checkpoint).parameters
        unknown = [name for name in options if name not in lightnings and not takes_argument(cls, name)]
        if unknown:  # Lightning would ignore them
            meant = did_you_mean(nearest(unknown[0], inspect.signature(cls).parameters))
            raise UsageError(
                f"load_from_checkpoint is given {join_quoted(unknown)}, which {cls.__name__} does not take. Leave it "
                f"out.{meant}"
            )
        architecture = None
        if isinstance(checkpoint_path, str | Path):
            trusts_code = (options.get("model_kwargs") or {}).get("trust_remote_code", False)
            checkpoint_path = verified_checkpoint(checkpoint_path, trusts_code=trusts_code)
            architecture = saved_arguments(checkpoint_path).get("architecture")
        before = _architecture_to_load.set(architecture)
        try:
            return super().load_from_checkpoint(checkpoint_path, *args[:3], **{**options, "weights_only": True})
        finally:
            _architecture_to_load.reset(before)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Like torch's, without the weights frozen under adapters; in a spawned process, plus the architecture."""
        state: dict[str, Any] = super().state_dict(*args, **options)
        if self.adapters is not None:
            prefix = f"{options.get('prefix', '')}model."
            for name in [name for name in state if self.adapters.omits(name.removeprefix(prefix))]:
                del state[name]
        if returns_weights(self._trainer):
            state[_ARCHITECTURE] = json.dumps(self.hparams["architecture"])
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Like torch's; first builds the model if there is none yet and the state has its architecture."""
        if _ARCHITECTURE in state_dict:
            state_dict = dict(state_dict)
            self.architecture = json.loads(state_dict.pop(_ARCHITECTURE))
            options["strict"] = True
            if self.model is None:
                trainer, self._trainer = self._trainer, None  # its data is not set up in this process
                self.configure_model()
                self._trainer = trainer
        return super().load_state_dict(state_dict, *args, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        """Like torch's; adds what `state_dict` leaves out, even if this module is inside another one.

        Raises:
            ValueError: The weights that `state_dict` leaves out differ from this model's.
        """
        fingerprint = state_dict.get(f"{prefix}{FINGERPRINT}")
        if fingerprint is not None and self.adapters is not None:
            check_same_base(fingerprint, self.adapters, self.pretrained)
            own = dict(self.named_parameters(prefix.removesuffix("."), remove_duplicate=False))
            names = [f"{prefix}model.{name}" for name in self.adapters.pretrained]
            state_dict |= {name: own[name] for name in names}
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    @property
    def _strategy_loads(self) -> bool:
        """Whether the strategy itself loads weights and optimizer states, before any hooks, as FSDP does."""
        return self._trainer is not None and not self.trainer.strategy.lightning_restore_optimizer

    # --- what others need to know about the model ---

    @property
    def backbone(self) -> nn.Module | None:
        """The model without its head, as `BackboneFinetuning` needs it; None before `configure_model`."""
        return None if self.model is None else self._transformer.base_model

    @property
    def task(self) -> Task:
        """The task: the data module's, else from the model's configuration."""
        if self._task is None:
            self._task = self._find_task()
        return self._task

    def _find_task(self) -> Task:
        data, options = text_data_of(self._trainer), self.loss_options
        labels = data.train_labels() if data is not None and options.to_balance else None
        if data is not None and data.task is not None:
            task = data.task
        else:
            assert self.model is not None, "a model has a task once it is built"
            kind = look_up(problem_type_of(self.model.config), TASKS, "the model's problem_type")
            task = kind.from_config(self.model.config) or kind.from_names(self.label_names)
        if labels is not None:
            options = options.balanced(task.label_counts(labels), len(labels))
            self.hparams.update({name: getattr(options, name) for name in self.loss_options.to_balance})
        elif options.to_balance:  # as computed in a checkpoint or a previous fit
            known: dict[str, Any] = {name: self.hparams.get(name) or "balanced" for name in options.to_balance}
            options = replace(options, **known)
        return task.with_loss(options)

    @property
    def label_names(self) -> list[str]:
        """Label names in the order of the logits; empty for a pretrained model before `configure_model`."""
        config = self._own_config()
        return [] if config is None else label_names_from_config(config)

    def text_model(self) -> TextModel:
        """What a data module needs to know about the model."""
        own = self._own_config()
        config = self._source.config() if own is None else own
        return TextModel(
            tokenizer_name=self.pretrained,
            tokenizer_kwargs=self._source.location,
            config=config,
            trained_config=config if own is not None or is_fine_tuned(config) else None,
            trained_on=self._trained_on,
            check=self._check_text_data,
            sample_weights=self._sample_weights,
        )

    def _sample_weights(self, labels: Tensor) -> Tensor | None:
        return self.task.sample_weights(labels)

    def _check_text_data(self, data: TextData) -> None:
        """Checks what can be checked without the model's weights; `check_inputs` checks the rest."""
        own = self._own_config()
        config = self._source.config() if own is None else own
        check_validates(self, EarlyStopping)
        check_max_length(data.max_length, positions(config))
        if data.task is not None:
            data.task.with_loss(self.loss_options.balanced({}, 0))  # the samples of each class are counted later
            if own is None:
                self._source.check_classes(self.num_labels, data.task, config)

    def _own_config(self) -> PretrainedConfig | None:
        """Configuration of the built model, or of a checkpoint's; None if there is neither."""
        if self.model is not None:
            return self.model.config
        return None if self.architecture is None else self._source.config()

    @property
    def _source(self) -> ModelSource:
        return ModelSource(self.pretrained, self.model_kwargs, self.architecture, bool(self.peft_config))

    @property
    def _schedule(self) -> Schedule:
        return Schedule(self.lr_scheduler, self.lr_scheduler_kwargs, self.warmup_steps, self.warmup_ratio)

    @property
    def _transformer(self) -> PreTrainedModel:
        """The `transformers` model, unwrapped if a subclass has wrapped it, as `peft` does."""
        assert self.model is not None
        return next((part for part in self.model.modules() if isinstance(part, PreTrainedModel)), self.model)

    def _overrides(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(SequenceClassifier, method)


@cache
def _named_inputs(kind: Any) -> frozenset[str]:
    """Names of the model's arguments, and of those that its attention takes for packed batches."""
    packed = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return frozenset([*inspect.signature(kind.forward).parameters, *packed])


def _is_flattened(inputs: Batch) -> bool:
    """Whether only position ids separate the samples of a row; attention would then mix them."""
    positions = inputs.get("position_ids")
    if positions is None or len(positions) != 1 or "attention_mask" in inputs or torch.compiler.is_exporting():
        return False
    return int((positions == 0).sum()) > 1


def forward_kwargs(batch: Batch) -> Batch:
    """The model's inputs in a batch: everything except labels, row numbers and the loss weight."""
    return {name: value for name, value in batch.items() if name not in ("index", "loss_weight", "labels")}
