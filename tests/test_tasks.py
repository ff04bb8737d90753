"""Tests of tasks: several labels a sample, and regression; single labels have a file of their own."""

import json
import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from helpers import slow, trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, pipeline

from smartbatch_lightning import PredictionWriter, SequenceClassifier, SmartBatchDataModule, demo
from smartbatch_lightning.callbacks.memory_check import MemoryCheck
from smartbatch_lightning.data.splits import stratified_split, train_and_validation_rows
from smartbatch_lightning.export import export_model
from smartbatch_lightning.tasks import MultiLabelClassification, Regression, SingleLabelClassification
from smartbatch_lightning.tasks.source import LabelSource

NAMES = ["anger", "fear", "joy"]
WORDS = dict(zip(NAMES, ["dull", "slow", "fine"], strict=True))
# of 60 samples those whose number has the bit of a label
HAS = np.array([[bool(row >> label & 1) for label in range(3)] for row in range(60)])
TEXTS = [" ".join(WORDS[NAMES[label]] for label in np.flatnonzero(row)) + " a film" for row in HAS]
LISTS = [[NAMES[label] for label in np.flatnonzero(row)] for row in HAS]
SCORES = HAS.sum(axis=1) * 1.25 + 0.1
SMALL = BertConfig(vocab_size=2000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)


def saved(folder: Path, labels: dict[str, Any], features: dict[str, Any] | None = None) -> str:
    whole = {"text": Value("string"), **features} if features else None
    split = Dataset.from_dict({"text": TEXTS, **labels}, features=None if whole is None else Features(whole))
    DatasetDict(train=split, test=split).save_to_disk(folder / "saved")
    return str(folder / "saved")


def csv(folder: Path, columns: dict[str, Any]) -> str:
    pd.DataFrame({"text": TEXTS, **columns}).to_csv(folder / "data.csv", index=False)
    return str(folder / "data.csv")


def module(dataset: str | dict[str, str], tokenizer: str | None = None, **options) -> SmartBatchDataModule:
    return SmartBatchDataModule(dataset, tokenizer, **{"max_length": 16, "batch_size": 8, "seed": 0, **options})


def encoded(base: str, dataset: str, **options) -> tuple[SmartBatchDataModule, np.ndarray]:
    data = module(dataset, base, validation_split=None, **options)
    data.setup("fit")
    return data, data.train_data.labels


REGRESSION = {"problem_type": "regression"}
FORMS = {
    "lists of names": lambda folder: (saved(folder, {"label": LISTS}), {}),
    "lists of a ClassLabel's numbers": lambda folder: (
        saved(
            folder,
            {"label": [np.flatnonzero(row).tolist() for row in HAS]},
            {"label": Sequence(ClassLabel(names=NAMES))},
        ),
        {},
    ),
    "lists of numbers with names": lambda folder: (
        saved(folder, {"label": [np.flatnonzero(row).tolist() for row in HAS]}),
        {"label_names": NAMES},
    ),
    "texts with a delimiter": lambda folder: (
        csv(folder, {"label": ["; ".join(names) for names in LISTS]}),
        {"label_delimiter": ";"},
    ),
    "columns of 0 and 1": lambda folder: (
        csv(folder, {name: HAS[:, number].astype(int) for number, name in enumerate(NAMES)}),
        {"label_column": NAMES},
    ),
    "columns of True and False": lambda folder: (
        csv(folder, {name: HAS[:, number] for number, name in enumerate(NAMES)}),
        {"label_column": NAMES},
    ),
    "lists of 0 and 1": lambda folder: (
        saved(folder, {"label": HAS.astype(int).tolist()}),
        {"label_names": NAMES},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_several_labels_a_sample_are_found_out_and_read_in_whatever_form_they_stand(form, base, tmp_path: Path) -> None:
    dataset, options = FORMS[form](tmp_path)
    data, labels = encoded(base, dataset, **options)
    assert isinstance(data.task, MultiLabelClassification)
    assert data.label_names == NAMES
    np.testing.assert_array_equal(labels, HAS)
    written = data.task.decode(labels).to_pylist()
    assert written == ([";".join(names) for names in LISTS] if form == "texts with a delimiter" else LISTS)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "lists of names"])
