"""Texts that are tokenized when their batch is made."""

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import Seen, assert_same, cli, slow, trainer
from run_to_be_killed import Dropped
from test_families import make_tiny
from test_resume import SaveAndStop, train
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from smartbatch_lightning import PredictionWriter, SequenceClassifier, SmartBatchDataModule, TrainingMonitor, demo
from smartbatch_lightning.callbacks.memory_check import MemoryCheck
from smartbatch_lightning.data.encoding import TextEncoder
from smartbatch_lightning.data.lazy import LazyTokenTable
from smartbatch_lightning.report.padding_report import PaddingReport

WORDS = [
    "film",
    "unwatchable",
    "naïve",
    "日本語",
    "café,",
    "(so)",
    "it's",
    "—",
    "a",
    "😀!",
    "antidisestablishmentarianism",
]


def texts(number: int) -> list[str]:
    rng = random.Random(1)
    return ["", *(" ".join(rng.choices(WORDS, k=rng.randint(0, 40))) for _ in range(number - 2)), ""]


def data(given: list[str] | Dataset | None = None, **options) -> SmartBatchDataModule:
    """Of texts with two labels, or of the demo."""
    rows = "demo" if given is None else [{"text": text, "label": row % 2} for row, text in enumerate(given)]
    return SmartBatchDataModule(
        rows, **{"tokenization": "lazy", "max_length": 32, "seed": 1, "batch_size": 8, **options}
    )


