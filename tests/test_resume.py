"""Interrupted runs: what follows is what would have followed, to the last bit."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import Seen, assert_same, diaries, finish, kill_after, slow, start, trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from run_to_be_killed import Dropped

from smartbatch_lightning import (
    BatchSpec,
    SmartBatchDataModule,
    SmartBatchSampler,
    TrainingMonitor,
    plan_epoch,
    storage,
)
from smartbatch_lightning.callbacks.checkpoint_preflight import CheckpointPreflight
from smartbatch_lightning.callbacks.stop_on_signal import StopOnSignal
from smartbatch_lightning.checkpointing import AtomicCheckpointIO
from smartbatch_lightning.storage import lock_folder

BATCHINGS = ["smart", "tutorial", "random"]
BUDGET = {"max_tokens_per_batch": 80}
STEPS = 7  # batches in an epoch of the short runs below


class InterruptionError(Exception):
    """Stands for whatever ends a run."""


class SaveAndStop(Callback):
    """Saves after a batch, then ends the run."""

    def __init__(self, path: Path, epoch: int, batch: int) -> None:
        self.path, self.at = path, (epoch, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            trainer.save_checkpoint(self.path)
            raise InterruptionError


def data(**options) -> SmartBatchDataModule:
    return SmartBatchDataModule(
        **{"validation_split": 0.9, "max_length": 16, "batch_size": 32, "seed": 5, "jitter": 1.0, **options}
    )


def train(
    folder: Path, *callbacks: Callback, ckpt_path=None, module=None, torch_seed=0, **options
) -> tuple[list, dict]:
    """Batches by epoch, and the final weights."""
    seen, model = Seen(), Dropped(learning_rate=1e-3)
    run = trainer(folder, **{"max_epochs": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0, **options})
    run.callbacks += [seen, *callbacks]
    seen.epochs = [[] for _ in range(run.max_epochs)]
    seen.on_train_epoch_start = lambda *_: None
    seen.on_train_batch_end = lambda t, m, o, batch, i: seen.epochs[t.current_epoch].append(
        tuple(batch["index"].tolist())
    )
    torch.manual_seed(torch_seed)
    try:
        run.fit(model, module or data(), ckpt_path=ckpt_path)
    except InterruptionError:
        return seen.epochs, {}
    return seen.epochs, model.state_dict()


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_resuming_yields_exactly_the_remaining_batches(batching: str, num_replicas: int, step: int) -> None:
    lengths = [5, 9, 3] * 50
    for rank in range(num_replicas):
        ranks = {"num_replicas": num_replicas, "rank": rank}
        whole, rest = (SmartBatchSampler(lengths, BatchSpec(batching, 4), **ranks) for _ in range(2))
        rest.load_state_dict({"epoch": 2, "consumed": [(num_replicas, step)]})
        for epoch in (2, 3):
            whole.set_epoch(epoch)
            rest.set_epoch(epoch)
            assert list(rest) == list(whole)[step if epoch == 2 else 0 :]
            assert len(rest) == len(whole)
        rest.set_epoch(2)
        assert rest.start_step == step


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("runs", [[(2, 5)], [(1, 9)], [(2, 5), (4, 2)], [(3, 4), (3, 1), (1, 6)], [(4, 0), (2, 3)]])
@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize(
    "size", [{"batch_size": 4}, BUDGET, {**BUDGET, "padding": "packed"}], ids=["4", "budget", "packed"]
)
def test_ranks_of_any_number_train_what_is_left_of_the_epoch_once(size, batching, runs, num_replicas) -> None:
    lengths = [5, 9, 3, 12, 4, 30] * 25
    trained: list[int] = []
    for number, (ranks, steps) in enumerate(runs):
        for rank in range(ranks):
            sampler = SmartBatchSampler(lengths, BatchSpec(batching, **size), num_replicas=ranks, rank=rank)
            sampler.load_state_dict({"epoch": 0, "consumed": runs[:number]})
            trained += [sample for batch in list(sampler)[:steps] for sample in batch]
    counts = set()
    for rank in range(num_replicas):
        sampler = SmartBatchSampler(lengths, BatchSpec(batching, **size), num_replicas=num_replicas, rank=rank)
        sampler.load_state_dict({"epoch": 0, "consumed": runs})
        batches = list(sampler)
        counts.add(len(batches))
        assert sampler.start_step + len(batches) == len(sampler)
        trained += [sample for batch in batches for sample in batch]
    assert len(counts) == 1
    assert sorted(trained) == list(range(150))


def test_an_epoch_that_is_all_trained_leaves_nothing_to_any_number_of_ranks() -> None:
    sampler = SmartBatchSampler([5] * 40, BatchSpec(batch_size=4), num_replicas=2, rank=0)
    sampler.load_state_dict({"epoch": 0, "consumed": [(1, 10)]})
    assert list(sampler) == []
    assert sampler.start_step == len(sampler) == 5


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize("steps", [STEPS - 2, slow(STEPS), slow(STEPS + 3)])
def test_the_rest_of_an_epoch_that_max_steps_cut_short_is_trained_by_a_run_with_more(
    steps: int, tmp_path: Path
) -> None:
    whole, _ = train(tmp_path / "whole")
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    before, _ = train(tmp_path, TrainingMonitor(), saver, max_steps=steps)
    monitor = TrainingMonitor()
    after, _ = train(tmp_path, monitor, ckpt_path=tmp_path / f"step={steps}.ckpt")
    assert [a + b for a, b in zip(before, after, strict=True)] == whole
    assert [counts.samples for counts, _ in monitor.epochs] == [sum(map(len, epoch)) for epoch in whole]


@pytest.mark.parametrize(
    ("epoch", "batch", "accumulate"),
    [(1, 3, 2), slow(0, 1, 1), slow(0, STEPS - 1, 2)]
    + [slow(*at, 1) for at in ((0, STEPS - 1), (1, 3), (2, 5))]
    + [slow(*at, 2) for at in ((0, 1), (2, 5))],
)
def test_a_run_resumed_after_an_optimizer_step_ends_with_the_same_weights(
    epoch, batch, accumulate, tmp_path: Path
) -> None:
    options = {"accumulate_grad_batches": accumulate}
    whole, weights = train(tmp_path, **options)
    assert [len(batches) for batches in whole] == [STEPS] * 3
    before, _ = train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", epoch, batch), **options)
    after, resumed = train(tmp_path, ckpt_path=tmp_path / "a.ckpt", **options)
    assert [a + b for a, b in zip(before, after, strict=True)] == whole
    assert_same(resumed, weights)


def test_a_run_on_the_same_batches_in_every_epoch_is_resumed_exactly(tmp_path: Path) -> None:
    options = {"overfit_batches": 3}
    whole, weights = train(tmp_path, module=data(jitter="auto"), **options)
    assert [len(batches) for batches in whole] == [3] * 3
    train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 1, 1), module=data(jitter="auto"), **options)
    after, resumed = train(tmp_path, ckpt_path=tmp_path / "a.ckpt", module=data(jitter="auto"), **options)
    assert after == [[], whole[1][2:], whole[2]]
    assert_same(resumed, weights)


def test_batches_whose_gradients_were_being_accumulated_are_trained_again(tmp_path: Path) -> None:
    whole, weights = train(tmp_path, accumulate_grad_batches=3)
    train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 1, 4), accumulate_grad_batches=3)
    after, resumed = train(tmp_path, ckpt_path=tmp_path / "a.ckpt", accumulate_grad_batches=3)
    assert after[1] == whole[1][3:]
    assert_same(resumed, weights)


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_train_steps": STEPS},
        slow({"every_n_epochs": 1, "monitor": "val_loss"}),
        slow({"every_n_epochs": 1}),
        slow({"every_n_epochs": 1, "save_on_train_epoch_end": True}),
        slow({"every_n_train_steps": 3}),
    ],
)
@pytest.mark.parametrize("val_check_interval", [1.0, pytest.param(3, marks=pytest.mark.slow)])
def test_every_kind_of_checkpoint_is_resumed_exactly(options: dict, val_check_interval, tmp_path: Path) -> None:
    checks = {"val_check_interval": val_check_interval, "enable_checkpointing": True}
    whole, weights = train(tmp_path, ModelCheckpoint(tmp_path / "all", save_top_k=-1, **options), **checks)
    checkpoints = sorted((tmp_path / "all").glob("*.ckpt"))
    assert len(checkpoints) >= 3
    for checkpoint in checkpoints:
        state = torch.load(checkpoint, weights_only=True)["SmartBatchDataModule"]
        saver = ModelCheckpoint(tmp_path / "again", save_top_k=-1, **options)
        after, resumed = train(tmp_path, saver, ckpt_path=checkpoint, **checks)
        done = sum(steps for _, steps in state["consumed"])
        expected = [[]] * state["epoch"] + [
            epoch[done if n == 0 else 0 :] for n, epoch in enumerate(whole[state["epoch"] :])
        ]
        assert after == expected, checkpoint.name
        if any(after):
            assert_same(resumed, weights)


@pytest.mark.slow
@pytest.mark.parametrize("again", [(1, 2), (2, 3)])
@pytest.mark.parametrize("first", ["last batch", "epoch end"])
def test_a_run_resumed_at_the_end_of_an_epoch_can_be_resumed_again(first: str, again, tmp_path: Path) -> None:
    class EpochEnd(SaveAndStop):
        def on_train_batch_end(self, *args) -> None: ...

        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.save_checkpoint(self.path)
            raise InterruptionError

    whole, weights = train(tmp_path)
    train(tmp_path, (EpochEnd if first == "epoch end" else SaveAndStop)(tmp_path / "a.ckpt", 0, STEPS - 1))
    seconds, _ = train(tmp_path, SaveAndStop(tmp_path / "b.ckpt", *again), ckpt_path=tmp_path / "a.ckpt")
    after, resumed = train(tmp_path, ckpt_path=tmp_path / "b.ckpt")
    epoch, batch = again
    assert seconds[0] == []
    assert after[epoch] == whole[epoch][batch + 1 :]
    assert after[epoch + 1 :] == whole[epoch + 1 :]
    assert_same(resumed, weights)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint available")
def test_a_run_that_failed_goes_on_and_can_fail_again(tmp_path: Path) -> None:
    """Lightning's checkpoint of an exception leaves counters ahead, and would repeat a batch at the second resume."""

    class FailAt(Callback):
        def __init__(self, epoch: int, batch: int) -> None:
            self.at = (epoch, batch)

        def on_before_zero_grad(self, trainer, *_) -> None:
            if (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx) == self.at:
                raise InterruptionError

    whole, weights = train(tmp_path)
    rescue = {"enable_checkpointing": True}
    first, _ = train(tmp_path, OnExceptionCheckpoint(tmp_path, "1"), FailAt(0, 4), **rescue)
    stop = SaveAndStop(tmp_path / "2.ckpt", 1, 2)
    second, _ = train(tmp_path, stop, ckpt_path=tmp_path / "1.ckpt", **rescue)
    third, resumed = train(tmp_path, ckpt_path=tmp_path / "2.ckpt", **rescue)
    assert [a + b + c for a, b, c in zip(first, second, third, strict=True)] == whole
    assert_same(resumed, weights)


