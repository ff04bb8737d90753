"""The best weights: kept by default, tested, exported and named, beside the last; and training that ends in time."""

import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import FAST, cli, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import load_file

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule
from smartbatch_lightning.callbacks.best import BestCheckpoint, EarlyStop
from smartbatch_lightning.callbacks.stop_on_signal import StopOnSignal

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

# by which the first epoch is the best: the rate is so high that later ones are worse, or the same
RUN = [*FAST[:3], "--trainer.max_epochs=3", "--trainer.default_root_dir=run", "--trainer.limit_val_batches=4"]


class Planned(SequenceClassifier):
    """Its validation metric is what is planned for each epoch."""

    PLAN = (0.2, 0.9, 0.5)

    def on_validation_epoch_end(self) -> None:
        self.log("val_planned", torch.tensor(self.PLAN[self.current_epoch]))


def planned(folder: Path, *callbacks, **options) -> tuple[Planned, object]:
    run = trainer(
        folder,
        callbacks=list(callbacks),
        **{"max_epochs": 3, "limit_train_batches": 2, "limit_val_batches": 1, "enable_checkpointing": True, **options},
    )
    model = Planned()
    data = SmartBatchDataModule(max_length=16, batch_size=16, validation_split=0.9, seed=1)
    run.fit(model, data)
    return model, run


def epoch_of(path: str | Path) -> int:
    return torch.load(path, weights_only=True)["epoch"]


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path: Path) -> None:
    saver = BestCheckpoint("val_planned", "max", str(tmp_path / "kept"))
    planned(tmp_path, saver)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert (epoch_of(saver.best_model_path), epoch_of(saver.last_model_path)) == (1, 2)
    assert saver.best_model_path == str(tmp_path / "kept" / "best.ckpt")
    assert float(saver.best_model_score) == pytest.approx(0.9)


