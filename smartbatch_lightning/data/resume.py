"""What a checkpoint stores about the data, and resuming from it on any number of ranks."""

import hashlib
from typing import Any

import lightning as L
import numpy as np
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from smartbatch_lightning import progress
from smartbatch_lightning.batching import BatchSpec
from smartbatch_lightning.data.sampler import SmartBatchSampler
from smartbatch_lightning.data.tokens import TokenDataset
from smartbatch_lightning.errors import UsageError, join_quoted

_FIELD_DESCRIPTIONS = {"data": "data (texts, labels, tokenizer, tokenization, max_length, truncation or split)"}


def dataset_fingerprint(data: TokenDataset, spec: BatchSpec) -> dict[str, Any]:
    """Everything that an epoch's plan depends on except the number of ranks; a resume is exact if all of it is equal.

    Args:
        data: The training samples.
        spec: The sampler's, with a number as jitter.
    """
    return {"data": data_digest(data), **spec.fingerprint()}


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Rejects a checkpoint made with other data or batching.

    Raises:
        ValueError: The fingerprints differ; the message lists the differences.
    """
    differing = [
        f"{_FIELD_DESCRIPTIONS.get(name, name)} was {saved.get(name)}, now {current.get(name)}"
        for name in {**current, **saved}
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise UsageError(
            f"the checkpoint cannot be resumed exactly: {'; '.join(differing)}. Restore these settings; or set "
            "--data.ignore_fingerprint_mismatch=true to continue at the same step of the new plan; or start from its "
            "weights with SequenceClassifier.load_from_checkpoint."
        )


def data_digest(data: TokenDataset) -> str:
    """Hash of all token ids, rows and labels."""
    digest = hashlib.sha256(data.table.digest.encode())
    for array in (data.rows, data.labels):
        digest.update(np.ascontiguousarray(array).tobytes() if array is not None else b"none")
    return digest.hexdigest()[:16]


def check_data_parallel(trainer: L.Trainer) -> None:
    """Rejects strategies in which some ranks need the same samples, such as tensor parallelism."""
    shares = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size)
    if shares != trainer.world_size:
        raise UsageError(
            f"the strategy divides the samples into {shares} shares for {trainer.world_size} ranks, for tensor "
            f"parallelism, but this data module gives every rank its own samples. Use "
            f"ModelParallelStrategy(data_parallel_size={trainer.world_size}, tensor_parallel_size=1)."
        )


def check_ranks_agree(sets: list[TokenDataset], label_names: list[str] | None, spec: BatchSpec) -> None:
    """Rejects, on every rank, a stage whose ranks differ in data, labels or settings; all ranks must call it.

    Args:
        sets: Data sets of the stage.
        label_names: Names of the classes.
        spec: The limits of a batch.

    Raises:
        ValueError: The ranks differ; the message lists the differences.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    settings = {f"data.{name}": value for name, value in spec.fingerprint().items()}
    record: dict[str, Any] = {"data": [data_digest(data) for data in sets], "label names": label_names, **settings}
    records: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(records, record)
    for rank, other in enumerate(records):
        if differing := [name for name in {**records[0], **other} if records[0].get(name) != other.get(name)]:
            raise UsageError(
                f"rank {rank} and rank 0 differ in {join_quoted(differing)}: "
                + "; ".join(f"{other.get(name)} and {records[0].get(name)}" for name in differing)
                + ". Give every rank the same files, arguments and seed."
            )


def training_state(trainer: L.Trainer, sampler: SmartBatchSampler) -> dict[str, Any]:
    """The training progress, as input for `SmartBatchSampler.load_state_dict`, and whether validation comes next."""
    at = progress.position(trainer)
    state = {"consumed": []} if at.batches is None else sampler.state_dict(at.batches)
    return {**state, "epoch": at.epoch, "validation_due": at.validation_due}


def has_trained(state: dict[str, Any]) -> bool:
    """Whether a checkpoint was written after the first batch; before, plans may change, as in a batch size finder.

    Args:
        state: As returned by `training_state`.
    """
    return bool(state["epoch"] or any(batches for _, batches in state["consumed"]))


def resume_training(trainer: L.Trainer, sampler: SmartBatchSampler, state: dict[str, Any]) -> None:
    """Makes Lightning resume at a checkpoint's progress, in batches per rank of the current number of ranks.

    Args:
        trainer: In `fit`, about to restore its counters.
        sampler: The training sampler.
        state: As returned by `training_state`.
    """
    sampler.load_state_dict(state)
    sampler.set_epoch(state["epoch"])
    length = progress.batches_per_epoch(trainer, len(sampler))
    batches = min(sampler.start_step, length) if state["consumed"] else None
    due = state["validation_due"] or sampler.start_step > length
    progress.rewrite_checkpoint(trainer, progress.Position(state["epoch"], batches, due), length)


def resume_from_lightning_counters(trainer: L.Trainer, sampler: SmartBatchSampler) -> None:
    """Resumes from Lightning's counters if a checkpoint has no state of the data module, with a warning."""
    batches = progress.position(trainer).batches or 0
    rank_zero_warn(
        "The checkpoint has no state of this data module, perhaps because its class was renamed. Resuming after "
        f"{batches} batches of the epoch, which is exact only if data, seed, batching and the number of ranks are the "
        "same as before."
    )
    sampler.load_state_dict({"epoch": sampler.epoch, "consumed": [(sampler.num_replicas, batches)]})
