"""The DataLoader that Lightning cannot get wrong: every quirk of Lightning's data loading is met here, and only here.

Each was found with lightning 2.6 and has a test that fails without its cure.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from smartbatch_lightning.sampler import SmartBatchSampler


class _SamplerHandle(DistributedSampler[Any], SequentialSampler):
    """What Lightning sees as `loader.sampler`.

    A `DistributedSampler`, so that Lightning does not try to replace it under DDP; a `SequentialSampler`, so that
    `overfit_batches` does not; and the object on which Lightning calls `set_epoch`.
    """

    def __init__(self, batch_sampler: SmartBatchSampler, on_epoch: Callable[[SmartBatchSampler], None] | None) -> None:
        self.batch_sampler = batch_sampler
        self.on_epoch = on_epoch

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
        if self.on_epoch is not None:
            self.on_epoch(self.batch_sampler)

    def __len__(self) -> int:
        return len(self.batch_sampler)


class _LazyIterator(Iterator[Any]):
    """Starts iterating at the first `next()`.

    Lightning calls `iter(loader)` before `set_epoch` and before it restores progress; workers would already fetch
    batches of the wrong epoch.
    """

    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self._start = start
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._start()
        return next(self._iterator)


class SmartBatchLoader(DataLoader[Any]):
    """A `DataLoader` over a `SmartBatchSampler` that works under a plain Lightning Trainer, on one rank or many.

    Args:
        dataset: A map-style data set.
        batch_sampler: Chooses this rank's batches.
        on_epoch: Called when Lightning has set the epoch, before it counts the epoch's batches.
        options: Everything else that `DataLoader` takes. Arguments that exclude a batch sampler are dropped, since
            Lightning builds loaders anew for prediction with them set.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_sampler: SmartBatchSampler,
        on_epoch: Callable[[SmartBatchSampler], None] | None = None,
        **options: Any,
    ) -> None:
        for excluded in ("sampler", "shuffle", "batch_size", "drop_last"):
            options.pop(excluded, None)
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        # Lightning wraps the batch sampler of a prediction loader; torch forbids `self.sampler = ...` by now.
        ours = getattr(batch_sampler, "_batch_sampler", batch_sampler)
        self.__dict__["sampler"] = _SamplerHandle(ours, on_epoch)

    def __iter__(self) -> Any:
        return _LazyIterator(super().__iter__)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module's state is enough, but Lightning warns of loaders that have none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing, as `state_dict`."""