def test_a_run_that_goes_on_knows_the_best_of_before(tmp_path: Path) -> None:
    planned(tmp_path, BestCheckpoint("val_planned", "max", str(tmp_path / "kept")), max_epochs=2)
    saver = BestCheckpoint("val_planned", "max", str(tmp_path / "kept"))
    run = trainer(
        tmp_path, callbacks=[saver], max_epochs=3, limit_train_batches=2, limit_val_batches=1, enable_checkpointing=True
    )
    data = SmartBatchDataModule(max_length=16, batch_size=16, validation_split=0.9, seed=1)
    run.fit(Planned(), data, ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert (epoch_of(saver.best_model_path), epoch_of(saver.last_model_path)) == (1, 2)


def test_a_second_fit_knows_all_of_the_first_after_the_best_weights_were_tested(tmp_path: Path) -> None:
    class Never(Planned):
        PLAN = (0.9, 0.5, 0.2, 0.1)

    saver, stopping = BestCheckpoint("val_planned", "max", str(tmp_path / "kept")), EarlyStop(9)
    options = {"limit_train_batches": 2, "limit_val_batches": 1, "enable_checkpointing": True, "max_epochs": 3}
    run = trainer(tmp_path, callbacks=[saver, stopping], **options)
    model, data = Never(), SmartBatchDataModule(max_length=16, batch_size=16, validation_split=0.9, seed=1)
    run.fit(model, data)
    run.test(model, data, ckpt_path="best", verbose=False)
    assert (stopping.wait_count, saver.last_model_path) == (2, str(tmp_path / "kept" / "last.ckpt"))
    run.fit_loop.max_epochs = 4
    run.fit(model, data)
    assert epoch_of(saver.best_model_path) == 0
    assert epoch_of(saver.last_model_path) == 3


def test_another_run_in_the_same_folder_is_refused_and_replaces_nothing(tmp_path: Path) -> None:
    planned(tmp_path, BestCheckpoint("val_planned", "max", str(tmp_path / "kept")), max_epochs=1)
    before = (tmp_path / "kept" / "best.ckpt").read_bytes()
    with pytest.raises(ValueError, match=r"kept has checkpoints of another run.*--ckpt_path=last"):
        planned(tmp_path, BestCheckpoint("val_planned", "max", str(tmp_path / "kept")), max_epochs=1)
    assert (tmp_path / "kept" / "best.ckpt").read_bytes() == before


def test_early_stopping_waits_as_many_validations_as_it_is_told_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for patience, epochs in ((1, 3), (2, 4)):
        Planned.PLAN = (0.2, 0.9, 0.5, 0.4, 0.3)
        with caplog.at_level("INFO"):
            options = {"max_epochs": 5, "enable_checkpointing": False}
            _, run = planned(tmp_path, EarlyStop(patience, "val_planned", "max"), **options)
        assert run.current_epoch == epochs
        assert f"val_planned did not improve in the last {patience} records. Best score: 0.900" in caplog.text
    Planned.PLAN = (0.2, 0.9, 0.5)


@pytest.mark.parametrize("interval", [1, timedelta(0)])
def test_validations_after_every_batch_are_looked_at_one_by_one(interval: int | timedelta, tmp_path: Path) -> None:
    """Lightning takes val_check_interval=1 for 1.0, one validation an epoch."""

    class ByBatch(Planned):
        def on_validation_epoch_end(self) -> None:
            self.log("val_planned", torch.tensor([0.2, 0.9, 0.5, 0.4][self.global_step - 1]))

    saver = BestCheckpoint("val_planned", "max", str(tmp_path / "kept"))
    run = trainer(
        tmp_path,
        callbacks=[saver, EarlyStop(1, "val_planned", "max")],
        enable_checkpointing=True,
        val_check_interval=interval,
        limit_train_batches=4,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    run.fit(ByBatch(), SmartBatchDataModule(max_length=16, batch_size=16, validation_split=0.9, seed=1))
    assert run.global_step == 3
    assert torch.load(saver.best_model_path, weights_only=True)["global_step"] == 2


def test_a_signal_leaves_the_last_checkpoint_of_another_run(tmp_path: Path) -> None:
    class Signal(Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            if trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("another's")
    saver = BestCheckpoint("val_planned", "max")
    with pytest.raises(SystemExit) as stop:
        planned(tmp_path, saver, Signal(), StopOnSignal())
    assert stop.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "checkpoints" / "last.ckpt").read_text() == "another's"
    assert torch.load(tmp_path / "checkpoints" / "last-v1.ckpt", weights_only=True)["global_step"] == 1


def test_a_callback_that_a_second_trainer_takes_knows_nothing_of_the_first_ones_run(tmp_path: Path) -> None:
    saver = BestCheckpoint("val_planned", "max")
    Planned.PLAN = (0.2, 0.9, 0.5)
    planned(tmp_path, saver)
    first = saver.best_model_path
    Planned.PLAN = (0.4, 0.3, 0.1)
    planned(tmp_path, saver)
    Planned.PLAN = (0.2, 0.9, 0.5)
    assert (epoch_of(first), epoch_of(saver.best_model_path)) == (1, 0)
    assert float(saver.best_model_score) == pytest.approx(0.4)


def test_a_run_that_had_stopped_goes_on_with_more_patience(tmp_path: Path) -> None:
    Planned.PLAN = (0.9, 0.5, 0.4, 0.3, 0.2, 0.1)
    last = tmp_path / "kept" / "last.ckpt"
    for patience, path, epochs in ((1, None, 2), (1, last, 2), (3, last, 4)):
        saver = BestCheckpoint("val_planned", "max", str(last.parent))
        callbacks = [EarlyStop(patience, "val_planned", "max"), saver]
        options = {"max_epochs": 6, "limit_train_batches": 2, "limit_val_batches": 1, "enable_checkpointing": True}
        run = trainer(tmp_path, callbacks=callbacks, **options)
        run.fit(
            Planned(), SmartBatchDataModule(max_length=16, batch_size=16, validation_split=0.9, seed=1), ckpt_path=path
        )
        assert run.current_epoch == epochs
    Planned.PLAN = (0.2, 0.9, 0.5)


def test_a_run_that_goes_on_by_another_metric_is_stopped_by_that_one_alone() -> None:
    stopping = EarlyStop(1, "val_loss", "min")
    stopping.load_state_dict({**EarlyStop(1, "val_f1", "max").state_dict(), "wait_count": 1, "best_score": 0.9})
    assert (stopping.wait_count, float(stopping.best_score)) == (0, float("inf"))


@pytest.mark.parametrize(("stop", "expected"), [((), ("val_loss", "min")), (("val_f1",), ("val_f1", "max"))])
def test_early_stopping_watches_the_metric_of_the_best_weights_unless_another_is_given(
    stop: tuple[str, ...], expected: tuple[str, str], tmp_path: Path
) -> None:
    stopping, saver = EarlyStop(2, *stop), BestCheckpoint("val_loss", dirpath=str(tmp_path / "kept"))
    run = trainer(tmp_path, callbacks=[stopping, saver], enable_checkpointing=True, limit_train_batches=1,
                  limit_val_batches=1)  # fmt: skip
    run.fit(SequenceClassifier(), SmartBatchDataModule(max_length=16))
    assert (stopping.monitor, stopping.mode) == expected


def test_without_patience_nothing_is_stopped(tmp_path: Path) -> None:
    _, run = planned(tmp_path, EarlyStop(), enable_checkpointing=False)
    assert run.current_epoch == 3


def test_early_stopping_without_validation_is_refused_before_anything_is_tokenized(tmp_path: Path) -> None:
    class Counted(SmartBatchDataModule):
        def tokenize(self, dataset):
            tokenized.append(len(dataset))
            return super().tokenize(dataset)

    tokenized: list[int] = []
    run = trainer(tmp_path, callbacks=[EarlyStop(2)])
    with pytest.raises(ValueError, match="there is no validation. Set --data.validation_split"):
        run.fit(SequenceClassifier(), Counted(max_length=16, validation_split=None))
    assert not tokenized


def test_early_stopping_of_another_module_needs_the_name_of_a_metric(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[EarlyStop(2)], limit_train_batches=1, limit_val_batches=1)
    with pytest.raises(ValueError, match="which metric of BoringModel to watch is not known. Set --early_stopping.mon"):
        run.fit(BoringModel())


@pytest.mark.slow
def test_the_command_line_keeps_names_tests_and_exports_the_best_by_macro_f1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = cli("fit", *RUN, "--export_model.folder=exported", "--model.learning_rate=1e-3")
    saver = fitted.trainer.checkpoint_callback
    assert (saver.monitor, saver.mode) == ("val_f1", "max")
    table = next(one for one in fitted.trainer.callbacks if type(one).__name__ == "TrainingMonitor").epochs
    scores = [metrics["val_f1"] for _, metrics in table]
    best = scores.index(max(scores))
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert saved["epoch"] == best
    printed = capsys.readouterr().out
    assert f"Checkpoint: {saver.best_model_path}\nLast checkpoint: {saver.last_model_path}\n" in printed
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for name, weight in exported.items():
        assert torch.equal(weight, saved["state_dict"][f"model.{name}"]), name
    assert f"| val_f1 | {scores[best]:.4f} |" in (tmp_path / "exported" / "README.md").read_text()
    last = torch.load(saver.last_model_path, weights_only=True)["state_dict"]
    for name, weight in fitted.model.state_dict().items():
        assert torch.equal(weight, last[name]), name  # what the run goes on with
    again = cli("validate", *FAST[:2], "--trainer.limit_val_batches=4", f"--ckpt_path={saver.best_model_path}")
    assert float(again.trainer.callback_metrics["val_f1"]) == pytest.approx(scores[best])


def test_the_command_line_stops_early_by_one_option_and_takes_another_metric() -> None:
    fitted = cli("fit", *RUN, "--early_stopping.patience=1", "--checkpoint.monitor=val_loss", "--model.learning_rate=0")
    assert fitted.trainer.current_epoch == 2  # nothing gets better at a rate of 0
    saver = fitted.trainer.checkpoint_callback
    assert (saver.monitor, saver.mode) == ("val_loss", "min")
    [stopping] = fitted.trainer.early_stopping_callbacks
    assert (stopping.monitor, stopping.mode) == ("val_loss", "min")


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks")  # which the command leaves out
def test_without_validation_the_last_weights_are_kept_alone(tmp_path: Path) -> None:
    fitted = cli("fit", *FAST, "--data.validation_split=null", "--trainer.default_root_dir=run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]
    assert fitted.trainer.checkpoint_callback.monitor is None


@pytest.mark.parametrize(("steps", "waited"), [(1, 0), (3, 0), (5, 1)])
def test_early_stopping_counts_no_validation_that_max_steps_leaves_out(steps: int, waited: int, tmp_path) -> None:
    class Never(Planned):
        PLAN = (0.9, 0.5, 0.2)

    stopping, saver = EarlyStop(9, "val_planned", "max"), BestCheckpoint("val_planned", "max", str(tmp_path / "kept"))
    options = {"limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, "max_steps": steps}
    run = trainer(tmp_path, callbacks=[stopping, saver], max_epochs=-1, enable_checkpointing=True, **options)
    run.fit(Never(), SmartBatchDataModule(max_length=16, batch_size=16, validation_split=0.9, seed=1))
    assert stopping.wait_count == waited
    assert torch.load(saver.last_model_path, weights_only=True)["global_step"] == steps


def test_an_epoch_that_ends_before_its_validation_leaves_the_last_weights(tmp_path: Path) -> None:
    cli("fit", *FAST[:2], "--trainer.max_steps=3", "--trainer.default_root_dir=run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.slow
def test_a_checkpoint_callback_of_ones_own_goes_before_the_command_lines() -> None:
    own = [
        "--trainer.callbacks=ModelCheckpoint",
        "--trainer.callbacks.monitor=val_accuracy",
        "--trainer.callbacks.mode=max",
    ]
    fitted = cli("fit", *FAST, *own, "--trainer.default_root_dir=run")
    assert [type(saver) for saver in fitted.trainer.checkpoint_callbacks] == [ModelCheckpoint]
    assert cli("fit", *FAST, "--trainer.enable_checkpointing=false").trainer.checkpoint_callback is None


def test_a_metric_to_monitor_that_validation_does_not_log_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Where a subclass logs others by itself, so that their names are not known before."""
    with pytest.raises(ValueError, match="BestCheckpoint monitors 'val_nope', but validation logs 'val_planned'"):
        planned(tmp_path, BestCheckpoint("val_nope", "max"), num_sanity_val_steps=1)


def test_a_trial_run_in_a_folder_of_another_run_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_text("of another run")
    saver = BestCheckpoint(dirpath=str(tmp_path))
    data = SmartBatchDataModule(validation_split=0.9, max_length=16)
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True, fast_dev_run=1).fit(SequenceClassifier(), data)
    assert (tmp_path / "last.ckpt").read_text() == "of another run"
