"""Evaluations: their numbers beside scikit-learn's, their page, tables that are read, and reports of real runs."""

import html.parser
import json
import re
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.calibration
import sklearn.metrics as sk
from helpers import slow, trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BertConfig

from smartbatch_lightning import (
    Evaluation,
    EvaluationReport,
    PredictionWriter,
    SequenceClassifier,
    SmartBatchDataModule,
    demo,
)
from smartbatch_lightning.cli import main
from smartbatch_lightning.evaluation.command import evaluate
from smartbatch_lightning.evaluation.samples import Lengths
from smartbatch_lightning.evaluation.sections import FIGURES
from smartbatch_lightning.tasks import MultiLabelClassification, Regression, SingleLabelClassification
from smartbatch_lightning.tasks.thresholds import read_thresholds, write_thresholds

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def names(number: int) -> list[str]:
    return [f"class {one}" for one in range(number)]


def single(classes: int, samples: int = 500, sharpness: float = 1.0, **options) -> Evaluation:
    """Classes drawn from the probabilities of random logits, which `sharpness` then overstates."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (samples, classes))
    labels = np.array([rng.choice(classes, p=row) for row in scipy.special.softmax(logits, axis=1)])
    scores = scipy.special.softmax(sharpness * logits, axis=1).astype(np.float32)
    return Evaluation(SingleLabelClassification.from_names(names(classes)), scores, labels, **options)


def several(labels: int, samples: int = 500, sharpness: float = 1.0, **options) -> Evaluation:
    rng = np.random.default_rng(1)
    logits = rng.normal(-1, 1.5, (samples, labels))
    truth = rng.random((samples, labels)) < scipy.special.expit(logits)
    scores = scipy.special.expit(sharpness * logits).astype(np.float32)
    return Evaluation(MultiLabelClassification.from_names(names(labels)), scores, truth, **options)


def numbers(targets: int, samples: int = 500, **options) -> Evaluation:
    rng = np.random.default_rng(2)
    truth = rng.normal(3, 2, (samples, targets))
    predictions = (0.8 * truth + rng.normal(0, 1, truth.shape)).astype(np.float32)
    task = Regression(tuple(f"target {one}" for one in range(targets)))
    return Evaluation(task, *((predictions[:, 0], truth[:, 0]) if targets == 1 else (predictions, truth)), **options)


# --- the numbers ---


@pytest.mark.parametrize("evaluation", [single(2), single(5), several(6)], ids=["two classes", "five", "labels"])
def test_every_class_has_scikit_learns_precision_recall_f1_support_and_areas(evaluation: Evaluation) -> None:
    results, truth = evaluation.results, np.asarray(evaluation.labels)
    expected = sk.precision_recall_fscore_support(truth, evaluation.predicted, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [getattr(one, name) for one in results.classes] == pytest.approx(values, abs=1e-6), name
    for number, one in enumerate(results.classes):
        of_class = truth[:, number] if truth.ndim == 2 else truth == number
        scores = evaluation.scores[:, number]
        assert one.auroc == pytest.approx(sk.roc_auc_score(of_class, scores), abs=1e-5)
        assert one.average_precision == pytest.approx(sk.average_precision_score(of_class, scores), abs=1e-5)
    matrix = sk.multilabel_confusion_matrix if truth.ndim == 2 else sk.confusion_matrix
    assert results.confusion_matrix.tolist() == matrix(truth, evaluation.predicted).tolist()


@pytest.mark.parametrize("classes", [2, 5])
def test_the_summary_of_single_labels_is_scikit_learns(classes: int) -> None:
    evaluation = single(classes)
    labels, predicted = evaluation.labels, evaluation.scores.argmax(1)
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "f1": sk.f1_score(labels, predicted, average="macro"),
        "matthews": sk.matthews_corrcoef(labels, predicted),
        "log_loss": -np.log(evaluation.scores[np.arange(len(labels)), labels]).mean(),
    }
    assert {name: evaluation.results.summary[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_the_summary_of_several_labels_is_scikit_learns() -> None:
    evaluation = several(6)
    summary, predicted = evaluation.results.summary, evaluation.scores > 0.5
    expected = {
        "exact_match": sk.accuracy_score(evaluation.labels, predicted),
        "f1": sk.f1_score(evaluation.labels, predicted, average="macro"),
        "f1_micro": sk.f1_score(evaluation.labels, predicted, average="micro"),
        "hamming_distance": sk.hamming_loss(evaluation.labels, predicted),
        "log_loss": np.mean(
            [sk.log_loss(evaluation.labels[:, one], evaluation.scores[:, one].astype(float)) for one in range(6)]
        ),
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("evaluation", [single(4, 3000, 2.0), several(3, 1000, 2.0)], ids=["classes", "labels"])
def test_the_reliability_diagram_is_scikit_learns_and_its_weighted_gap_the_calibration_error(evaluation) -> None:
    if evaluation.labels.ndim == 1:
        probabilities, came_true = evaluation.scores.max(1), evaluation.scores.argmax(1) == evaluation.labels
    else:
        probabilities, came_true = evaluation.scores.flatten(), evaluation.labels.flatten()
    observed, mean = sklearn.calibration.calibration_curve(came_true, probabilities, n_bins=15)
    found = evaluation.results.calibration
    assert [one.observed for one in found.bins] == pytest.approx(observed, abs=1e-6)
    assert [one.probability for one in found.bins] == pytest.approx(mean, abs=1e-6)
    gap = sum(one.count * abs(one.observed - one.probability) for one in found.bins) / len(came_true)
    assert found.expected_calibration_error == pytest.approx(gap, abs=1e-6)
    assert gap > 0.03  # they are overconfident


@pytest.mark.parametrize("make", [single, several])
def test_the_fitted_temperature_has_the_least_loss_and_calibrates(make) -> None:
    evaluation = make(4, 3000, 2.5, temperature="fit")
    results, scores, labels = evaluation.results, evaluation.scores.astype(float), evaluation.labels

    def loss(temperature: float) -> float:
        if labels.ndim == 1:
            scaled = scipy.special.log_softmax(np.log(scores) / temperature, axis=1)
            return -scaled[np.arange(len(labels)), labels].mean()
        signs = np.where(labels, 1, -1)
        return -scipy.special.log_expit(signs * scipy.special.logit(scores) / temperature).mean()

    least = scipy.optimize.minimize_scalar(loss, (1, 3)).x
    assert results.temperature == pytest.approx(least, rel=1e-3)
    assert results.temperature == pytest.approx(2.5, rel=0.1)  # by which the probabilities overstate
    assert results.scaled.log_loss == pytest.approx(loss(least), abs=1e-6)
    assert results.calibration.log_loss == pytest.approx(loss(1), abs=1e-5)
    assert results.scaled.expected_calibration_error < 0.03 < results.calibration.expected_calibration_error


@pytest.mark.parametrize("evaluation", [single(2, 100), several(3, 100)], ids=["two classes", "labels"])
def test_no_threshold_has_a_better_f1_than_the_best(evaluation: Evaluation) -> None:
    thresholds = evaluation.results.thresholds
    assert list(thresholds) == (names(3) if evaluation.labels.ndim == 2 else ["class 1"])
    predicted = evaluation.task.predict_labels(evaluation.scores, thresholds)
    for one in evaluation.results.classes:
        if one.name in thresholds:
            number = evaluation.task.label_names.index(one.name)
            truth = evaluation.labels[:, number] if predicted.ndim == 2 else evaluation.labels
            scores = evaluation.scores[:, number]
            best = max(sk.f1_score(truth, scores >= cut) for cut in scores)
            reached = sk.f1_score(truth, predicted[:, number] if predicted.ndim == 2 else predicted)
            assert reached == pytest.approx(best, abs=1e-9)
            assert one.best_f1 == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("targets", [1, 2])
def test_a_regression_has_scipys_and_scikit_learns_numbers(targets: int) -> None:
    evaluation = numbers(targets)
    scores, labels = (np.reshape(a, (500, targets)).astype(float) for a in (evaluation.scores, evaluation.labels))
    for number, one in enumerate(evaluation.results.targets):
        x, y = labels[:, number], scores[:, number]
        expected = {
            "mae": sk.mean_absolute_error(x, y),
            "rmse": sk.root_mean_squared_error(x, y),
            "r2": sk.r2_score(x, y),
            "pearson": scipy.stats.pearsonr(x, y).statistic,
            "spearman": scipy.stats.spearmanr(x, y).statistic,
            "bias": np.mean(y - x),
        }
        assert {name: getattr(one, name) for name in expected} == pytest.approx(expected, abs=1e-5)
        assert sum(part.samples for part in one.quantiles) == 500
        lowest = (x >= one.quantiles[0].low) & (x <= one.quantiles[0].high)
        assert one.quantiles[0].rmse == pytest.approx(sk.root_mean_squared_error(x[lowest], y[lowest]))
        assert lowest.sum() == one.quantiles[0].samples == 50


def test_texts_that_were_cut_stand_by_themselves_in_accuracy_by_length() -> None:
    lengths = np.minimum(np.arange(500) // 2 + 1, 200)
    evaluation = single(2, lengths=Lengths(lengths, "tokens", 200))
    groups = evaluation.results.lengths
    right = evaluation.scores.argmax(1) == evaluation.labels
    assert groups[-1].name == "200 or more"
    assert groups[-1].samples == (lengths == 200).sum()
    assert groups[-1].value == pytest.approx(right[lengths == 200].mean())
    assert sum(group.samples for group in groups) == 500
    assert sum(group.samples * group.value for group in groups) == pytest.approx(right.sum())


def test_of_several_labels_it_is_the_mean_f1_of_a_sample_by_length() -> None:
    lengths = np.arange(500)
    evaluation = several(3, lengths=Lengths(lengths))
    first = evaluation.results.lengths[0]
    truth, predicted = evaluation.labels[: first.samples], evaluation.predicted[: first.samples]
    expected = sk.f1_score(truth, predicted, average="samples", zero_division=1)
    assert first.samples == 50
    assert first.value == pytest.approx(expected, abs=1e-6)


def test_the_worst_mistakes_come_with_row_text_label_probabilities_and_loss() -> None:
    texts = [f"text {one}" for one in range(500)]
    evaluation = single(3, texts=texts, index=np.arange(500) + 1000, lengths=Lengths(np.arange(500)))
    mistakes = evaluation.results.mistakes
    losses = -np.log(evaluation.scores[np.arange(500), evaluation.labels])
    wrong = np.flatnonzero(evaluation.scores.argmax(1) != evaluation.labels)
    expected = wrong[np.argsort(-losses[wrong])][:50]
    assert [one.row - 1000 for one in mistakes] == expected.tolist()
    for one, sample in zip(mistakes, expected.tolist(), strict=True):
        assert one.text == texts[sample]
        assert one.length == sample
        assert one.loss == pytest.approx(losses[sample], rel=1e-4)
        assert one.label == f"class {evaluation.labels[sample]}" != one.prediction
        assert next(iter(one.scores)) == one.prediction
        assert one.scores[one.label] == pytest.approx(evaluation.scores[sample, evaluation.labels[sample]])


def test_the_worst_errors_of_targets_in_other_units_are_weighed_by_their_spread() -> None:
    labels = np.array([[0.0, 0.0], [1.0, 1000.0], [2.0, 2000.0], [3.0, 3000.0]])
    scores = labels + np.array([[0, 0], [3, 0], [0, 100], [0, 0]])
    mistakes = Evaluation(Regression(("small", "large")), scores, labels).results.mistakes
    assert [one.row for one in mistakes] == [1, 2]
    assert mistakes[0].scores == {"small": 3.0, "large": 0.0}


# --- what it is shown as ---


class _Page(html.parser.HTMLParser):
    """Elements that are not closed, addresses, and texts of a page."""

    void = {"meta", "br", "img", "link", "input"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.add(tag)
        if tag not in self.void:
            self.open.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action") and v]

    def handle_startendtag(self, tag, attributes) -> None:
        self.tags.add(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action") and v]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def written(evaluation: Evaluation, folder: Path) -> tuple[dict, _Page]:
    """Saves an evaluation, and checks that its files are what they are to be."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    paths = evaluation.save(folder)
    pictures = [path for path in paths if path.suffix == ".png"]
    assert len(pictures) == len(evaluation.figures()) == len(paths) - 2
    for path in pictures:
        assert imread(path)[..., :3].std() > 0.01  # something is drawn on it
    told = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"), parse_constant=refuse)
    content = (folder / "evaluation.html").read_text(encoding="utf-8")
    page = _Page(content)
    assert page.open == []
    assert page.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", content)
    assert content.count("<svg") == len(pictures)
    return told, page


