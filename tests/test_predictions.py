"""Predictions as a table: their columns, what is refused, and runs that are killed and go on."""

import json
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import run_predictions
import torch
from datasets import Dataset
from helpers import Fork, cli, finish, trainer
from hypothesis import given
from hypothesis import strategies as st

from smartbatch_lightning import (
    BatchSpec,
    Evaluation,
    PadCollator,
    PredictionWriter,
    SequenceClassifier,
    SmartBatchDataModule,
    SmartBatchSampler,
    demo,
    storage,
)
from smartbatch_lightning.data import datamodule
from smartbatch_lightning.shards import TableShards

ROWS = run_predictions.ROWS


def reviews(number: int = ROWS) -> pd.DataFrame:
    frame = pd.read_parquet(demo.data_dir() / "test.parquet")[:number]
    return frame.assign(id=[f"={row}" for row in range(number)], tags=[["a", str(row)] for row in range(number)])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    reviews().to_parquet(tmp_path / "reviews.parquet", index=False)
    return tmp_path / "reviews.parquet"


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datamodule, "_PREDICTION_WINDOW", run_predictions.WINDOW)


def module(path: Path, **options) -> SmartBatchDataModule:
    names = ["negative", "positive"]
    return SmartBatchDataModule(
        {"test": str(path)}, str(demo.model_dir()), label_names=names, max_length=32, batch_size=8, **options
    )


def predict(rows: Path, folder: Path, model: SequenceClassifier | None = None, **options) -> PredictionWriter:
    writer = PredictionWriter(**{"path": str(folder / "predictions.parquet"), **options})
    run = trainer(folder, callbacks=[writer])
    run.predict(model or SequenceClassifier(str(demo.model_dir())), module(rows), return_predictions=False)
    return writer


