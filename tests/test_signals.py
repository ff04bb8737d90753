"""Signals that end a run: it saves, says how to go on, does not hang, and is no success.

`pytest -m slow -n 2 tests/test_signals.py` sends each of four signals ten times to one process, to two ranks and to torchrun's, and
each to a run that still tokenizes.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import assert_same, begin, diaries, finish, kill_after, start

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1]
TIMES = 10


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_at_any_moment_saves_says_how_to_go_on_and_is_no_success(number, devices: int, tmp_path: Path) -> None:
    rng = random.Random(number * devices)
    options = {"devices": devices, "accumulate": 2, "every": 1000, "epochs": 3}
    whole = tmp_path / "whole"
    run_it = begin if devices == 1 else start  # those of several ranks by Lightning's own launcher
    finish(run_it(whole, **options), whole)
    for time_of in range(TIMES):
        folder = tmp_path / str(time_of)
        run = run_it(folder, **options)
        kill_after(run, folder, rng.randint(0, 30), rng.uniform(0, 0.05), number)
        log = (folder / "log.txt").read_text()
        assert run.returncode == 128 + number, log[-3000:]
        assert f"Stopped by {number.name} after step" in log
        assert f"ckpt_path='{folder}/checkpoints/last.ckpt'" in log
        finish(run_it(folder, **options), folder)
        for rank in range(devices):
            assert [[step for steps in diaries(folder, rank) for step in steps]] == diaries(whole, rank)
        weights, resumed = (torch.load(path / "weights.pt") for path in (whole, folder))
        assert_same(resumed, weights)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_under_torchrun_saves_and_is_no_success_whoever_receives_it(number, tmp_path: Path) -> None:
    """By turns one rank receives it, as where a node is taken away, and all processes, as from a terminal or a scheduler."""
    rng = random.Random(number)
    for time_of in range(TIMES):
        folder = tmp_path / str(time_of)
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        script = [str(Path(__file__).with_name("run_to_be_killed.py")), str(folder), "devices=2", "every=1000"]
        with (folder / "log.txt").open("wb") as log:
            run = subprocess.Popen([*command, *script], stdout=log, stderr=log, start_new_session=True)
        batches = rng.randint(1, 25)
        while run.poll() is None and not (diaries(folder) and len(diaries(folder)[0]) >= batches):
            time.sleep(0.005)
        ranks = [child for child in psutil.Process(run.pid).children() if str(script[0]) in child.cmdline()]
        assert len(ranks) == 2
        if time_of % 2:
            ranks[rng.randrange(2)].send_signal(number)
        else:
            for process in [*ranks, psutil.Process(run.pid)]:  # each rank is in a session of its own
                process.send_signal(number)
        assert run.wait(timeout=100) != 0
        assert not psutil.wait_procs(ranks, timeout=60)[1]
        said = (folder / "log.txt").read_text()
        assert f"ckpt_path='{folder}/checkpoints/last.ckpt'" in said, said[-3000:]
        assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_tokenizing_ends_the_run_on_all_ranks_and_is_no_success(
    number, devices, tmp_path: Path
) -> None:
    """Nothing is trained yet, so nothing is saved; what the first process leaves does not disturb the next run."""
    variables = {"SMARTBATCH_CACHE": str(tmp_path / "cache")}
    run = start(tmp_path / "run", variables, devices=devices, tokenizing=1)
    while run.poll() is None and not (tmp_path / "run" / "tokenizing.txt").exists():
        time.sleep(0.005)
    ranks = [psutil.Process(run.pid), *psutil.Process(run.pid).children()]
    os.kill(run.pid, number)
    statuses = (1,) if number == signal.SIGINT else (-number, 128 + number)  # Lightning's of a KeyboardInterrupt
    assert run.wait(timeout=60) in statuses, (tmp_path / "run" / "log.txt").read_text()
    assert not psutil.wait_procs(ranks[1:], timeout=60)[1]
    finish(start(tmp_path / "run", variables, devices=devices, epochs=1), tmp_path / "run")