def test_names_and_texts_stand_in_the_page_as_they_are_whatever_they_contain(tmp_path: Path) -> None:
    odd = ["<script>alert(1)</script>", "$x^2$ & $", "_hidden", "日本語", "مرحبا", "😀 'q\" {{ 7 * 7 }}"]
    texts = [f"</p><img src=x onerror=alert({one})> {{{{ 7 * 7 }}}} \x00 naïve 日本" for one in range(300)]
    rng = np.random.default_rng(0)
    task = SingleLabelClassification.from_names(odd)
    evaluation = Evaluation(task, rng.dirichlet(np.ones(6), 300), rng.integers(0, 6, 300), texts=texts, title="<i>")
    told, page = written(evaluation, tmp_path / "told")
    evaluation.show()
    for name in odd:
        assert name in page.text
        assert name in told["label_names"]
    assert told["mistakes"][0]["text"] in texts
    assert "onerror=alert(" in page.text
    assert "49" not in page.text.split("The worst mistakes")[0].split("samples")[0]


@pytest.mark.parametrize(
    ("evaluation", "met"),
    [
        (Evaluation(SingleLabelClassification.from_names(names(3)), np.eye(3)[[0, 1, 1]], np.array([0, 1, 0])), "no 2"),
        (Evaluation(SingleLabelClassification.from_names(names(2)), np.array([[0.4, 0.6]]), np.array([0])), "one"),
        slow(single(2, 1, temperature="fit"), "one, with a temperature"),
        (Evaluation(MultiLabelClassification.from_names(names(2)), np.array([[0.4, 0.6]]), np.zeros((1, 2), bool)), ""),
        slow(several(28, 200, temperature="fit", lengths=Lengths(np.full(200, 7))), "28 labels"),
        slow(numbers(1, 1), "one number"),
        slow(numbers(5, 30, lengths=Lengths(np.arange(30) + 1)), "five targets"),
        (Evaluation(Regression(("y",)), np.full(9, 2.0), np.arange(9.0)), "the same prediction"),
        slow(Evaluation(Regression(("y",)), np.arange(9.0), np.full(9, 2.0)), "the same target"),
        slow(Evaluation(Regression(("y",)), np.arange(9.0), np.arange(9.0)), "no error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_odd_cases_are_written_as_json_figures_and_a_page(evaluation, met, tmp_path, capsys) -> None:
    told, page = written(evaluation, tmp_path / "told")
    evaluation.show()
    assert str(len(evaluation.scores)) in capsys.readouterr().out
    assert told["samples"] == len(evaluation.scores)
    assert "NaN" not in page.text
    assert " nan" not in page.text


def test_a_class_without_samples_has_no_recall_and_no_areas_and_counts_in_no_mean(tmp_path: Path) -> None:
    task = SingleLabelClassification.from_names(["a", "b", "absent"])
    scores = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
    results = Evaluation(task, scores, np.array([0, 1, 1, 1])).results
    absent = results.classes[2]
    assert (absent.support, absent.predicted, absent.precision, absent.recall, absent.f1, absent.auroc) == (
        0, 0, None, None, None, None,
    )  # fmt: skip
    assert results.summary["auroc"] == pytest.approx(1.0)
    assert results.summary["f1"] == pytest.approx(sk.f1_score([0, 1, 1, 1], [0, 1, 0, 1], average="macro"))


@pytest.mark.parametrize("make", [single, slow(several)])
def test_where_all_is_right_it_says_so_and_fits_no_temperature(make, tmp_path: Path, capsys) -> None:
    evaluation = make(3, 50, 3.0)
    labels = evaluation.predicted
    perfect = Evaluation(evaluation.task, evaluation.scores, labels, temperature="fit")
    told, page = written(perfect, tmp_path / "told")
    perfect.show()
    assert told["mistakes"] == told["confusions"] == []
    assert told["temperature"] is None
    assert "There are no mistakes." in page.text
    assert "No temperature was fitted: all predictions are correct" in page.text
    printed = capsys.readouterr().out
    assert "There are no mistakes." in printed
    assert "No temperature was fitted" in printed
    assert all(one.best_f1 in (None, 1.0) for one in perfect.results.classes)


def test_no_temperature_is_fitted_to_predictions_that_are_worse_than_none() -> None:
    evaluation = single(2, 500)
    upside_down = Evaluation(evaluation.task, evaluation.scores[:, ::-1].copy(), evaluation.labels, temperature="fit")
    assert upside_down.results.temperature is None
    assert "equally likely" in upside_down.results.notes[0]


@pytest.mark.slow
def test_of_a_thousand_classes_the_most_confused_are_drawn_within_seconds(tmp_path: Path) -> None:
    evaluation = single(1000, 1000)
    start = time.process_time()
    told, _ = written(evaluation, tmp_path / "told")
    assert time.process_time() - start < 20
    assert "confusion_matrix" not in told
    assert len(told["classes"]) == 1000
    assert len(told["confusions"]) == 20
    assert len(told["curves"]) == 8
    assert (tmp_path / "told" / "evaluation.html").stat().st_size < 2_000_000
    assert max(path.stat().st_size for path in (tmp_path / "told").glob("*.png")) < 1_000_000


@pytest.mark.parametrize(("samples", "seconds"), [(25_000, 20), slow(1_000_000, 240)])
def test_many_samples_take_bounded_time(samples: int, seconds: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, samples)
    scores = scipy.special.expit(rng.normal(0, 2, samples) + 3 * labels - 1.5).astype(np.float32)
    probabilities = np.stack([1 - scores, scores], axis=1)
    task = SingleLabelClassification.from_names(["negative", "positive"])
    lengths = Lengths(rng.integers(10, 400, samples), "tokens", 399)
    start = time.process_time()
    evaluation = Evaluation(task, probabilities, labels, lengths=lengths, temperature="fit")
    written(evaluation, tmp_path / "told")
    assert time.process_time() - start < seconds
    assert (tmp_path / "told" / "evaluation.html").stat().st_size < 1_000_000
    assert evaluation.results.classes[1].auroc == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-4)
    precision = sk.average_precision_score(labels, scores)
    assert evaluation.results.classes[1].average_precision == pytest.approx(precision, abs=1e-4)


# --- tables ---


def table_of(evaluation: Evaluation, **columns) -> pa.Table:
    """What `predict` writes, with columns of its input."""
    task = evaluation.task
    if isinstance(task, Regression):
        predicted = {"prediction": evaluation.scores.tolist()}
    else:
        predicted = {
            "prediction": task.decode(evaluation.predicted),
            **{f"probability_{name}": evaluation.scores[:, number] for number, name in enumerate(task.label_names)},
        }
    return pa.table({"index": np.arange(len(evaluation.scores)), **columns, **predicted})


def labelled(evaluation: Evaluation) -> pa.Table:
    return table_of(evaluation, label=evaluation.task.decode(evaluation.labels))


def as_csv(table: pa.Table, path: Path) -> None:
    """As `predict` writes lists."""
    frame = table.to_pandas()
    for name in frame:
        if isinstance(frame[name][0], np.ndarray):
            frame[name] = [json.dumps(row.tolist(), ensure_ascii=False) for row in frame[name]]
    frame.to_csv(path, index=False)


def same(found: Evaluation, expected: Evaluation) -> None:
    assert found.task.label_names == expected.task.label_names
    np.testing.assert_array_equal(found.labels, expected.labels.astype(np.asarray(found.labels).dtype))
    np.testing.assert_array_equal(found.scores, expected.scores)
    if not isinstance(expected.task, Regression):
        np.testing.assert_array_equal(found.predicted, expected.predicted)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize(
    "evaluation", [single(2), single(4), several(3), numbers(1)], ids=["two", "four", "several", "number"]
)
def test_a_table_gives_what_its_arrays_give(evaluation: Evaluation, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"predictions.{ending}"
    if isinstance(evaluation.task, Regression):
        evaluation = Evaluation(Regression(("label",)), evaluation.scores, evaluation.labels.astype(np.float32))
    pq.write_table(labelled(evaluation), path) if ending == "parquet" else as_csv(labelled(evaluation), path)
    found = Evaluation.from_table(path)
    same(found, evaluation)
    assert found.title == "predictions"
    assert found.results.summary == evaluation.results.summary


@pytest.mark.parametrize("ending", ["tsv", "csv.gz", "TSV.bz2"])
def test_tables_are_read_whatever_separates_and_compresses_them(ending: str, tmp_path: Path) -> None:
    evaluation, path = single(3), tmp_path / f"predictions.{ending}"
    labelled(evaluation).to_pandas().to_csv(path, index=False, sep="," if "csv" in ending else "\t")
    same(Evaluation.from_table(path), evaluation)


def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path) -> None:
    evaluation, folder = single(3), tmp_path / "predictions"
    folder.mkdir()
    table = labelled(evaluation)
    pq.write_table(table[:200], folder / "part-0.parquet")
    pq.write_table(table[200:], folder / "part-1.parquet")
    same(Evaluation.from_table(folder), evaluation)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_several_targets_stand_in_a_column_each_or_in_lists(ending: str, tmp_path: Path) -> None:
    evaluation, path = numbers(2), tmp_path / f"p.{ending}"
    labels = {f"target {one}": evaluation.labels[:, one] for one in range(2)}
    table = table_of(evaluation, **labels, both=evaluation.labels.tolist())
    pq.write_table(table, path) if ending == "parquet" else as_csv(table, path)
    found = Evaluation.from_table(path, label_column=["target 0", "target 1"])
    assert found.task.label_names == ["target 0", "target 1"]
    lists = Evaluation.from_table(path, label_column="both")
    assert lists.task.label_names == ["both_0", "both_1"]
    for one in (found, lists):
        np.testing.assert_allclose(one.labels, evaluation.labels, rtol=1e-6)
        np.testing.assert_array_equal(one.scores, evaluation.scores)


def test_several_labels_stand_as_texts_with_a_delimiter_or_in_a_column_each(tmp_path: Path) -> None:
    evaluation = several(3)
    truth = evaluation.labels
    texts = [";".join(name for name, has in zip(names(3), row, strict=True) if has) for row in truth]
    table = table_of(evaluation, label=texts, **{name: truth[:, n].astype(int) for n, name in enumerate(names(3))})
    pq.write_table(table, tmp_path / "columns.parquet")
    as_csv(table, tmp_path / "columns.csv")
    pq.write_table(table.drop_columns(["prediction"]), tmp_path / "text.parquet")
    as_csv(table.drop_columns(["prediction"]), tmp_path / "text.csv")
    for ending in ("parquet", "csv"):
        same(Evaluation.from_table(tmp_path / f"columns.{ending}", label_column=names(3)[::-1]), evaluation)
        same(Evaluation.from_table(tmp_path / f"text.{ending}", label_delimiter=";"), evaluation)


def test_ids_go_by_the_names_that_are_given_or_that_the_file_has(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset

    evaluation = single(2)
    table = table_of(evaluation, label=1 - evaluation.labels)  # as in data whose classes stand the other way round
    pq.write_table(table, tmp_path / "p.parquet")
    same(Evaluation.from_table(tmp_path / "p.parquet", label_names=["class 1", "class 0"]), evaluation)
    named = Dataset(table).cast_column("label", ClassLabel(names=["class 1", "class 0"]))
    named.to_parquet(str(tmp_path / "named.parquet"))
    same(Evaluation.from_table(tmp_path / "named.parquet"), evaluation)


@pytest.mark.parametrize("classes", [["07", "08"], ["0", "1"], ["True", "False"], ["-1", "=1"], ["NA", "None"]])
def test_classes_that_look_like_something_else_are_read_from_csv_by_name(classes: list[str], tmp_path: Path) -> None:
    one = single(2)
    task = SingleLabelClassification.from_names(classes)
    evaluation = Evaluation(task, one.scores, one.labels)
    frame = labelled(evaluation).to_pandas()
    for column in ("label", "prediction"):
        frame[column] = frame[column].map(lambda name: f"'{name}" if str(name)[0] in "=-" else str(name))
    frame.to_csv(tmp_path / "p.csv", index=False)
    same(Evaluation.from_table(tmp_path / "p.csv"), evaluation)


def test_ids_in_csv_are_told_with_the_option_that_names_them(tmp_path: Path) -> None:
    evaluation = single(2)
    table_of(evaluation, label=evaluation.labels).to_pandas().to_csv(tmp_path / "p.CSV", index=False)
    with pytest.raises(ValueError, match="has integers, but the classes are 'class 0', 'class 1'. Set label_names"):
        Evaluation.from_table(tmp_path / "p.CSV")
    same(Evaluation.from_table(tmp_path / "p.CSV", label_names=["class 0", "class 1"]), evaluation)


def test_numbers_that_are_names_of_classes_stay_names_beside_label_names(tmp_path: Path) -> None:
    one = single(2)
    evaluation = Evaluation(SingleLabelClassification.from_names(["0", "1"]), one.scores, one.labels)
    pq.write_table(labelled(evaluation), tmp_path / "p.parquet")
    same(Evaluation.from_table(tmp_path / "p.parquet", label_names=["1", "0"]), evaluation)


def test_what_was_predicted_by_thresholds_is_evaluated_as_it_was_predicted(tmp_path: Path) -> None:
    evaluation = single(2)
    strict = evaluation.task.predict_labels(evaluation.scores, {"class 1": 0.9})
    assert (strict != evaluation.predicted).any()
    predicted = Evaluation(evaluation.task, evaluation.scores, evaluation.labels, strict)
    pq.write_table(labelled(predicted), tmp_path / "p.parquet")
    same(Evaluation.from_table(tmp_path / "p.parquet"), predicted)
    write_thresholds({"class 1": 0.9}, tmp_path / "thresholds.json")
    pq.write_table(labelled(evaluation), tmp_path / "q.parquet")
    same(Evaluation.from_table(tmp_path / "q.parquet", thresholds=tmp_path / "thresholds.json"), predicted)


def test_lengths_of_a_table_are_characters_and_pairs_of_texts_one(tmp_path: Path) -> None:
    evaluation = single(2)
    texts = [f"größe {'x' * one}" for one in range(500)]
    table = table_of(evaluation, label=evaluation.task.decode(evaluation.labels), premise=texts, hypothesis=texts)
    pq.write_table(table, tmp_path / "p.parquet")
    found = Evaluation.from_table(tmp_path / "p.parquet", text_column=["premise", "hypothesis"])
    assert found.lengths.unit == "characters"
    assert found.lengths.values.tolist() == [2 * len(text) for text in texts]
    assert found.texts[3] == f"{texts[3]} / {texts[3]}"


def changed(column: str, value) -> pa.Table:
    table = labelled(single(3, 20))
    values = table.column(column).to_pylist()
    values[7] = value
    return table.set_column(table.column_names.index(column), column, pa.array(values))


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (labelled(single(3)), {"label_column": "stars"}, "no column 'stars'; it has 'index', 'label', 'prediction', 'pro"),
        (labelled(single(3)), {"text_column": "body"}, "no column 'body'; it has .*Set text_column, or .*predictions.columns"),
        (labelled(single(3)).select(["index", "label", "prediction"]), {}, "neither a column 'probability_NAME'.*it has"),
        (changed("label", "class 9"), {}, "row 7 .*'class 9', which is not one of the 3 classes: 'class 0', 'class 1'"),
        (changed("label", None), {}, "row 7 .*has no label in 'label'"),
        (changed("probability_class 1", float("nan")), {}, "row 7 .*has nan in 'probability_class 1'"),
        (changed("probability_class 1", None), {}, "row 7 .*has None in 'probability_class 1'"),
        (changed("probability_class 1", 1.2), {}, "row 7 has 1.2 for 'class 1', which is not a probability"),
        (changed("probability_class 1", 0.999), {}, "probabilities of row 7 sum to 1"),
        (changed("label", "class 0, class 2"), {}, "row 7 .*If these are several labels, set label_delimiter=','"),
        (labelled(single(3))[:0], {}, "has no rows"),
        (labelled(single(2)).drop_columns("probability_class 1"), {}, "has probabilities of 'class 0' only. Give a col"),
        (pa.table({"label": [1, 2], "prediction": [1, 2]}), {}, "has whole numbers in 'prediction' and no probabilities"),
        (table_of(single(3), label=[0] * 500), {}, "has integers, but the classes are 'class 0'.*Set label_names"),
        (table_of(single(3), label=[0] * 500), {"label_names": ["a", "b"]}, "has probabilities of 'class 0', 'class 1'"),
        (table_of(numbers(1), label=["x"] * 500), {}, "row 0 .* has 'x' in 'label', which is not a number"),
        (table_of(numbers(1), label=[float("inf")] * 500), {}, "row 0 .*the target inf"),
        (labelled(single(3)), {"text_column": "index"}, "holds int64, not text"),
        (labelled(single(3)), {"temperature": 0.0}, "temperature is 0.0; give a number above 0, or fit"),
        (table_of(numbers(1), label=np.ones(500)), {"temperature": "fit"}, "temperature is given.*numbers are predicted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_a_table_lacks_is_told_in_one_line(table: pa.Table, options: dict, message: str, tmp_path: Path) -> None:
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=message) as error:
        Evaluation.from_table(tmp_path / "p.parquet", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["nothing.parquet", "nothing.csv", "text.parquet"])
def test_a_file_that_is_no_table_is_told_in_one_line(path: str) -> None:
    Path("text.parquet").write_text("hello")
    with pytest.raises(ValueError, match=f"the predictions {path} cannot be read: .* Give a Parquet, CSV or TSV file"):
        Evaluation.from_table(path)


@pytest.mark.parametrize("path", ["nothing.parquet", "nothing.csv"])
def test_a_table_that_is_not_there_is_said_to_be_missing(path: str) -> None:
    with pytest.raises(ValueError, match=f"the predictions {path} cannot be read: there is no such file. Give a"):
        Evaluation.from_table(path)


def test_arrays_of_other_shapes_are_refused() -> None:
    task = SingleLabelClassification.from_names(["a", "b"])
    with pytest.raises(ValueError, match=r"labels has the shape \(2,\); give \(3,\), for 2 outputs"):
        Evaluation(task, np.full((3, 2), 0.5), np.zeros(2, int))
    with pytest.raises(ValueError, match="labels are from 0 to 2; give class numbers from 0 to 1"):
        Evaluation(task, np.full((3, 2), 0.5), np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="there are 1 texts for 3 samples"):
        Evaluation(task, np.full((3, 2), 0.5), np.zeros(3, int), texts=["a"])


# --- thresholds ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1.5}', "have 1.5 for 'a'; give a number from 0 to 1"),
        ('{"a": true}', "have True for 'a'"),
        ('{"a": NaN}', "have nan for 'a'"),
        ('{"z": 0.5}', "are for 'z', but thresholds apply here to 'a', 'b'. Remove the others"),
        ("[0.5]", "hold list; give numbers by label"),
        ("{", "cannot be read"),
    ],
)
def test_thresholds_out_of_range_or_of_unknown_labels_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "thresholds.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_thresholds(tmp_path, MultiLabelClassification.from_names(["a", "b"]))


def test_a_folder_of_no_model_or_of_one_with_other_labels_gets_no_thresholds(tmp_path: Path, monkeypatch) -> None:
    pq.write_table(labelled(single(2)), "p.parquet")
    BertConfig(id2label={0: "a", 1: "b"}).save_pretrained(tmp_path / "other")
    for folder, message in (
        ("nothing", "nothing has no config.json of a model. Give the folder of an"),
        ("other", "has the labels 'a', 'b', but"),
    ):
        with pytest.raises(SystemExit, match=message):
            smartbatch(
                monkeypatch, "evaluate", "--predictions=p.parquet", "--thresholds=best", f"--model_folder={folder}"
            )
        assert not (tmp_path / folder / "thresholds.json").exists()


def test_thresholds_decide_on_the_second_of_two_classes_and_on_none_of_three(tmp_path: Path) -> None:
    write_thresholds({"b": 0.3}, tmp_path / "thresholds.json")
    two = SingleLabelClassification.from_names(["a", "b"])
    thresholds = read_thresholds(tmp_path / "thresholds.json", two)
    scores = np.array([[0.75, 0.25], [0.65, 0.35], [0.1, 0.9]])
    assert two.predict_labels(scores, thresholds).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="thresholds apply only to several labels or .* Leave thresholds out"):
        read_thresholds(tmp_path, SingleLabelClassification.from_names(["a", "b", "c"]))


