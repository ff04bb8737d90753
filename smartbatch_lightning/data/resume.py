"""Where training stands, and how Lightning goes on from there.

Lightning keeps how many epochs and batches were trained, in counters that are internal to it (lightning 2.6); the
tests in `tests/test_resume.py` pin what is used of them here.
"""

import hashlib
import math
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR

from smartbatch_lightning.batching import BatchSpec
from smartbatch_lightning.data.sampler import SmartBatchSampler
from smartbatch_lightning.data.tokens import TokenDataset
from smartbatch_lightning.errors import UsageError

_FIELD_DESCRIPTIONS = {"data": "data (texts, labels, tokenizer, max_length or split)"}


def dataset_fingerprint(data: TokenDataset, spec: BatchSpec) -> dict[str, Any]:
    """What an epoch's plan is made from, but for the number of ranks: a resume is exact where all of it is equal.

    Args:
        data: The training samples.
        spec: Of the sampler, its jitter a number.
    """
    digest = hashlib.sha256(data.table.digest.encode())
    for array in (data.rows, data.labels):
        digest.update(np.ascontiguousarray(array).tobytes() if array is not None else b"none")
    return {"data": digest.hexdigest()[:16], **spec.fingerprint()}


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses a checkpoint of other data or batching.

    Raises:
        ValueError: The fingerprints differ; the message names in what.
    """
    differing = [
        f"{_FIELD_DESCRIPTIONS.get(name, name)} was {saved.get(name)}, now {current.get(name)}"
        for name in {**current, **saved}
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise UsageError(
            f"the checkpoint cannot be resumed exactly: {'; '.join(differing)}. Set these as they were; or set "
            "--data.ignore_fingerprint_mismatch=true to go on at the same step of the new plan; or start from its "
            "weights with SequenceClassifier.load_from_checkpoint."
        )


def training_progress(trainer: L.Trainer, sampler: SmartBatchSampler) -> dict[str, Any]:
    """Where training stands, as `SmartBatchSampler.load_state_dict` takes it.

    Counted by what the optimizer has seen, not by what workers fetched: batches whose gradients were still being
    accumulated are trained again.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if epochs.started <= epochs.processed:  # between two epochs
        return {"epoch": epochs.processed, "consumed": []}
    steps = batches.processed
    if steps < trainer.num_training_batches:
        steps -= steps % trainer.accumulate_grad_batches
    return {**sampler.state_dict(steps), "epoch": epochs.processed}


def sync_loop_progress(trainer: L.Trainer, sampler: SmartBatchSampler, *, resumed: bool) -> None:
    """Makes Lightning count the epoch's batches from where the sampler goes on.

    Called when Lightning has restored its progress and set the epoch, and has not begun to count. There is something
    to do after a resume on another number of ranks, where a step is another share of the epoch, and after one from
    the middle of an accumulation.

    Args:
        trainer: In `fit`.
        sampler: The training loader's.
        resumed: The data module has found its state in the checkpoint.
    """
    loop = trainer.fit_loop
    progress: Any = loop.epoch_loop.batch_progress
    epochs: Any = loop.epoch_progress
    if (loop.restarted_mid_epoch or loop.restarted_on_epoch_end) and epochs.current.started <= epochs.current.processed:
        # After a checkpoint of an epoch's last batch, Lightning never counts the next one as started; a checkpoint of
        # that one would then be taken for one between two epochs.
        epochs.increment_ready()
        epochs.increment_started()
    # a checkpoint of an exception leaves these one ahead for ever, and Lightning repeats a batch at the next resume
    progress.total.ready = progress.total.started = progress.total.processed
    if not resumed and loop.restarted_mid_epoch:
        rank_zero_warn(
            "The checkpoint has no state of this data module, perhaps because its class was renamed. Going on after "
            f"{progress.current.processed} batches of the epoch, which is exact if data, seed, batching and the number "
            "of ranks are as before."
        )
        sampler.load_state_dict(
            {"epoch": sampler.epoch, "consumed": [(sampler.num_replicas, progress.current.processed)]}
        )
    if not sampler.consumed:
        return
    shift = sampler.start_step - progress.current.processed
    for counter in ("ready", "started", "processed", "completed"):
        setattr(progress.current, counter, getattr(progress.current, counter) + shift)
    if any(num_replicas != sampler.num_replicas for num_replicas, _ in sampler.consumed) and trainer.max_steps == -1:
        _sync_lr_schedulers(trainer, sampler)


def _sync_lr_schedulers(trainer: L.Trainer, sampler: SmartBatchSampler) -> None:
    """Puts schedules by the step at the same share of training as before, since an epoch now has other steps."""
    window = trainer.accumulate_grad_batches
    steps = sampler.epoch * math.ceil(len(sampler) / window) + sampler.start_step // window
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step" and isinstance(config.scheduler, LambdaLR):
            config.scheduler.last_epoch = steps - 1
            config.scheduler.step()
