"""Optimizers over parameter groups: weight decay, and the learning rate of each part of a model."""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from smartbatch_lightning.contract import callbacks_of
from smartbatch_lightning.errors import UsageError, join_quoted, root_cause_message
from smartbatch_lightning.models.layers import encoder_layers, parameter_depths
from smartbatch_lightning.models.schedule import Schedule

# As created by LightningCLI from `class_path` and `init_args`; in Python a class, or a `functools.partial` of one.
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]


def build_optimizer(
    make: OptimizerCallable,
    parameters: Iterable[nn.Parameter],
    model: PreTrainedModel,
    layer_decay: float,
    head_learning_rate: float | None,
) -> Optimizer:
    """Creates an optimizer that does not decay one-dimensional parameters, with a learning rate for each model part.

    Args:
        make: Creates it from parameter groups; its own learning rate applies to everything above the layers.
        parameters: The parameters to train; those outside the base model are the head.
        model: The `transformers` model.
        layer_decay: Learning rate of each layer relative to the one above, as in *ELECTRA* (Clark et al., 2020); the
            embeddings have the lowest.
        head_learning_rate: Learning rate of the head; by default the optimizer's own.

    Returns:
        The optimizer, whose groups have a `name`.

    Raises:
        ValueError: It takes no parameter groups, or has no learning rate for `layer_decay` to start from.
    """
    names, depths = _parts_of(model, layer_decay != 1.0, head_learning_rate is not None)
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for parameter in parameters:
        parts[names[depths.get(parameter, -1)]].append(parameter)
    groups, learning_rates = [], []
    for depth, (name, of_part) in enumerate(parts.items()):
        share = layer_decay ** max(0, len(names) - 2 - depth)
        for kind, decay in (("decay", {}), ("no_decay", {"weight_decay": 0.0})):
            if params := [parameter for parameter in of_part if (parameter.ndim > 1) == (kind == "decay")]:
                groups.append({"params": params, "name": f"{name}_{kind}".lstrip("_"), **decay})
                learning_rates.append((share, head_learning_rate if name == "head" else None))
    try:
        optimizer = make(groups)
    except Exception as error:  # an optimizer may raise anything
        raise UsageError(
            f"no optimizer could be created from the model's parameter groups: {root_cause_message(error)} Give "
            "another --model.optimizer, or override configure_optimizer."
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"optimizer creates a {type(optimizer).__name__}; give a subclass of torch.optim.Optimizer.")
    for group, (share, learning_rate) in zip(optimizer.param_groups, learning_rates, strict=False):
        if learning_rate is not None:
            group["lr"] = learning_rate
        elif share != 1.0:
            if group.get("lr") is None:
                raise UsageError(f"{type(optimizer).__name__} has no lr for layer_decay to start from. Give it one.")
            group["lr"] = group["lr"] * share
    return optimizer


def check_same_groups(saved: Sequence[dict[str, Any]], optimizer: Optimizer, *, more_follow: bool) -> None:
    """Rejects to resume with an optimizer that cannot load the state in a checkpoint.

    Args:
        saved: The parameter groups of the checkpoint's optimizer.
        optimizer: This run's, just created.
        more_follow: Whether a callback adds groups during training.

    Raises:
        ValueError: It is of another type, or has other groups.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, optimizer.param_groups)]
    fitting = sizes[0][: len(sizes[1])] == sizes[1] and (more_follow or len(sizes[0]) == len(sizes[1]))
    fresh = optimizer.param_groups[0]
    # schedules and newer versions of torch add settings to groups
    other_kind = saved[0].keys() - fresh.keys() and optimizer.defaults.keys() - saved[0].keys()
    if not fitting or other_kind:
        differs = f"has parameter groups of {sizes[0]} parameters, where this run has {sizes[1]}"
        if fitting:
            differs = f"is not of the type of this run's, {type(optimizer).__name__}"
        raise UsageError(
            f"the checkpoint's optimizer {differs}. Set optimizer, layer_decay and head_learning_rate as they were; or "
            "start from the checkpoint's weights with SequenceClassifier.load_from_checkpoint."
        )


def check_settings(settings: Any, schedule: Schedule) -> None:
    """Rejects optimizer settings that are out of range or exclude each other.

    Args:
        settings: Has the arguments of a `SequenceClassifier` as attributes.
        schedule: The learning rate schedule.
    """
    for name in ("learning_rate", "adam_epsilon", "weight_decay", "head_learning_rate"):
        value = getattr(settings, name)
        if value is not None and not (isinstance(value, Real) and 0 <= float(value) < math.inf):
            raise UsageError(f"{name} is {value!r}; give a number that is 0 or more.")
    if not 0 < settings.layer_decay <= 1:
        raise UsageError(
            f"layer_decay is {settings.layer_decay}; give a factor above 0 and up to 1, where 1 means no decay."
        )
    adam = (settings.learning_rate, settings.adam_epsilon, settings.weight_decay)
    if settings.optimizer is not None and adam != (None, 1e-8, 0):
        raise UsageError(
            "learning_rate is {}, adam_epsilon {} and weight_decay {}, which are for AdamW, but optimizer is given. "
            "Set its own lr, eps and weight_decay in its init_args, and learning_rate to null.".format(*adam)
        )
    if schedule.sets_rates and (settings.layer_decay != 1 or settings.head_learning_rate is not None):
        raise UsageError(
            "lr_scheduler has max_lr, one learning rate for all parameters, together with layer_decay or "
            "head_learning_rate. Leave max_lr out; each group then warms up to its own rate."
        )


def check_callbacks(trainer: L.Trainer, settings: Any) -> None:
    """Rejects callbacks that would unfreeze weights or override the learning rates of parts of the model.

    Args:
        trainer: With its callbacks.
        settings: Has the arguments of a `SequenceClassifier` as attributes.
    """
    rates = {"layer_decay": settings.layer_decay != 1.0, "head_learning_rate": settings.head_learning_rate is not None}
    frozen = {name: bool(getattr(settings, name)) for name in ("freeze_embeddings", "freeze_layers", "peft_config")}
    undone = {BaseFinetuning: rates | frozen, LearningRateFinder: rates | {"optimizer": settings.optimizer is not None}}
    for kind, options in undone.items():
        given = [name for name, is_given in options.items() if is_given]
        if given and (found := callbacks_of(trainer, kind)):
            raise UsageError(
                f"the callback {type(found[0]).__name__} would undo {join_quoted(given)}: it unfreezes parameters or "
                "sets learning rates. Use one of the two."
            )


def _parts_of(model: PreTrainedModel, by_layer: bool, head_apart: bool) -> tuple[list[str], dict[nn.Parameter, int]]:
    """Names of the parts with their own learning rates, from the bottom up, and the index of each parameter's part.

    Parameters without an index belong to the last part.
    """
    if by_layer:
        layers = [f"layer_{number}" for number in range(len(encoder_layers(model)))]
        return ["embeddings", *layers, "top", "head"], parameter_depths(model)
    if head_apart:
        return ["backbone", "head"], dict.fromkeys(model.base_model.parameters(), 0)
    return [""], {}
