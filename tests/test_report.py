"""Tests of the report: its numbers, and that it can be looked at."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import cli
from matplotlib.image import imread

from smartbatch_lightning import SmartBatchDataModule, demo
from smartbatch_lightning.console import echo, table_of
from smartbatch_lightning.plots import as_png
from smartbatch_lightning.report import figures
from smartbatch_lightning.report.padding_report import PaddingReport

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

ROOT = Path(__file__).parent.parent
WAYS = [
    ("random", "max_length"),
    *((batching, padding) for padding in ("longest", "packed") for batching in ("random", "tutorial", "smart")),
]


@pytest.fixture(scope="module")
def demo_report() -> PaddingReport:
    return PaddingReport.from_datamodule(SmartBatchDataModule(seed=1), ranks=4)


def test_the_splits_are_counted_by_class(demo_report: PaddingReport) -> None:
    train, test = demo_report.splits
    assert (train.name, train.samples) == ("train", demo.REVIEWS["train"])
    assert train.classes == {"negative": 1000, "positive": 1000}
    assert (test.name, test.samples) == ("test", demo.REVIEWS["test"])
    assert sum(test.classes.values()) == 600


@pytest.mark.slow
def test_the_share_that_is_cut_is_told(own_cache: Path) -> None:
    data = SmartBatchDataModule(validation_split=None, seed=1)
    told = PaddingReport.from_datamodule(data).splits[0].truncated
    whole = [len(data.tokenizer(text)["input_ids"]) for text in data.splits["train"]["text"][:]]
    assert told == np.mean(np.array(whole) > 400)
    assert 0 < told < 1


def test_every_batching_and_padding_is_weighed_against_fixed_padding(demo_report: PaddingReport) -> None:
    by_way = {(one.batching, one.padding): one for one in demo_report.strategies}
    assert list(by_way) == WAYS
    fixed = by_way["random", "max_length"]
    real = int(demo_report.lengths.sum())
    assert (fixed.tokens, fixed.savings_vs_fixed, fixed.expected_speedup) == (1800 * 400, 0, 1)
    assert all(one.tokens == real and one.padding_ratio == 0 for way, one in by_way.items() if way[1] == "packed")
    smart = by_way["smart", "longest"]
    assert real < smart.tokens < by_way["random", "longest"].tokens < fixed.tokens
    assert smart.is_configured
    assert sum(one.is_configured for one in demo_report.strategies) == 1
    assert smart.largest_batch == (16, 400)
    assert smart.balance < by_way["random", "longest"].balance < 1.2
    assert by_way["random", "packed"].batch_overlap < 0.02 < smart.batch_overlap < 1
    assert fixed.tokens / smart.tokens < smart.expected_speedup < (fixed.tokens / smart.tokens) ** 2


def test_a_token_budget_is_reported_as_it_would_be_trained() -> None:
    report = PaddingReport.from_datamodule(SmartBatchDataModule(seed=1, max_tokens_per_batch=3000, padding="packed"))
    by_way = {(one.batching, one.padding): one for one in report.strategies}
    samples, width = by_way["smart", "longest"].largest_batch
    assert 2800 < samples * width <= 3000
    assert by_way["smart", "packed"].is_configured
    assert 2800 < by_way["smart", "packed"].largest_batch[1] <= 3000


def test_the_command_prints_tables_and_writes_json_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("report", f"--folder={tmp_path / 'report'}", "--data.padding=packed", "--ranks=4")
    printed = capsys.readouterr().out
    assert "[positive]" in printed
    assert "[negative]" in printed
    assert "smart, packed *" in printed
    assert "720,000" in printed
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    assert told["ranks"] == 4
    assert len(told["strategies"]) == len(WAYS)
    for name in ("classes", "lengths", "tokens", "widths"):
        picture = imread(tmp_path / "report" / f"{name}.png")
        assert picture.shape[1] >= 1200
        assert picture[..., :3].std() > 0.05  # something is drawn on it


@pytest.mark.slow
def test_data_without_labels_or_a_model_of_their_own_are_reported(tmp_path: Path, minilm: str) -> None:
    (tmp_path / "texts.csv").write_text("text,label\n" + "fine,1\nbad,0\n" * 20)
    report = PaddingReport.from_datamodule(
        SmartBatchDataModule(str(tmp_path / "texts.csv"), minilm, validation_split=None)
    )
    assert report.splits[0].classes == {"0": 20, "1": 20}
    report.save(tmp_path / "told")
    assert len(list((tmp_path / "told").iterdir())) == 5


def test_a_way_for_which_the_budget_has_no_room_is_left_out_and_test_labels_may_be_none(tmp_path: Path, minilm) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "fine indeed,1\nbad,0\n" * 20)
    (tmp_path / "test.csv").write_text("text,label\nwho knows,-1\n")
    files = {name: str(tmp_path / f"{name}.csv") for name in ("train", "test")}
    data = SmartBatchDataModule(files, minilm, validation_split=None, max_length=100, max_tokens_per_batch=50)
    report = PaddingReport.from_datamodule(data, ranks=3)
    assert [(one.batching, one.padding) for one in report.strategies] == list(WAYS[1:])
    assert report.splits[1].classes == {}
    assert all(one.expected_speedup > 10 for one in report.strategies)
    report.show()


def test_a_budget_that_only_packed_batches_fit_into_is_reported_without_widths(tmp_path: Path) -> None:
    long = " ".join(["dull"] * 18)  # two windows of 16 tokens at most, 32 with padding
    (tmp_path / "train.csv").write_text("text,label\n" + f"fine,1\n{long},0\n" * 20)
    data = SmartBatchDataModule(
        str(tmp_path / "train.csv"), str(demo.model_dir()), validation_split=None, max_length=16,
        truncation="windows", stride=0, padding="packed", max_tokens_per_batch=24,
    )  # fmt: skip
    report = PaddingReport.from_datamodule(data)
    assert {one.padding for one in report.strategies} == {"packed"}
    assert report.lengths.max() == 18 + 2 * 2
    assert {path.name for path in report.save(tmp_path / "told")} == {
        "report.json", "classes.png", "lengths.png", "tokens.png",
    }  # fmt: skip


def test_of_very_many_classes_the_table_names_the_first(tmp_path: Path, minilm: str, capsys) -> None:
    rows = [f"a film,class {number:02} of thirty" for number in range(30)] * 2
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    data = SmartBatchDataModule(str(tmp_path / "train.csv"), minilm, max_length=16, validation_split=None)
    PaddingReport.from_datamodule(data).show()
    printed = capsys.readouterr().out
    assert "class 00 of thirty 2, class 01 of thirty 2, 28 more" in printed
    assert max(map(len, printed.splitlines())) <= 110


def test_a_class_whose_name_looks_like_mathematics_is_drawn_as_it_is_written(tmp_path: Path) -> None:
    as_png(figures.classes({"train": {r"$\frac{$": 30, "_b": 20}}), tmp_path / "classes.png")
    assert imread(tmp_path / "classes.png")[..., :3].std() > 0.05


@pytest.mark.parametrize("ranks", [0, -1])
def test_a_report_for_no_ranks_is_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"ranks is {ranks}; give 1 or more"):
        PaddingReport.from_datamodule(SmartBatchDataModule(), ranks)


def test_data_of_other_labels_than_a_fine_tuned_model_has_are_reported(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "fine indeed,yes\nbad,no\n" * 20)
    cli("report", f"--data.dataset={tmp_path / 'train.csv'}", f"--model.pretrained={demo.model_dir()}", "--ranks=1")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["splits"][0]["classes"] == {
        "no": 20,
        "yes": 20,
    }


@pytest.mark.slow
def test_imdb_is_reported_with_its_known_numbers_in_twice_the_time_of_importing_lightning(
    imdb: Path, minilm: str, tmp_path: Path
) -> None:
    command = [
        sys.executable, str(ROOT / "train.py"), "report", "--config", str(ROOT / "configs" / "imdb.yaml"),
        f"--data.dataset={imdb}", f"--model.pretrained={minilm}", f"--folder={tmp_path}",
    ]  # fmt: skip
    environment = {**os.environ, "SMARTBATCH_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    seconds = []
    for one in (command, [sys.executable, "-c", "import lightning"], command):  # the first one tokenizes
        start = time.perf_counter()
        subprocess.run(one, check=True, capture_output=True, env=environment)
        seconds.append(time.perf_counter() - start)
    told = json.loads((tmp_path / "report.json").read_text())
    tokens = {(one["batching"], one["padding"]): one["tokens"] for one in told["strategies"]}
    assert tokens["random", "packed"] == 6_358_424
    assert tokens["random", "max_length"] == 10_000_000
    assert 6_370_000 <= tokens["tutorial", "longest"] <= 6_385_000
    _, importing, reporting = seconds
    assert reporting <= 2 * importing


def test_neither_markup_nor_escapes_of_the_data_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;owned\x07[red]good[/red]"
    echo(hostile)
    echo(table_of([{"class": hostile}]))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert printed.count(r"\x1b]0;owned\x07[red]good[/red]") == 2