# --- the plan ---


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=200),
    window=st.integers(6, 300),
    ranks=st.integers(1, 3),
    budget=st.sampled_from([None, 120]),
)
def test_when_a_window_is_done_on_all_ranks_every_row_up_to_its_end_was_predicted_once(lengths, window, ranks, budget):
    if len(lengths) < ranks:
        return
    spec = BatchSpec(batch_size=4, max_tokens_per_batch=budget)
    samplers = [SmartBatchSampler(lengths, spec, shuffle=False, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    for sampler in samplers:
        sampler.window = window
    batches = [list(sampler) for sampler in samplers]
    assert [len(own) for own in batches] == [len(samplers[0])] * ranks
    steps = samplers[0].window_steps().tolist()
    sizes, before, done = [], 0, 0
    for end in steps:
        seen = sorted(row for own in batches for batch in own[before:end] for row in batch)
        assert seen == list(range(done, done + len(seen)))
        sizes.append(len(seen))
        before, done = end, done + len(seen)
    assert done == len(lengths)
    assert max(sizes) <= max(window, ranks)
    assert max(sizes) - min(sizes) <= 1
    for sampler, own in zip(samplers, batches, strict=True):
        sampler.load_state_dict({"epoch": 0, "consumed": [(ranks, steps[0])]})
        assert list(sampler) == own[steps[0] :]


# --- columns ---


def test_one_column_may_be_given_by_its_name_alone(rows, small_windows, tmp_path) -> None:
    predict(rows, tmp_path, path=str(tmp_path / "out.parquet"), columns="text")
    assert pd.read_parquet(tmp_path / "out.parquet")["text"].tolist() == list(reviews()["text"])


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_columns_of_the_input_stand_beside_the_predictions_as_in_the_data(
    ending, rows, small_windows, tmp_path
) -> None:
    path = tmp_path / f"out.{ending}"
    predict(rows, tmp_path, path=str(path), columns=["id", "label", "tags", "text"])
    data = reviews()
    table = pd.read_parquet(path) if ending == "parquet" else pd.read_csv(path)
    carried = ["id", "label", "tags", "text"]
    assert table.columns.tolist() == ["index", *carried, "prediction", "probability_negative", "probability_positive"]
    assert table["index"].tolist() == list(range(ROWS))
    likelier = table["probability_positive"] > table["probability_negative"]
    assert table["prediction"].tolist() == np.where(likelier, "positive", "negative").tolist()
    assert table["text"].tolist() == data["text"].tolist()
    assert table["label"].tolist() == data["label"].tolist()
    if ending == "csv":
        assert table["id"].tolist() == [f"'={row}" for row in range(ROWS)]
        assert [json.loads(tags) for tags in table["tags"]] == data["tags"].tolist()
    else:
        assert table["id"].tolist() == data["id"].tolist()
        assert [list(tags) for tags in table["tags"]] == data["tags"].tolist()


def test_the_table_in_windows_is_that_of_one_window(rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict(rows, tmp_path, path=str(tmp_path / "one.parquet"))
    monkeypatch.setattr(datamodule, "_PREDICTION_WINDOW", 64)
    predict(rows, tmp_path, path=str(tmp_path / "five.parquet"))
    assert pq.ParquetFile(tmp_path / "five.parquet").num_row_groups == 5
    one, five = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("one", "five"))
    pd.testing.assert_frame_equal(one, five, atol=1e-6, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["five.parquet", "one.parquet", "reviews.parquet"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["id", "nosuch"], "has 'nosuch', but the split to predict has 'text', 'label', 'id', 'tags'"),
        (["index"], "but index, prediction and probability_NAME are reserved"),
        (["prediction"], "rename them in the data"),
        (["probability_x"], "rename them in the data"),
        (["id", "id"], "each name may appear once"),
    ],
)
def test_a_column_that_is_not_there_or_clashes_is_refused_before_anything_is_predicted(
    columns, message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {name: list(range(4)) for name in columns if name not in ("id", "nosuch")}
    frame = reviews(4).assign(**own)
    frame.to_parquet(tmp_path / "reviews.parquet", index=False)
    monkeypatch.setattr(SequenceClassifier, "forward", None)
    with pytest.raises(ValueError, match=message):
        predict(tmp_path / "reviews.parquet", tmp_path, columns=columns)
    assert [path.name for path in tmp_path.iterdir()] == ["reviews.parquet"]


def test_columns_of_loaders_that_are_no_data_modules_are_refused(rows, tmp_path: Path) -> None:
    data = module(rows)
    data.setup("predict")
    run = trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "out.csv"), columns=["id"])])
    with pytest.raises(ValueError, match="this run has NoneType. Leave --predictions.columns out"):
        run.predict(SequenceClassifier(str(demo.model_dir())), data.predict_dataloader())
    run = trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "out.csv"))])
    run.predict(SequenceClassifier(str(demo.model_dir())), data.predict_dataloader())
    assert pd.read_csv(tmp_path / "out.csv")["index"].tolist() == list(range(ROWS))


# --- never overwritten ---


