"""Two real processes under a plain `Trainer(strategy="ddp", devices=2)`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from datasets import load_dataset
from test_resume import diaries, finish, start

TESTS = Path(__file__).parent
ROOT = TESTS.parent


@pytest.mark.parametrize(("batching", "accumulate"), [("smart", 1), ("random", 2)])
def test_two_ranks_share_every_epoch_and_step_together(batching: str, accumulate: int, tmp_path: Path) -> None:
    finish(start(tmp_path, devices=2, batching=batching, accumulate=accumulate, workers=1), tmp_path)
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


def test_two_ranks_measure_and_predict_what_one_does(imdb: Path, tmp_path: Path) -> None:
    """1,001 reviews, which two ranks cannot share evenly."""
    reviews = (
        load_dataset("parquet", data_files=str(imdb / "test.parquet"), split="train").shuffle(1).select(range(1001))
    )
    reviews.to_parquet(tmp_path / "reviews.parquet")
    metrics, tables = [], []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        command = [sys.executable, str(TESTS / "run_evaluation.py"), str(folder), str(tmp_path / "reviews.parquet")]
        subprocess.run([*command, str(ranks)], check=True, capture_output=True, timeout=200)
        metrics.append(json.loads((folder / "metrics.json").read_text()))
        tables.append(pd.read_csv(folder / "predictions.csv"))
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)
    assert set(metrics[0]) == {"test_loss", "test_accuracy", "test_f1"}
    for table in tables:
        assert table["index"].tolist() == list(range(1001))
    assert tables[0]["label"].tolist() == tables[1]["label"].tolist()
    pd.testing.assert_frame_equal(tables[0], tables[1], atol=1e-6, rtol=0)


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
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2
    assert not list((tmp_path / "cache").glob("*.unfinished"))


@pytest.mark.slow
def test_more_ranks_than_samples_is_an_error_that_says_how_many_would_do(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,label\nfine,1\n")
    files = f"--data.dataset={{train: {tmp_path / 'one.csv'}, test: {tmp_path / 'one.csv'}}}"
    options = ["--data.label_names=[bad,good]", "--data.validation_split=test", "--data.tokenizer", ""]
    from smartbatch_lightning import demo

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
    assert "1 samples cannot be shared by 2 ranks" in run.stderr
    assert "Run on at most 1 devices" in run.stderr