@pytest.fixture(scope="module")
def tokenizer(minilm: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(minilm)


# --- what is made of texts ---


@pytest.mark.parametrize(
    ("batching", "padding", "workers"),
    [("smart", "longest", 1), ("random", "packed", 0), slow("tutorial", "longest", 2), slow("smart", "max_length", 0)],
)
@pytest.mark.parametrize("columns", ["one", slow("pairs"), slow("joined")])
def test_a_batch_holds_what_the_tokenizer_makes_of_its_texts(
    batching: str, padding: str, workers: int, columns: str, tokenizer, tmp_path: Path
) -> None:
    frame = pd.DataFrame({"text": texts(300), "more": texts(300)[::-1], "label": [0, 1] * 150})
    given = {} if columns == "one" else {"text_columns": ["text", "more"]}
    if columns == "joined":
        given["text_separator"] = " // "
    module = SmartBatchDataModule(
        frame, tokenizer, tokenization="lazy", max_length=32, batch_size=8, batching=batching, padding=padding,
        num_workers=workers, validation_split=None, cache_dir=str(tmp_path), **given,
    )  # fmt: skip
    module.prepare_data()
    module.setup("fit")
    rows = []
    for batch in module.train_dataloader():
        packed = padding == "packed"
        lengths = batch["cu_seq_lens_q"].diff() if packed else batch["attention_mask"].sum(1)
        kept = slice(None) if packed else batch["attention_mask"].bool()
        for row, ids, types in zip(
            batch["index"].tolist(),
            batch["input_ids"][0 if packed else kept].split(lengths.tolist()),
            batch.get("token_type_ids", batch["input_ids"])[0 if packed else kept].split(lengths.tolist()),
            strict=True,
        ):
            first, second = frame["text"][row], frame["more"][row]
            joined = {"one": [first], "pairs": [first, second or None], "joined": [f"{first} // {second}"]}[columns]
            expected = tokenizer(*joined, truncation=True, max_length=32)
            assert ids.tolist() == expected["input_ids"]
            assert "token_type_ids" not in batch or types.tolist() == expected["token_type_ids"]
            rows.append(row)
        assert ("token_type_ids" in batch) == (columns == "pairs")
    assert sorted(rows) == list(range(300))
    assert list(tmp_path.iterdir()) == []  # nothing was tokenized ahead


@pytest.mark.parametrize("truncation", [slow("tail"), slow("head_tail"), "windows"])
def test_long_texts_are_cut_as_those_that_are_tokenized_ahead(truncation: str, tmp_path: Path) -> None:
    base, samples = str(demo.model_dir()), []
    for tokenization in ("ahead", "lazy"):
        module = data(texts(60), tokenizer=base, max_length=24, truncation=truncation, tokenization=tokenization)
        module.setup("fit")
        samples.append([module.train_data[sample]["input_ids"].tolist() for sample in range(len(module.train_data))])
        run = trainer(tmp_path, limit_val_batches=1, max_steps=2)
        run.fit(SequenceClassifier(base), module)
    assert samples[0] == samples[1]
    assert (max(map(len, samples[0])) > 24) == (truncation == "windows")


def test_threads_of_the_tokenizer_do_not_stop_a_forked_worker(minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # with which it would wait for threads that a fork lacks
    module = data(texts(40), tokenizer=minilm, num_workers=1, loader_kwargs={"timeout": 60})
    module.setup("fit")
    assert sum(len(batch["labels"]) for batch in module.train_dataloader()) == 36


# --- estimates ---


def table(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, columns=("text",), max_length=500) -> LazyTokenTable:
    return LazyTokenTable(dataset, TextEncoder(tokenizer, columns, None, max_length))


@pytest.mark.parametrize("columns", [("text",), ("text", "more")])
def test_tokens_that_words_and_punctuation_are_one_each_of_are_estimated_exactly(columns: tuple[str, ...]) -> None:
    rng = random.Random(2)
    rows = [" ".join(rng.choices(["film", "bad", "not,", "plot."], k=rng.randint(1, 30))) for _ in range(1500)]
    tokenizer = AutoTokenizer.from_pretrained(str(demo.model_dir()))
    lazy = table(Dataset.from_dict({"text": rows, "more": rows[::-1]}), tokenizer, columns, max_length=60)
    encoded = tokenizer(rows, *([rows[::-1]] if len(columns) == 2 else []), truncation=True, max_length=60)
    assert lazy.lengths.tolist() == [len(ids) for ids in encoded["input_ids"]]


def test_estimates_and_digest_are_those_of_the_rows_however_they_are_stored(tokenizer, tmp_path: Path) -> None:
    rows = texts(1500)
    whole = table(Dataset.from_dict({"text": rows}), tokenizer)
    true = [len(ids) for ids in tokenizer(rows)["input_ids"]]
    assert abs(whole.lengths.sum() / sum(true) - 1) < 0.05
    assert np.corrcoef(whole.lengths, true)[0, 1] > 0.95
    order = np.random.default_rng(0).permutation(1500)
    shuffled = Dataset.from_dict({"text": [rows[row] for row in order]})
    stored = [
        concatenate_datasets([Dataset.from_dict({"text": rows[:7]}), Dataset.from_dict({"text": rows[7:]})]),
        shuffled.select(np.argsort(order)),  # by an indices mapping
        Dataset(pa.table({"text": pa.array(["x", *rows, "y"], pa.large_string())})).select(range(1, 1501)),
    ]
    stored[0].save_to_disk(tmp_path / "saved")
    stored.append(Dataset.load_from_disk(tmp_path / "saved"))
    for other in (table(dataset, tokenizer) for dataset in stored):
        assert other.lengths.tolist() == whole.lengths.tolist()
        assert other.digest == whole.digest
    assert table(shuffled, tokenizer).digest != whole.digest
    assert table(Dataset.from_dict({"text": [*rows[:-1], " "]}), tokenizer).digest != whole.digest
    assert table(Dataset.from_dict({"text": rows}), tokenizer, max_length=501).digest != whole.digest


def test_of_texts_that_are_all_cut_every_estimate_is_in_range(tokenizer) -> None:
    lazy = table(Dataset.from_dict({"text": ["film " * number for number in range(50, 80)]}), tokenizer, max_length=20)
    assert set(lazy.lengths.tolist()) <= set(range(1, 21))


# --- runs ---


def test_a_run_counts_its_real_tokens_and_ends_as_if_tokenized_ahead_by_the_same_plan(tmp_path: Path) -> None:
    ended = []
    for tokenization in ("ahead", "lazy"):
        torch.manual_seed(0)
        model, monitor, seen = Dropped(learning_rate=1e-3), TrainingMonitor(), Seen()
        run = trainer(tmp_path, callbacks=[monitor, seen, MemoryCheck()], limit_val_batches=1)
        run.fit(model, data(texts(100), tokenizer=str(demo.model_dir()), batching="random", tokenization=tokenization))
        ended.append((seen.epochs, monitor.total.real_tokens, monitor.total.tokens, model.state_dict()))
    (*ahead, weights), (*lazy, others) = ended
    assert ahead == lazy
    assert_same(weights, others)


@pytest.mark.parametrize("workers", [0, slow(2)])
def test_a_run_that_is_resumed_is_that_of_one_that_was_not(workers: int, minilm: str, tmp_path: Path) -> None:
    def module(**options) -> SmartBatchDataModule:
        return data(
            texts(230), tokenizer=str(demo.model_dir()), validation_split=0.1, num_workers=workers, batch_size=32,
            **{"max_length": 24, **options},
        )  # fmt: skip

    whole, weights = train(tmp_path, module=module())
    train(tmp_path, SaveAndStop(tmp_path / "a.ckpt", 1, 2), module=module())
    after, resumed = train(tmp_path, ckpt_path=tmp_path / "a.ckpt", module=module())
    assert after == [[], whole[1][3:], whole[2]]
    assert_same(resumed, weights)
    for options in ({"tokenization": "ahead"}, {"max_length": 23}):
        with pytest.raises(ValueError, match=r"resumed exactly: data \(texts, labels, tokenizer, tokenization,"):
            train(tmp_path, ckpt_path=tmp_path / "a.ckpt", module=module(**options))


def test_predictions_are_those_of_texts_that_are_tokenized_ahead(tmp_path: Path) -> None:
    model = SequenceClassifier(str(demo.model_dir()))
    for tokenization in ("ahead", "lazy"):
        module = data(texts(150), tokenizer=str(demo.model_dir()), tokenization=tokenization, predict_split="train")
        writer = PredictionWriter(str(tmp_path / f"{tokenization}.parquet"))
        trainer(tmp_path, callbacks=[writer]).predict(model, module, return_predictions=False)
    ahead, lazy = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("ahead", "lazy"))
    pd.testing.assert_frame_equal(ahead, lazy, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_the_command_trains_lazily(tmp_path: Path) -> None:
    ran = cli(
        "fit", "--data.tokenization=lazy", f"--data.cache_dir={tmp_path}", "--data.num_workers=1",
        "--data.max_length=24", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1",
        "--trainer.max_epochs=1", "--trainer.enable_checkpointing=false",
    )  # fmt: skip
    assert ran.trainer.global_step == 2
    assert not list(tmp_path.glob("tokens-*"))


@pytest.mark.slow
def test_the_report_counts_tokens_and_says_what_they_would_be_tokenized_ahead(minilm: str) -> None:
    lazy, ahead = (
        PaddingReport.from_datamodule(data(texts(300), tokenizer=minilm, tokenization=one, jitter=1.0))
        for one in ("lazy", "ahead")
    )
    assert lazy.splits == ahead.splits
    assert lazy.lengths.tolist() == ahead.lengths.tolist()
    padding, least = ({one.name: one.padding_ratio for one in report.strategies} for report in (lazy, ahead))
    assert padding["smart, longest"] > least["smart, longest"] == lazy.tokenized_ahead
    assert padding["smart, packed"] == padding["random, max_length"] - least["random, max_length"] == 0
    assert ahead.tokenized_ahead is None
    assert lazy.frontier[1].padding_ratio > ahead.frontier[1].padding_ratio


# --- what is refused ---


def test_what_lazy_tokenization_does_not_go_with_is_refused_in_one_line() -> None:
    class Own(SmartBatchDataModule):
        def tokenize(self, dataset: Dataset) -> list[list[int]]:
            return [[2, 3]] * len(dataset)

    with pytest.raises(
        ValueError, match="max_tokens_per_batch is 800, but with tokenization 'lazy'.*--data.batch_size"
    ):
        data(batch_size=None, max_tokens_per_batch=800)
    with pytest.raises(ValueError, match="tokenization is 'later'; choose 'ahead' or 'lazy'"):
        data(tokenization="later")
    with pytest.raises(ValueError, match="tokenization is 'lazy', but Own.tokenize gave token ids"):
        Own(tokenization="lazy").prepare_data()


def test_texts_of_which_no_samples_can_be_made_are_refused_before_training(minilm: str) -> None:
    dataset = Dataset.from_dict({"text": ["fine", None, "film"], "label": [0, 1, 0]})
    with pytest.raises(ValueError, match="no text in row 1"):
        data(dataset["text"], tokenizer=minilm).prepare_data()
    with pytest.raises(ValueError, match="has a transform"):
        table(dataset.with_transform(lambda rows: rows), AutoTokenizer.from_pretrained(minilm))


@pytest.mark.parametrize(("number", "workers"), [(100, 0), (1000, 1)])
def test_a_text_that_spells_the_end_token_is_told_by_its_row_at_the_latest_in_its_batch(
    number: int, workers: int, tmp_path: Path
) -> None:
    """Of a hundred all are looked at before training, of a thousand about every fourth."""
    make_tiny("bart", tmp_path / "base")
    given = ["fine film"] * number
    given[77] = "fine</s>"
    module = data(given, num_workers=workers, validation_split=None)
    run = trainer(tmp_path, limit_val_batches=0)
    with pytest.raises(ValueError, match="'</s>' tokens in row 77 .counted from 0. is 2, but 1"):
        run.fit(SequenceClassifier(str(tmp_path / "base")), module)
    assert hasattr(module, "train_data") == (number == 1000)
