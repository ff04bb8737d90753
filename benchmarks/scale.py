"""What millions of short texts cost: prepare, killed in the middle and started again; plan; 100 steps; predict.

    python -m benchmarks.scale --samples 1000000 10000000

Each part is the command line in a process of its own, with the whole of its start; texts are composed of phrases, 30
tokens on average, and the model is a BERT of one layer. `memory_gb` is the most that a process had to itself,
`resident_gb` also counts pages of files that it had mapped, which the system takes back where it needs room.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from benchmarks.common import SEED, Row, minilm, report

_PHRASES = 20_000
_ROWS_COMPOSED_TOGETHER = 1_000_000
_TRAIN_PY = Path(__file__).parents[1] / "train.py"


def compose(path: Path, num_samples: int, words: NDArray[np.str_]) -> None:
    """Writes texts of four phrases each, and labels."""
    rng = np.random.default_rng(SEED)
    phrases = pa.array([" ".join(rng.choice(words, rng.integers(2, 13))) for _ in range(_PHRASES)])
    schema = pa.schema({"text": pa.string(), "label": pa.int64()})
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, num_samples, _ROWS_COMPOSED_TOGETHER):
            rows = min(_ROWS_COMPOSED_TOGETHER, num_samples - first)
            parts = [phrases.take(pa.array(rng.integers(_PHRASES, size=rows))) for _ in range(4)]
            texts = pc.binary_join_element_wise(*parts, " ")
            writer.write_table(pa.table({"text": texts, "label": rng.integers(2, size=rows)}, schema))


def save_model(folder: Path) -> NDArray[np.str_]:
    """Writes a BERT of one layer that counts as trained, with a real tokenizer; returns words of its vocabulary."""
    tokenizer = BertTokenizer.from_pretrained(minilm())
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
        id2label={0: "0", 1: "1"},
        label2id={"0": 0, "1": 1},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return np.array(sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 3))


def run(
    part: str, num_samples: int, arguments: list[str], folder: Path, until: Callable[[], bool] | None = None
) -> Row:
    """Seconds and memory of a command, which is killed when something is so."""
    environment = os.environ | {"SMARTBATCH_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    start, memory, resident = perf_counter(), 0, 0
    with (folder / "log.txt").open("wb") as log:
        command = subprocess.Popen(
            [sys.executable, str(_TRAIN_PY), *arguments], env=environment, cwd=folder, stdout=log, stderr=log
        )
        process = psutil.Process(command.pid)
        while command.poll() is None:
            used = process.memory_info()
            memory, resident = max(memory, used.rss - used.shared), max(resident, used.rss)
            if until is not None and until():
                command.kill()
            sleep(0.05)
    seconds = perf_counter() - start
    if command.wait() and until is None:
        raise SystemExit((folder / "log.txt").read_text()[-3000:])
    return {
        "part": part,
        "samples": num_samples,
        "seconds": seconds,
        "memory_gb": memory / 1e9,
        "resident_gb": resident / 1e9,
    }


def at_scale(num_samples: int, num_predicted: int, folder: Path) -> tuple[list[Row], Row]:
    """All parts in a folder: what each costs, and what the kill and the disk say."""
    words = save_model(folder / "model")
    compose(folder / "train.parquet", num_samples, words)
    compose(folder / "test.parquet", num_predicted, words)
    common = [
        "--model.pretrained=model",
        "--data.dataset={train: train.parquet, test: test.parquet}",
        "--data.validation_split=null",
        "--data.max_length=64",
        "--data.batch_size=64",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
    ]

    def shards() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.arrow")}

    # of both splits a shard has 2**16 samples
    half = (num_samples + num_predicted) // 2**17
    rows = [run("prepare, killed", num_samples, ["prepare", *common], folder, lambda: len(shards()) >= half)]
    before = shards()
    rows.append(run("prepare, to the end", num_samples, ["prepare", *common], folder))
    kept = sum(shards().get(path) == made for path, made in before.items())
    rows.append(run("prepare, again", num_samples, ["prepare", *common], folder))
    rows.append(run("plan, 100 steps", num_samples, ["fit", *common, "--trainer.max_steps=100"], folder))
    rows.append(run(f"predict {num_predicted:,}", num_samples, ["predict", *common], folder))
    made, disk = len(shards()), {name: _gigabytes(folder / name) for name in ("train.parquet", "hf", "cache")}
    return rows, {
        "samples": num_samples,
        "shards_at_the_kill": len(before),
        "of_these_kept": kept,
        "shards_at_the_end": made,
        **{f"{name}_gb": size for name, size in disk.items()},
    }


def _gigabytes(path: Path) -> float:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(file.stat().st_size for file in files) / 1e9


def main() -> None:
    """Runs all parts and reports."""
    parser = argparse.ArgumentParser(description="See the first lines of the file.")
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--predicted", type=int, default=1_000_000)
    args = parser.parse_args()
    tables: dict[str, list[Row]] = {"parts": [], "kill and disk": []}
    for num_samples in args.samples:
        with TemporaryDirectory() as folder:
            rows, facts = at_scale(num_samples, args.predicted, Path(folder))
        tables["parts"] += rows
        tables["kill and disk"].append(facts)
    report("scale", tables)


if __name__ == "__main__":
    main()
