"""Rejecting numbers that are not finite: training ends, and nothing is saved, exported or predicted."""

import math
from collections.abc import Iterable

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torch import Tensor

from smartbatch_lightning.contract import callbacks_of
from smartbatch_lightning.errors import UsageError

_MAX_UNREAD = 1000  # losses kept on the device

# For trained models whose numbers are not finite.
REMEDY = (
    "Use a checkpoint from before training diverged, or set --trainer.precision=32-true if half precision overflows."
)


class TrainingLosses:
    """Losses of training batches, kept on the device until they are read, since every read waits for it.

    Attributes:
        last: The last loss that was read, a float32 scalar on the CPU; None before.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self._unread: list[tuple[int, Tensor]] = []

    def add(self, step: int, loss: Tensor) -> None:
        """Adds the loss of a batch, a scalar; `step` is its optimizer step, as counted by loggers."""
        self._unread.append((step, loss.detach()))

    @property
    def is_full(self) -> bool:
        """Whether so many losses are unread that they should be read now."""
        return len(self._unread) >= _MAX_UNREAD

    def read(self, trainer: L.Trainer, numbers: Tensor | None, remedy: str) -> list[int]:
        """Reads the losses and other numbers from the device, with a single wait; rejects losses that are not finite.

        All ranks must call it. While `LearningRateFinder` tries learning rates, some of which may be too high, any loss
        is accepted.

        Args:
            trainer: The Trainer.
            numbers: Shape (n,), int64; None for none.
            remedy: End of the error message.

        Returns:
            The numbers.

        Raises:
            ValueError: A loss is not finite on one of the ranks.
        """
        if not self._unread:
            return [] if numbers is None else numbers.tolist()
        losses, self._unread = self._unread, []
        values = torch.stack([loss for _, loss in losses])
        place = torch.arange(len(values), device=values.device)
        first = trainer.strategy.reduce(place.where(~values.isfinite(), len(values)).min(), reduce_op="min")
        assert isinstance(first, Tensor)
        bits = values[-1].float().view(torch.int32)  # to read a float together with whole numbers
        found_and_last = torch.stack((first, bits))
        together = found_and_last if numbers is None else torch.cat((numbers, found_and_last))
        *read, found, last = together.tolist()
        if found < len(losses) and not callbacks_of(trainer, _LRCallback):
            raise UsageError(f"the loss of step {losses[found][0]} is nan or infinite. {remedy}")
        self.last = torch.tensor(last, dtype=torch.int32).view(torch.float32)
        return read


def check_evaluated(trainer: L.Trainer) -> None:
    """Rejects the results of `validate` or `test` if a loss is not finite, on all ranks."""
    if trainer.state.fn == TrainerFn.FITTING:
        return
    for name, value in trainer.callback_metrics.items():
        if name.partition("/")[0] in ("val_loss", "test_loss") and not math.isfinite(value):
            raise UsageError(f"{name} is {float(value)}, so the other metrics are meaningless. {REMEDY}")


def check_weights(weights: Iterable[Tensor], what: str, remedy: str) -> None:
    """Rejects weights that are not finite; waits for the device.

    Raises:
        ValueError: A weight is not finite; the message begins with `what`.
    """
    whole = [weight for weight in weights if type(weight) in (Tensor, torch.nn.Parameter)]  # not sharded ones
    finite = [weight.detach().isfinite().all() for weight in whole if weight.is_floating_point()]
    if finite and not torch.stack(finite).all():
        raise UsageError(f"{what}: the model has weights that are nan or infinite. {remedy}")
