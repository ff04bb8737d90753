"""One rank's share of each epoch's plan, as a batch sampler for any torch `DataLoader`."""

from collections.abc import Iterator

import torch.distributed as dist
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

from smartbatch_lightning.planning import Batching, BatchPlan, plan_epoch, steps_per_epoch


class SmartBatchSampler(Sampler[list[int]]):
    """Yields one rank's batches of similar-length samples, planned anew each epoch.

    Over all ranks every sample appears exactly once an epoch, and every rank takes equally many steps. The order is a
    pure function of the arguments and the epoch; no global random state is read, and nothing is counted while
    iterating.

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
        self.lengths = lengths
        self.batch_size = batch_size
        self.batching = batching
        self.jitter = jitter
        self.seed = seed
        self.shuffle = shuffle
        self.num_replicas = num_replicas or (dist.get_world_size() if distributed else 1)
        self.rank = rank if rank is not None else (dist.get_rank() if distributed else 0)
        self.epoch = 0
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"rank is {self.rank}; with num_replicas={self.num_replicas} give 0 or more and less.")
        self._num_steps = steps_per_epoch(len(self.lengths), batch_size, self.num_replicas)  # type: ignore[arg-type]

    @property
    def sampler(self) -> "SmartBatchSampler":
        """Itself: Lightning tells the epoch to `loader.batch_sampler.sampler`, never to a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches are yielded next, as `DistributedSampler.set_epoch` does."""
        self.epoch = epoch

    def plan(self) -> BatchPlan:
        """The batches of the current epoch over all ranks."""
        return plan_epoch(
            self.lengths,
            self.batch_size,
            self.batching,
            seed=self.seed,
            epoch=self.epoch,
            num_replicas=self.num_replicas,
            jitter=self.jitter,
            shuffle=self.shuffle,
        )

    def __len__(self) -> int:
        """Batches of this rank in an epoch: the same in every epoch and on every rank."""
        return self._num_steps

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.plan().share(self.rank))
