"""Memory that `predict` takes, and whether a run that is killed at half and started again loses or repeats a row.

    python -m benchmarks.predictions --rows 5000000

Composes a Parquet file of short rows, each with an id; tokenizes it by `smartbatch prepare`; starts `smartbatch
predict` of a tiny BERT in a process of its own, whose memory is read every tenth of a second; kills it by SIGKILL when
half of the shards are there; and starts the same command again. Memory is counted from the moment in which predicting
starts: what is the process' own, and all that is resident, which counts the pages of memory-mapped files too, that the
system takes back when it needs them.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import lightning as L
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.callbacks import Callback
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from benchmarks.common import SEED, Row, report
from smartbatch_lightning import demo

_ROWS_COMPOSED_TOGETHER = 2**18
_MIB = 2**20
_STARTED = Path("started")


class TellsStart(Callback):
    """Makes a file when the first batch is predicted."""

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Makes it."""
        _STARTED.touch()


def compose(path: Path, num_rows: int) -> None:
    """Rows of one to eight words, and an id each that says its row."""
    words = np.array(["a", "dull", "fine", "slow", "bright", "film", "plot", "scene", "never", "quite", "is"], object)
    rng = np.random.default_rng(SEED)
    schema = pa.schema({"id": pa.string(), "text": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, num_rows, _ROWS_COMPOSED_TOGETHER):
            rows = range(first, min(first + _ROWS_COMPOSED_TOGETHER, num_rows))
            lengths = rng.integers(1, 9, len(rows))
            texts = [" ".join(words[rng.integers(0, len(words), length)]) for length in lengths]
            writer.write_table(pa.table({"id": [f"row-{row}" for row in rows], "text": texts}, schema))


def save_model(folder: Path) -> None:
    """A BERT of one layer that counts as trained, with the demo's tokenizer."""
    tokenizer = BertTokenizer.from_pretrained(demo.model_dir())
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        max_position_embeddings=32,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def predict(command: list[str], folder: Path, kill_at: int | None) -> Row:
    """Runs the command, and kills it when so many shards are there.

    Returns:
        Seconds, and memory in MiB: when the first batch is predicted, and at most from then on, above that.
    """
    started, shards = folder / _STARTED, folder / "predictions.parquet.shards"
    started.unlink(missing_ok=True)
    with (folder / "log.txt").open("ab") as log:
        # more threads would only wait for each other in a model as small as this
        variables = {"OMP_NUM_THREADS": "1", **os.environ}
        run = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=variables)
    process, own, resident, begun = psutil.Process(run.pid), [0], [0], 0.0
    while run.poll() is None:
        memory = process.memory_info()
        if started.exists():
            begun = begun or perf_counter()
            own.append(memory.rss - memory.shared)
            resident.append(memory.rss)
        if kill_at is not None and len(list(shards.glob("*.parquet"))) >= kill_at:
            run.kill()
        sleep(0.1)
    if run.returncode not in (0, -9) or len(own) < 3:
        raise SystemExit((folder / "log.txt").read_text()[-3000:])
    return {
        "run": "killed at half" if run.returncode else "went on to the end",
        "seconds": perf_counter() - begun,
        "own MiB at first": own[1] / _MIB,
        "most above": (max(own) - own[1]) / _MIB,
        "resident MiB at first": resident[1] / _MIB,
        "most above ": (max(resident) - resident[1]) / _MIB,
    }


def check(path: Path, num_rows: int) -> Row:
    """Counts the rows of the file, and those that are not there or there twice; each carries its own id."""
    index, wrong = [], 0
    for batch in pq.ParquetFile(path).iter_batches(columns=["index", "id"]):
        rows = batch.column("index").to_numpy()
        index.append(rows)
        wrong += sum(name != f"row-{row}" for name, row in zip(batch.column("id").to_pylist(), rows, strict=True))
    counts = np.bincount(np.concatenate(index), minlength=num_rows)
    return {
        "rows": int(counts.sum()),
        "lost": int((counts == 0).sum()),
        "more than once": int((counts > 1).sum()),
        "with another's id": wrong,
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch_size", type=int, default=512)
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        compose(folder / "rows.parquet", arguments.rows)
        save_model(folder / "model")
        options = [
            f"--model.pretrained={folder / 'model'}",
            f"--data.dataset={{test: {folder / 'rows.parquet'}}}",
            "--data.max_length=32",
            f"--data.batch_size={arguments.batch_size}",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
        ]
        script = str(Path(__file__).parents[1] / "train.py")
        subprocess.run([sys.executable, script, "prepare", *options], check=True, cwd=folder)
        command = [sys.executable, script, "predict", *options, "--predictions.columns=[id]"]
        command += ["--trainer.callbacks=benchmarks.predictions.TellsStart", "--trainer.enable_progress_bar=false"]
        half = max(1, arguments.rows // 2**16)
        runs = [predict(command, folder, half), predict(command, folder, None)]
        report("predictions", {"Memory": runs, "Rows": [check(folder / "predictions.parquet", arguments.rows)]})


if __name__ == "__main__":
    main()
