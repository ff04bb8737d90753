"""One rank's share of each epoch's plan, as a batch sampler for any torch `DataLoader`."""

from collections.abc import Iterator

import numpy as np
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from smartbatch_lightning.planning import Batching, BatchPlan, checked_arguments, plan_epoch, steps_per_epoch

Trained = list[tuple[int, int]]


class SmartBatchSampler(Sampler[list[int]]):
    """Yields one rank's batches of similar-length samples, planned anew each epoch.

    Over all ranks every sample appears exactly once an epoch, and every rank takes equally many steps. The order is a
    pure function of the arguments, the epoch and what was trained of it before; no global random state is read, and
    nothing is counted while iterating.

    Args:
        lengths: Tokens of each sample after truncation, special tokens counted. Shape (num_samples,).
        batch_size: Samples in a batch at most, on one rank.
        batching: How batches are chosen: `smart`, `tutorial` or `random`.
        jitter: Tokens by which lengths are moved at random before sorting (`smart` only).
        seed: Seed of the whole run.
        shuffle: False for evaluation: the same batches every time, in order.
        num_replicas: Ranks that share the samples; by default the world size of the default process group, or 1.
        rank: Which of them this is; by default this process' rank, or 0.

    Raises:
        ValueError: `batch_size` is below 1, or a length is, or there are fewer samples than ranks.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        batch_size: int = 16,
        batching: Batching = "smart",
        *,
        jitter: float = 1.0,
        seed: int = 0,
        shuffle: bool = True,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.lengths = checked_arguments(lengths, batching, jitter)
        self.batch_size = batch_size
        self.batching = batching
        self.jitter = jitter
        self.seed = seed
        self.shuffle = shuffle
        self.num_replicas = num_replicas or (dist.get_world_size() if distributed else 1)
        self.rank = rank if rank is not None else (dist.get_rank() if distributed else 0)
        self.epoch = 0
        self._resumed_epoch = -1
        self._trained: Trained = []
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(
                f"rank is {self.rank}; with num_replicas={self.num_replicas} give 0 to {self.num_replicas - 1}."
            )
        self._num_steps = steps_per_epoch(len(self.lengths), batch_size, self.num_replicas)

    @property
    def sampler(self) -> "SmartBatchSampler":
        """Itself: Lightning tells the epoch to `loader.batch_sampler.sampler`, never to a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches are yielded next, as `DistributedSampler.set_epoch` does."""
        self.epoch = epoch

    def resume(self, epoch: int, trained: Trained) -> None:
        """Leaves out of an epoch what was trained of it before; other epochs stay whole.

        On as many ranks as before, the batches that follow are those of an uninterrupted epoch. On another number,
        the samples that are left are dealt out anew.

        Args:
            epoch: The epoch that was interrupted.
            trained: Of each run that trained a part of it, the number of ranks and the steps that each rank took.
        """
        self._resumed_epoch = epoch
        self._trained = list(trained)

    @property
    def trained(self) -> Trained:
        """What was trained of the current epoch before this run."""
        return self._trained if self.epoch == self._resumed_epoch else []

    @property
    def first_step(self) -> int:
        """Batches of this rank that lie behind it when iterating starts, counted so that `len` ends the epoch."""
        if all(num_replicas == self.num_replicas for num_replicas, _ in self.trained):
            return sum(steps for _, steps in self.trained)
        plan, step = self._rest()
        return len(self) - (len(plan) // self.num_replicas - step)

    def plan(self) -> BatchPlan:
        """The batches of the current epoch over all ranks, with those that were trained before."""
        return self._plan(self.num_replicas)

    def _plan(self, num_replicas: int, samples: NDArray[np.int64] | None = None) -> BatchPlan:
        if samples is not None and not len(samples):
            return BatchPlan(samples, np.zeros(1, np.int64), num_replicas)
        plan = plan_epoch(
            self.lengths if samples is None else self.lengths[samples],
            self.batch_size,
            self.batching,
            seed=self.seed,
            epoch=self.epoch,
            num_replicas=num_replicas,
            jitter=self.jitter,
            shuffle=self.shuffle,
        )
        return plan if samples is None else BatchPlan(samples[plan.order], plan.offsets, num_replicas)

    def _rest(self) -> tuple[BatchPlan, int]:
        """The plan in force, and the steps of it that were trained before."""
        runs = [*self.trained, (self.num_replicas, 0)]
        plan, step = self._plan(runs[0][0]), 0
        for num_replicas, steps in runs:
            if num_replicas != plan.num_replicas:
                plan, step = self._plan(num_replicas, plan.order[plan.offsets[step * plan.num_replicas] :]), 0
            step += steps
        return plan, step

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch: the same in every epoch and on every rank."""
        return self._num_steps

    def __iter__(self) -> Iterator[list[int]]:
        plan, step = self._rest()
        return (batch.tolist() for batch in plan.share(self.rank, step))