def test_predict_takes_thresholds_and_evaluate_reads_what_it_wrote(data, tmp_path: Path) -> None:
    scores, classes = {}, ["negative", "positive"]
    for name, thresholds in (("plain", None), ("strict", str(tmp_path / "model"))):
        if thresholds:  # halfway through the probabilities there are
            cut = float(np.median(scores["plain"]["probability_positive"]))
            write_thresholds({"positive": cut}, tmp_path / "model" / "thresholds.json")
        writer = PredictionWriter(f"{name}.parquet", ["label", "text"], thresholds=thresholds)
        trainer(tmp_path, callbacks=[writer]).predict(SequenceClassifier(str(demo.model_dir())), data)
        scores[name] = pd.read_parquet(f"{name}.parquet")
    strict = scores["strict"]
    assert (strict["prediction"] == np.where(strict["probability_positive"] > cut, "positive", "negative")).all()
    assert 15 < (strict["prediction"] == "positive").sum() < 25
    found = Evaluation.from_table("strict.parquet", text_column="text", label_names=classes)
    right = strict["prediction"] == np.array(classes)[strict["label"]]
    assert found.results.summary["accuracy"] == pytest.approx(right.mean())
    write_thresholds({"weird": 0.5}, tmp_path / "model" / "thresholds.json")
    with pytest.raises(ValueError, match="are for 'weird', but thresholds apply here to 'positive'"):
        trainer(tmp_path, callbacks=[PredictionWriter("x.parquet", thresholds="model")]).predict(
            SequenceClassifier(str(demo.model_dir())), data
        )
    assert not Path("x.parquet").exists()


