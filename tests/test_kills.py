"""Runs of random settings, killed at random and at aimed moments: what they leave is what an uninterrupted run leaves.

`pytest -m slow -n 2 tests/test_kills.py` kills 200 times.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import assert_same, begin, diaries, finish

RUNS, KILLS = 40, 5
MOMENTS = ["first step", "step", "validation", "end of validation", "end of epoch", "start of epoch"]


def settings(rng: random.Random) -> dict:
    """Of a run; packed ones have a token budget."""
    packed = rng.random() < 0.3
    return {
        "devices": 2 if rng.random() < 0.15 else 1,
        "batching": rng.choice(["smart", "random"] if packed else ["smart", "tutorial", "random"]),
        "padding": "packed" if packed else "longest",
        "budget": 160 if packed else 0,
        "tokenization": "ahead" if packed else rng.choice(["ahead", "ahead", "lazy"]),
        "workers": rng.choice([0, 0, 0, 2]),
        "accumulate": rng.choice([1, 1, 2, 3]),
        "every": rng.randint(1, 5),
        "stopping": rng.choice([0, 1, 2]),
        "averaging": rng.choice(["none", "none", "ema", "swa"]),
        "best": rng.choice([0, 1, 2]),
        "logged": rng.choice([0, 1]),
        "val_interval": rng.choice([1.0, 1.0, 0.5, 7.0]),
    }


def kill(folder: Path, options: dict, rng: random.Random) -> None:
    """Starts a run, or goes on, and kills all its ranks at some moment; it may end before that."""
    moment = rng.choice([*MOMENTS, "any", "any", "writing", "writing"])
    passed = 0 if moment == "first step" else rng.randint(0, 8 if moment == "step" else 2)
    aimed = {} if moment in ("any", "writing") else {"kill": moment, "passed": passed}
    before = len(diaries(folder))
    run = begin(folder, **options, **aimed)
    delay = rng.uniform(0, 1.5)
    while run.poll() is None and len(diaries(folder)) == before:
        time.sleep(0.001)
    until = time.monotonic() + (delay if moment == "any" else 60)
    while run.poll() is None and time.monotonic() < until:
        if moment == "writing" and list(folder.glob("checkpoints/*.unfinished")) and rng.random() < 0.3:
            break
        time.sleep(0.0005)
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    status = run.wait(timeout=120)  # of two ranks one may see the other die before it is killed
    assert status in (0, -signal.SIGKILL, 1 if options["devices"] > 1 else 0), (folder / "log.txt").read_text()[-3000:]


def curves(folder: Path) -> dict[tuple[int, str], float]:
    """What was logged by step; what a later start logged replaces what an earlier one did. Of speed and time nothing."""
    found: dict[tuple[int, str], float] = {}
    logs = sorted(folder.glob("lightning_logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:]))
    for path in logs:
        table = pd.read_csv(path) if path.stat().st_size else pd.DataFrame({"step": []})
        for name in table:
            if name.startswith(("lr", "val_", "train_loss_step")):
                column = table[["step", name]].dropna()
                found |= {(int(step), name): value for step, value in zip(column["step"], column[name], strict=True)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(RUNS))
def test_a_run_of_random_settings_that_is_killed_again_and_again_leaves_what_an_uninterrupted_one_does(
    seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    options = settings(rng)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    finish(begin(whole, **options), whole)
    for _ in range(KILLS):
        kill(folder, options, rng)
    finish(begin(folder, **options), folder)
    for rank in range(options["devices"]):
        [expected] = diaries(whole, rank)
        assert {step for run in diaries(folder, rank) for step in run} == set(expected), options
    ended, expected_end = (json.loads((path / "end.json").read_text()) for path in (folder, whole))
    if options["averaging"] == "swa" and options["stopping"]:
        del ended["rate"], expected_end["rate"]  # one that had stopped makes no schedule of SWA's when it is restarted
    assert ended == expected_end, options
    assert curves(folder) == curves(whole), options
    weights, resumed = (torch.load(path / "weights.pt") for path in (whole, folder))
    assert_same(resumed, weights)
