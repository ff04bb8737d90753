"""The benchmarks for GPUs, as a dry run on a CPU with tiny sizes: every contestant trains, every part prints its rows."""

import argparse
import faulthandler
import json
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

sys.path.append(str(ROOT))  # what is in no package: an installed one goes before the folder's
gpu, peers = import_module("benchmarks.gpu"), import_module("benchmarks.peers")

pytestmark = pytest.mark.slow  # .ci/run runs them

LENGTHS = np.random.default_rng(0).integers(3, 25, 96).astype(np.int16)


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    np.save(tmp_path / "lengths.npy", LENGTHS)
    return tmp_path / "lengths.npy"


def arguments(lengths: Path, **options) -> argparse.Namespace:
    defaults = {"device": "cpu", "dry_run": True, "reviews": 0, "test_reviews": 0, "batches": 2, "precision": None}
    more = {"max_tokens_per_batch": 400, "attention_dropout": 0.0, "compile": False, "repeats": 1, "patience": 600}
    return argparse.Namespace(lengths=lengths, rows=lengths.with_suffix(".jsonl"), **{**defaults, **more, **options})


def test_every_contestant_trains_in_a_dry_run(lengths: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(peers, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(peers, "quiet", lambda: warnings.simplefilter("ignore"))  # what it does else lasts
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda *args, **options: None
    )  # pytest has no stderr for it
    args = arguments(lengths)
    names = [one.name for one in peers.contestants(peers.made(args), args)]
    assert len(names) == 20
    rows = peers.compare(args, names)
    assert [row[""] for row in rows] == names
    assert all(row["real_tokens_per_second"] > 0 for row in rows)
    assert f"{len(names)} runs are left of {len(names)}" in capsys.readouterr().err
    args.rows.write_text("".join(args.rows.read_text().splitlines(keepends=True)[:-1]))
    measured = [json.loads(line)["name"] for line in args.rows.read_text().splitlines()]
    again = peers.compare(args, names)  # goes on where the file ends
    assert [row["seconds"] for row in again[:-1]] == [row["seconds"] for row in rows[:-1]]
    assert [json.loads(line)["name"] for line in args.rows.read_text().splitlines()] == [*measured, names[-1]]


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_of_the_gpu_benchmark_has_a_dry_run(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    bench = gpu.Bench("cpu", np.full(200, 30), ways="eager")
    gpu.PARTS[part](bench)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row["part"] == part and "error" not in row for row in rows)
    assert rows or part in ("attention", "waits", "profile")  # which have no meaning on a CPU


@pytest.mark.parametrize("options", [[], ["--sharded"]], ids=["DDP", "FSDP2"])
def test_the_benchmark_of_ranks_has_a_dry_run(options: list[str], lengths: Path) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "benchmarks.ranks",
    ]
    tiny = ["--device=cpu", f"--lengths={lengths}", "--max_tokens_per_batch=100", "--steps=2"]
    ended = subprocess.run(
        [*torchrun, *tiny, *options], cwd=ROOT, check=True, capture_output=True, text=True, timeout=300
    )
    row = json.loads(ended.stdout.splitlines()[-1])
    assert (row["ranks"], row["steps"], row["strategy"] == "FSDP2") == (2, 2, bool(options))
    assert row["slowest_rank_over_mean"] >= 1
