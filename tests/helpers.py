"""What tests of several files share: a quiet Trainer, the command line, and processes that are killed."""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import run_to_be_killed
import torch
from lightning.pytorch.callbacks import Callback

from smartbatch_lightning import SmartBatchCLI


def slow(*values):
    """Values of a test that are left to `pytest -m slow`, where others of the kind are quick."""
    return pytest.param(*values, marks=pytest.mark.slow)


def trainer(folder: Path, **options) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(default_root_dir=folder, accelerator="cpu", **{**quiet, "max_epochs": 1, **options})


class Seen(Callback):
    """Records the rows of every batch that was trained, by epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[tuple[int, ...]]] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.epochs.append([])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.epochs[-1].append(tuple(batch["index"].tolist()))

    def rows(self, epoch: int) -> list[int]:
        return sorted(row for batch in self.epochs[epoch] for row in batch)


ROOT = Path(__file__).parents[1]


FAST = ["--data.max_length=24", "--data.batch_size=64", "--trainer.limit_train_batches=2", "--trainer.max_epochs=1"]


QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


def cli(*args: str) -> SmartBatchCLI:
    return SmartBatchCLI(args=[*args, *QUIET])


def assert_same(resumed: dict, whole: dict) -> None:
    assert resumed.keys() == whole.keys()
    for name in whole:
        assert torch.equal(resumed[name], whole[name]), name


def start(folder: Path, variables: dict[str, str] | None = None, **options) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("run_to_be_killed.py")
    command = [sys.executable, str(script), str(folder), *(f"{name}={value}" for name, value in options.items())]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PL_"))}
    environment |= variables or {}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


@functools.cache
def _forks() -> multiprocessing.context.ForkServerContext:
    """A server of forks that has imported what a run needs; by itself it would look for that in the working directory."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["run_to_be_killed", "run_flag", "torch._dynamo"])  # the latter is what DDP imports
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()
    return forks


class Fork:
    """What `subprocess.Popen` has, for a function that is called in a process with all imports, which saves seconds.

    Args:
        folder: Where it works, and writes its `log.txt`.
        ranks: Of several the first forks the others, with the variables that torchrun sets for each, and waits for them.
        run: A function of a module, called with the arguments.
    """

    def __init__(self, folder: Path, ranks: int, run: Callable[..., Any], *arguments: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.process = _forks().Process(target=_run_forked, args=(folder, ranks, run, arguments))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode


def begin(folder: Path, **options) -> Fork:
    """As `start`, in a second; without Lightning's launcher of ranks."""
    arguments = [f"{name}={value}" for name, value in options.items()]
    return Fork(folder, options.get("devices", 1), run_to_be_killed.main, folder, *arguments)


def _run_forked(folder: Path, ranks: int, run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as where nothing was forked
    log = os.open(folder / "log.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    sys.argv = ["run", str(folder), *map(str, arguments)]
    for name in [name for name in os.environ if name.startswith(("SLURM", "PL_"))]:
        del os.environ[name]
    other = None
    if ranks == 2:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GROUP_RANK": "0"}
        other = os.fork() or None
        os.environ |= {"LOCAL_RANK": "0" if other else "1", "RANK": "0" if other else "1"}
    try:
        run(*arguments)
        if other and os.waitpid(other, 0)[1]:
            sys.exit("the other rank failed")
    except BaseException:
        if other:
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
        raise


def finish(run: Fork | subprocess.Popen[bytes], folder: Path) -> None:
    assert run.wait(timeout=300) == 0, (folder / "log.txt").read_text()[-3000:]


def diaries(folder: Path, rank: int = 0) -> list[list[tuple[int, int, tuple[int, ...]]]]:
    """For each run of a rank its batches: epoch, number and ids. A line that the kill cut short is left out."""
    runs: list[list[tuple[int, int, tuple[int, ...]]]] = []
    path = folder / f"diary-{rank}.txt"
    text = path.read_text() if path.exists() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        if line.startswith("start"):
            runs.append([])
        else:
            epoch, batch, *ids = map(int, line.split())
            runs[-1].append((epoch, batch, tuple(ids)))
    return runs


def kill_after(run: Fork | subprocess.Popen[bytes], folder: Path, lines: int, delay: float, how=signal.SIGKILL) -> None:
    """Sends a signal to all ranks when the newest run has trained so many batches, and a moment has passed."""
    before = len(diaries(folder))
    while run.poll() is None and not (len(d := diaries(folder)) > before and len(d[-1]) >= lines):
        time.sleep(0.001)
    time.sleep(delay)
    assert run.poll() is None, (folder / "log.txt").read_text()[-3000:]
    os.killpg(run.pid, how)
    run.wait(timeout=120)


SHORT = [
    "--data.dataset=demo", "--data.validation_split=0.9", "--data.max_length=24", "--data.batch_size=8",
    "--model.pretrained=demo", "--model.learning_rate=0.001", "--trainer.max_epochs=3", "--trainer.limit_val_batches=2",
    "--trainer.num_sanity_val_steps=0", "--trainer.accelerator=cpu", "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false", "--trainer.callbacks+=run_to_be_killed.Diary",
]  # fmt: skip


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """A file's content with a bit flipped, or bytes inserted, taken out or zeroed, at a random place."""
    content = bytearray(whole)
    at = rng.randrange(len(content))
    damage = rng.choice(["flip", "insert", "cut out", "zero"])
    if damage == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif damage == "insert":
        content[at:at] = rng.randbytes(rng.randint(1, 8))
    elif damage == "cut out":
        del content[at : at + rng.randint(1, 64)]
    else:
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    return bytes(content)