def test_thresholds_that_are_not_there_are_refused_before_the_data_is_loaded(monkeypatch) -> None:
    with pytest.raises(SystemExit, match="error: the thresholds nothing.json cannot be read: .* Create them with"):
        smartbatch(monkeypatch, "predict", "--model.pretrained=not/there", "--data.dataset=nothing.csv",
                   "--predictions.thresholds=nothing.json")  # fmt: skip


# --- the command ---


def smartbatch(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["smartbatch", *arguments])
    main()


def test_the_command_prints_tables_and_writes_a_page_json_figures_and_thresholds(tmp_path, monkeypatch, capsys) -> None:
    evaluation = several(3)
    table = labelled(evaluation).append_column("text", pa.array([f"text {one}" for one in range(500)]))
    pq.write_table(table, tmp_path / "predictions.parquet")
    BertConfig(id2label=dict(enumerate(names(3)))).save_pretrained(tmp_path / "model")
    smartbatch(monkeypatch, "evaluate", "--predictions=predictions.parquet", "--text_column=text", "--thresholds=best",
               "--temperature=fit", "--folder=told", "--model_folder=model")  # fmt: skip
    printed = capsys.readouterr().out
    assert "class 2" in printed
    assert "By length" in printed
    assert {path.name for path in (tmp_path / "told").iterdir()} >= {"evaluation.html", "evaluation.json", "roc.png"}
    for folder in ("told", "model"):
        assert read_thresholds(tmp_path / folder, evaluation.task) == evaluation.results.thresholds
    told = json.loads((tmp_path / "told" / "evaluation.json").read_text())
    assert told["temperature"] == pytest.approx(1, abs=0.2)
    smartbatch(monkeypatch, "evaluate", "--predictions=predictions.parquet", "--thresholds=told", "--folder=again")
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert [one["f1"] for one in again["classes"]] == pytest.approx([one["best_f1"] for one in told["classes"]])