def test_a_trained_model_is_tested_on_labels_of_its_names_in_whatever_form_and_order(form, base, tmp_path) -> None:
    (tmp_path / "train").mkdir()
    trained, _ = encoded(base, saved(tmp_path / "train", {"label": LISTS}), label_names=NAMES[::-1])
    assert trained.label_names == NAMES[::-1]
    config = BertConfig(**trained.task.config_fields())
    task = type(trained.task).from_config(config)
    dataset, options = FORMS[form](tmp_path)
    own, _ = encoded(base, dataset, **options)
    aligned = own.task.aligned_with(task)
    np.testing.assert_array_equal(aligned.encode(own.label_source.read(own.splits["train"], "train")), HAS[:, ::-1])


@pytest.mark.parametrize("kind", ["TRUE and FALSE", "numbers with spaces", "mixed", "of another format"])
def test_columns_of_truth_values_are_several_labels_however_they_are_written(kind, base: str, tmp_path: Path) -> None:
    words = {"TRUE and FALSE": [("FALSE", "TRUE")] * 3, "numbers with spaces": [(" 0", " 1 ")] * 3}
    spelled = words.get(kind, [("false", "true"), ("0", "1"), ("0.0", "1.0")])
    columns = {
        name: [no_yes[int(has)] for has in HAS[:, n]]
        for n, (name, no_yes) in enumerate(zip(NAMES, spelled, strict=True))
    }
    dataset = saved(tmp_path, columns) if kind == "of another format" else csv(tmp_path, columns)
    data, labels = encoded(base, dataset, label_column=NAMES)
    assert isinstance(data.task, MultiLabelClassification)
    np.testing.assert_array_equal(labels, HAS)


def test_texts_of_numbers_in_several_columns_are_a_regression(base: str, tmp_path: Path) -> None:
    texts = {"a": [f" {score}" for score in SCORES], "b": [str(score) for score in -SCORES]}
    data, labels = encoded(base, saved(tmp_path, texts), label_column=["a", "b"])
    assert isinstance(data.task, Regression)
    np.testing.assert_array_equal(labels, np.stack([SCORES, -SCORES], axis=1).astype(np.float32))


@pytest.mark.parametrize("kind", ["decimal128(10, 2)", "decimal128(38, 2)", "decimal256(40, 2)"])
def test_decimals_are_classes_where_they_are_whole_and_targets_elsewhere(kind: str, base: str, tmp_path: Path) -> None:
    for number, (values, expected) in enumerate([(["1.00", "-7.00"], [1, -7]), (["1.50", "2.00"], [1.5, 2])]):
        labels = [Decimal(value) for value in values * 30]
        (tmp_path / str(number)).mkdir()
        dataset = saved(tmp_path / str(number), {"label": labels}, {"label": Value(kind)})
        data, encoded_labels = encoded(base, dataset)
        assert data.task.decode(encoded_labels).to_pylist() == expected * 30
        lists = saved(
            tmp_path / str(number), {"label": [[one, one] for one in labels]}, {"label": Sequence(Value(kind))}
        )
        data, encoded_labels = encoded(base, lists)
        assert data.task.decode(encoded_labels).to_pylist()[1] == ([-7] if number == 0 else [2, 2])


def test_targets_beyond_the_whole_numbers_of_floats_are_the_nearest_floats(base: str, tmp_path: Path) -> None:
    targets = [2**53 + 1, 2**62 + 1, -(2**63)]
    _, labels = encoded(base, saved(tmp_path, {"label": targets * 20}), **REGRESSION)
    assert labels[:3].tolist() == [2.0**53, 2.0**62, -(2.0**63)]


@pytest.mark.parametrize("names", [None, NAMES])
def test_a_test_split_whose_samples_have_no_label_needs_no_type(names, base: str, tmp_path: Path) -> None:
    for split, labels in (("train", LISTS), ("test", [[]] * 3)):
        lines = [json.dumps({"text": "a film", "label": one}) for one in labels]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    data = module({s: str(tmp_path / f"{s}.jsonl") for s in ("train", "test")}, base, label_names=names)
    data.setup("test")
    assert data.test_data[0].labels.tolist() == [[False] * 3] * 3


def test_one_name_is_that_of_a_target(base: str, tmp_path: Path) -> None:
    data, _ = encoded(base, csv(tmp_path, {"label": SCORES}), label_names=["score"])
    assert isinstance(data.task, Regression)
    assert data.label_names == ["score"]


def test_labels_that_are_named_as_transformers_names_unnamed_ones_are_names(base: str, tmp_path: Path) -> None:
    texts = ["LABEL_0;LABEL_1", "LABEL_1", ""] * 20
    data, labels = encoded(base, csv(tmp_path, {"label": texts}), label_delimiter=";")
    task = MultiLabelClassification.from_config(BertConfig(**data.task.config_fields()))
    assert task == data.task
    assert task.decode(labels).to_pylist() == texts
    assert (
        MultiLabelClassification.from_config(BertConfig(num_labels=2, problem_type="multi_label_classification"))
        is None
    )


