"""The shipped sbatch file on a real SLURM of one node, set up by `tests/slurm.sh`: `pytest -m slurm`, as root on Debian."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import SHORT, assert_same, diaries

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of one node with two cores."""
    folder = tmp_path_factory.mktemp("slurm")
    setup = ROOT / "tests" / "slurm.sh"
    subprocess.run(["bash", str(setup), "start", str(folder)], check=True, timeout=300)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    yield {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "PYTHONPATH": str(ROOT / "tests")}
    subprocess.run(["bash", str(setup), "stop", str(folder)], check=True, timeout=60)


def submit(folder: Path, environment: dict[str, str]) -> str:
    """Submits the shipped file as it is, without GPUs, on the demo; gives the job's number."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    command = ["sbatch", "--parsable", "--gres=none", "--time=10", str(folder / "configs/cluster/slurm.sbatch")]
    options = [*SHORT, f"--trainer.callbacks.folder={folder}", f"--trainer.default_root_dir={folder}"]
    answer = subprocess.run(
        [*command, *options], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return answer.stdout.strip()


def control(*command: str, env: dict[str, str]) -> str:
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def wait_for(job: str, environment: dict[str, str], folder: Path, seconds: float = 240) -> None:
    """Until the job has ended well; a requeued one waits ten seconds for its processes to end, and not its two minutes."""
    end = time.monotonic() + seconds
    requeued: float | None = None
    while (shown := control("scontrol", "show", "job", job, env=environment)) and "JobState=COMPLETED" not in shown:
        log = folder / f"slurm-{job}.out"
        assert time.monotonic() < end, shown + (log.read_text()[-4000:] if log.exists() else "")
        assert "JobState=FAILED" not in shown, log.read_text()[-4000:]
        if "JobState=PENDING" in shown and "Restarts=1" in shown:
            requeued = requeued or time.monotonic()
        if requeued and time.monotonic() > requeued + 10 and "JobState=PENDING" in shown:
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=environment, check=False)
        time.sleep(0.5)


def wait_for_batches(folder: Path, number: int) -> None:
    end = time.monotonic() + 120
    while sum(len(run) for run in diaries(folder)) < number:
        assert time.monotonic() < end
        time.sleep(0.005)


def weights(folder: Path) -> dict:
    [checkpoint] = (folder / "runs" / "imdb").glob("last.ckpt")
    return torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    wait_for(submit(folder, slurm), slurm, folder)
    return folder


@pytest.mark.parametrize("disturbance", ["signal", "requeue"])
def test_a_job_that_is_requeued_half_way_ends_with_the_same_result(disturbance, whole, slurm, tmp_path: Path) -> None:
    job = submit(tmp_path, slurm)
    wait_for_batches(tmp_path, 17)
    if disturbance == "signal":
        control("scancel", "--signal=USR1", job, env=slurm)
    else:
        control("scontrol", "requeue", job, env=slurm)
    wait_for(job, slurm, tmp_path)
    for rank in range(2):
        [expected] = diaries(whole, rank)
        first, second = diaries(tmp_path, rank)
        assert first == expected[: len(first)]
        assert len(first) < len(expected)
        assert second == expected[len(first) if disturbance == "signal" else 0 :][-len(second) :]
        if disturbance == "signal":
            assert len(first) + len(second) == len(expected)
    assert_same(weights(tmp_path), weights(whole))