@pytest.mark.slow
def test_a_run_without_a_seed_is_torchs_and_goes_on_as_itself_under_another(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    whole = train(tmp_path, module=data(seed=None), torch_seed=1)
    again = train(tmp_path, module=data(seed=None), torch_seed=1)
    assert whole[0] == again[0]
    assert whole[0] != train(tmp_path, module=data(seed=None), torch_seed=2)[0]
    stopped, _ = train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 1, 3), module=data(seed=None), torch_seed=1)
    resumed, weights = train(tmp_path, ckpt_path=tmp_path / "a.ckpt", module=data(seed=None), torch_seed=2)
    assert [a + b for a, b in zip(stopped, resumed, strict=True)] == whole[0]
    assert_same(weights, whole[1])


def test_what_was_set_aside_without_a_seed_is_what_the_checkpoint_is_validated_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    first, second = data(seed=None), data(seed=None)
    train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 1, 3), module=first, torch_seed=1)
    torch.manual_seed(2)
    run = trainer(tmp_path, limit_val_batches=1)
    run.validate(Dropped(), second, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert second.validation_data[0].rows.tolist() == first.validation_data[0].rows.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ckpt_path", "loaded"])
def test_samples_that_a_checkpoint_may_have_been_trained_on_are_not_validated_on(how: str, tmp_path: Path) -> None:
    first = data()
    train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 1, 3), module=first)
    model = Dropped() if how == "ckpt_path" else Dropped.load_from_checkpoint(tmp_path / "a.ckpt")
    options = {"ckpt_path": tmp_path / "a.ckpt"} if how == "ckpt_path" else {}

    def validated(**changed) -> list[int]:
        module = data(**changed)
        trainer(tmp_path, limit_val_batches=1).validate(model, module, **options, verbose=False)
        return module.validation_data[0].rows.tolist()

    assert validated() == first.validation_data[0].rows.tolist()
    for changed in ({"seed": 6}, {"max_length": 12}, {"validation_split": 0.5}):
        with pytest.raises(
            ValueError, match="which may have been trained on them. Use its config, .* seed, 5; or name"
        ):
            validated(**changed)
    assert len(validated(seed=6, validation_split="test")) == len(first.splits["test"])