def test_a_refused_label_names_the_options_of_evaluate(monkeypatch) -> None:
    evaluation = several(3)
    ids = [",".join(str(number) for number in range(3) if row[number]) for row in evaluation.labels]
    pq.write_table(table_of(evaluation, label=ids), "p.parquet")
    command = ("evaluate", "--predictions=p.parquet", "--label_delimiter=,")
    with pytest.raises(SystemExit, match="If integers are class ids, set --label_names") as stop:
        smartbatch(monkeypatch, *command)
    assert "--data." not in str(stop.value.code)
    assert not Path("evaluation").exists()
    smartbatch(monkeypatch, *command, "--label_names=[class 0, class 1, class 2]")
    told = json.loads(Path("evaluation/evaluation.json").read_text())
    assert [one["support"] for one in told["classes"]] == evaluation.labels.sum(axis=0).tolist()


@pytest.mark.slow
def test_a_refused_label_that_reads_like_an_option_is_quoted_as_it_is(tmp_path: Path) -> None:
    table = pa.table({"probability_a": [0.2], "probability_b": [0.8], "label": ["--data.label_names"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="'--data.label_names'"):
        evaluate(str(tmp_path / "rows.parquet"), folder=str(tmp_path / "evaluation"))


def test_a_report_leaves_nothing_of_an_earlier_one_and_other_files_where_they_are(tmp_path: Path) -> None:
    """Its thresholds would be taken for those of the newer predictions."""
    (tmp_path / "mine.png").write_bytes(b"a picture")
    for evaluation, thresholds in ((several(3), {"class 0": 0.3}), (single(3), None)):
        paths = evaluation.save(tmp_path, thresholds)
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths} | {"mine.png"}
    for evaluation in (several(3, lengths=Lengths(np.arange(500), "tokens")), single(3), numbers(1), numbers(5)):
        assert evaluation.figures().keys() <= set(FIGURES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label_column=stars"], "error: .* has no column 'stars'"),
        (["--thresholds=best"], "error: thresholds=best needs a multi-label task or two classes"),
        (["--model_folder=evaluation"], "error: model_folder is 'evaluation', but there are no thresholds"),
        (["--thresholds=nothing.json"], "error: the thresholds nothing.json cannot be read"),
    ],
)
def test_a_mistake_ends_the_command_in_one_line(arguments, message, monkeypatch) -> None:
    pq.write_table(labelled(single(3)), "p.parquet")
    with pytest.raises(SystemExit, match=message) as stop:
        smartbatch(monkeypatch, "evaluate", "--predictions=p.parquet", *arguments)
    assert "\n" not in str(stop.value.code)
    assert not Path("evaluation").exists()