def test_a_model_that_does_not_say_its_task_is_tested_with_an_option_that_the_message_names(tmp_path, base) -> None:
    names = dict(enumerate(NAMES))
    config = BertConfig(**{**SMALL.to_dict(), "id2label": names, "label2id": {name: n for n, name in names.items()}})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "hub")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "hub")
    hub, dataset = str(tmp_path / "hub"), saved(tmp_path, {"label": LISTS})
    option = {"problem_type": "multi_label_classification"}
    for fit, run in ((True, trainer(tmp_path, max_steps=1)), (False, trainer(tmp_path))):
        with pytest.raises(ValueError, match=re.escape(f"--model.model_kwargs='{json.dumps(option)}'")):
            (run.fit if fit else run.test)(SequenceClassifier(hub), module(dataset))
    [tested] = trainer(tmp_path).test(SequenceClassifier(hub, model_kwargs=option), module(dataset))
    assert "test_exact_match" in tested


def test_classes_that_hardly_ever_recur_are_warned_of(base: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="60 classes in 60 samples, such as '0 €'.*problem_type=regression.*label_col"):
        encoded(base, csv(tmp_path, {"label": [f"{number} €" for number in range(60)]}))
    with pytest.warns(
        UserWarning, match="60 classes, such as '0,5'.*label_delimiter.*1234.5 .*problem_type=regression"
    ):
        encoded(base, csv(tmp_path, {"label": [f"{number},5" for number in range(60)]}))


def test_lists_of_the_classes_0_and_1_are_no_indicators(base: str, tmp_path: Path) -> None:
    lists = [[], [0], [1], [0, 1]] * 15
    data, labels = encoded(base, saved(tmp_path, {"label": lists}))
    assert data.label_names == ["0", "1"]
    assert [np.flatnonzero(row).tolist() for row in labels] == lists


def test_lists_of_a_0_and_a_1_are_read_as_in_training(base: str, tmp_path: Path) -> None:
    test = Dataset.from_dict({"text": ["a film"], "label": [[0, 1]]})
    numbers, indicators = [[0, 1], [1], []] * 20, [[0, 1], [1, 0]] * 30
    for number, (lists, has) in enumerate([(numbers, [True, True]), (indicators, [False, True])]):
        train = Dataset.from_dict({"text": TEXTS, "label": lists})
        DatasetDict(train=train, test=test).save_to_disk(tmp_path / str(number))
        data = module(str(tmp_path / str(number)), base)
        data.setup("test")
        assert data.test_data[0].labels.tolist() == [has]
        task = MultiLabelClassification.from_config(BertConfig(**data.task.config_fields()))
        assert task.encode(LabelSource().read(test, "test")).tolist() == [has]
    with pytest.raises(ValueError, match="could be two label ids.*Use names instead of numbers"):
        MultiLabelClassification.from_names(["a", "b"]).encode(LabelSource().read(test, "test"))


@pytest.mark.parametrize(
    ("columns", "options", "kind", "names"),
    [
        ({"label": SCORES}, {}, Regression, ["label"]),
        ({"a": SCORES, "b": -SCORES}, {"label_column": ["b", "a"]}, Regression, ["b", "a"]),
        ({"label": SCORES.round()}, {}, SingleLabelClassification, ["0", "1", "3", "4"]),
        ({"label": SCORES.round()}, {"problem_type": "regression"}, Regression, ["label"]),
        ({"label": ["a,b", "c"] * 30}, {}, SingleLabelClassification, ["a,b", "c"]),
    ],
)
def test_numbers_with_a_fraction_are_a_regression_and_all_else_single_labels(
    columns, options, kind, names, base: str, tmp_path: Path
) -> None:
    data, labels = encoded(base, csv(tmp_path, columns), **options)
    assert type(data.task) is kind
    assert data.label_names == names
    if kind is Regression:
        expected = np.stack([columns[name] for name in names], axis=1).squeeze().astype(np.float32)
        np.testing.assert_array_equal(labels, expected)


