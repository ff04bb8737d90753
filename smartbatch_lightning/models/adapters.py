"""`peft` adapters, such as LoRA: a small number of weights that are trained instead of a model's own.

The adapter layers are put into the `transformers` model itself, so packing, freezing and everything else work as usual.
The pretrained weights do not change, so checkpoints leave them out.
"""

import copy
import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from xxhash import xxh3_64

from smartbatch_lightning.errors import UsageError, join_quoted, root_cause_message
from smartbatch_lightning.registry import look_up

FINGERPRINT = "base_fingerprint"  # buffer that identifies the weights left out of a checkpoint
# Types for which training, saving, merging and loading by transformers are tested. Others add tokens, depend on the
# training step, or give wrong results when merged.
_SUPPORTED_TYPES = (
    *("LORA", "BOFT", "DELORA", "FOURIERFT", "GRALORA", "HIRA"),
    *("HRA", "IA3", "LOHA", "LOKR", "OFT", "RANDLORA"),
)
# LoRA options for text generation: more layers than in the configuration, and adapters that start at a given token.
_GENERATION_OPTIONS = ("layer_replication", "alora_invocation_tokens")
_VALUES_HASHED = 1024  # values of each weight that go into the fingerprint


@dataclass(frozen=True)
class Adapters:
    """The adapters added to a model by `add_adapters`.

    Attributes:
        peft_model: peft's wrapper around the model, which saves and merges adapters.
        pretrained: Names of the model's parameters that keep their loaded values.
        fingerprint: Hash of these parameters. Shape (), int64.
    """

    peft_model: Any
    pretrained: frozenset[str]
    fingerprint: Tensor

    def __str__(self) -> str:
        """The type of adapter, and the number of trained parameters."""
        trained, total = self.peft_model.get_nb_trainable_parameters()
        kind = self.peft_model.peft_type.value
        return f"{kind} trains {trained:,} of {total:,} parameters, {trained / total:.2%}."

    def omits(self, name: str) -> bool:
        """Whether a checkpoint omits this entry of the state: pretrained weights and their bitsandbytes data."""
        module, found, _ = name.partition(".weight.")
        return (f"{module}.weight" if found else name) in self.pretrained or name.endswith((".SCB", ".weight_format"))

    def for_saving(self, merged_for: Sequence[Mapping[str, Tensor]] = ()) -> Any:
        """A copy on the CPU for saving: peft's wrapper, or the model with the adapters merged into its weights.

        Args:
            merged_for: Batches of inputs for which the merged model must give the same logits; if empty, the adapters
                are not merged.

        Raises:
            ValueError: The logits differ, for example because layers share weights.
        """
        detached = copy.deepcopy(self.peft_model).cpu().eval()
        if not merged_for:
            return detached
        expected = _logits(detached, merged_for)
        try:
            _unwrap_trained_modules(detached)
            merged = detached.merge_and_unload()
        except Exception as error:  # peft has many kinds of layers
            raise UsageError(
                f"the adapters cannot be merged into the weights: {root_cause_message(error)} Export only the adapters "
                "with adapter=true."
            ) from error
        difference = (_logits(merged, merged_for) - expected).abs() / (1 + expected.abs())
        if difference.max() > torch.finfo(expected.dtype).eps ** 0.5:
            raise UsageError(
                f"merged into the weights of {type(merged).__name__}, the adapters give logits that differ by up to "
                f"{difference.max():.2g} from the trained ones. Export only the adapters with adapter=true."
            )
        return merged


def is_quantized(model: nn.Module | None) -> bool:
    """Whether a model has weights in 8 or 4 bits."""
    return bool(getattr(model, "is_quantized", False))


def read_peft_config(given: Any) -> Any:
    """The `peft.PeftConfig` for a sequence classifier that `peft_config` describes.

    Args:
        given: `peft_type` and the arguments of its configuration; or `class_path` and `init_args`.

    Raises:
        ValueError: peft is not installed, or the configuration is invalid or of an unsupported type.
    """
    peft = _import_peft()
    if not isinstance(given, Mapping) or not {"peft_type", "class_path"} & given.keys():
        raise UsageError(f"peft_config is {given!r}; give peft_type, such as {{peft_type: LORA, r: 8}}, or class_path.")
    options = dict(given)
    kind = options.pop("class_path", None) or options.pop("peft_type")
    options = options.pop("init_args", options) or {}
    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    makers = {name: known[name] for name in _SUPPORTED_TYPES if name in known}  # older versions have fewer
    make = look_up(kind, makers | {maker.__name__: maker for maker in makers.values()}, "peft_config")
    if not (isinstance(make, type) and issubclass(make, peft.PeftConfig)):  # a checkpoint may name it
        raise UsageError(f"peft_config is {kind!r}, which is not a peft.PeftConfig. Give one of {join_quoted(makers)}.")
    try:
        config: Any = make(**{**options, "task_type": "SEQ_CLS", "inference_mode": False})
    except Exception as error:  # peft checks arguments in many ways
        raise UsageError(f"peft_config is {dict(given)}: {root_cause_message(error)} Correct it.") from error
    if config.peft_type.value not in _SUPPORTED_TYPES:
        raise UsageError(f"peft_config is {kind!r}, which is not supported. Give one of {join_quoted(makers)}.")
    if met := [name for name in _GENERATION_OPTIONS if config.to_dict().get(name)]:
        raise UsageError(f"peft_config has {join_quoted(met)}, which is not supported. Leave it out.")
    return config


def plain_peft_config(given: Any) -> dict[str, Any]:
    """`peft_config` as a dictionary that a checkpoint can store.

    Raises:
        ValueError: As for `read_peft_config`.
    """
    if hasattr(given, "to_dict"):
        given = json.loads(json.dumps(given.to_dict(), default=sorted))  # sets
    read_peft_config(given)
    return dict(given)