def test_a_second_data_module_without_a_seed_sets_the_same_samples_aside_in_the_same_process(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    first, second = data(seed=None), data(seed=None)
    train(tmp_path, module=first, max_epochs=1)
    trainer(tmp_path, limit_val_batches=1).validate(Dropped(), second, verbose=False)
    assert second.validation_data[0].rows.tolist() == first.validation_data[0].rows.tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.parametrize("at", [(2, 3), slow((1, 3)), slow((2, 0))])
def test_weights_that_are_averaged_over_epochs_are_resumed_in_the_middle_of_one(at, tmp_path: Path) -> None:
    def averaging() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(5e-4, swa_epoch_start=2, annealing_epochs=3)

    _, whole = train(tmp_path, averaging(), max_epochs=4)
    train(tmp_path, averaging(), SaveAndStop(tmp_path / "a.ckpt", *at), max_epochs=4)
    _, resumed = train(tmp_path, averaging(), ckpt_path=tmp_path / "a.ckpt", max_epochs=4)
    assert_same(resumed, whole)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_the_table_of_a_run_that_was_stopped_within_an_epoch_is_the_same_after_a_restart(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        stopping = EarlyStopping("val_loss", min_delta=100.0, patience=1)
        return [TrainingMonitor(), stopping, ModelCheckpoint(tmp_path, save_last=True)]

    first, again = callbacks(), callbacks()
    trained, _ = train(tmp_path, *first, val_check_interval=3, max_epochs=3)
    assert [len(epoch) for epoch in trained] == [6, 0, 0]
    train(tmp_path, *again, ckpt_path=tmp_path / "last.ckpt", val_check_interval=3, max_epochs=3)
    assert [counts.samples for counts, _ in again[0].epochs] == [sum(map(len, trained[0]))]


@pytest.mark.slow
def test_early_stopping_without_patience_that_has_not_stopped_yet_goes_on_after_a_resume(tmp_path: Path) -> None:
    class Improves(Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            trainer.callback_metrics["better"] = torch.tensor(float(trainer.current_epoch))

    def callbacks() -> list[Callback]:
        return [Improves(), EarlyStopping("better", mode="max", patience=0), ModelCheckpoint(tmp_path, save_last=True)]

    train(tmp_path, *callbacks(), max_epochs=2)
    resumed, _ = train(tmp_path, *callbacks(), ckpt_path=tmp_path / "last.ckpt", max_epochs=3)
    assert [len(epoch) for epoch in resumed] == [0, 0, STEPS]


def test_a_checkpoint_of_weights_alone_is_refused_where_training_is_to_go_on(tmp_path: Path) -> None:
    train(tmp_path, ModelCheckpoint(tmp_path, "weights", save_weights_only=True), max_epochs=1)
    with pytest.raises(ValueError, match="the checkpoint has only weights, as written with save_weights_only=True"):
        train(tmp_path, ckpt_path=tmp_path / "weights.ckpt", max_epochs=2)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_run_that_was_stopped_early_trains_no_further_when_it_is_started_again(tmp_path: Path) -> None:
    def stopping() -> list[Callback]:
        saver = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss", save_last=True)
        return [EarlyStopping("val_loss", min_delta=9.0, patience=1), saver]

    seen, weights = train(tmp_path, *stopping(), max_epochs=5)
    assert [len(epoch) for epoch in seen] == [STEPS, STEPS, 0, 0, 0]
    last = tmp_path / "checkpoints" / "last.ckpt"
    again, resumed = train(tmp_path, *stopping(), ckpt_path=last, max_epochs=5)
    assert not any(again)
    assert_same(resumed, weights)
    seen, _ = train(tmp_path, ckpt_path=last, max_epochs=3)
    assert [len(epoch) for epoch in seen] == [0, 0, STEPS]


@pytest.mark.slow
def test_two_runs_do_not_write_to_one_folder_of_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_SECONDS_BETWEEN_MESSAGES", 0.1)
    monkeypatch.setattr(storage, "_SECONDS_TO_END", 0.2)
    savers = {"enable_checkpointing": True}
    first = lock_folder(tmp_path / "checkpoints", "")
    with pytest.raises(ValueError, match="another process is writing to .*checkpoints. Wait until it ends. Give Model"):
        train(tmp_path, CheckpointPreflight(), ModelCheckpoint(tmp_path / "checkpoints"), **savers)
    first.release()
    for _ in range(2):  # which gives it back when it ends, whether well or not
        train(tmp_path, CheckpointPreflight(), ModelCheckpoint(tmp_path / "checkpoints"), **savers, max_epochs=1)
        stop = SaveAndStop(tmp_path / "a.ckpt", 0, 1)
        train(tmp_path, CheckpointPreflight(), ModelCheckpoint(tmp_path / "checkpoints"), stop, **savers)


@pytest.mark.slow
def test_workers_change_nothing_on_resume(tmp_path: Path) -> None:
    whole, weights = train(tmp_path)
    train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 1, 2), module=data(num_workers=2))
    after, resumed = train(tmp_path, ckpt_path=tmp_path / "a.ckpt", module=data(num_workers=1))
    assert after[1] == whole[1][3:]
    assert_same(resumed, weights)


@pytest.mark.slow
def test_reloading_the_loader_every_epoch_changes_nothing_on_resume(tmp_path: Path) -> None:
    options = {"reload_dataloaders_every_n_epochs": 1}
    whole, weights = train(tmp_path, **options)
    train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 1, 2), **options)
    after, resumed = train(tmp_path, ckpt_path=tmp_path / "a.ckpt", **options)
    assert after == [[], whole[1][3:], whole[2]]
    assert_same(resumed, weights)


