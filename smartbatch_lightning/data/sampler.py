"""One rank's share of each epoch's plan, as a batch sampler for any torch `DataLoader`."""

from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from smartbatch_lightning.batching import BatchPlan, BatchSpec, plan_epoch
from smartbatch_lightning.batching.planner import as_lengths, plan_windows, window_offsets, with_jitter
from smartbatch_lightning.errors import UsageError

_DEFAULT = BatchSpec()


class SmartBatchSampler(Sampler[list[int]]):
    """Yields one rank's batches of similar-length samples, in a new plan every epoch.

    Over all ranks, every sample appears exactly once per epoch, and every rank takes the same number of steps. The
    order is a pure function of the arguments, the epoch and the part of it already consumed; no global random state is
    read, and nothing is counted while iterating.

    Args:
        lengths: Tokens of each sample after truncation, including special tokens. Shape (num_samples,).
        spec: The batching strategy and the limits of a batch.
        shuffle: False for evaluation: the same batches every time, in order.
        num_replicas: Number of ranks; by default the world size of the default process group, even if that is started
            later, or 1.
        rank: This process's rank; by default that in the process group, or 0.

    Attributes:
        spec: The given one, with a number in place of `jitter: auto`.
        window: Number of consecutive samples planned together, without shuffling, before the next ones; None for all.

    Raises:
        ValueError: A length is below 1 or above the token budget, or there are fewer samples than ranks.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        spec: BatchSpec = _DEFAULT,
        *,
        shuffle: bool = True,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.lengths = as_lengths(lengths)
        self.spec = with_jitter(spec, self.lengths) if shuffle else spec
        self.shuffle = shuffle
        self._given_ranks = (num_replicas, rank)
        self.window: int | None = None
        self._steps: dict[tuple[int, int | None], int] = {}  # steps of an epoch, by number of ranks and window
        self.epoch = 0
        self._unfinished: dict[str, Any] = {"epoch": -1, "consumed": []}
        if not 0 <= self.rank < self.num_replicas:
            raise UsageError(
                f"rank is {self.rank}; with num_replicas={self.num_replicas} give 0 to {self.num_replicas - 1}."
            )
        len(self)  # plans an epoch, so that samples that cannot be planned are rejected now

    @property
    def num_replicas(self) -> int:
        """Number of ranks."""
        return self._given_ranks[0] or (dist.get_world_size() if _is_distributed() else 1)

    @property
    def rank(self) -> int:
        """This process's rank."""
        given = self._given_ranks[1]
        return (dist.get_rank() if _is_distributed() else 0) if given is None else given

    @property
    def sampler(self) -> "SmartBatchSampler":
        """Itself: Lightning sets the epoch on `loader.batch_sampler.sampler`, never on a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose batches are yielded next, like `DistributedSampler.set_epoch`."""
        self.epoch = epoch

    def state_dict(self, step: int = 0) -> dict[str, Any]:
        """State after `step` batches of this rank in the current epoch; at its end, `step` is `len(self)`.

        Returns:
            `epoch`, and `consumed`: for each run that consumed part of the epoch, its number of ranks and the steps
            taken by each.
        """
        consumed = [*self.consumed, (self.num_replicas, max(step, self.start_step) - self.start_step)]
        return {"epoch": self.epoch, "consumed": consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skips the consumed part of an epoch; other epochs are unaffected.

        On the same number of ranks, the remaining batches are those of an uninterrupted epoch. On another number, the
        remaining samples are replanned; if there are fewer of them than ranks, some appear in the batches of two ranks
        but count once.
        """
        self._unfinished = {"epoch": state["epoch"], "consumed": [(ranks, steps) for ranks, steps in state["consumed"]]}

    @property
    def consumed(self) -> list[tuple[int, int]]:
        """The number of ranks and the steps per rank of each earlier run that consumed part of the current epoch."""
        return list(self._unfinished["consumed"]) if self.epoch == self._unfinished["epoch"] else []

    @property
    def start_step(self) -> int:
        """Batches of this rank already consumed when iteration starts; `len(self)` means the whole epoch."""
        if all(num_replicas == self.num_replicas for num_replicas, _ in self.consumed):
            return sum(steps for _, steps in self.consumed)
        plan, step = self._remaining_plan()
        return len(self) - (len(plan) // self.num_replicas - step)

    def loss_weights(
        self, accumulated: int = 1, num_batches: int | None = None, sample_weights: ArrayLike | None = None
    ) -> Iterator[float]:
        """Weights for the mean losses of the batches to come, within their optimizer steps.

        Trainers average losses over ranks and accumulated batches. With these weights, that average is the (weighted)
        mean over all samples of the optimizer step, even if batches differ in size.

        Args:
            accumulated: Batches per rank accumulated for an optimizer step.
            num_batches: Batches per rank after which the epoch ends, with its last optimizer step.
            sample_weights: Weight of each sample in the mean loss of its batch, if not all equal. Shape (num_samples,).
        """
        plan, step = self._remaining_plan()
        sums: NDArray[Any] = plan.batch_sizes()
        only_step = len(plan) == self.num_replicas
        if only_step or (sample_weights is not None and len(plan)):
            counted = (np.ones(len(self.lengths)) if sample_weights is None else np.asarray(sample_weights))[plan.order]
            if only_step:  # samples may appear in it twice
                again = np.ones(len(counted), bool)
                again[np.unique(plan.order, return_index=True)[1]] = False
                counted[again] = 0
            sums = np.add.reduceat(counted, plan.offsets[:-1])
        samples = sums.reshape(-1, self.num_replicas)[step:]
        batches = self.start_step + np.arange(len(samples))
        trained = batches < (len(self) if num_batches is None else num_batches)
        window = batches[trained] // accumulated
        total = np.bincount(window - window[:1], weights=samples[trained].sum(axis=1))[window - window[:1]]
        weights = samples[trained, self.rank] * self.num_replicas * accumulated / total
        return chain(weights.tolist(), repeat(1.0))

    def plan(self) -> BatchPlan:
        """The batches of the current epoch over all ranks, including those already consumed."""
        return self._plan(self.num_replicas)

    def window_steps(self) -> NDArray[np.int64]:
        """Number of steps of a whole epoch after which each window is finished. Shape (num_windows,)."""
        ends = window_offsets(len(self.lengths), self.window or len(self.lengths))[1:]
        return np.searchsorted(self.plan().offsets, ends) // self.num_replicas

    def _plan(self, num_replicas: int, samples: NDArray[np.int64] | None = None) -> BatchPlan:
        if samples is not None and not len(samples):
            return BatchPlan(samples, np.zeros(1, np.int64), num_replicas)
        if samples is not None and len(samples) < num_replicas:
            return BatchPlan(np.resize(samples, num_replicas), np.arange(num_replicas + 1), num_replicas)
        if samples is None and self.window is not None:
            return plan_windows(self.lengths, self.spec, self.window, num_replicas=num_replicas)
        lengths = self.lengths if samples is None else self.lengths[samples]
        plan = plan_epoch(lengths, self.spec, epoch=self.epoch, num_replicas=num_replicas, shuffle=self.shuffle)
        return plan if samples is None else BatchPlan(samples[plan.order], plan.offsets, num_replicas)

    def _remaining_plan(self) -> tuple[BatchPlan, int]:
        """The current plan, and the number of its steps already consumed."""
        runs = [*self.consumed, (self.num_replicas, 0)]
        plan, step = self._plan(runs[0][0]), 0
        for num_replicas, steps in runs:
            if num_replicas != plan.num_replicas:
                plan, step = self._plan(num_replicas, plan.order[plan.offsets[step * plan.num_replicas] :]), 0
            step += steps
        return plan, step

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch: the same in every epoch and on every rank."""
        key = self.num_replicas, self.window
        if key not in self._steps:
            self._steps[key] = len(self._plan(self.num_replicas)) // self.num_replicas
        return self._steps[key]

    def __iter__(self) -> Iterator[list[int]]:
        plan, step = self._remaining_plan()
        if not self.consumed and len(plan) != len(self) * self.num_replicas:
            raise UsageError(
                f"the strategy {self.spec.batching!r} made {len(plan)} batches in epoch {self.epoch}, and "
                f"{len(self) * self.num_replicas} before. The number has to be the same in every epoch."
            )
        return (batch.tolist() for batch in plan.rank_batches(self.rank, step))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
