"""Tests of labels: they go by name, whatever numbers stand for them, and no class is lost on the way."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from helpers import slow, trainer
from lightning.pytorch.callbacks import Callback

from smartbatch_lightning import PredictionWriter, SequenceClassifier, SmartBatchDataModule, demo
from smartbatch_lightning.data.splits import stratified_split
from smartbatch_lightning.tasks import SingleLabelClassification
from smartbatch_lightning.tasks.source import LabelSource


def model_folder() -> str:
    return str(demo.model_dir())


def module(dataset, **options) -> SmartBatchDataModule:
    return SmartBatchDataModule(dataset, model_folder(), **{"max_length": 16, "batch_size": 8, "seed": 0, **options})


def write(path: Path, rows: list[tuple], header: str = "text,label") -> str:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def named(texts: list[str], ids: list[int], names: list[str]) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": texts, "label": ids}, features=features)


@pytest.mark.parametrize("values", [range(12), range(1, 6)], ids=["0 to 11", "stars 1 to 5"])
def test_the_id_of_a_class_label_stands_for_its_name_and_for_nothing_else(values, tmp_path: Path) -> None:
    """`class_encode_column` sorts the names of whole numbers as text: '0', '1', '10', '11', '2'."""
    values = list(values)
    plain = Dataset.from_dict({"text": ["a film"] * 60, "label": [values[row % len(values)] for row in range(60)]})
    encoded = plain.class_encode_column("label")
    encoded.save_to_disk(tmp_path / "saved")
    data = module(str(tmp_path / "saved"), validation_split=None)
    data.setup("fit")
    names = [data.label_names[number] for number in data.train_data.labels]
    assert names == [str(label) for label in plain["label"]]
    assert data.task.decode(data.train_data.labels).to_pylist() == list(plain["label"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that tells neg from pos without an error."""
    tmp_path = tmp_path_factory.mktemp("trained")
    rows = [("a dull film", "neg"), ("a fine film", "pos")] * 20
    data = module(write(tmp_path / "train.csv", rows), validation_split=None)
    run = trainer(tmp_path, max_epochs=30, limit_val_batches=0)
    run.fit(SequenceClassifier(model_folder(), learning_rate=1e-3), data)
    run.save_checkpoint(tmp_path / "trained.ckpt")
    return tmp_path / "trained.ckpt"


@pytest.mark.parametrize("names", [slow(["neg", "pos"]), ["pos", "neg"]])
def test_a_checkpoint_is_tested_on_labels_of_its_names_whatever_their_order(names, trained, tmp_path: Path) -> None:
    test = named(["a dull film", "a fine film"] * 5, [names.index("neg"), names.index("pos")] * 5, names)
    test.to_parquet(tmp_path / "test.parquet")
    model = SequenceClassifier.load_from_checkpoint(trained)
    [measured] = trainer(tmp_path).test(model, module({"test": str(tmp_path / "test.parquet")}))
    assert measured["test_accuracy"] == 1.0


def test_a_training_split_in_another_order_does_not_change_what_a_checkpoint_means(trained, tmp_path: Path) -> None:
    split = named(["a dull film", "a fine film"] * 5, [1, 0] * 5, ["pos", "neg"])
    DatasetDict(train=split, test=split).save_to_disk(tmp_path / "saved")
    model = SequenceClassifier.load_from_checkpoint(trained)
    for stage in ("test", "validate"):
        data = module(str(tmp_path / "saved"), validation_split="test")
        [measured] = getattr(trainer(tmp_path), stage)(model, data)
        assert {value for name, value in measured.items() if name.endswith("accuracy")} == {1.0}
    losses = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            losses.append(float(outputs["loss"]))

    trainer(tmp_path, callbacks=[Losses()], limit_train_batches=1).fit(model, module(str(tmp_path / "saved")))
    assert losses[0] < 0.1  # it goes on with what it knows


def test_numbers_are_never_taken_for_the_names_of_words(trained, tmp_path: Path) -> None:
    data = module({"test": write(tmp_path / "test.csv", [("a dull film", 0), ("a fine film", 1)])})
    model = SequenceClassifier.load_from_checkpoint(trained)
    with pytest.raises(
        ValueError, match=r"has the label '0', which is not one of the 2 classes: 'neg', 'pos'.*label_names"
    ):
        trainer(tmp_path).test(model, data)
    data = module(data.dataset, label_names=["neg", "pos"])
    assert trainer(tmp_path).test(model, data)[0]["test_accuracy"] == 1.0


