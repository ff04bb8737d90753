"""Every callback and flag that Lightning's documentation lists for fitting, on one process and on two ranks.

`docs/lightning.md` has the table.
"""

import inspect
import re
import warnings
from pathlib import Path

import lightning as L
import pytest
from helpers import Fork, diaries, finish
from lightning.pytorch import callbacks as of_lightning
from run_flag import ROWS, Case, cases, train

TESTS = Path(__file__).parent
CASES = cases(Path("."))
# abstract; and flags of a Trainer that is made by hand, or for devices that are not here
LEFT_OUT = {"Callback", "Checkpoint", "ProgressBar", "ExceptionHandling", "SpikeDetection"}
WITHOUT_MEANING = {"devices", "callbacks", "model_registry", "precision"}


def assert_trained(folder: Path, case: Case, devices: int) -> None:
    """Every sample once an epoch, or where batches are limited as many batches as asked for, on each rank."""
    trained = [run for rank in range(devices) for run in diaries(folder, rank)]
    assert len(trained) >= devices
    for epoch in range(2 if case.batches is None else len(case.batches)):
        steps = [[ids for number, _, ids in run if number == epoch] for run in trained[-devices:]]
        rows = [row for run in steps for ids in run for row in ids]
        assert len(rows) == len(set(rows))
        if case.batches is None or case.batches == [25]:
            assert len(rows) == ROWS
        else:
            assert [len(run) for run in steps] == [case.batches[epoch]] * devices
    assert max(number for run in trained for number, _, _ in run) == epoch


def test_every_callback_and_flag_of_lightning_is_tried_and_stands_in_the_docs() -> None:
    names = {name for name in of_lightning.__all__ if name not in LEFT_OUT}
    names |= set(inspect.signature(L.Trainer.__init__).parameters) - {"self"} - WITHOUT_MEANING
    assert names <= set(CASES)
    table = (TESTS.parent / "docs" / "lightning.md").read_text()
    assert set(CASES) == set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_process_trains_every_sample_once_an_epoch_whatever_the_callback_or_flag(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = train(tmp_path, name, 1)
    assert_trained(tmp_path, CASES[name], 1)
    if CASES[name].batches is None and not CASES[name].options.get("barebones"):
        assert trainer.callback_metrics["train_loss"].isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.on_two_ranks])
def test_two_ranks_train_every_sample_once_an_epoch_whatever_the_callback_or_flag(name: str, tmp_path: Path) -> None:
    finish(Fork(tmp_path, 2, train, tmp_path, name, 2), tmp_path)
    assert_trained(tmp_path, CASES[name], 2)