def add_adapters(model: PreTrainedModel, peft_config: dict[str, Any], fresh: Collection[str]) -> Adapters:
    """Adds adapters to a model; only they, the head and weights that the pretrained model lacks are trained.

    Args:
        model: The model; changed in place.
        peft_config: As returned by `plain_peft_config`. If it names no layers to adapt, peft's defaults for the model
            family are used, else all linear layers.
        fresh: Names of the weights that the pretrained model lacks.

    Raises:
        ValueError: The model lacks the named layers, or the configuration would change pretrained weights.
    """
    peft = _import_peft()
    config = read_peft_config(peft_config)
    if config.target_modules is None and not config.to_dict().get("target_parameters"):
        known = getattr(peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], "target_module_mapping", None)
        if known is None:  # peft keeps IA3's elsewhere, and those of its layers whose inputs are scaled
            known = peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
            if model.config.model_type not in known and config.feedforward_modules is None:
                config.feedforward_modules = []
        config.target_modules = known.get(model.config.model_type, "all-linear")
        if config.target_modules == "all-linear":
            given, excluded = config.exclude_modules, _excluded_linear_layers(model, _trained_modules(model, fresh))
            if isinstance(given, str):  # a regular expression
                config.exclude_modules = "|".join([given, *map(re.escape, excluded)])
            else:
                config.exclude_modules = [*(given or []), *excluded] or None
            if not any(isinstance(module, nn.Linear | Conv1D) for module in model.base_model.modules()):
                raise UsageError(
                    f"{type(model).__name__} has no linear layers to which adapters could be added. Leave peft_config "
                    "out, or set its target_modules to other layers."
                )
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if unknown := [name for name in config.modules_to_save or [] if name.rpartition(".")[2] not in modules]:
        raise UsageError(
            f"modules_to_save has {join_quoted(unknown)}, which {type(model).__name__} does not have. Correct the "
            "names."
        )
    config.modules_to_save = [*(config.modules_to_save or []), *_trained_modules(model, fresh)]
    before = {*model.parameters()}
    of_base = {*model.base_model.parameters()}
    compared = [one for name, one in model.named_parameters() if one in of_base and name not in fresh]
    fingerprint = _fingerprint(compared)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # internal to peft
            peft_model = peft.PeftModel(model, config)
    except Exception as error:  # peft passes on any error of its layers
        raise UsageError(
            f"peft_config is {peft_config}, which does not fit {type(model).__name__}: {root_cause_message(error)} "
            "Correct it."
        ) from error
    if not torch.equal(_fingerprint(compared), fingerprint):
        raise UsageError(
            f"peft_config is {peft_config}, which changes the pretrained weights, but checkpoints do not store these. "
            "Set init_lora_weights to true."
        )
    names = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter in before and not parameter.requires_grad
    ]
    return Adapters(peft_model, frozenset(names), fingerprint)


def check_same_adapters(saved: dict[str, Any] | None, own: dict[str, Any] | None) -> None:
    """Rejects a checkpoint of a model with other adapters."""
    if saved != own and (saved is None or own is None or read_peft_config(saved) != read_peft_config(own)):
        raise UsageError(
            f"the checkpoint's peft_config is {saved}, but this model's is {own}. Set --model.peft_config to the "
            "checkpoint's."
        )


def check_same_base(fingerprint: Tensor, adapters: Adapters, pretrained: str) -> None:
    """Rejects adapters that were trained on other base weights."""
    if int(fingerprint) != int(adapters.fingerprint):
        raise UsageError(
            f"the checkpoint holds adapters that were trained on weights that {pretrained!r} does not have now. Set "
            "--model.pretrained, its revision and model_kwargs as in training."
        )


def _trained_modules(model: PreTrainedModel, fresh: Collection[str]) -> list[str]:
    """Names of the head and of base model modules with weights that the pretrained model lacks, without submodules."""
    base = model.base_model
    names = {
        name for name, child in model.named_children() if child is not base and any(True for _ in child.parameters())
    }
    names = names if base is not model else set()
    names |= {name.rpartition(".")[0] for name in fresh}
    return sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names))


def _unwrap_trained_modules(peft_model: Any) -> None:
    """Replaces peft's wrappers of fully trained modules by these, which most of its adapters do for single layers only.

    Args:
        peft_model: peft's wrapper around the model; changed in place.
    """
    for name, module in list(peft_model.named_modules()):
        if isinstance(module, _import_peft().utils.ModulesToSaveWrapper):
            trained = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            parent, _, child = name.rpartition(".")
            setattr(peft_model.get_submodule(parent), child, trained)


def _excluded_linear_layers(model: PreTrainedModel, trained: Collection[str]) -> list[str]:
    """Names of linear layers that are fully trained, or return more than a product, such as routers of experts."""
    linear = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = tuple(f"{name}." for name in trained)
    return [
        name
        for name, kind in linear.items()
        if kind.__module__.startswith("transformers.models.") or f"{name}.".startswith(inside)
    ]


@torch.no_grad()
def _logits(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    return torch.cat([model(**batch).logits for batch in batches])


def _fingerprint(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Hash of weights, except those in 8 or 4 bits. Shape (), int64."""
    digest = xxh3_64()
    for parameter in parameters:
        if parameter.is_floating_point():
            digest.update(parameter.detach().reshape(-1)[:_VALUES_HASHED].float().cpu().numpy().tobytes())
    return torch.tensor(digest.intdigest() - 2**63)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError(
            "peft_config is given, but peft is not installed. Run pip install 'smartbatch-lightning[peft]'."
        ) from error
    return peft