@pytest.mark.parametrize(
    "labels",
    [["", "pos"], [1, "x"], slow([0.5, 1.25]), slow(["bad", "good"]), slow(["pos", "pos"]), slow(["neg,pos", "x"])],
)
def test_labels_in_a_file_to_predict_play_no_part(labels: list, trained, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a dull film", "a fine film"], "label": labels})
    frame.to_csv(tmp_path / "new.csv", index=False)
    given = frame if labels == [1, "x"] else str(tmp_path / "new.csv")
    writer = PredictionWriter(str(tmp_path / "out.csv"))
    run = trainer(tmp_path, callbacks=[writer])
    run.predict(SequenceClassifier.load_from_checkpoint(trained), module(given))
    assert pd.read_csv(tmp_path / "out.csv")["prediction"].tolist() == ["neg", "pos"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        slow([True, False], [True, False]),
        (["07", "7"], ["07", "7"]),
        slow([7, 3], [7, 3]),
        slow(["b", "a"], ["b", "a"]),
    ],
)
@pytest.mark.parametrize("ending", ["parquet", slow("csv")])
def test_predicted_labels_stand_as_they_stood_in_the_data(labels, expected, ending: str, tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": ["a dull film", "a fine film"] * 20, "label": labels * 20})
    path = str(tmp_path / f"train.{ending}")
    data.to_csv(path) if ending == "csv" else data.to_parquet(path)
    data_module = module(path, validation_split=None, predict_split="train")
    run = trainer(
        tmp_path, max_epochs=30, limit_val_batches=0, callbacks=[PredictionWriter(str(tmp_path / "out.parquet"))]
    )
    model = SequenceClassifier(model_folder(), learning_rate=1e-3)
    run.fit(model, data_module)
    run.save_checkpoint(tmp_path / "run.ckpt")
    run.predict(SequenceClassifier.load_from_checkpoint(tmp_path / "run.ckpt"), data_module)
    assert pd.read_parquet(tmp_path / "out.parquet")["prediction"].tolist() == expected * 20


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rare", ["a", "zz"], ids=["sorted first", "sorted last"])
def test_a_class_of_one_sample_is_trained_and_said_to_be_so(rare: str, seed: int, tmp_path: Path, caplog) -> None:
    rows = [("a film", "m"), ("a dull film", "n")] * 20 + [("a rare film", rare)]
    with caplog.at_level("INFO"):
        data = module(write(tmp_path / "t.csv", rows), seed=seed, validation_split=0.2)
        data.setup("fit")
    assert 40 in data.train_data.rows
    assert sum("Too few samples" in record.message and repr(rare) in record.message for record in caplog.records) == 1


def test_fifty_classes_of_two_samples_take_turns_in_validation() -> None:
    """With a share of 0.1 ten samples of ten classes are set aside, and others with another seed."""
    labels = np.repeat(np.arange(50), 2)
    drawn = [labels[stratified_split(labels, 0.1, seed)[1]].tolist() for seed in range(4)]
    assert all(len(set(classes)) == 10 for classes in drawn)
    assert len({tuple(sorted(classes)) for classes in drawn}) == 4


@pytest.mark.parametrize("name", ["validation", "dev", "VAL", "Valid"])
def test_a_split_that_is_named_for_validation_is_validated_on(name: str, tmp_path: Path) -> None:
    files = {
        split: write(tmp_path / f"{split}.csv", [("a dull film", 0), ("a fine film", 1)] * rows)
        for split, rows in (("train", 10), (name, 3))
    }
    data = module(files)
    data.setup("fit")
    assert (len(data.train_data), [len(part) for part in data.validation_data]) == (20, [6])
    told_otherwise = module(files, validation_split=0.25)
    told_otherwise.setup("fit")
    assert (len(told_otherwise.train_data), len(told_otherwise.validation_data[0])) == (15, 5)
    assert name in data.used_splits


def test_a_split_that_is_not_used_is_named_where_samples_are_set_aside_for_validation(tmp_path: Path, caplog) -> None:
    rows = [("a dull film", 0), ("a fine film", 1)] * 10
    data = module({split: write(tmp_path / f"{split}.csv", rows) for split in ("train", "test", "eval")})
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert "is set aside for validation; unused splits: 'eval'. To validate on another split" in caplog.text


@pytest.mark.parametrize("nothing", [0, 0.0, None])
def test_no_validation_is_a_share_of_nothing(nothing, tmp_path: Path) -> None:
    data = module(write(tmp_path / "t.csv", [("a dull film", 0), ("a fine film", 1)] * 5), validation_split=nothing)
    data.setup("fit")
    assert (len(data.train_data), data.validation_data, data.val_dataloader()) == (10, [], [])


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["--5", "4"], ["--5", "4"]),
        (pa.array([2**63 + 1, 7], pa.uint64()), ["7", "9223372036854775809"]),
    ],
)
def test_labels_that_are_almost_numbers_come_back_as_they_were(labels, names: list[str]) -> None:
    columns = LabelSource().read(Dataset(pa.table({"label": labels})), "train")
    for task in (SingleLabelClassification.from_columns(columns), SingleLabelClassification.from_names(names)):
        assert task.label_names == names
        assert [str(label) for label in task.decode(np.arange(2)).to_pylist()] == names


@pytest.mark.parametrize("label", [float("inf"), float("nan")])
def test_a_float_that_is_no_number_is_named_with_its_row(label: float) -> None:
    with pytest.raises(ValueError, match=f"row 1 .* of the split 'train' has the label {label} in 'label'"):
        SingleLabelClassification.from_columns(LabelSource().read(Dataset(pa.table({"label": [1.0, label]})), "train"))


