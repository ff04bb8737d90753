"""Checks before training that the largest batches fit in memory."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from smartbatch_lightning.data.collators import batch_lengths
from smartbatch_lightning.data.loader import SmartBatchLoader
from smartbatch_lightning.errors import UsageError, root_cause_message
from smartbatch_lightning.models.classifier import SequenceClassifier


class MemoryCheck(Callback):
    """Before the first step, runs the planned batches that need the most memory forward and backward.

    These are the epoch's batches with the longest sample, the most tokens and the most samples, over all ranks; often
    they are one and the same. Weights, optimizer, metrics and random state are left unchanged, and memory is reserved
    for the optimizer state, such as AdamW's two moments. Works for a `SequenceClassifier` whose `step` is not
    overridden, on one device or with DDP.

    Args:
        enabled: Whether to run the check.

    Raises:
        ValueError: A batch does not fit; the message gives its shape and what to lower.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Runs the batches."""
        loader = trainer.train_dataloader
        if (
            not self.enabled
            or not isinstance(loader, SmartBatchLoader)
            or not isinstance(pl_module, SequenceClassifier)
            or type(pl_module).step is not SequenceClassifier.step
            or not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        ):
            return
        with _restoring_state(pl_module), _reserving_optimizer_state(trainer):
            for batch in largest_batches(loader):
                _try(trainer, pl_module, loader, batch)


def largest_batches(loader: SmartBatchLoader) -> list[list[int]]:
    """The loader's batches with the longest sample, the most tokens and the most samples."""
    sampler = loader.plan_sampler
    plan, lengths = sampler.plan(), sampler.lengths
    sizes, longest = plan.batch_sizes(), plan.longest(lengths)
    tokens = sampler.spec.tokens(lengths[plan.order], plan.offsets)
    by_length, by_size = longest * (sizes.max() + 1) + sizes, sizes * (longest.max() + 1) + longest
    return [plan[number].tolist() for number in sorted({int(by.argmax()) for by in (by_length, tokens, by_size)})]


def _try(trainer: L.Trainer, module: SequenceClassifier, loader: SmartBatchLoader, samples: list[int]) -> None:
    collated = loader.collate_fn([loader.dataset[sample] for sample in samples])
    if not isinstance(collated, dict) or not {"input_ids", "labels"} <= collated.keys():
        return
    try:
        batch = trainer.strategy.batch_to_device(collated)
        with trainer.precision_plugin.train_step_context():
            loss = module.step(batch, "train")
        loss.backward()  # type: ignore[no-untyped-call]
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not re.search("out of memory|can't allocate memory|bad_alloc", str(error)):
            raise
        lengths = batch_lengths(collated)
        longest = "" if lengths is None else f", the longest of {int(lengths.max())} tokens,"
        raise UsageError(
            f"a batch of {len(samples)} samples{longest} does not fit into memory: its input "
            f"has the shape {tuple(collated['input_ids'].shape)}. {root_cause_message(error)} Lower --data.batch_size, "
            "the token budget or --data.max_length; or set --trainer.precision=bf16-mixed; "
            "--trainer.accumulate_grad_batches makes up for smaller batches."
        ) from error


@contextmanager
def _restoring_state(module: SequenceClassifier) -> Iterator[None]:
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            module.zero_grad(set_to_none=True)
            module.epoch_metrics.start("train")
            if devices:
                torch.cuda.empty_cache()


@contextmanager
def _reserving_optimizer_state(trainer: L.Trainer) -> Iterator[None]:
    """Reserves the memory that the optimizer state will take up from the first step on."""
    held = [
        torch.empty_like(parameter)
        for optimizer in trainer.optimizers
        if not optimizer.state
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
        for _ in range(2 if "betas" in group else bool(group.get("momentum")))
    ]
    yield
    del held