@pytest.mark.slow
def test_a_renamed_data_module_goes_on_by_lightnings_count_with_a_warning(tmp_path: Path) -> None:
    class Renamed(SmartBatchDataModule):
        pass

    whole, weights = train(tmp_path)
    train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 1, 2))
    renamed = Renamed(validation_split=0.9, max_length=16, batch_size=32, seed=5, jitter=1.0)
    with pytest.warns(UserWarning, match="no state of this data module.*Resuming after 3 batches of the epoch"):
        after, resumed = train(tmp_path, ckpt_path=tmp_path / "a.ckpt", module=renamed)
    assert after == [[], whole[1][3:], whole[2]]
    assert_same(resumed, weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 16}, "batch_size was 32, now 16"),
        slow({"seed": 6}, r"data \(.*\) was .*seed was 5, now 6"),
        slow({"batching": "random"}, "batching was smart, now random"),
        slow({"max_tokens_per_batch": 512}, "max_tokens_per_batch was None, now 512"),
        slow({"jitter": 2.0}, "jitter was 1.0, now 2.0"),
        slow(
            {"max_length": 17}, r"data \(texts, labels, tokenizer, tokenization, max_length, truncation or split\) was"
        ),
    ],
)
def test_a_checkpoint_of_other_data_seed_or_batching_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 0, 2))
    with pytest.raises(
        ValueError,
        match=f"cannot be resumed exactly: {message}.*ignore_fingerprint_mismatch=true.*load_from_checkpoint",
    ):
        train(tmp_path, ckpt_path=tmp_path / "a.ckpt", module=data(**options))
    after, _ = train(tmp_path, ckpt_path=tmp_path / "a.ckpt", module=data(**options, ignore_fingerprint_mismatch=True))
    assert len(after[0]) == (STEPS if options != {"batch_size": 16} else 13) - 3