def test_a_file_that_is_there_is_refused_before_the_model_runs_unless_it_is_to_be_overwritten(
    rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "predictions.parquet"
    path.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(SequenceClassifier, "forward", None)
        with pytest.raises(ValueError, match=r"predictions.parquet already exists. Give another --predictions.path"):
            predict(rows, tmp_path)
    assert path.read_text() == "mine"
    predict(rows, tmp_path, overwrite=True)
    assert len(pd.read_parquet(path)) == ROWS


def test_a_folder_is_never_overwritten(rows, tmp_path: Path) -> None:
    mine = tmp_path / "predictions.parquet" / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(ValueError, match="predictions.parquet is a folder. Give another --predictions.path"):
        predict(rows, tmp_path, overwrite=True)
    assert mine.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_the_command_refuses_to_overwrite_before_it_tokenizes_and_keeps_no_predictions(
    rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("predictions.parquet").write_text("mine")
    args = ["--data.max_length=24", f"--data.dataset={{test: {rows}}}", "--predictions.columns=[id,label]"]
    args.append(f"--model.pretrained={demo.model_dir()}")
    with monkeypatch.context() as patch:
        patch.setattr(SmartBatchDataModule, "prepare_data", None)
        with pytest.raises(ValueError, match="predictions.parquet already exists"):
            cli("predict", *args)
    run = cli("predict", *args, "--predictions.overwrite=true", "--data.num_workers=1")
    table = pd.read_parquet("predictions.parquet")
    assert table.columns.tolist()[:4] == ["index", "id", "label", "prediction"]
    assert table["index"].tolist() == list(range(ROWS))
    assert run.trainer.predict_loop.predictions == []
    kept = run.trainer.predict_dataloaders.batch_sampler.seen_batch_indices
    assert len(kept) == 19
    assert [number for number, batch in enumerate(kept) if batch] == [18]  # Lightning's of the others are let go


# --- killed ---


def seen(folder: Path) -> list[list[int]]:
    """Rows that the model saw in each run, over all ranks."""
    runs: dict[int, list[int]] = {}
    for path in sorted(folder.glob("rows-*.txt")):
        runs.setdefault(int(path.stem.split("-")[1]), []).extend(map(int, path.read_text().split()))
    return [runs[number] for number in sorted(runs)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("whole")
    reviews().to_parquet(folder / "reviews.parquet", index=False)
    run_predictions.main(folder / "run", 1)
    return pd.read_parquet(folder / "run" / "predictions.parquet")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "number", "status"),
    [
        ([1, 1, 1], signal.SIGKILL, -signal.SIGKILL),
        ([1, 1], signal.SIGTERM, 128 + signal.SIGTERM),
        ([2, 2], signal.SIGKILL, -signal.SIGKILL),
        ([2, 1], signal.SIGKILL, -signal.SIGKILL),
        ([1, 2], signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["killed twice", "SIGTERM", "two ranks", "two ranks, then one", "one rank, then two"],
)
def test_a_run_that_was_killed_goes_on_and_no_row_is_lost_or_twice(
    ranks, number, status, rows, uninterrupted, tmp_path: Path
) -> None:
    """Windows of 61 or 60 rows, 8 batches on one rank and 4 on each of two; the kills fall into later windows."""
    folder = tmp_path / "run"
    for before in ranks[:-1]:
        after = 20 // before
        run = Fork(folder, before, run_predictions.main, folder, before, int(number), after)
        assert run.wait(timeout=120) == status, (folder / "log.txt").read_text()[-3000:]
        assert not (folder / "predictions.parquet").exists()
    finish(Fork(folder, ranks[-1], run_predictions.main, folder, ranks[-1]), folder)
    table = pd.read_parquet(folder / "predictions.parquet")
    pd.testing.assert_frame_equal(table, uninterrupted, atol=1e-6, rtol=0)
    runs = seen(folder)
    assert len(runs) == len(ranks)
    again = sum(map(len, runs)) - ROWS
    assert 0 <= again < 61 * (len(ranks) - 1)  # of the windows in which it was killed
    assert all(len(run) == len(set(run)) for run in runs)
    assert min(runs[-1]) > 0
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".txt") == ["predictions.parquet"]
    if number == signal.SIGTERM:
        assert "2 shards are in" in (folder / "log.txt").read_text()


@pytest.mark.slow
def test_a_run_that_was_killed_while_shards_were_joined_joins_them_without_the_model(
    rows, uninterrupted, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = Fork(folder, 1, run_predictions.main, folder, 1, int(signal.SIGKILL), 0, True)
    assert run.wait(timeout=120) == -signal.SIGKILL
    finish(Fork(folder, 1, run_predictions.main, folder, 1), folder)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "predictions.parquet"), uninterrupted)
    assert [len(run) for run in seen(folder)] == [ROWS, 0]


def interrupt(path: Path, folder: Path) -> None:
    """Leaves the shards of two windows."""

    class Interrupts(SequenceClassifier):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 20:
                raise RuntimeError("interrupted")
            return super().predict_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="interrupted"):
        predict(path, folder, Interrupts(str(demo.model_dir())))


