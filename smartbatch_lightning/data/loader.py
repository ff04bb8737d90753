"""A DataLoader that works under Lightning, with workarounds for what Lightning does to data loaders.

Each workaround is needed with lightning 2.6 and has a test that fails without it.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from time import perf_counter
from typing import Any, cast

import torch
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset

from smartbatch_lightning.data.sampler import SmartBatchSampler
from smartbatch_lightning.errors import UsageError, join_quoted

_DECIDED_BY_BATCHES = {"batch_sampler", "batch_size", "sampler", "shuffle", "drop_last"}


class _LightningSamplerAdapter(DistributedSampler[Any], SequentialSampler):
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

    Lightning calls `iter(loader)` before `set_epoch` and before it restores progress, so workers would start fetching
    batches of the wrong epoch.
    """

    def __init__(self, loader: "SmartBatchLoader") -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None
        self._num_batches = 0

    def __next__(self) -> Any:
        start = perf_counter()
        try:
            if self._iterator is None:
                self._iterator = self._loader.batches()
            batch = next(self._iterator)
            self._loader.num_yielded += 1
            self._drop_batch_indices()
            return batch
        finally:
            self._loader.data_wait_seconds += perf_counter() - start

    def _drop_batch_indices(self) -> None:
        """Deletes the sample indices that Lightning keeps for predicted batches, except those of the newest.

        Lightning uses only the newest, but would keep all of them, as Python numbers.
        """
        if isinstance(self._loader.batch_sampler, _IndexBatchSamplerWrapper):
            if self._num_batches:
                self._loader.batch_sampler.seen_batch_indices[self._num_batches - 1] = []
            self._num_batches += 1


def _attach_loss_weights(batches: Iterator[Any], weights: Iterable[float]) -> Iterator[Any]:
    for batch, weight in zip(batches, weights, strict=False):
        if isinstance(batch, MutableMapping):
            batch["loss_weight"] = weight
        yield batch


class SmartBatchLoader(DataLoader[Any]):
    """A `DataLoader` over a `SmartBatchSampler` that works under a plain Lightning Trainer, on one rank or many.

    Args:
        dataset: A map-style data set.
        batch_sampler: Chooses this rank's batches.
        on_epoch: Called after Lightning has set the epoch, before its first batch. Given by a data module, which then
            stores the training progress; without it, the loader does so itself.
        loss_weights: Called at the start of an epoch, returns a weight for each batch to come; a batch that is a
            dictionary then gets its weight as `loss_weight`, a float.
        options: Other arguments of `DataLoader`. Those that exclude a batch sampler are dropped, since Lightning sets
            them when it recreates loaders for prediction.

    Attributes:
        plan_sampler: The batch sampler, unwrapped if Lightning has wrapped it.
        data_wait_seconds: Time spent waiting for batches, over all epochs.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_sampler: SmartBatchSampler | _IndexBatchSamplerWrapper,
        on_epoch: Callable[[SmartBatchSampler], None] | None = None,
        loss_weights: Callable[[SmartBatchSampler], Iterable[float]] | None = None,
        **options: Any,
    ) -> None:
        for excluded in _DECIDED_BY_BATCHES:
            options.pop(excluded, None)
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        # Lightning wraps the batch sampler of a prediction loader; torch no longer allows `self.sampler = ...`.
        if isinstance(batch_sampler, _IndexBatchSamplerWrapper):
            batch_sampler = cast(SmartBatchSampler, batch_sampler._batch_sampler)
        self.plan_sampler = batch_sampler
        self.__dict__["sampler"] = _LightningSamplerAdapter(self.plan_sampler, on_epoch)
        self.loss_weights = loss_weights
        self.has_state = on_epoch is None
        self.num_yielded = 0
        self.data_wait_seconds = 0.0

    def __iter__(self) -> Any:
        return _LazyIterator(self)

    def batches(self) -> Iterator[Any]:
        """Starts iterating over the batches of an epoch."""
        self.num_yielded = self.plan_sampler.start_step
        batches: Iterator[Any] = super().__iter__()
        if self.loss_weights is None:
            return batches
        return _attach_loss_weights(batches, self.loss_weights(self.plan_sampler))

    def state_dict(self) -> dict[str, Any]:
        """The progress of iteration; empty if a data module stores it."""
        ranks = self.plan_sampler.num_replicas
        return {"epoch": self.plan_sampler.epoch, "consumed": [(ranks, self.num_yielded)]} if self.has_state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a state.

        Raises:
            ValueError: The number of ranks has changed.
        """
        ranks = self.plan_sampler.num_replicas
        if state and state["consumed"][0][0] != ranks:
            raise UsageError(
                f"the checkpoint was written on {state['consumed'][0][0]} ranks, but now there are {ranks}. To resume "
                "on any number of ranks, pass the data module to the Trainer, datamodule=..., instead of its loaders."
            )
        if state:
            self.plan_sampler.load_state_dict(state)


def unpatch_loaders() -> None:
    """Restores the methods of `DataLoader` that Lightning replaces while a hook creates loaders.

    After an exception in the hook, Lightning leaves its replacements behind, and patches those again in the next run.
    """
    kinds: list[Any] = [DataLoader]
    for kind in kinds:
        kinds += kind.__subclasses__()
        for method in ("__setattr__", "__delattr__", "__init__"):
            if (replaced := f"__old{method}") in vars(kind):
                setattr(kind, method, vars(kind)[replaced])
                delattr(kind, replaced)


def check_loader_kwargs(options: dict[str, Any], num_workers: int) -> dict[str, Any]:
    """Returns the options, unless the batch plan sets one or `DataLoader` does not take it.

    Raises:
        ValueError: There is such an option.
    """
    if fixed := _DECIDED_BY_BATCHES & set(options):
        raise UsageError(
            f"loader_kwargs has {join_quoted(sorted(fixed))}, which the batch plan sets. Use --data.batch_size and "
            "--data.batching, or override configure_sampler."
        )
    try:
        loader: DataLoader[Any] = DataLoader(TensorDataset(torch.zeros(1)), **{"num_workers": num_workers, **options})
        if loader.timeout and not loader.num_workers:  # torch would notice too late, when iterating
            raise ValueError("timeout needs num_workers of 1 or more")
    except (TypeError, ValueError) as error:
        raise UsageError(f"loader_kwargs is {options}, which a DataLoader does not take: {error}") from error
    return options
