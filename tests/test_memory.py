"""Tests of the check of memory before a run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import trainer
from run_to_be_killed import Dropped

from smartbatch_lightning import SmartBatchDataModule
from smartbatch_lightning.callbacks.memory_check import MemoryCheck, largest_batches

TESTS = Path(__file__).parent


def data(**options) -> SmartBatchDataModule:
    return SmartBatchDataModule(**{"validation_split": 0.9, "max_length": 100, "seed": 1, **options})


@pytest.mark.parametrize("padding", ["longest", "packed"])
def test_the_check_leaves_weights_optimizer_and_random_state_as_they_were(padding: str, tmp_path: Path) -> None:
    weights = []
    for enabled in (False, True):
        torch.manual_seed(5)
        model = Dropped(learning_rate=1e-3)
        run = trainer(tmp_path, callbacks=[MemoryCheck(enabled)], limit_train_batches=3, limit_val_batches=0)
        run.fit(model, data(padding=padding))
        weights.append(({**model.state_dict()}, torch.rand(3), dict(run.callback_metrics)))
    (plain, drawn, metrics), (checked, drawn_after, metrics_after) = weights
    assert all(torch.equal(plain[name], checked[name]) for name in plain)
    assert torch.equal(drawn, drawn_after)
    assert metrics == metrics_after


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 8}, {"max_tokens_per_batch": 800}, {"max_tokens_per_batch": 800, "padding": "packed"}],
)
@pytest.mark.parametrize("batching", ["smart", "random"])
def test_the_batches_that_are_tried_are_the_longest_the_widest_and_the_fullest(options, batching) -> None:
    module = data(batching=batching, **options)
    module.setup("fit")
    loader = module.train_dataloader()
    lengths, every = module.train_data.lengths, list(loader.plan_sampler)
    tried = largest_batches(loader)
    assert 1 <= len(tried) <= 3

    def tokens(batch):
        return lengths[batch].sum() if options.get("padding") == "packed" else len(batch) * lengths[batch].max()

    for measure in (tokens, len, lambda batch: lengths[batch].max()):
        assert max(map(measure, tried)) == max(map(measure, every))


def test_what_the_package_knows_nothing_of_is_not_tried(tmp_path: Path) -> None:
    class Own(Dropped):
        def step(self, batch, stage, dataloader_idx=0):
            return self(input_ids=batch["words"]).logits.sum()

    class Words(SmartBatchDataModule):
        def configure_collator(self):
            collator = super().configure_collator()
            return lambda rows: {"words": collator(rows)["input_ids"], "labels": collator(rows)["labels"]}

    run = trainer(tmp_path, callbacks=[MemoryCheck()], limit_train_batches=1, limit_val_batches=0)
    run.fit(Own(), Words(validation_split=0.9, max_length=16))
    assert run.global_step == 1


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_one_error_with_its_shape_before_the_first_step(tmp_path: Path) -> None:
    """In a process with a limit on its memory."""
    run = subprocess.run(
        [sys.executable, str(TESTS / "run_out_of_memory.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 1
    assert "error: a batch of 1000 samples, the longest of 400 tokens, does not fit into memory" in run.stderr
    assert "its input has the shape (1000, 400)" in run.stderr
    assert "Lower --data.batch_size" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "stepped").exists()