@pytest.mark.parametrize("other", ["weights", "data"])
def test_what_a_killed_run_of_another_model_or_other_data_left_is_refused_or_overwritten(
    other, rows, small_windows, tmp_path: Path, capsys
) -> None:
    interrupt(rows, tmp_path)
    assert "2 shards are in" in capsys.readouterr().out
    model = SequenceClassifier(str(demo.model_dir()))
    model.configure_model()
    path = rows
    if other == "weights":
        torch.nn.init.zeros_(model.model.classifier.bias)
        torch.nn.init.zeros_(model.model.classifier.weight)
    else:
        path = tmp_path / "others.parquet"
        reviews()[::-1].to_parquet(path, index=False)
    with pytest.raises(ValueError, match=f"shards has 2 shards of an unfinished run, whose '{other}' differs?"):
        predict(path, tmp_path, model)
    predict(path, tmp_path, model, overwrite=True)
    table = pd.read_parquet(tmp_path / "predictions.parquet")
    assert table["index"].tolist() == list(range(ROWS))
    if other == "weights":
        assert (table["probability_positive"] == 0.5).all()


def test_columns_may_be_others_when_a_killed_run_goes_on(rows, small_windows, tmp_path: Path) -> None:
    interrupt(rows, tmp_path)
    predict(rows, tmp_path, columns=["label"])
    assert pd.read_parquet(tmp_path / "predictions.parquet")["label"].tolist() == reviews()["label"].tolist()


def test_a_loader_with_which_a_killed_run_went_on_is_whole_again(rows, small_windows, tmp_path: Path) -> None:
    data = module(rows)
    data.setup("predict")
    loader = data.predict_dataloader()
    interrupt(rows, tmp_path)
    for name in ("predictions", "again"):
        run = trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / f"{name}.parquet"))])
        run.predict(SequenceClassifier(str(demo.model_dir())), loader)
        assert pd.read_parquet(tmp_path / f"{name}.parquet")["index"].tolist() == list(range(ROWS))
        assert run.num_predict_batches == [40 if name == "again" else 24]


def test_several_loaders_or_batches_without_an_index_are_refused(rows, tmp_path: Path) -> None:
    data = module(rows)
    data.setup("predict")

    class OfAnyLoader(SequenceClassifier):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return super().predict_step(batch, batch_idx)

    model = OfAnyLoader(str(demo.model_dir()))
    run = trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "out.csv"))])
    with pytest.raises(ValueError, match="there are 2 loaders, but only one table to write"):
        run.predict(model, [data.predict_dataloader(), data.predict_dataloader()])
    data = module(rows, loader_kwargs={"collate_fn": without_index})
    with pytest.raises(ValueError, match="the batches have no 'index'"):
        run.predict(model, data)


def without_index(rows: list) -> dict:
    batch = PadCollator()(rows)
    del batch["index"]
    return batch


def test_limited_batches_are_predicted_alone(rows, small_windows, tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "out.csv"))], limit_predict_batches=10)
    run.predict(SequenceClassifier(str(demo.model_dir())), module(rows))
    table = pd.read_csv(tmp_path / "out.csv")
    assert len(table) == len(set(table["index"])) == 61 + 2 * 8  # a window, and two batches of the next
    assert table["index"].is_monotonic_increasing


# --- shards ---


def test_a_shard_counts_once_all_ranks_of_a_run_have_written_it(tmp_path: Path) -> None:
    shards = TableShards(tmp_path / "out.csv", "Ask.")
    assert shards.acquire({"data": 1}, overwrite=False) == 0
    for shard, rank, ranks in [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 0, 3), (2, 0, 1)]:
        shards.write(pa.table({"index": [10 * shard + rank]}), shard, rank, ranks)
    assert shards.num_finished == 1
    shards.write(pa.table({"index": [10]}), 1, 0, 1)
    assert shards.num_finished == 3
    shards.release()
    shards = TableShards(tmp_path / "out.csv", "Ask.")
    assert shards.acquire({"data": 1}, overwrite=False) == 3
    assert shards.join(3, "index", lambda table: table) == 4
    assert pd.read_csv(tmp_path / "out.csv")["index"].tolist() == [0, 1, 10, 20]