def test_a_checkpoint_of_other_texts_of_the_same_lengths_and_labels_is_refused(tmp_path: Path) -> None:
    class Given(SmartBatchDataModule):
        first = 10

        def tokenize(self, dataset):
            return [[2, self.first + row % 7, *[9] * (row % 11), 3] for row in range(len(dataset))]

    options = {"validation_split": 0.9, "batch_size": 32, "seed": 5, "jitter": 1.0}
    train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 0, 2), module=Given(**options))
    train(tmp_path, ckpt_path=tmp_path / "a.ckpt", module=Given(**options))
    other = Given(**options)
    other.first = 11
    with pytest.raises(
        ValueError,
        match=r"cannot be resumed exactly: data \(texts, .*\) was \w+, now \w+\. Restore these settings; or set",
    ):
        train(tmp_path, ckpt_path=tmp_path / "a.ckpt", module=other)


def test_a_checkpoint_that_is_cut_short_says_so_and_names_the_others(tmp_path: Path) -> None:
    train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 0, 2))
    (tmp_path / "b.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:5000])
    with pytest.raises(
        ValueError, match=r"b.ckpt is damaged or not a checkpoint: .*its folder has \['a.ckpt', 'b.ckpt'\]"
    ):
        train(tmp_path, ckpt_path=tmp_path / "b.ckpt", plugins=[AtomicCheckpointIO()])


def test_a_checkpoint_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    saver = ModelCheckpoint(tmp_path / "file" / "checkpoints")
    with pytest.raises(ValueError, match="file/checkpoints cannot be written: .*another dirpath"):
        train(tmp_path, CheckpointPreflight(), saver, enable_checkpointing=True)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "step": 1}, tmp_path / "a.ckpt")
    with pytest.raises(Exception, match="pickle|local object"):
        AtomicCheckpointIO().save_checkpoint({"step": lambda: 2}, tmp_path / "a.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt") == {"state_dict": {}, "step": 1}


