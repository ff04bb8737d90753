"""Tests of the embedded demo."""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, DatasetDict, load_dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from smartbatch_lightning import demo

TEXTS_SHA256 = "cf1a8e4dc37fa7a38e4ba70d58070a92164649b5531c83db7d884e55d2721759"
VOCABULARY_SHA256 = "922e63076587721c3877633318a4294af9a9d14ee4946471846dc2e33b99ef71"
WEIGHTS_SHA256 = "6d9dd80165c3211c2371983c7c3b3b3c50ab17f12600a737816bfc86fc3293ec"

MAKE_IT = "from smartbatch_lightning import demo; print(demo.data_dir()); print(demo.model_dir())"


def start_making(cache: Path) -> subprocess.Popen[str]:
    root = Path(demo.__file__).parents[1]
    environment = os.environ | {"SMARTBATCH_CACHE": str(cache), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", MAKE_IT]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def read(cache: Path) -> DatasetDict:
    return load_dataset(str(demo.data_dir()), cache_dir=str(cache / "datasets"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMARTBATCH_CACHE", str(folder))
        demo.data_dir()
    return folder


@pytest.fixture
def made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMARTBATCH_CACHE", str(cache))
    return cache


def test_the_demo_is_the_same_on_every_machine(made: Path) -> None:
    reviews = read(made)
    texts = hashlib.sha256()
    for split in ("train", "test"):
        for row in reviews[split]:
            texts.update(f"{row['label']} {row['text']}\n".encode())
    assert texts.hexdigest() == TEXTS_SHA256

    vocabulary = AutoTokenizer.from_pretrained(demo.model_dir()).get_vocab()
    listed = "\n".join(sorted(vocabulary, key=vocabulary.__getitem__))
    assert hashlib.sha256(listed.encode()).hexdigest() == VOCABULARY_SHA256

    weights = hashlib.sha256()  # uniform draws are the same bits on every processor
    for name, tensor in sorted(load_file(demo.model_dir() / "model.safetensors").items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    assert weights.hexdigest() == WEIGHTS_SHA256


def test_the_labels_are_named_and_balanced(made: Path) -> None:
    reviews = read(made)
    assert set(reviews) == {"train", "test"}
    for split in reviews.values():
        assert split.features["label"] == ClassLabel(names=["negative", "positive"])
        assert np.mean(split["label"]) == 0.5


def test_no_test_review_is_also_a_training_review(made: Path) -> None:
    reviews = read(made)
    assert not set(reviews["train"]["text"]) & set(reviews["test"]["text"])


def test_lengths_spread_like_reviews(made: Path) -> None:
    lengths = np.array([len(text.split()) for text in read(made)["train"]["text"]])
    assert 4 <= lengths.min() <= 10
    assert 160 <= np.median(lengths) <= 190
    assert 215 <= lengths.mean() <= 245
    assert 400 <= np.quantile(lengths, 0.9) <= 500
    assert lengths.max() >= 900


def test_lengths_do_not_tell_the_label(made: Path) -> None:
    train = read(made)["train"]
    lengths = np.array([len(text.split()) for text in train["text"]])
    assert abs(np.corrcoef(lengths, train["label"])[0, 1]) < 0.05


def test_no_word_alone_tells_the_label(made: Path) -> None:
    train = read(made)["train"]
    labels = np.array(train["label"])
    words = [set(text.lower().replace(".", " ").replace(",", " ").split()) for text in train["text"]]
    for word in set().union(*words):
        agreement = np.mean([word in review for review in words] == (labels == 1))
        assert 0.25 < agreement < 0.75, word


def test_the_model_folder_loads_like_any_other(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir(), local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(demo.model_dir(), local_files_only=True)
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 512
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.tokenize("The PLOT was gripping.") == ["the", "plot", "was", "gripping", "."]
    assert tokenizer.unk_token not in tokenizer.tokenize("A zebra quickly jumped over 25 foxes")
    assert model(**tokenizer("a real treat", return_tensors="pt")).logits.shape == (1, 2)


def test_a_made_demo_is_not_made_again(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (made / demo.NAME).rglob("*")}
    demo.data_dir()
    demo.model_dir()
    assert {path: path.stat().st_mtime_ns for path in (made / demo.NAME).rglob("*")} == before


@pytest.mark.slow
def test_two_processes_making_the_demo_at_once_both_get_it(tmp_path: Path) -> None:
    processes = [start_making(tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    folder = tmp_path / demo.NAME
    assert [output.split() for output in outputs] == [[str(folder / "data"), str(folder / "model")]] * 2
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["test.parquet", "train.parquet"]
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.slow
def test_a_half_written_demo_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start_making(tmp_path)
    unfinished = tmp_path / f"{demo.NAME}.unfinished"
    deadline = time.monotonic() + 60
    while not unfinished.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert unfinished.exists()
    assert not (tmp_path / demo.NAME).exists()

    monkeypatch.setenv("SMARTBATCH_CACHE", str(tmp_path))
    assert read(tmp_path)["train"].num_rows == demo.REVIEWS["train"]
    assert (demo.model_dir() / "model.safetensors").exists()
    assert not unfinished.exists()


@pytest.mark.slow
def test_making_the_demo_leaves_the_global_random_state_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMARTBATCH_CACHE", str(tmp_path))
    before = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()
    demo.model_dir()
    after = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])


def test_a_damaged_demo_is_made_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMARTBATCH_CACHE", str(tmp_path))
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    weights = demo.model_dir() / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    demo._made.cache_clear()  # as a new process
    loaded = load_file(demo.model_dir() / "model.safetensors")
    digest = hashlib.sha256()
    for name, tensor in sorted(loaded.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS_SHA256