def test_help_names_the_command_and_its_options(monkeypatch, capsys) -> None:
    for arguments, told in ((["--help"], "smartbatch evaluate --help"), (["evaluate", "--help"], "--label_column")):
        with pytest.raises(SystemExit) as stop:
            smartbatch(monkeypatch, *arguments)
        assert stop.value.code == 0
        assert told in capsys.readouterr().out


# --- the callback ---


def reviews(path: Path, rows: int) -> str:
    table = pq.read_table(demo.data_dir() / "test.parquet")[:rows]
    pq.write_table(table, path)
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> SmartBatchDataModule:
    files = {"train": reviews(tmp_path / "a.parquet", 60), "test": reviews(tmp_path / "b.parquet", 40)}
    return SmartBatchDataModule(files, str(demo.model_dir()), max_length=24, batch_size=16, seed=1)


def test_a_test_is_reported_with_its_metrics_texts_and_lengths_and_logged(data, tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), "logs", "0")
    run = trainer(tmp_path, callbacks=[EvaluationReport("report")], logger=logger)
    [measured] = run.test(SequenceClassifier(str(demo.model_dir())), data)
    told = json.loads(Path("report/test/evaluation.json").read_text())
    assert told["samples"] == 40
    for name in ("accuracy", "f1"):
        assert told["summary"][name] == pytest.approx(measured[f"test_{name}"], abs=1e-6)
    assert told["summary"]["log_loss"] == pytest.approx(measured["test_loss"], abs=1e-5)
    table = pq.read_table("b.parquet")
    whole = [len(ids) for ids in data.tokenizer(table["text"].to_pylist())["input_ids"]]
    assert told["mistakes"]
    for one in told["mistakes"]:
        assert table["text"][one["row"]].as_py().startswith(one["text"].removesuffix(" ..."))
        assert one["length"] == whole[one["row"]]
    assert told["lengths"][-1]["name"].endswith(f" {max(whole):,}")
    assert max(whole) > 24
    events = EventAccumulator(str(tmp_path / "logs" / "0"), size_guidance={"images": 0}).Reload()
    assert "evaluation/test/reliability" in events.Tags()["images"]
    [logged] = events.Scalars("evaluation/test/f1/positive")
    assert [logged.value] == pytest.approx([one["f1"] for one in told["classes"] if one["name"] == "positive"])


