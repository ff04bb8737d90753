"""Where numbers are no longer finite, training ends, and nothing is saved, exported or predicted."""

import math
from collections.abc import Iterable

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torch import Tensor

from smartbatch_lightning.errors import UsageError

# Where a trained model's numbers are not finite.
REMEDY = (
    "Use a checkpoint from before training diverged, or set --trainer.precision=32-true if half precision overflows."
)


def check_losses(trainer: L.Trainer, losses: list[tuple[int, Tensor]], remedy: str) -> None:
    """Refuses losses that are not finite, on all ranks, which all have to call it; waits for the device.

    Not while `LearningRateFinder` tries out rates, of which the highest may be too high.

    Args:
        trainer: Of the ranks.
        losses: Optimizer step, as loggers count them, and loss, a scalar, of each batch.
        remedy: What the message ends with.

    Raises:
        ValueError: One of them is not finite, on one of the ranks.
    """
    if any(isinstance(callback, _LRCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return
    values = torch.stack([loss for _, loss in losses])
    steps = torch.tensor([step for step, _ in losses], device=values.device)
    none = torch.iinfo(steps.dtype).max
    first = int(trainer.strategy.reduce(steps.where(~values.isfinite(), none).min(), reduce_op="min"))
    if first < none:
        raise UsageError(f"the loss of step {first} is nan or infinite. {remedy}")


def check_evaluated(trainer: L.Trainer) -> None:
    """Refuses what `validate` or `test` has found where a loss is not finite, on all ranks alike.

    Raises:
        ValueError: One is not.
    """
    if trainer.state.fn == TrainerFn.FITTING:
        return
    for name, value in trainer.callback_metrics.items():
        if name.partition("/")[0] in ("val_loss", "test_loss") and not math.isfinite(value):
            raise UsageError(f"{name} is {float(value)}, and the other metrics say nothing. {REMEDY}")


def check_weights(weights: Iterable[Tensor], what: str, remedy: str) -> None:
    """Refuses weights that are not finite; waits for the device.

    Raises:
        ValueError: One of them is not; the message begins with `what`.
    """
    whole = [weight for weight in weights if type(weight) in (Tensor, torch.nn.Parameter)]  # none of a sharded model
    finite = [weight.detach().isfinite().all() for weight in whole if weight.is_floating_point()]
    if finite and not torch.stack(finite).all():
        raise UsageError(f"{what}: the model has weights that are nan or infinite. {remedy}")
