"""Tests of standardized targets: learnt in standard deviations, returned in the original units."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from helpers import Fork, finish, trainer
from test_tasks import HAS, SCORES, TEXTS, csv, module
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, GPT2Config, pipeline

from smartbatch_lightning import PredictionWriter, SequenceClassifier, SmartBatchDataModule
from smartbatch_lightning.callbacks.model_export import ModelExport
from smartbatch_lightning.export import export_model
from smartbatch_lightning.models.head import rescale_logits
from smartbatch_lightning.models.metrics import StageMetrics
from smartbatch_lightning.tasks import Regression
from smartbatch_lightning.tasks.metrics import build_metrics
from smartbatch_lightning.tasks.standardization import Standardization

PRICES = SCORES * 40_000 + 1_000_000.5
PAIR = {"label_column": ["price", "score"]}


def standardized(dataset: str | dict[str, str], *args, **options) -> SmartBatchDataModule:
    return module(dataset, *args, standardize_targets=True, **options)


def frame(folder: Path, name: str = "data") -> str:
    path = folder / f"{name}.csv"
    pd.DataFrame({"text": TEXTS, "price": PRICES, "score": SCORES}).to_csv(path, index=False)
    return str(path)


def test_mean_and_deviation_are_those_of_the_training_part_alone(base: str, tmp_path: Path) -> None:
    dataset = frame(tmp_path)
    data = standardized(dataset, base, validation_split=0.25, **PAIR)
    data.setup("fit")
    rows, targets = data.train_data.rows, np.stack([PRICES, SCORES], axis=1)
    assert len(rows) == 45
    np.testing.assert_allclose(data.task.standardization.mean, targets[rows].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(data.task.standardization.std, targets[rows].std(axis=0), rtol=1e-12)
    expected = (targets - targets[rows].mean(axis=0)) / targets[rows].std(axis=0)
    np.testing.assert_allclose(data.train_data.labels, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(data.task.decode(data.train_data.labels).to_pylist(), targets, rtol=1e-6)
    as_they_are = module(dataset, base, validation_split=0.25, **PAIR)
    as_they_are.setup("fit")
    np.testing.assert_array_equal(as_they_are.train_data.rows, rows)


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SequenceClassifier, dict[str, float]]:
    """A folder with data.csv and a checkpoint, the model that was trained, and its metrics of all rows."""
    folder = tmp_path_factory.mktemp("trained")
    dataset = frame(folder)
    data = standardized({"train": dataset, "test": dataset}, label_column="price", validation_split=0.25)
    model = SequenceClassifier(base, learning_rate=1e-2)
    run = trainer(folder, max_epochs=20)
    run.fit(model, data)
    run.save_checkpoint(folder / "run.ckpt")
    return folder, model, run.test(model, data)[0]


def predicted(folder: Path, model: SequenceClassifier, data: SmartBatchDataModule) -> np.ndarray:
    run = trainer(folder, callbacks=[PredictionWriter(str(folder / "predictions.parquet"), overwrite=True)])
    run.predict(model, data)
    return pq.read_table(folder / "predictions.parquet")["prediction"].to_numpy()


@pytest.mark.slow
def test_metrics_and_predictions_of_a_checkpoint_are_in_the_datas_unit_without_training_data(trained, tmp_path) -> None:
    folder, _, tested = trained
    model = SequenceClassifier.load_from_checkpoint(folder / "run.ckpt")
    data = module({"test": str(folder / "data.csv")}, label_column="price")
    prices = predicted(tmp_path, model, data)
    [again] = trainer(tmp_path).test(model, data)
    assert again == pytest.approx(tested)
    expected = {
        "test_mse": ((prices - PRICES) ** 2).mean(),
        "test_mae": abs(prices - PRICES).mean(),
        "test_pearson": np.corrcoef(prices, PRICES)[0, 1],
    }
    assert {name: again[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    mean, std = (values[0] for values in model.task.standardization.__dict__.values())
    assert again["test_loss"] == pytest.approx((((prices - PRICES) / std) ** 2).mean(), rel=1e-5)
    assert expected["test_mae"] < 0.5 * PRICES.std()
    assert mean == pytest.approx(PRICES.mean(), rel=0.1)


def test_validation_of_a_checkpoint_sets_the_same_samples_aside(trained, tmp_path: Path) -> None:
    folder, _, _ = trained
    model = SequenceClassifier.load_from_checkpoint(folder / "run.ckpt")
    data = standardized({"train": str(folder / "data.csv")}, label_column="price", validation_split=0.25)
    trainer(tmp_path).validate(model, data)
    assert len(data.validation_data[0]) == 15
    assert data.task.standardization == model.task.standardization


def test_the_exported_model_gives_the_datas_unit_and_trains_on(trained, tmp_path: Path) -> None:
    folder, model, tested = trained
    dataset, exported = str(folder / "data.csv"), str(tmp_path / "exported")
    data = module({"train": dataset, "test": dataset}, label_column="price", validation_split=0.25)
    prices = predicted(tmp_path, model, data)
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    export_model(model, data, exported)
    assert all(weight.equal(before[name]) for name, weight in model.model.state_dict().items())
    assert not {"target_mean", "target_std"} & json.loads((Path(exported) / "config.json").read_text()).keys()
    classify = pipeline("text-classification", exported, truncation=True, function_to_apply="none")
    assert [one["score"] for one in classify(TEXTS)] == pytest.approx(prices.tolist(), rel=1e-5)
    for again in (data, standardized(data.dataset, label_column="price", validation_split=0.25)):
        fresh = SequenceClassifier(exported, learning_rate=0.0)
        run = trainer(tmp_path)
        run.fit(fresh, again)
        assert (fresh.task.standardization is None) == (again is data)
        [now] = run.test(fresh, again)
        assert now["test_mae"] == pytest.approx(tested["test_mae"], rel=1e-3)


def test_a_model_of_more_than_two_joined_columns_is_exported(base: str, tmp_path: Path) -> None:
    columns, dataset = list("abcde"), str(tmp_path / "data.csv")
    pd.DataFrame({**dict.fromkeys(columns, TEXTS), "price": PRICES}).to_csv(dataset, index=False)
    options = {"text_columns": columns, "text_separator": " ", "label_column": "price"}
    data = standardized({"train": dataset, "test": dataset}, base, validation_split=0.25, **options)
    model = SequenceClassifier(base, learning_rate=1e-2)
    trainer(tmp_path).fit(model, data)
    prices = predicted(tmp_path, model, data)
    export_model(model, data, tmp_path / "exported")
    classify = pipeline("text-classification", str(tmp_path / "exported"), truncation=True, function_to_apply="none")
    joined = [" ".join([text] * len(columns)) for text in TEXTS]
    assert [one["score"] for one in classify(joined)] == pytest.approx(prices.tolist(), rel=1e-5)


FAMILIES = [
    "albert",
    "bart",
    "bert",
    "camembert",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "roberta",
    "xlnet",
]


def fit_and_test_on_two_ranks(folder: Path, dataset: str, base: str) -> None:
    torch.set_num_threads(1)
    data = standardized({"train": dataset, "test": dataset}, label_column="price", validation_split=0.25)
    run, model = trainer(folder, max_epochs=2, devices=2, strategy="ddp"), SequenceClassifier(base, learning_rate=1e-2)
    run.fit(model, data)
    run.save_checkpoint(folder / "run.ckpt")
    [tested] = run.test(model, data)
    if run.is_global_zero:
        (folder / "metrics.json").write_text(json.dumps(tested))


@pytest.mark.slow
def test_two_ranks_standardise_and_measure_as_one_does(base: str, tmp_path: Path) -> None:
    dataset = frame(tmp_path)
    finish(Fork(tmp_path, 2, fit_and_test_on_two_ranks, tmp_path, dataset, base), tmp_path)
    model = SequenceClassifier.load_from_checkpoint(tmp_path / "run.ckpt")
    [alone] = trainer(tmp_path).test(model, module({"test": dataset}, label_column="price"), verbose=False)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(alone)
    data = standardized(dataset, base, label_column="price", validation_split=0.25)
    data.prepare_data()
    data.setup("fit")
    assert model.task.standardization == data.task.standardization


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_of_any_family_takes_up_another_unit(family: str) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_labels": 2, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    if family == "bart":
        sizes = {"vocab_size": 100, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
        heads |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    elif family == "distilbert":
        sizes = {"vocab_size": 100, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
    elif family == "xlnet":
        sizes = {"vocab_size": 100, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIG_MAPPING[family](**{**heads, **sizes})).eval()
    inputs = {"input_ids": torch.tensor([[1, 7, 8, 9, 2], [1, 9, 9, 3, 2]])}
    with torch.no_grad():
        before = model(**inputs).logits
        rescale_logits(model, [3.0, 0.5], [1000.0, -2.0])
        torch.testing.assert_close(model(**inputs).logits, before * torch.tensor([3, 0.5]) + torch.tensor([1000, -2.0]))


def test_targets_of_a_million_that_differ_by_one_keep_their_digits(tmp_path: Path, base: str) -> None:
    rng = np.random.default_rng(0)
    targets = 1_000_000 + rng.normal(size=60)
    data = standardized(csv(tmp_path, {"label": targets}), base, validation_split=None)
    data.setup("fit")
    task, labels = data.task, data.train_data.labels
    np.testing.assert_allclose(labels, (targets - targets.mean()) / targets.std(), atol=1e-6)
    noise = rng.normal(size=60) / 10
    logits = torch.tensor(labels + noise, dtype=torch.float32)[:, None]
    metrics = StageMetrics(build_metrics(["mse", "mae", "pearson", "spearman"], task), task)
    for part in (slice(0, 20), slice(20, 60)):
        metrics.update(torch.tensor(0.0), logits[part], torch.from_numpy(labels[part]))
        metrics._flush()
    found = {name: float(metric.compute()) for name, metric in metrics.computable().items() if name != "loss"}
    ranks = [values.argsort().argsort() for values in (labels + noise, labels)]
    expected = {
        "mse": ((noise * targets.std()) ** 2).mean(),
        "mae": abs(noise * targets.std()).mean(),
        "pearson": np.corrcoef(labels + noise, labels)[0, 1],
        "spearman": np.corrcoef(*ranks)[0, 1],
    }
    assert found == pytest.approx(expected, rel=1e-5)
    prediction = task.prediction_columns({k: v.numpy() for k, v in task.predict(logits).items()})["prediction"]
    np.testing.assert_allclose(prediction, targets + noise * targets.std(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"label": ["a", "b"] * 30}, {}, "standardize_targets is true, but problem_type is 'single_label_class"),
        (
            {"a": HAS[:, 0], "b": HAS[:, 1]},
            {"label_column": ["a", "b"]},
            "standardize_targets is true, but problem_type is 'multi_label",
        ),
        (
            {"a": SCORES, "b": [0.1] * 60},
            {"label_column": ["a", "b"]},
            "the target 'b' is 0.1 in every training sample.*--data.label_column",
        ),
    ],
)
def test_what_cannot_be_standardised_is_refused_by_name(columns, options, message, base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        standardized(csv(tmp_path, columns), base, **options).setup("fit")


def test_a_checkpoint_of_other_means_is_refused(trained, base: str, tmp_path: Path) -> None:
    folder, _, _ = trained
    for own in (module, standardized):
        data = own({"train": str(folder / "data.csv")}, label_column="price", test_split="train", validation_split=0.5)
        with pytest.raises(
            ValueError, match="checkpoint has learnt targets standardized by the mean.*but the data has"
        ):
            trainer(tmp_path).test(SequenceClassifier(base), data, ckpt_path=folder / "run.ckpt")


def test_a_head_without_a_bias_is_refused_for_export_before_training(base: str, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=2000, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0, n_positions=32)
    model = SequenceClassifier(
        architecture={**config.to_dict(), "problem_type": "regression", "id2label": {0: "label"}}
    )
    standardization = Standardization((1.0,), (2.0,))
    model.architecture |= Regression(("label",), standardization).config_fields()
    data = standardized(csv(tmp_path, {"label": SCORES}), base)
    run = trainer(tmp_path, callbacks=[ModelExport(str(tmp_path / "exported"))])
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification has no last layer with a bias"):
        run.fit(model, data)
    assert run.global_step == 0
