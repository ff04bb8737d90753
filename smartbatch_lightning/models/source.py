"""Building models: from the Hub, a folder or a checkpoint's configuration."""

from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from smartbatch_lightning import demo
from smartbatch_lightning.errors import UsageError, check_trusted, join_quoted, root_cause_message
from smartbatch_lightning.families import check_has_head, drop_caches, drop_chunks
from smartbatch_lightning.hub import hub_or_cache
from smartbatch_lightning.models.compatibility import adopt_tokenizer, check_head, is_fine_tuned
from smartbatch_lightning.models.head import rescale_logits
from smartbatch_lightning.models.layers import find_layers
from smartbatch_lightning.tasks import Task
from smartbatch_lightning.tasks.config import label_names_from_config
from smartbatch_lightning.tasks.standardization import Standardization

# Options of `from_pretrained` that say where a model, and thus its tokenizer, is found.
_LOCATION_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")
_NOT_IN_CONFIG = ("attn_implementation", "dtype", "quantization_config")
_WHICH_FILES = ("use_safetensors", "variant")  # options for pretrained weights
_PLACEMENT = ("device_map", "max_memory", "offload_folder", "offload_buffers", "tp_plan", "tp_size", "device_mesh")


@dataclass(frozen=True)
class ModelSource:
    """A model's name on the Hub or its folder, with options of `from_pretrained`; or a checkpoint's configuration.

    Args:
        pretrained: As the argument of `SequenceClassifier`.
        model_kwargs: As the argument of `SequenceClassifier`.
        architecture: Configuration of a model whose weights are in a checkpoint, as a dictionary; takes precedence over
            `pretrained`.
        adapted: Whether the checkpoint has only the adapters and the head; all other weights are in `pretrained`.
    """

    pretrained: str
    model_kwargs: dict[str, Any]
    architecture: dict[str, Any] | None
    adapted: bool = False

    def load(
        self,
        num_labels: int | None,
        task: Task | None,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        untrained_needs_labels: bool,
    ) -> tuple[PreTrainedModel, set[str]]:
        """Builds the model, in `eval` mode, with pretrained weights if there are any.

        Args:
            num_labels: Number of classes, if there is no task.
            task: The data's task.
            tokenizer: The tokenizer with which batches are padded.
            untrained_needs_labels: Reject a model without a trained head if the number of classes is unknown.

        Returns:
            The model, and the names of freshly initialized weights.

        Raises:
            ValueError: The model is not found, does not fit the task, or `model_kwargs` has options that it lacks.
        """
        if self.architecture is not None:
            model, fresh = self._model_for_checkpoint(tokenizer)
            if num_labels not in (None, model.config.num_labels):
                raise UsageError(
                    f"num_labels is {num_labels}, but the checkpoint classifies into "
                    f"{join_quoted(label_names_from_config(model.config))}. Leave num_labels out."
                )
            return model, fresh
        config, standardization = self._pretrained_config(), None
        check_has_head(config)
        adopt_tokenizer(config, tokenizer)  # before the model is built, since embeddings also use the padding token
        drop_caches(config)
        drop_chunks(config)
        if task is not None:
            self.check_classes(num_labels, task, config)
            knows_targets = is_fine_tuned(config) and label_names_from_config(config) == task.label_names
            before = Standardization.from_fields(config.to_dict())
            config.update(task.config_fields())
            if knows_targets and before is None:
                standardization = Standardization.from_fields(config.to_dict())
        elif num_labels is not None:
            if is_fine_tuned(config) and config.num_labels != num_labels:
                raise UsageError(
                    f"num_labels is {num_labels}, but {self._path!r} classifies into "
                    f"{join_quoted(label_names_from_config(config))}. Leave num_labels out, or use the base model that "
                    "it was fine-tuned from."
                )
            config.num_labels = num_labels
        elif untrained_needs_labels and not is_fine_tuned(config):
            if tokenizer is not None:  # of a data module, whose data has no labels
                raise UsageError(
                    f"{self._path!r} has not been trained to classify, no checkpoint was loaded, and the data has no "
                    "labels. Give a checkpoint with --ckpt_path, or an exported folder with --model.pretrained."
                )
            raise UsageError(
                "num_labels is not given, and there is no SmartBatchDataModule to take the number of classes from. Set "
                "--model.num_labels."
            )
        model, fresh = self._pretrained_model(config)
        if standardization is not None:  # it was trained on the targets as they are
            pairs = list(zip(standardization.mean, standardization.std, strict=True))
            rescale_logits(model, [1 / std for _, std in pairs], [-mean / std for mean, std in pairs])
        return model, fresh

    def check_classes(self, num_labels: int | None, task: Task, config: PretrainedConfig) -> None:
        """Rejects a task whose number of classes is not the given one, or not that of a fine-tuned model's head.

        Args:
            num_labels: The number that was given, if any.
            task: The data's task.
            config: The model's configuration.

        Raises:
            ValueError: The numbers differ.
        """
        if num_labels not in (None, len(task.label_names)):
            raise UsageError(
                f"num_labels is {num_labels}, but the data has {len(task.label_names)} classes: "
                f"{join_quoted(task.label_names)}. Leave num_labels out; it is taken from the data."
            )
        check_head(self._path, config, task.label_names)

    def config(self) -> PretrainedConfig:
        """Configuration of a checkpoint's model, else of the pretrained one."""
        return self._pretrained_config() if self.architecture is None else self.checkpoint_config(self.architecture)

    def checkpoint_config(self, architecture: dict[str, Any]) -> PretrainedConfig:
        """The configuration that a checkpoint has as a dictionary.

        Raises:
            ValueError: transformers does not know it, and it does not come with trusted code.
        """
        if "auto_map" in architecture and self.model_kwargs.get("trust_remote_code"):
            pretrained = self._pretrained_config()
            config = type(pretrained).from_dict({**architecture, "auto_map": pretrained.auto_map})  # only trusted code
            config._name_or_path = self._path  # where transformers looks for it
            return config
        if (kind := architecture.get("model_type")) is None:
            raise UsageError(
                f"architecture is {architecture!r}, which has no model_type. Leave it out; it is set by checkpoints."
            )
        if kind not in CONFIG_MAPPING:
            raise UsageError(
                f"transformers {version('transformers')} does not know the checkpoint's {kind} model. Upgrade it; or, "
                "if the model came with its own Python code that you trust, set "
                "--model.model_kwargs.trust_remote_code=true."
            )
        return AutoConfig.for_model(**architecture)

    @property
    def location(self) -> dict[str, Any]:
        """The options that say where the model, and thus its tokenizer, is found."""
        return {name: value for name, value in self.model_kwargs.items() if name in _LOCATION_OPTIONS}

    @property
    def _path(self) -> str:
        return str(demo.model_dir()) if self.pretrained == "demo" else self.pretrained

    def _model_for_checkpoint(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[PreTrainedModel, set[str]]:
        """The checkpoint's model before its weights are loaded, with changes from `model_kwargs`, such as dropout."""
        self._check_options()
        config = self.checkpoint_config(self.architecture or {})
        if "quantization_config" in self.model_kwargs:
            del config.quantization_config  # otherwise the pretrained weights would be expected to be quantized
        # a checkpoint always has a problem_type
        fixed = (*_LOCATION_OPTIONS, *_WHICH_FILES, *_NOT_IN_CONFIG, "problem_type")
        changed = {name: value for name, value in self.model_kwargs.items() if name not in fixed}
        if unknown := [name for name in changed if not hasattr(config, name)]:
            raise _unknown_options(unknown, "the checkpoint")
        config.update(changed)
        adopt_tokenizer(config, tokenizer)
        drop_caches(config)
        drop_chunks(config)
        if not self.adapted:
            if str(self.pretrained) not in ("demo", made_from := config.name_or_path):
                rank_zero_warn(
                    f"the model is the checkpoint's, made from {made_from}; {self.pretrained} is used only for its "
                    "tokenizer. Leave --model.pretrained out."
                )
            passed = (*_NOT_IN_CONFIG, "trust_remote_code")
            options = {name: value for name, value in self.model_kwargs.items() if name in passed}
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
                config, **options
            )
            return model, {name for name, _ in model.named_parameters()}
        if (found := self._pretrained_config().model_type) != config.model_type:
            raise UsageError(
                f"the checkpoint has adapters of a {config.model_type} model, but {self.pretrained!r} is a {found} "
                "model. Set --model.pretrained to the one that they were trained with."
            )
        return self._pretrained_model(config)

    def _check_options(self) -> None:
        """Rejects options that belong to the data or the Trainer, or that transformers has renamed."""
        if of_data := sorted({"num_labels", "id2label", "label2id"} & self.model_kwargs.keys()):
            raise UsageError(
                f"model_kwargs has {join_quoted(of_data)}, but the classes are those of the data. Leave that out; to "
                "name the classes, set --data.label_names."
            )
        if "torch_dtype" in self.model_kwargs:
            raise UsageError("model_kwargs has 'torch_dtype', which transformers now calls dtype. Rename it.")
        if placing := [name for name in _PLACEMENT if name in self.model_kwargs]:
            raise UsageError(
                f"model_kwargs has {join_quoted(placing)}, but the Trainer places the model on devices. Leave that "
                "out, and set --trainer.accelerator, --trainer.devices or --trainer.strategy."
            )

    def _pretrained_config(self) -> PretrainedConfig:
        self._check_options()
        not_in_config = (*_NOT_IN_CONFIG, *_WHICH_FILES)
        options = {option: value for option, value in self.model_kwargs.items() if option not in not_in_config}
        try:
            with hub_or_cache(self._path):
                config, unknown = AutoConfig.from_pretrained(
                    self._path, return_unused_kwargs=True, **{"trust_remote_code": False, **options}
                )
        except Exception as error:  # configurations check their fields in many ways
            check_trusted(self.pretrained, error)
            if (Path(self._path) / "adapter_config.json").is_file():
                raise UsageError(
                    f"{self.pretrained!r} holds only adapters, without the weights of their base model. Give a folder "
                    "with all weights, as written by export with adapter=false; or the checkpoint, with --ckpt_path."
                ) from error
            if not isinstance(error, OSError) or (Path(self._path) / "config.json").is_file():
                how = f", with model_kwargs {self.model_kwargs}" if self.model_kwargs else ""
                raise UsageError(
                    f"the configuration of {self.pretrained!r} cannot be used{how}: {root_cause_message(error)} "
                    f"Correct {'these, or ' if how else ''}its config.json."
                ) from error
            raise UsageError(
                f"the model {self.pretrained!r} was not found locally or on the Hub: {root_cause_message(error)} Give "
                "the path of a folder written by save_pretrained, or a name on the Hub, and check the network."
            ) from error
        if unknown := set(unknown) - set(_LOCATION_OPTIONS):
            raise _unknown_options(unknown, repr(self.pretrained))
        assert isinstance(config, PretrainedConfig)
        quantization = getattr(config, "quantization_config", None)
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method is not None and method not in (*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"):
            raise UsageError(  # transformers would load the weights as if they were not quantized
                f"the configuration of {self.pretrained!r} has quantization_config with the quant_method {method!r}, "
                f"which transformers {version('transformers')} does not know. Upgrade transformers; or choose a model "
                "with weights that are not quantized."
            )
        return config

    def _pretrained_model(self, config: PretrainedConfig) -> tuple[PreTrainedModel, set[str]]:
        passed = (*_LOCATION_OPTIONS, *_WHICH_FILES, *_NOT_IN_CONFIG)
        options = {option: value for option, value in self.model_kwargs.items() if option in passed}
        how = f" with model_kwargs {self.model_kwargs}" if self.model_kwargs else ""
        correct = "Correct these, or check" if self.model_kwargs else "Check"
        try:
            with hub_or_cache(self._path):
                model, found = AutoModelForSequenceClassification.from_pretrained(
                    # in float32 whatever the stored dtype: half precision is up to the Trainer
                    self._path,
                    config=config,
                    output_loading_info=True,
                    ignore_mismatched_sizes=not is_fine_tuned(config),  # such as those of a head for another task
                    **{"dtype": torch.float32, "trust_remote_code": False, **options},
                )
        except OSError as error:
            raise UsageError(
                f"the weights of {self._path!r} were not found locally or on the Hub: {root_cause_message(error)} Give "
                "the path of a folder written by save_pretrained, or a name on the Hub, and check the network."
            ) from error
        except Exception as error:  # reading the files and passing the options may raise anything
            check_trusted(self.pretrained, error)
            remedy = f"{correct} that its files are complete and of one model."
            if isinstance(error, ImportError):  # such as that of a package for quantized weights
                remedy = "Install it; or choose a model that does not need it."
            raise UsageError(f"{self._path!r} cannot be loaded{how}: {root_cause_message(error)} {remedy}") from error
        if getattr(model, "_hf_peft_config_loaded", False):  # only they would be trained, or not even they
            raise UsageError(
                f"{self._path!r} has an adapter_config.json, with adapters that transformers adds to the model. Merge "
                "them into its weights with merge_and_unload of peft, or remove that file."
            )
        mismatched = {name for name, *_ in found["mismatched_keys"]}
        if misfits := sorted(name for name in mismatched if name.startswith(f"{model.base_model_prefix}.")):
            raise UsageError(
                f"the shapes of {join_quoted(misfits)} in {self._path!r} differ from its configuration{how}. "
                f"{correct} that its files are of one model."
            )
        missing = mismatched | set(found["missing_keys"])
        if not {name for name, _ in model.named_parameters()} - missing:
            raise UsageError(
                f"{self._path!r} has no weights for {type(model).__name__}, which its configuration names. Give a "
                "folder written by save_pretrained."
            )
        if unused := _inside_layers(model, found["unexpected_keys"]):
            rank_zero_warn(
                f"{self._path!r} has {join_quoted(unused)}, which {type(model).__name__} does not have, so it "
                "computes something other than the pretrained model. Choose a model that this version of "
                "transformers supports in full."
            )
        if any(not name.startswith(f"{model.base_model_prefix}.") for name in missing):
            model.config.architectures = None  # otherwise `is_fine_tuned` would consider the head trained
        return model, missing


def _inside_layers(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Names of weights that belong to the model's layers, such as BERT's relative positions, not to another head.

    Leaves out causal masks, which old versions of transformers saved as `bias` of an attention layer.
    """
    layers, base = [*(find_layers(model) or ())], f"{model.base_model_prefix}."
    modules = {name.removeprefix(base): module for name, module in model.named_modules()}
    prefixes = tuple(f"{name}." for name, module in modules.items() if module in layers)

    def is_weight(name: str) -> bool:
        of, _, kind = name.rpartition(".")
        return kind == "weight" or (kind == "bias" and hasattr(modules.get(of), "weight"))

    return sorted(
        name for name in names if name.removeprefix(base).startswith(prefixes) and is_weight(name.removeprefix(base))
    )


def _unknown_options(names: Collection[str], of: str) -> UsageError:
    known = ", ".join(map(repr, (*_LOCATION_OPTIONS, *_WHICH_FILES, *_NOT_IN_CONFIG)))
    return UsageError(
        f"model_kwargs has {join_quoted(sorted(names))}, which is neither in the configuration of {of} nor one of "
        f"{known}. Correct the name, or leave it out."
    )