def test_a_folder_that_another_process_writes_to_or_a_rank_does_not_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_SECONDS_BETWEEN_MESSAGES", 0.01)
    monkeypatch.setattr(storage, "_SECONDS_TO_END", 0.02)
    first = TableShards(tmp_path / "out.csv", "Ask.")
    with pytest.raises(ValueError, match="Give a path on a disk that all ranks share"):
        first.check_shared()
    first.acquire({}, overwrite=False)
    first.check_shared()
    with pytest.raises(ValueError, match="another process is writing to .*out.csv.shards/run. Wait until it ends. Ask"):
        TableShards(tmp_path / "out.csv", "Ask.").acquire({}, overwrite=True)
    first.release()
    assert not first.folder.exists()


def test_a_damaged_shard_is_told_with_its_remedy(rows, small_windows, tmp_path: Path) -> None:
    interrupt(rows, tmp_path)
    part = tmp_path / "predictions.parquet.shards" / "000001.0-of-1.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(ValueError, match="000001.0-of-1.parquet is damaged: .* Delete it; the same command then"):
        predict(rows, tmp_path)
    part.unlink()
    predict(rows, tmp_path)
    assert pd.read_parquet(tmp_path / "predictions.parquet")["index"].tolist() == list(range(ROWS))


def test_ids_of_a_class_label_keep_their_names_so_that_a_table_can_be_evaluated_by_itself(tmp_path: Path) -> None:
    data = demo.data_dir() / "test.parquet"
    predict(data, tmp_path, columns=["label"])
    table = Dataset.from_parquet(str(tmp_path / "predictions.parquet"), cache_dir=str(tmp_path / "cache"))
    names = table.features["label"].names
    assert names == ["negative", "positive"]
    right = np.mean([names[label] == found for label, found in zip(table["label"], table["prediction"], strict=True)])
    evaluation = Evaluation.from_table(str(tmp_path / "predictions.parquet"))
    assert evaluation.results.summary["accuracy"] == pytest.approx(right)


def test_labels_in_csv_are_read_again_as_they_were_whatever_they_begin_with(tmp_path: Path) -> None:
    names = ["'=a", "''-b", "'c", "-d"]
    probabilities = {f"probability_{name}": np.eye(len(names))[number] for number, name in enumerate(names)}
    shards = TableShards(tmp_path / "out.csv", "Ask.")
    shards.acquire({}, overwrite=False)
    columns = {"index": range(len(names)), "label": names, "prediction": names, **probabilities}
    shards.write(pa.table({name: pa.array(values) for name, values in columns.items()}), 0, 0, 1)
    shards.join(1, "index", lambda table: table)
    shards.release()
    assert Evaluation.from_table(str(tmp_path / "out.csv")).results.summary["accuracy"] == 1


def test_what_a_subclass_adds_to_its_predictions_is_left_out_of_the_table(tmp_path: Path) -> None:
    class Adding(SequenceClassifier):
        def predict_step(self, batch, batch_idx):
            return {**super().predict_step(batch, batch_idx), "note": "mine", "number": batch_idx}

    rows = [{"text": "a fine film"}, {"text": "dull"}]
    data = SmartBatchDataModule(rows, str(demo.model_dir()), max_length=16, label_names=["negative", "positive"])
    trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "rows.csv"))]).predict(Adding(), data)
    table = pd.read_csv(tmp_path / "rows.csv")
    assert list(table) == ["index", "prediction", "probability_negative", "probability_positive"]
    assert table["index"].tolist() == [0, 1]