def test_classes_that_look_like_several_labels_are_warned_of(base: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = [",".join(map(str, sorted(rng.choice(28, rng.integers(1, 4), replace=False)))) for _ in TEXTS]
    with pytest.warns(UserWarning, match="look like several labels separated by ','.*--data.label_delimiter=','"):
        encoded(base, csv(tmp_path, {"label": labels}))


@pytest.mark.parametrize("labels", [LISTS, [[1, 2], [2], []] * 20])
def test_lists_written_as_text_are_no_classes_and_no_names_with_a_delimiter(labels, base: str, tmp_path: Path) -> None:
    written = csv(tmp_path, {"label": list(map(str, labels))})
    with pytest.warns(UserWarning, match="are lists written as text.*save lists in JSON lines or Parquet"):
        encoded(base, written)
    with pytest.raises(ValueError, match="'label' of the split 'train' holds lists written as text, such as"):
        encoded(base, written, label_delimiter=",")


def test_targets_of_a_class_label_are_its_names_and_not_its_ids(base: str, tmp_path: Path) -> None:
    def stars(*names: str) -> str:
        return saved(tmp_path / names[0], {"label": [0, 4, 2] * 20}, {"label": ClassLabel(names=list(names))})

    _, labels = encoded(base, stars("1", "2", "3", "4", "5"), **REGRESSION)
    assert labels[:3].tolist() == [1, 5, 3]
    with pytest.raises(ValueError, match="row 0 .* has 'worst' in 'label', which is not a number"):
        encoded(base, stars("worst", "bad", "fair", "good", "best"), **REGRESSION)


BAD = {
    "a row that is null": (
        lambda f: saved(f, {"label": [None, *LISTS[1:]]}),
        {},
        "row 0 .* is null in 'label'.*Drop such rows, or write an empty list",
    ),
    "a null among labels": (
        lambda f: saved(f, {"label": [["joy"], ["joy", None], *LISTS[2:]]}),
        {},
        "row 1 .* has no label in 'label'",
    ),
    "a column of 0 and 1 with 2": (
        lambda f: csv(f, {"a": [0, 1, 2] * 20, "b": [0, 1, 1] * 20}),
        {"label_column": ["a", "b"], "problem_type": "multi_label_classification"},
        "row 2 .* has the value 2 in 'a'; give 0 and 1",
    ),
    "no value": (
        lambda f: csv(f, {"a": [0, 1, None] * 20, "b": [0, 1, 1] * 20}),
        {"label_column": ["a", "b"]},
        "row 2 .* has no value in 'a'",
    ),
    "no delimiter": (
        lambda f: csv(f, {"label": ["joy", "joy,fear"] * 30}),
        {"problem_type": "multi_label_classification"},
        "holds .*string, but multi_label.*Set --data.label_delimiter",
    ),
    "a delimiter for single labels": (
        lambda f: csv(f, {"label": ["joy", "fear"] * 30}),
        {"problem_type": "single_label_classification", "label_delimiter": ","},
        "label_delimiter is given, but problem_type is 'single_label_classification'",
    ),
    "two columns for single labels": (
        lambda f: csv(f, {"a": ["joy", "fear"] * 30, "b": ["joy", "fear"] * 30}),
        {"problem_type": "single_label_classification", "label_column": ["a", "b"]},
        "label_column is .*'a', 'b'.*one label per sample",
    ),
    "texts for a regression": (
        lambda f: csv(f, {"label": ["joy", "fear"] * 30}),
        {"problem_type": "regression"},
        "row 0 .* has 'joy' in 'label', which is not a number",
    ),
    "numbers with a decimal comma": (
        lambda f: csv(f, {"label": ["3.5", " 4", "3,5"] * 20}),
        REGRESSION,
        "row 2 .* has '3,5' in 'label'.*like 1234.5",
    ),
    "numbers with a percent sign": (
        lambda f: csv(f, {"a": ["3.5", "12 %"] * 30, "b": [0.5, 2] * 30}),
        {**REGRESSION, "label_column": ["b", "a"]},
        "row 1 .* has '12 %' in 'a'",
    ),
    "numbers with separators of thousands": (
        lambda f: saved(f, {"label": [["1.5", "2"], ["1.5", "1,200"]] * 30}),
        REGRESSION,
        "row 1 .* has '1,200' in 'label'",
    ),
    "a NaN among columns of 0 and 1": (
        lambda f: saved(f, {"a": [0.0, 1, math.nan] * 20, "b": [0, 1, 1] * 20}),
        {"label_column": ["b", "a"]},
        "row 2 .* has the value nan in 'a'; give 0 and 1",
    ),
    "a word among columns of 0 and 1": (
        lambda f: csv(f, {"a": [0, 1, "yes"] * 20, "b": [0, 1, 1] * 20}),
        {"label_column": ["a", "b"]},
        "row 2 .* has the value 'yes' in 'a'; give 0 and 1, or true and false",
    ),
    "a list of 0 and 1 that is too short": (
        lambda f: saved(f, {"label": [*HAS[:7].astype(int).tolist(), [0, 1], *HAS[8:].astype(int).tolist()]}),
        {},
        "row 7 .* does not have a 0 or 1 for each of the 3 labels in 'label', as most rows have",
    ),
    "a list of 0 and 1 that is too long": (
        lambda f: saved(f, {"label": [[0, 0], [1, 1], [1, 0, 0]] * 20}),
        {"label_names": ["a", "b"]},
        "row 2 .* does not have a 0 or 1 for each of the 2 labels",
    ),
    "a list of 0 and 1 with a 2": (
        lambda f: saved(f, {"label": [*HAS[:7].astype(int).tolist(), [0, 1, 2], *HAS[8:].astype(int).tolist()]}),
        {"label_names": NAMES},
        "row 7 .* does not have a 0 or 1 for each of the 3 labels",
    ),
    "lists of a 0 and a 1 but for one": (
        lambda f: saved(f, {"label": [[1, 0], [0, 1]] * 29 + [[0, 1], [1]]}),
        {},
        "row 59 .* does not have a 0 or 1 for each of the 2 labels",
    ),
    "lists for single labels": (
        lambda f: saved(f, {"label": LISTS}),
        {"problem_type": "single_label_classification"},
        """'label' of the split 'train' holds lists.*--model.model_kwargs='{"problem_type": "multi_label_class""",
    ),
    "one name of several classes": (
        lambda f: csv(f, {"label": ["joy", "fear"] * 30}),
        {"label_names": ["score"]},
        "label_names is 'score'.*If the label is a number to predict, set --data.problem_type=regression",
    ),
    "a target that is nan": (
        lambda f: csv(f, {"label": ["0.5", "nan", "1.5"] * 20}),
        {},
        "row 1 .* has the target nan in 'label'",
    ),
    "a target that is infinite": (
        lambda f: csv(f, {"label": ["0.5", "0.7", "-inf"] * 20}),
        {},
        "row 2 .* has the target -inf",
    ),
    "no target": (lambda f: csv(f, {"label": ["0.5", "", "1.5"] * 20}), {}, "row 1 .* has no target in 'label'"),
    "targets that are alike": (
        lambda f: csv(f, {"label": [0.5] * 60}),
        {},
        r"all targets of the split 'train' are \[0.5\]",
    ),
    "lists of other lengths": (
        lambda f: saved(f, {"label": [[0.5, 1.5]] * 59 + [[0.5]]}),
        {},
        "row 59 .* does not have 2 targets",
    ),
    "a target beyond float32": (
        lambda f: saved(f, {"label": [0.5, 1e39] * 30}),
        {},
        r"row 1 .* has the target 1e\+39",
    ),
    "lists without a target": (
        lambda f: saved(f, {"label": [[]] * 60}, {"label": Sequence(Value("float32"))}),
        {"problem_type": "regression"},
        "row 0 .* has no target in 'label'",
    ),
    "a column that is not there": (
        lambda f: csv(f, {"a": LISTS}),
        {"label_column": ["a", "b"]},
        "column 'b' is not in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_labels_that_cannot_be_right_are_refused_by_row(case: str, base: str, tmp_path: Path) -> None:
    make, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        encoded(base, make(tmp_path), **options)


def test_a_label_that_is_unknown_to_training_is_refused_by_its_row(base: str, tmp_path: Path) -> None:
    split = Dataset.from_dict({"text": TEXTS, "label": LISTS})
    other = Dataset.from_dict({"text": ["a film"] * 2, "label": [["joy"], ["joy", "awe"]]})
    DatasetDict(train=split, test=other).save_to_disk(tmp_path / "saved")
    data = module(str(tmp_path / "saved"), base)
    with pytest.raises(ValueError, match="row 1 .*split 'test' has the label 'awe', which is not one of the 3 classes"):
        data.setup("test")


@pytest.mark.parametrize("options", [{"label_column": []}, {"label_column": ["a", "a"]}, {"label_delimiter": ""}])
def test_arguments_that_name_no_labels_are_refused_when_they_are_given(options: dict) -> None:
    with pytest.raises(ValueError, match="label_column is|label_delimiter is"):
        module("demo", **options)


def test_a_model_of_another_task_is_refused(base: str, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match="trained for single_label_classification, not for regression.*problem_type"):
        run.fit(SequenceClassifier(str(demo.model_dir())), module(csv(tmp_path, {"label": SCORES})))


def test_targets_are_read_by_the_names_of_their_columns(tmp_path: Path, base: str) -> None:
    dataset = csv(tmp_path, {"a": SCORES, "b": -SCORES})
    expected = np.stack([-SCORES, SCORES], axis=1).astype(np.float32)
    data, labels = encoded(base, dataset, label_column=["a", "b"], label_names=["b", "a"], **REGRESSION)
    assert data.label_names == ["b", "a"]
    np.testing.assert_array_equal(labels, expected)
    trained = Regression.from_config(BertConfig(**data.task.config_fields()))
    for columns in (["a", "b"], ["b", "a"]):
        source = LabelSource.from_arguments(columns, None)
        np.testing.assert_array_equal(trained.encode(source.read(data.splits["train"], "train")), expected)


@pytest.mark.parametrize("names", [["x", "y"], ["a", "c"]])
def test_columns_go_by_position_where_none_has_a_labels_name_and_are_refused_where_some_have(
    names, tmp_path: Path, base: str
) -> None:
    numbers = np.arange(60) % 2
    split = module(csv(tmp_path, {"a": numbers, "b": 1 - numbers}), base).splits["train"]
    source = LabelSource.from_arguments(["a", "b"], None)
    tasks = [MultiLabelClassification.from_names(names), Regression.from_names(names)]
    for task in tasks:
        if names == ["x", "y"]:
            np.testing.assert_array_equal(task.encode(source.read(split, "train")), np.stack([numbers, 1 - numbers], 1))
        else:
            with pytest.raises(ValueError, match="label_column names 'a', 'b', but the labels are 'a', 'c'"):
                task.encode(source.read(split, "train"))


def test_an_odd_row_among_lists_of_0_and_1_is_refused_where_training_had_none(base: str, tmp_path: Path) -> None:
    train = Dataset.from_dict({"text": TEXTS, "label": HAS.astype(int).tolist()})
    test = Dataset.from_dict({"text": ["a film"] * 3, "label": [[0, 1, 1], [1, 0, 0], [1, 0]]})
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="row 2 .*'test' does not have a 0 or 1 for each of the 3 labels"):
        module(str(tmp_path / "saved"), base).setup("test")


def test_the_numbers_of_a_class_label_are_its_names_however_often_they_stand(base: str, tmp_path: Path) -> None:
    votes = [[0, 1, 1], [0, 0, 0], [1, 1, 1]] * 20
    features = {"label": Sequence(ClassLabel(names=["neg", "pos"]))}
    data, labels = encoded(base, saved(tmp_path, {"label": votes}, features))
    assert data.label_names == ["neg", "pos"]
    assert labels[:3].tolist() == [[True, True], [True, False], [False, True]]


def test_whole_numbers_in_texts_count_the_names_that_are_given(base: str, tmp_path: Path) -> None:
    texts = [",".join(map(str, np.flatnonzero(row))) for row in HAS]
    dataset = csv(tmp_path, {"label": texts})
    _, labels = encoded(base, dataset, label_delimiter=",", label_names=NAMES)
    np.testing.assert_array_equal(labels, HAS)


@pytest.mark.parametrize("written", [[".5", "-1.5", "2."], [" 0.5", "1e-1", "-0"]])
def test_numbers_are_read_however_they_are_written(written, base: str, tmp_path: Path) -> None:
    dataset = csv(tmp_path, {"label": written * 20})
    _, labels = encoded(base, dataset, problem_type="regression")
    assert labels[:3].tolist() == pytest.approx([float(number) for number in written])


def test_targets_of_a_narrow_range_are_counted_all() -> None:
    counts = Regression.from_names(["a"]).label_counts(np.linspace(1000.1, 1004, 50))
    assert sum(counts.values()) == 50
    assert len(counts) == 5


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_that_would_round_targets_is_refused(precision: str, base: str, tmp_path: Path) -> None:
    data = module(csv(tmp_path, {"label": SCORES + 1000}))
    run = trainer(tmp_path, precision=precision, max_steps=1)
    with pytest.raises(ValueError, match="rounded the targets .*--trainer.precision=bf16-mixed or 32-true"):
        run.fit(SequenceClassifier(base), data)


def test_a_checkpoint_of_another_task_with_the_same_names_is_refused(base: str, tmp_path: Path) -> None:
    dataset = csv(tmp_path, {"a": HAS[:, 0].astype(int), "b": HAS[:, 1].astype(int), "label": ["a", "b"] * 30})
    run = trainer(tmp_path, max_steps=1)
    run.fit(SequenceClassifier(base), module(dataset, label_column=["a", "b"]))
    run.save_checkpoint(tmp_path / "a.ckpt")
    single = module({"train": dataset, "test": dataset})
    with pytest.raises(ValueError, match="trained for multi_label_classification, not for single_label"):
        trainer(tmp_path).test(SequenceClassifier(base), single, ckpt_path=tmp_path / "a.ckpt")


def test_a_loss_of_ones_own_takes_several_labels_as_torch_does(base: str, tmp_path: Path) -> None:
    class Own(SequenceClassifier):
        def compute_loss(self, output, labels) -> torch.Tensor:
            return F.binary_cross_entropy_with_logits(output.logits, labels)

    losses, dataset = [], saved(tmp_path, {"label": LISTS})
    for kind in (SequenceClassifier, Own):
        L.seed_everything(0)
        losses.append(trainer(tmp_path).validate(kind(base), module(dataset))[0]["val_loss"])
    assert losses[0] == losses[1]
    trainer(tmp_path, callbacks=[MemoryCheck()], max_steps=1).fit(Own(base), module(dataset))


# --- learnt, measured, predicted ---

TASKS = {
    "single_label_classification": (SingleLabelClassification.from_names(NAMES), torch.tensor([0, 2, 1, 2])),
    "multi_label_classification": (MultiLabelClassification.from_names(NAMES), torch.from_numpy(HAS[2:6])),
    "regression": (Regression.from_names(["a"]), torch.tensor([0.5, 2.5, -1.0, 0.1])),
    "regression of two targets": (
        Regression.from_names(["a", "b"]),
        torch.tensor([[0.5, 2], [1, 0], [3, 2], [0, 1.0]]),
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_loss_logits_and_gradients_are_those_of_transformers(name: str) -> None:
    task, labels = TASKS[name]
    config = BertConfig(**SMALL.to_diff_dict() | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    config.update(task.config_fields())
    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_config(config)
    ours = SequenceClassifier(architecture=config.to_dict())
    ours.configure_model()
    ours.model.load_state_dict(theirs.state_dict())
    batch = {"input_ids": torch.randint(5, 2000, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    own_labels = labels.float() if labels.dtype == torch.bool else labels
    expected = theirs(**batch, labels=own_labels)
    loss = ours.step({**batch, "labels": labels}, "train")
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.loss.backward()
    for own, other in zip(ours.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-6)


def measured(task, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    metrics = task.configure_metrics()
    metrics.update(task.scores(logits), task.metric_labels(labels))
    return {name: float(value) for name, value in metrics.compute().items()}


def test_metrics_of_several_labels_are_those_counted_by_hand() -> None:
    """All logits lie between 0 and 1, where torchmetrics would take them for probabilities."""
    logits = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    logits[torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < 0.4] *= -1
    labels = torch.from_numpy(HAS[:40])
    task, _ = TASKS["multi_label_classification"]
    found = (logits > 0).numpy()
    right = found & HAS[:40]
    by_label = 2 * right.sum(0) / (found.sum(0) + HAS[:40].sum(0))
    expected = {
        "f1": by_label.mean(),
        "f1_micro": 2 * right.sum() / (found.sum() + HAS[:40].sum()),
        "exact_match": (found == HAS[:40]).all(axis=1).mean(),
    }
    assert measured(task, logits, labels) == pytest.approx(expected, abs=1e-6)


def test_metrics_of_a_regression_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(3, 2, 50)
    predicted = target + rng.normal(0, 1, 50)
    task, _ = TASKS["regression"]
    ranks = [values.argsort().argsort() for values in (predicted, target)]
    expected = {
        "mse": ((predicted - target) ** 2).mean(),
        "mae": abs(predicted - target).mean(),
        "pearson": np.corrcoef(predicted, target)[0, 1],
        "spearman": np.corrcoef(*ranks)[0, 1],
    }
    logits = torch.tensor(predicted, dtype=torch.float32)[:, None]
    assert measured(task, logits, torch.tensor(target, dtype=torch.float32)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ({"label": LISTS}, {"padding": "packed"}),
        slow({"label": LISTS}, {}),
        slow({"label": SCORES.tolist()}, {}),
        slow({"a": SCORES.tolist(), "b": (-SCORES).tolist()}, {"label_column": ["a", "b"], "padding": "packed"}),
    ],
    ids=["several labels, packed", "several labels", "regression", "two targets, packed"],
)
def test_a_task_is_learnt_and_what_is_predicted_is_what_the_exported_pipeline_says(
    labels, options, base: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)  # with some seeds, this high learning rate learns nothing
    data = module(saved(tmp_path, labels), **options)
    model = SequenceClassifier(base, learning_rate=1e-2)
    run = trainer(tmp_path, max_epochs=30, callbacks=[PredictionWriter(str(tmp_path / "predictions.parquet"))])
    run.fit(model, data)
    [tested] = run.test(model, data)
    without_learning = math.log(2) if labels.get("label") is LISTS else float(np.var(SCORES))
    assert tested["test_loss"] < 0.75 * without_learning
    run.predict(model, data)
    table = pq.read_table(tmp_path / "predictions.parquet").to_pandas()
    export_model(model, data, tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["problem_type"] == ("multi_label_classification" if labels.get("label") is LISTS else "regression")
    classify = pipeline("text-classification", str(tmp_path / "exported"), truncation=True, top_k=None)
    for row, said in enumerate(classify(TEXTS[:10])):
        scores = {one["label"]: one["score"] for one in said}
        if labels.get("label") is LISTS:
            ours = {name: table[f"probability_{name}"][row] for name in NAMES}
            assert list(table["prediction"][row]) == [name for name in NAMES if scores[name] > 0.5]
        elif "label" in labels:
            ours = {"label": table["prediction"][row]}
        else:
            ours = dict(zip(("a", "b"), table["prediction"][row], strict=True))
        assert ours == pytest.approx(scores, abs=1e-5)


def test_predictions_of_several_labels_stand_in_csv_as_json(base: str, tmp_path: Path) -> None:
    data, model = module(saved(tmp_path, {"label": LISTS})), SequenceClassifier(base)
    run = trainer(tmp_path, max_steps=1, callbacks=[PredictionWriter(str(tmp_path / "predictions.csv"))])
    run.fit(model, data)
    run.predict(model, data)
    table = pd.read_csv(tmp_path / "predictions.csv")
    for row, labels in enumerate(table["prediction"]):
        assert json.loads(labels) == [name for name in NAMES if table[f"probability_{name}"][row] > 0.5]


def test_a_validation_split_keeps_the_shares_of_label_sets_and_of_the_range() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random((1000, 5)) < [0.5, 0.3, 0.2, 0.1, 0.01]
    task = MultiLabelClassification.from_names(list("abcde"))
    train, validation = train_and_validation_rows(task, labels, 0.2, 0)
    assert len(validation) == pytest.approx(200, abs=3)
    alone = np.zeros((21, 3), bool)
    alone[:10, 1] = alone[10:19, 2] = alone[19, 0] = True
    for seed in range(20):
        rows, _ = train_and_validation_rows(MultiLabelClassification.from_names(list("abc")), alone, 0.3, seed)
        assert 19 in rows
    for label in range(5):
        assert labels[validation, label].sum() == pytest.approx(0.2 * labels[:, label].sum(), abs=4)
        assert labels[train, label].any()
    targets = rng.exponential(size=1000).astype(np.float32)
    train, validation = train_and_validation_rows(Regression.from_names(["a"]), targets, 0.2, 0)
    quantiles = np.quantile(targets, np.linspace(0, 1, 11))
    counts, _ = np.histogram(targets[validation], quantiles)
    assert counts.tolist() == pytest.approx([20] * 10, abs=2)


def test_no_label_is_left_untrained_however_its_samples_share_it_with_other_labels() -> None:
    """Each of 60 labels has two or three samples, and no two samples have the same labels."""
    labels, rng = np.zeros((60, 60), bool), np.random.default_rng(0)
    for _ in range(3):
        labels[np.arange(60), rng.permutation(60)] = True
    strata = MultiLabelClassification.from_names([f"label {number}" for number in range(60)]).strata(labels)
    validated = set()
    for seed in range(50):
        train, validation = stratified_split(strata, 0.5, seed)
        assert labels[train].any(axis=0).all()
        validated |= set(validation.tolist())
    assert len(validated) >= 20


def test_the_source_of_labels_is_one_column_or_several() -> None:
    assert LabelSource.from_arguments("label", None) == LabelSource(("label",))
    assert LabelSource.from_arguments(["a", "b"], None).columns == ("a", "b")