def test_loaders_that_are_handed_to_the_trainer_by_hand_are_resumed_exactly(tmp_path: Path) -> None:
    def by_hand(*callbacks: Callback, ckpt_path=None) -> list:
        module, seen = data(), Seen()
        module.prepare_data()
        module.setup("fit")
        run = trainer(tmp_path, max_epochs=3)
        seen.epochs = [[] for _ in range(3)]
        seen.on_train_epoch_start = lambda *_: None
        seen.on_train_batch_end = lambda t, m, o, batch, i: seen.epochs[t.current_epoch].append(
            tuple(batch["index"].tolist())
        )
        run.callbacks += [seen, *callbacks]
        with suppress(InterruptionError):
            run.fit(Dropped(num_labels=2), module.train_dataloader(), ckpt_path=ckpt_path)
        return seen.epochs

    whole = by_hand()
    assert sorted(row for batch in whole[1] for row in batch) == sorted(row for batch in whole[0] for row in batch)
    before = by_hand(SaveAndStop(tmp_path / "a.ckpt", 1, 2))
    after = by_hand(ckpt_path=tmp_path / "a.ckpt")
    assert [a + b for a, b in zip(before, after, strict=True)] == whole


class Validations(Callback):
    """Writes down after which optimizer steps validation was over, and what was measured."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []
        self.epoch_ends = 0

    def on_validation_end(self, trainer, pl_module) -> None:
        self.seen.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.epoch_ends += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "interval"),
    [((1, 5), 3), ((0, STEPS - 1), 1.0), ((2, STEPS - 1), 3)]
    + [(at, 1.0) for at in ((0, 2), (1, 5), (2, STEPS - 1))]
    + [(at, 3) for at in ((0, 2), (0, STEPS - 1))],
)
def test_a_validation_that_was_due_when_the_run_ended_is_made_up_for(at, interval, tmp_path: Path) -> None:
    options = {"val_check_interval": interval}
    whole, before, after = Validations(), Validations(), Validations()
    train(tmp_path, whole, **options)
    train(tmp_path, before, SaveAndStop(tmp_path / "a.ckpt", *at), **options)
    train(tmp_path, after, ckpt_path=tmp_path / "a.ckpt", **options)
    assert before.seen + after.seen == whole.seen
    assert before.epoch_ends + after.epoch_ends == whole.epoch_ends == 3


@pytest.mark.slow
def test_what_is_logged_after_a_validation_that_is_made_up_for_has_the_same_steps(tmp_path: Path) -> None:
    def run(*callbacks: Callback, **where) -> dict[tuple[str, int], float]:
        logger = CSVLogger(tmp_path)
        train(tmp_path, *callbacks, val_check_interval=3, logger=logger, log_every_n_steps=1, **where)
        table = pd.read_csv(Path(logger.log_dir) / "metrics.csv").set_index("step")
        return {
            (name, step): value
            for name in ("val_loss", "train_loss_step")
            for step, value in table[name].dropna().items()
        }

    whole = run()
    before = run(SaveAndStop(tmp_path / "a.ckpt", 1, 5))
    lost = {("train_loss_step", 12)}  # of the step at which the run ended, before Lightning logs it
    expected = {key: value for key, value in whole.items() if key not in lost}
    assert before | run(ckpt_path=tmp_path / "a.ckpt") == expected


@pytest.mark.slow
def test_validations_that_are_counted_over_epochs_fall_on_the_same_steps_after_a_save_in_an_accumulation(
    tmp_path: Path,
) -> None:
    options = {"val_check_interval": 5, "check_val_every_n_epoch": None, "accumulate_grad_batches": 3}
    whole, before, after = Validations(), Validations(), Validations()
    train(tmp_path, whole, **options)
    train(tmp_path, before, SaveAndStop(tmp_path / "a.ckpt", 1, 4), **options)
    train(tmp_path, after, ckpt_path=tmp_path / "a.ckpt", **options)
    assert before.seen + after.seen == whole.seen


def test_ranks_that_are_more_than_the_samples_left_train_each_of_these_with_the_weight_of_one() -> None:
    weights, trained = [], []
    for rank in range(4):
        sampler = SmartBatchSampler([5] * 9, BatchSpec(batch_size=1), num_replicas=4, rank=rank)
        sampler.load_state_dict({"epoch": 0, "consumed": [(1, 7)]})
        [batch] = list(sampler)
        trained += batch
        weights.append(next(sampler.loss_weights()))
    assert len(set(trained)) == 2
    assert weights == [2.0, 2.0, 0.0, 0.0]  # whose mean over the ranks is the mean over the two samples


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_the_signal_on_which_a_job_is_requeued_stops_the_run(name: str, tmp_path: Path) -> None:
    class Send(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 2:
                os.kill(os.getpid(), signal.Signals[name])

    with pytest.raises(SystemExit) as stop:
        train(tmp_path, StopOnSignal(requeue_signal=name), Send())
    assert stop.value.code == 128 + signal.Signals[name]


# --- processes, killed ---


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    """Uninterrupted runs, each made once."""
    made: dict[tuple, Path] = {}

    def get(devices: int, accumulate: int, **size) -> Path:
        key = (devices, accumulate, *size.values())
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            finish(start(folder, devices=devices, accumulate=accumulate, **size), folder)
            made[key] = folder
        return made[key]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("batches", "workers", "accumulate"),
    [*product(["eight"], [0, 2], [1, 2]), ("packed", 0, 2), ("packed", 2, 1), ("lazy", 2, 1)],
)
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(
    batches, devices, workers, accumulate, reference, tmp_path
):
    packed = {"padding": "packed", "batching": "random", "budget": 160}
    size = {"packed": packed, "lazy": {"tokenization": "lazy"}}.get(batches, {})
    whole = reference(devices, accumulate, **size)
    rng = random.Random(f"{devices} {workers} {accumulate}")
    folder, epoch_batches = tmp_path / "run", len(diaries(whole)[0]) // 3
    options = {"devices": devices, "workers": workers, "accumulate": accumulate, **size}
    for low, high in ((2, epoch_batches), (epoch_batches // 2, epoch_batches), (2, epoch_batches // 2)):
        kill_after(start(folder, **options), folder, rng.randint(low, high), rng.random() * 0.05)
    finish(start(folder, **options), folder)
    for rank in range(devices):
        [expected] = diaries(whole, rank)
        runs = diaries(folder, rank)
        assert len(runs) == 4
        assert runs[0][0] == expected[0]
        for run, following in zip(runs, [*runs[1:], None], strict=True):
            first = expected.index(run[0])
            assert run == expected[first : first + len(run)]
            if following is not None:  # goes on from the newest checkpoint, which is every two optimizer steps
                repeated = first + len(run) - expected.index(following[0])
                assert 0 <= repeated <= 2 * 2 * accumulate
        assert runs[-1][-1] == expected[-1]
    weights, resumed = (torch.load(path / "weights.pt") for path in (whole, folder))
    assert_same(resumed, weights)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_trains_the_rest_of_the_epoch_once(before: int, after: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill_after(start(folder, devices=before), folder, 17 if before == 2 else 31, 0.0)
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["SmartBatchDataModule"]
    finish(start(folder, devices=after), folder)
    epoch, [(ranks, steps)] = state["epoch"], state["consumed"]
    assert (epoch, ranks) == (1, before)
    assert steps > 0
    for number in range(3):
        trained = []
        for rank in range(before):
            trained += [ids for e, b, ids in diaries(folder, rank)[0] if e == number and (e < epoch or b < steps)]
        for rank in range(after):
            trained += [ids for e, _, ids in diaries(folder, rank)[-1] if e == number]
        rows = sorted(row for batch in trained for row in batch)
        assert len(rows) == len(set(rows)) == 200, number
    assert float((folder / "steps.txt").read_text().split()[1]) == 0  # the schedule ends where training does


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["main", "other"])
def test_when_one_of_two_ranks_dies_the_other_ends_with_an_error_and_the_checkpoint_is_whole(
    victim, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = start(folder, devices=2, epochs=200)
    while run.poll() is None and len((diaries(folder) or [[]])[-1]) < 20:
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(run.pid), "-f", "run_to_be_killed"], capture_output=True, text=True)
    other = int(children.stdout.split()[0])
    os.kill(run.pid if victim == "main" else other, signal.SIGKILL)
    begun = time.monotonic()
    assert run.wait(timeout=120) != 0
    while Path(f"/proc/{other}").exists() and "Z" not in Path(f"/proc/{other}/stat").read_text().split(")")[-1][:3]:
        assert time.monotonic() - begun < 120, "the other rank hangs"
        time.sleep(0.1)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "slurm"), [(1, False), (2, False), (1, True)])
def test_a_signal_saves_at_the_next_step_requeues_and_goes_on_exactly(
    devices, slurm, reference, tmp_path: Path
) -> None:
    """With SLURM's variables and a `scontrol` that writes down what it is asked; `test_slurm.py` has the real one."""
    whole, folder = reference(devices, 2), tmp_path / "run"
    options = {"devices": devices, "accumulate": 2, "every": 1000}
    variables: dict[str, str] = {}
    if slurm:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ >>{tmp_path}/asked\n")
        (tmp_path / "scontrol").chmod(0o755)
        names = {
            "JOB_ID": "7",
            "JOB_NAME": "train",
            "NTASKS": "1",
            "NTASKS_PER_NODE": "1",
            "PROCID": "0",
            "LOCALID": "0",
        }
        variables = {f"SLURM_{name}": value for name, value in {**names, "NODEID": "0", "NNODES": "1"}.items()}
        variables["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    run = start(folder, variables, **options)
    kill_after(run, folder, 9, 0.0, signal.SIGUSR1)
    assert run.returncode == 128 + signal.SIGUSR1, (folder / "log.txt").read_text()[-3000:]
    if slurm:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
    finish(start(folder, variables, **options), folder)
    for rank in range(devices):
        first, second = diaries(folder, rank)
        assert [first + second] == diaries(whole, rank)
        assert len(first) < len(second)
    weights, resumed = (torch.load(path / "weights.pt") for path in (whole, folder))
    assert_same(resumed, weights)


@pytest.mark.slow
def test_resuming_deep_in_a_plan_of_a_hundred_million_samples_costs_no_more_than_planning() -> None:
    lengths = torch.randint(5, 400, (100_000_000,), dtype=torch.int32).numpy()
    begun = time.perf_counter()
    plan_epoch(lengths, BatchSpec(jitter=1.0))
    planning = time.perf_counter() - begun
    sampler = SmartBatchSampler(lengths, BatchSpec(jitter=1.0))
    sampler.load_state_dict({"epoch": 0, "consumed": [(1, 1_000_000)]})
    begun = time.perf_counter()
    assert sampler.start_step == 1_000_000
    next(iter(sampler))
    assert time.perf_counter() - begun < planning + 1