@pytest.mark.slow  # wandb is large, and no part of the test extra
def test_wandb_gets_the_figures(data, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer(tmp_path, callbacks=[EvaluationReport("report")], logger=logger).test(
        SequenceClassifier(str(demo.model_dir())), data
    )
    logger.experiment.finish()
    assert {path.name.partition("_")[0] for path in tmp_path.rglob("media/**/*.png")} >= {"confusion", "roc"}


def test_a_validation_is_reported_where_it_is_a_share_of_training_and_fit_reports_nothing(data, tmp_path) -> None:
    report = EvaluationReport("report")
    run = trainer(tmp_path, callbacks=[report], max_steps=1)
    model = SequenceClassifier(str(demo.model_dir()))
    run.fit(model, data)
    assert not Path("report").exists()
    assert not model._forward_hooks
    run.validate(model, data)
    told = json.loads(Path("report/val/evaluation.json").read_text())
    assert told["samples"] == 6
    assert not model._forward_hooks
    table = pq.read_table("a.parquet")
    for one in told["mistakes"]:
        assert table["text"][one["row"]].as_py().startswith(one["text"].removesuffix(" ..."))


@pytest.mark.slow
def test_each_of_several_test_sets_has_a_report(tmp_path: Path) -> None:
    files = {"train": reviews(tmp_path / "a.parquet", 60), "one": reviews(tmp_path / "b.parquet", 40)}
    files["other"] = reviews(tmp_path / "c.parquet", 25)
    data = SmartBatchDataModule(files, str(demo.model_dir()), max_length=24, test_split=["one", "other"], seed=1)
    run = trainer(tmp_path, callbacks=[EvaluationReport("report")])
    measured = run.test(SequenceClassifier(str(demo.model_dir())), data)
    for number, (name, samples) in enumerate((("one", 40), ("other", 25))):
        told = json.loads(Path(f"report/test/{name}/evaluation.json").read_text())
        assert told["samples"] == samples
        assert told["summary"]["accuracy"] == pytest.approx(measured[number][f"test_accuracy/{name}"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["several", "number"])
def test_several_labels_and_regressions_are_reported(labels: str, minilm: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"text": [f"film number {one}" for one in range(60)]})
    frame["label"] = (
        [[name for name in ("good", "long") if rng.random() < 0.5] for _ in range(60)]
        if labels == "several"
        else rng.normal(5, 2, 60)
    )
    frame.to_parquet("t.parquet")
    files = {"train": "t.parquet", "test": "t.parquet"}
    data = SmartBatchDataModule(files, max_length=24, validation_split="test", seed=1)
    run, model = trainer(tmp_path, callbacks=[EvaluationReport("report")], max_steps=1), SequenceClassifier(minilm)
    run.fit(model, data)
    [measured] = run.test(model, data)
    told = json.loads(Path("report/test/evaluation.json").read_text())
    for name, value in told["summary"].items():
        if f"test_{name}" in measured:
            assert value == pytest.approx(measured[f"test_{name}"], abs=1e-4), name
    assert len(set(told["summary"]) & {name.removeprefix("test_") for name in measured}) >= 3


def test_a_module_of_another_kind_and_a_folder_that_cannot_be_written_are_refused(data, tmp_path: Path) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(ValueError, match="reports on a SequenceClassifier, but this run has BoringModel"):
        trainer(tmp_path, callbacks=[EvaluationReport("report")]).test(BoringModel())
    Path("file").write_text("")
    run = trainer(tmp_path, callbacks=[EvaluationReport("file")])
    with pytest.raises(ValueError, match=r"file cannot be written.* Set another --evaluation.folder"):
        run.test(SequenceClassifier(str(demo.model_dir())), data)


def test_without_a_folder_nothing_is_kept(data, tmp_path: Path) -> None:
    report = EvaluationReport()
    model = SequenceClassifier(str(demo.model_dir()))
    L.seed_everything(1)
    trainer(tmp_path, callbacks=[report]).test(model, data)
    assert not report._batches
    assert not model._forward_hooks