@pytest.mark.parametrize("names", [["1.0", "0.0"], ["01", "00"], ["1e0", "0e0"]])
def test_names_that_are_written_as_numbers_are_never_indexed_by_numbers(names: list[str]) -> None:
    """Else 0, read from 0.0 in a file, would be of the class that is called 1.0."""
    columns = LabelSource().read(Dataset(pa.table({"label": [0.0, 1.0]})), "train")
    with pytest.raises(ValueError, match="has the label '0', which is not one of .* such as '1' for 1.0 or 01"):
        SingleLabelClassification.from_names(names).encode(columns)


@pytest.mark.parametrize("label", [1e20, 0.5])
def test_floats_that_are_no_classes_are_refused(label: float) -> None:
    with pytest.raises(ValueError, match="holds double; labels are whole numbers, strings or booleans"):
        SingleLabelClassification.from_columns(LabelSource().read(Dataset.from_dict({"label": [1.0, label]}), "train"))


@pytest.mark.parametrize(
    ("labels", "named"),
    [([" pos", "pos", "POS", "neg"], "' pos', 'POS', 'pos'"), (["café", "cafe\u0301", "thé"], "'cafe\u0301', 'café'")],
)
def test_classes_that_differ_in_case_spaces_or_unicode_form_are_warned_of(labels, named: str) -> None:
    data = module(Dataset.from_dict({"text": ["a film"] * len(labels), "label": labels}), validation_split=None)
    with pytest.warns(UserWarning, match=f"classes {named} differ only in case, spaces or Unicode form"):
        data.setup("fit")
    assert data.num_labels == len(labels)


@pytest.mark.parametrize("names", ["ab", {"a", "b"}, {0: "a", 1: "b"}])
def test_names_without_an_order_of_their_own_are_refused(names) -> None:
    with pytest.raises(ValueError, match="label_names is .*; give a list of names in the order of their ids"):
        module("demo", label_names=names)


@pytest.mark.parametrize("columns", [["text", "label"], ["label"]])
def test_a_label_column_that_is_a_text_column_too_is_refused(columns: list[str]) -> None:
    with pytest.raises(ValueError, match="text_columns and label_column both name 'label'"):
        module("demo", text_columns=columns)


def test_an_unknown_label_among_a_thousand_classes_is_a_short_message(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [("a film", f"class number {number}") for number in range(1000)] * 2)
    test = write(tmp_path / "test.csv", [("a film", "nobody")])
    with pytest.raises(ValueError, match="not one of the 1,000 classes: .* and 990 more") as caught:
        module({"train": train, "test": test}).setup("test")
    assert len(str(caught.value)) < 700


def test_numbers_in_one_file_and_a_word_in_another_are_read(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [("a film", 1), ("a dull film", 2), ("a fine film", 3)] * 3)
    test = write(tmp_path / "test.csv", [("a film", 1), ("a film", 2), ("a film", "three")])
    data = module({"train": train, "test": test})
    with pytest.raises(ValueError, match=r"row 2 .* of the split 'test' has the label 'three', .*: '1', '2', '3'"):
        data.setup("test")


def test_a_word_after_ten_thousand_numbers_is_a_class(tmp_path: Path) -> None:
    rows = [("a film", row % 2) for row in range(20_000)] + [("a film", "unsure")]
    data = module(write(tmp_path / "t.csv", rows), validation_split=None)
    data.setup("fit")
    assert data.label_names == ["0", "1", "unsure"]
    assert np.bincount(data.train_data.labels).tolist() == [10_000, 10_000, 1]


def test_numbers_in_a_csv_are_numbered_by_their_value(tmp_path: Path) -> None:
    data = module(write(tmp_path / "t.csv", [("a film", row % 12) for row in range(48)]), validation_split=None)
    data.setup("fit")
    assert data.label_names == [str(number) for number in range(12)]


@pytest.mark.slow
def test_one_data_module_serves_models_of_two_vocabularies(minilm: str, tmp_path: Path) -> None:
    """Nothing is kept from the first model: ids and classes are those of the second."""
    data = SmartBatchDataModule(max_length=16, batch_size=8)
    seen: list[torch.Tensor] = []

    class First(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append(batch["input_ids"].unique())

    for name in ("demo", minilm, "demo"):
        run = trainer(tmp_path, callbacks=[First()], limit_train_batches=1, limit_val_batches=0)
        run.fit(SequenceClassifier(name), data)
        assert data.tokenizer.vocab_size == run.lightning_module.model.config.vocab_size
    assert seen[0].tolist() == seen[2].tolist() != seen[1].tolist()


@pytest.mark.slow
def test_what_is_learnt_is_logged_once_also_if_a_run_adopts_the_seed_of_its_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged = []
    for number in range(2):
        torch.manual_seed(number)
        data, run = SmartBatchDataModule(max_length=16), trainer(tmp_path, max_steps=1 + number)
        with caplog.at_level("INFO"):
            run.fit(SequenceClassifier(), data, ckpt_path=tmp_path / "first.ckpt" if number else None)
        run.save_checkpoint(tmp_path / "first.ckpt")
        logged.append(caplog.text.count("Learning 2 classes"))
        caplog.clear()
    assert data.seed == 0
    assert logged == [1, 1]
