"""One rank's share of each epoch's plan, as a batch sampler for any torch `DataLoader`."""

from collections.abc import Iterator
from itertools import chain, repeat

import numpy as np
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from smartbatch_lightning.batching.plan import Batching, BatchPlan, plan_epoch
from smartbatch_lightning.errors import UsageError

Trained = list[tuple[int, int]]


class SmartBatchSampler(Sampler[list[int]]):
    """Yields one rank's batches of similar-length samples, planned anew each epoch.

    Over all ranks every sample appears exactly once an epoch, and every rank takes equally many steps. The order is a
    pure function of the arguments, the epoch and what was trained of it before; no global random state is read, and
    nothing is counted while iterating.

    Args:
        lengths: Tokens of each sample after truncation, special tokens counted. Shape (num_samples,).
        batch_size: Samples in a batch at most, on one rank; by default 16, or as many as the token budget allows.
        batching: How batches are chosen: `smart`, `tutorial` or `random`.
        max_tokens_per_batch: Token budget of a batch on one rank, with padding to its longest sample.
        pad_to_multiple_of: What batches are padded to a multiple of, for the budget to reckon with.
        packed: The batches will not be padded: the budget is for the sum of their lengths.
        jitter: Tokens by which lengths are moved at random before sorting (`smart` only).
        seed: Seed of the whole run.
        shuffle: False for evaluation: the same batches every time, in order.
        num_replicas: Ranks that share the samples; by default the world size of the default process group, or 1.
        rank: Which of them this is; by default this process' rank, or 0.

    Raises:
        ValueError: `batch_size` or a length is below 1, a length is above the token budget, or there are fewer samples
            than ranks.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        batch_size: int | None = None,
        batching: Batching = "smart",
        *,
        max_tokens_per_batch: int | None = None,
        pad_to_multiple_of: int = 1,
        packed: bool = False,
        jitter: float = 1.0,
        seed: int = 0,
        shuffle: bool = True,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.lengths = np.asarray(lengths)
        self.batch_size = 16 if batch_size is None and max_tokens_per_batch is None else batch_size
        self.batching = batching
        self.max_tokens_per_batch = max_tokens_per_batch
        self.pad_to_multiple_of = pad_to_multiple_of
        self.packed = packed
        self.jitter = jitter
        self.seed = seed
        self.shuffle = shuffle
        self.num_replicas = num_replicas or (dist.get_world_size() if distributed else 1)
        self.rank = rank if rank is not None else (dist.get_rank() if distributed else 0)
        self.epoch = 0
        self._resumed_epoch = -1
        self._trained: Trained = []
        if not 0 <= self.rank < self.num_replicas:
            raise UsageError(
                f"rank is {self.rank}; with num_replicas={self.num_replicas} give 0 to {self.num_replicas - 1}."
            )
        self._num_steps = len(self.plan()) // self.num_replicas

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

    def loss_weights(self, accumulated: int = 1, num_batches: int | None = None) -> Iterator[float]:
        """What the mean loss of each batch that is yielded next counts for in its optimizer step.

        Trainers average the losses of the ranks and of accumulated batches. Times these weights, that average is the
        mean over the samples of the optimizer step, however many each batch holds.

        Args:
            accumulated: Batches of a rank whose gradients are accumulated for an optimizer step.
            num_batches: Batches of a rank after which the epoch is ended, and its last optimizer step taken.
        """
        plan, step = self._rest()
        samples = plan.batch_sizes().reshape(-1, self.num_replicas)[step:]
        batches = self.first_step + np.arange(len(samples))
        trained = batches < (len(self) if num_batches is None else num_batches)
        window = batches[trained] // accumulated
        total = np.bincount(window - window[:1], weights=samples[trained].sum(axis=1))[window - window[:1]]
        weights = samples[trained, self.rank] * self.num_replicas * accumulated / total
        return chain(weights.tolist(), repeat(1.0))

    def plan(self) -> BatchPlan:
        """The batches of the current epoch over all ranks, with those that were trained before."""
        return self._plan(self.num_replicas)

    def _plan(self, num_replicas: int, samples: NDArray[np.int64] | None = None) -> BatchPlan:
        if samples is not None and not len(samples):
            return BatchPlan(samples, np.zeros(1, np.int64), num_replicas)
        lengths = self.lengths if samples is None else self.lengths[samples]
        plan = plan_epoch(
            lengths,
            self.batch_size,
            self.batching,
            max_tokens_per_batch=self.max_tokens_per_batch,
            pad_to_multiple_of=self.pad_to_multiple_of,
            packed=self.packed,
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
