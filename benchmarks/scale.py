"""What millions of short texts cost: prepare, killed in the middle and started again; plan; 100 steps; predict.

    python -m benchmarks.scale --samples 1000000 10000000

Each part is the command line in a process of its own, with the whole of its start; texts are composed of phrases, 30
tokens on average, and the model is a BERT of one layer. `memory_gb` is the most that a process had to itself,
`resident_gb` also counts pages of files that it had mapped, which the system takes back where it needs room. What
grows with the number of texts is best told by `cpu_seconds`, which other work on the machine disturbs least.
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
from datasets import Dataset
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from benchmarks.common import SEED, Row, interleaved, minilm, report
from smartbatch_lightning.data.encoding import TextEncoder
from smartbatch_lightning.data.token_cache import tokenize_to_cache

_PHRASES = 20_000
_ROWS_COMPOSED_TOGETHER = 1_000_000
_MAX_LENGTH = 64
_TRAIN_PY = Path(__file__).parents[1] / "train.py"


def compose(path: Path, num_samples: int, words: NDArray[np.str_], seed: int = SEED) -> None:
    """Writes texts of four phrases each, and labels."""
    rng = np.random.default_rng(seed)
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
        max_position_embeddings=_MAX_LENGTH,
        id2label={0: "0", 1: "1"},
        label2id={"0": 0, "1": 1},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return np.array(sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 3))


def tokenizing(num_samples: int, repeats: int, folder: Path) -> list[Row]:
    """Seconds to tokenize into the cache, over those of the Rust tokenizer alone, whose result nobody looks at."""
    compose(folder / "texts.parquet", num_samples, save_model(folder / "model"))
    texts = Dataset.from_parquet(str(folder / "texts.parquet"), cache_dir=str(folder / "hf"))
    tokenizer = BertTokenizer.from_pretrained(folder / "model")
    rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rust.no_padding()
    rust.enable_truncation(_MAX_LENGTH)
    lists = [block["text"] for block in texts.iter(2**12)]

    def alone(turn: int) -> None:
        for block in lists:
            rust.encode_batch_fast(block)

    def to_cache(turn: int) -> None:
        tokenize_to_cache(texts, TextEncoder(tokenizer, ["text"], None, _MAX_LENGTH), folder / str(turn))

    seconds = interleaved({"the Rust tokenizer alone": alone, "tokenize_to_cache": to_cache}, repeats)
    first = next(iter(seconds.values()))
    return [{"way": way, "seconds": taken, "times_as_long": taken / first} for way, taken in seconds.items()]


def run(
    part: str, num_samples: int, arguments: list[str], folder: Path, until: Callable[[], bool] | None = None
) -> Row:
    """Seconds and memory of a command, which is killed when something is so."""
    environment = os.environ | {"SMARTBATCH_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    start, cpu_seconds, memory, resident = perf_counter(), 0.0, 0, 0
    with (folder / "log.txt").open("wb") as log:
        command = subprocess.Popen(
            [sys.executable, str(_TRAIN_PY), *arguments], env=environment, cwd=folder, stdout=log, stderr=log
        )
        process = psutil.Process(command.pid)
        while command.poll() is None:
            used, cpu_seconds = process.memory_info(), sum(process.cpu_times()[:2])
            memory, resident = max(memory, used.rss - used.shared), max(resident, used.rss)
            if until is not None and until():
                command.kill()
            sleep(0.05)
    seconds = perf_counter() - start
    if command.wait() and until is None:
        raise SystemExit((folder / "log.txt").read_text()[-3000:])
    row = {
        "part": part,
        "samples": num_samples,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "memory_gb": memory / 1e9,
        "resident_gb": resident / 1e9,
    }
    print(row, flush=True)
    return row


def at_scale(num_samples: int, num_predicted: int, folder: Path) -> tuple[list[Row], Row]:
    """All parts in a folder: what each costs, and what the kill and the disk say."""
    words = save_model(folder / "model")
    compose(folder / "train.parquet", num_samples, words)
    compose(folder / "test.parquet", num_predicted, words, SEED + 1)  # not the same texts, whose tokens would be there
    common = [
        "--model.pretrained=model",
        "--data.dataset={train: train.parquet, test: test.parquet}",
        "--data.validation_split=null",
        f"--data.max_length={_MAX_LENGTH}",
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
    parser.add_argument("--tokenized", type=int, default=200_000, help="samples of the comparison with Rust alone")
    parser.add_argument("--repeats", type=int, default=5, help="of that comparison")
    args = parser.parse_args()
    with TemporaryDirectory() as name:
        tables = {"tokenizing": tokenizing(args.tokenized, args.repeats, Path(name)), "parts": [], "kill and disk": []}
    for num_samples in args.samples:
        with TemporaryDirectory() as name:
            rows, facts = at_scale(num_samples, args.predicted, Path(name))
        tables["parts"] += rows
        tables["kill and disk"].append(facts)
    report("scale", tables)


if __name__ == "__main__":
    main()
