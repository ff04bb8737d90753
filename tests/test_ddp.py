"""Two real processes under a plain `Trainer(strategy="ddp", devices=2)`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import run_evaluation
import run_ranks
import run_slow_preparation
import run_unequal_batches as unequal
import torch
from datasets import load_dataset
from helpers import SHORT, Fork, diaries, finish, slow, start

from smartbatch_lightning import PadCollator, demo, plan_epoch

TESTS = Path(__file__).parent
ROOT = TESTS.parent


@pytest.mark.parametrize(
    ("batching", "accumulate", "tokenization"),
    [slow("smart", 1, "ahead"), slow("random", 2, "ahead"), slow("smart", 1, "lazy")],
)
def test_two_ranks_share_every_epoch_and_step_together(batching, accumulate, tokenization, tmp_path: Path) -> None:
    options = {"batching": batching, "accumulate": accumulate, "tokenization": tokenization, "workers": 1}
    finish(start(tmp_path, devices=2, **options), tmp_path)
    [first], [second] = diaries(tmp_path, 0), diaries(tmp_path, 1)
    assert [step[:2] for step in first] == [step[:2] for step in second]
    plans = set()
    for epoch in range(3):
        steps = [(a[2], b[2]) for a, b in zip(first, second, strict=True) if a[0] == epoch]
        rows = [row for step in steps for share in step for row in share]
        assert len(rows) == len(set(rows)) == 200
        assert all(abs(len(a) - len(b)) <= 1 for a, b in steps)
        plans.add(tuple(rows))
    assert len(plans) == 3


@pytest.mark.slow
def test_ranks_whose_seeds_differ_train_rank_0s_plan_of_rank_0s_split(tmp_path: Path) -> None:
    """As after `seed_everything(7 + rank)`, which is a way to let dropout differ."""
    finish(start(tmp_path, devices=2, seed_by_rank=1), tmp_path)
    runs = [diaries(tmp_path, rank)[0] for rank in range(2)]
    for epoch in range(3):
        rows = [row for run in runs for number, _, ids in run for row in ids if number == epoch]
        assert len(rows) == len(set(rows)) == 200


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["longest", "packed"])
def test_two_ranks_measure_and_predict_what_one_does(padding: str, tmp_path: Path) -> None:
    """501 reviews, which two ranks cannot share evenly."""
    reviews = load_dataset("parquet", data_files=str(demo.data_dir() / "test.parquet"), split="train").select(
        range(501)
    )
    reviews.to_parquet(tmp_path / "reviews.parquet")
    runs = {}
    for ranks, way in ((1, "longest"), (2, padding)):
        folder = tmp_path / str(ranks)
        runs[folder] = Fork(folder, ranks, run_evaluation.main, folder, tmp_path / "reviews.parquet", ranks, way)
    for folder, run in runs.items():
        finish(run, folder)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in runs]
    tables = [pd.read_csv(folder / "predictions.csv") for folder in runs]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)
    assert set(metrics[0]) == {"test_loss", "test_accuracy", "test_f1"}
    for table in tables:
        assert table["index"].tolist() == list(range(501))
    assert tables[0]["prediction"].tolist() == tables[1]["prediction"].tolist()
    pd.testing.assert_frame_equal(tables[0], tables[1], atol=1e-6, rtol=0)
    reports = [json.loads((folder / "report" / "test" / "evaluation.json").read_text()) for folder in runs]
    assert [report["samples"] for report in reports] == [501, 501]
    assert reports[0]["confusion_matrix"] == reports[1]["confusion_matrix"]
    assert reports[0]["summary"] == pytest.approx(reports[1]["summary"], abs=1e-5)
    for worst in zip(*(report["mistakes"][:20] for report in reports), strict=True):
        assert worst[0]["row"] == worst[1]["row"]
        assert worst[0]["text"] == worst[1]["text"]


@pytest.mark.parametrize(
    ("ranks", "padding"),
    [(2, "packed"), *(pytest.param(*way, marks=pytest.mark.slow) for way in ((2, "longest"), (1, "packed")))],
)
def test_an_optimizer_step_follows_the_mean_over_its_samples_whatever_the_batches(ranks, padding, tmp_path) -> None:
    """Two batches are accumulated on every rank, the last time one, and no two of them are of the same size."""
    finish(Fork(tmp_path, ranks, unequal.main, tmp_path, ranks, padding), tmp_path)
    module = unequal.data(padding)
    module.setup("fit")
    plan = plan_epoch(module.train_data.lengths, module.spec, num_replicas=ranks)
    L.seed_everything(unequal.SEED)
    reference = unequal.Descent()
    reference.configure_model()
    optimizer = reference.configure_optimizer()
    trained = unequal.STEPS * ranks
    assert len(set(plan.batch_sizes()[:trained].tolist())) > 2
    for first in range(0, trained, unequal.ACCUMULATED * ranks):
        batches = range(first, min(first + unequal.ACCUMULATED * ranks, trained))
        samples = [module.train_data[int(sample)] for batch in batches for sample in plan[batch]]
        inputs = PadCollator(0)(samples)
        del inputs["index"]
        labels = inputs.pop("labels")
        torch.nn.functional.cross_entropy(reference(**inputs).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.load(tmp_path / "weights.pt")
    for name, weight in reference.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_jobs_preparing_the_same_data_at_once_both_end_with_one_whole_file(tmp_path: Path) -> None:
    environment = {**os.environ, "SMARTBATCH_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, str(ROOT / "train.py"), "prepare", "--data.max_length=24"]
    jobs = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(2)
    ]
    bars = [job.communicate(timeout=200)[1].count("Tokenizing: 100%") > 0 for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert any(bars)
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 2
    assert not list((tmp_path / "cache").rglob("*.unfinished"))


@pytest.mark.slow
def test_ranks_wait_longer_for_the_data_than_for_each_other(tmp_path: Path) -> None:
    finish(Fork(tmp_path, 2, run_slow_preparation.main, tmp_path), tmp_path)
    assert (tmp_path / "steps").read_text() == "2"


@pytest.mark.slow
def test_more_ranks_than_samples_is_an_error_that_says_how_many_would_do(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,label\nfine,1\n")
    files = f"--data.dataset={{train: {tmp_path / 'one.csv'}, test: {tmp_path / 'one.csv'}}}"
    options = ["--data.label_names=[bad,good]", "--data.validation_split=test", "--data.tokenizer", ""]
    options[-1] = str(demo.model_dir())
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "fit",
        files,
        *options,
        "--model.pretrained",
        str(demo.model_dir()),
    ]
    run = subprocess.run(
        [*command, "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"],
        capture_output=True, text=True, timeout=200, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode != 0
    assert "1 samples are too few for 2 ranks" in run.stderr
    assert "Run on at most 1 devices" in run.stderr


@pytest.mark.slow
def test_the_torchrun_launch_starts_again_when_a_rank_dies_and_trains_every_sample_once(tmp_path: Path) -> None:
    """On two ranks without GPUs; the kill comes after the first checkpoint, so that it is gone on from."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    options = [*SHORT, f"--trainer.callbacks.folder={tmp_path}", f"--trainer.default_root_dir={tmp_path}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "RANKS": "2", "PATH": path, "PYTHONPATH": str(TESTS)}
    requeue = tmp_path / "configs" / "cluster" / "requeue.yaml"
    requeue.write_text(requeue.read_text().replace("every_n_train_steps: 200", "every_n_train_steps: 5"))
    with (tmp_path / "log.txt").open("wb") as log:
        command = ["bash", "configs/cluster/torchrun.sh", *options]
        run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        while run.poll() is None and len((diaries(tmp_path) or [[]])[-1]) < 17:
            time.sleep(0.005)
        ranks = subprocess.run(
            ["pgrep", "-f", f"smartbatch fit.*{tmp_path}"], capture_output=True, text=True
        ).stdout.split()
        workers = [pid for pid in ranks if b"nproc-per-node" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert run.wait(timeout=200) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    first, second = diaries(tmp_path)
    assert second[0][0] * 13 + second[0][1] > 0  # not from the start
    for epoch in range(3):
        trained = {}
        for rank in range(2):
            for number, batch, ids in [step for diary in diaries(tmp_path, rank) for step in diary]:
                if number == epoch:
                    assert trained.setdefault((batch, rank), ids) == ids  # what was trained again was the same
        rows = [row for ids in trained.values() for row in ids]
        assert len(rows) == len(set(rows)) == 200
    assert len(first) + len(second) >= 39


def test_ranks_that_have_other_data_than_each_other_are_refused_on_each(tmp_path: Path) -> None:
    ranks = [Fork(tmp_path / str(rank), 1, run_ranks.main, rank, tmp_path) for rank in range(2)]
    for rank, run in enumerate(ranks):
        finish(run, tmp_path / str(rank))
        printed = (tmp_path / str(rank) / "log.txt").read_text()
        for said in (
            "same: agreed",
            "seed: refused: rank 1 and rank 0 differ in 'data', 'data.seed': .*same files, arguments and seed",
            "label names: refused: rank 1 and rank 0 differ in 'data', 'label names': ",
            "rows: refused: rank 1 and rank 0 differ in 'data': ",
        ):
            assert re.search(f"^{said}", printed, re.MULTILINE), printed
