"""Weights of classes, smoothed labels and focal loss: what is minimized, over batches, ranks and accumulation."""

from pathlib import Path

import numpy as np
import pytest
import run_weighted_loss as weighted
import torch
from datasets import Dataset, DatasetDict
from helpers import Fork, finish, slow, trainer
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding

from smartbatch_lightning import BatchSpec, SequenceClassifier, SmartBatchDataModule, SmartBatchSampler, demo
from smartbatch_lightning.tasks import MultiLabelClassification, Regression, SingleLabelClassification
from smartbatch_lightning.tasks.losses import LossOptions

NAMES = ["bad", "fair", "good"]


def single(**options) -> SingleLabelClassification:
    return SingleLabelClassification.from_names(NAMES).with_loss(LossOptions(**options))


def several(**options) -> MultiLabelClassification:
    return MultiLabelClassification.from_names(NAMES).with_loss(LossOptions(**options))


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 3, generator=generator), torch.tensor([0, 2, 2, 1, 2, 0, 2])


# --- one batch ---


def test_class_weights_by_name_are_those_of_torchs_cross_entropy() -> None:
    logits, labels = logits_and_labels()
    task = single(class_weights={"good": 0.5, "bad": 4.0}, label_smoothing=0.1)
    expected = torch.nn.CrossEntropyLoss(torch.tensor([4.0, 1.0, 0.5]), label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(task.compute_loss(logits, labels), expected)


def test_balanced_class_weights_are_scikit_learns() -> None:
    """For 1, 2 and 5 samples of 8: `8 / (3 * count)`."""
    options = LossOptions(class_weights="balanced").balanced({"bad": 1, "fair": 2, "good": 5}, 8)
    assert options.class_weights == pytest.approx({"bad": 8 / 3, "fair": 8 / 6, "good": 8 / 15})


def test_a_class_without_a_training_sample_counts_for_1_beside_balanced_ones() -> None:
    options = LossOptions(class_weights="balanced").balanced({"bad": 2, "fair": 0, "good": 6}, 8)
    task = SingleLabelClassification.from_names(NAMES).with_loss(options)
    weights = task.sample_weights(torch.tensor([0, 1, 2]))
    torch.testing.assert_close(weights, torch.tensor([8 / 4, 1.0, 8 / 12], dtype=torch.float64))


def test_focal_loss_scales_each_samples_cross_entropy_by_how_far_its_probability_is_from_1() -> None:
    logits, labels = logits_and_labels()
    probability = logits.double().softmax(1)[torch.arange(7), labels].numpy()
    weights = np.array([2.0, 1.0, 1.0])[labels.numpy()]
    expected = (weights * (1 - probability) ** 1.5 * -np.log(probability)).sum() / weights.sum()
    loss = single(focal_gamma=1.5, class_weights={"bad": 2.0}).compute_loss(logits, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_pos_weight_of_several_labels_is_that_of_torchs_loss() -> None:
    logits, labels = logits_and_labels()
    has = F.one_hot(labels, 3).float()
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 7.0, 1.0]))(logits, has)
    torch.testing.assert_close(several(pos_weight={"fair": 7.0}).compute_loss(logits, has.bool()), expected)
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))(logits, has)
    torch.testing.assert_close(several(pos_weight=2).compute_loss(logits, has.bool()), expected)


def test_focal_loss_of_several_labels_is_that_of_its_paper() -> None:
    logits, labels = logits_and_labels()
    has = F.one_hot(labels, 3).numpy().astype(bool)
    probability = 1 / (1 + np.exp(-logits.double().numpy()))
    of_truth = np.where(has, probability, 1 - probability)
    expected = ((1 - of_truth) ** 2 * -np.log(of_truth)).mean()
    loss = several(focal_gamma=2.0).compute_loss(logits, torch.from_numpy(has))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_balanced_pos_weight_is_samples_without_a_label_over_those_with_it() -> None:
    options = LossOptions(pos_weight="balanced").balanced({"bad": 2, "fair": 0, "good": 8}, 8)
    assert options.pos_weight == {"bad": 3.0}


def test_weights_first_asked_for_in_inference_mode_are_trained_with_afterwards() -> None:
    logits, labels = logits_and_labels()
    task = single(class_weights={"bad": 1.25})
    with torch.inference_mode():
        task.compute_loss(logits, labels)
    logits.requires_grad_()
    task.compute_loss(logits, labels).backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": "even"}, "class_weights is 'even'; give 'balanced'"),
        ({"class_weights": [1.0, 5.0]}, "class_weights is the list .*; give numbers by name"),
        ({"class_weights": {1: 2.0, "1": 3.0}}, "class_weights has a name twice: 1, '1'"),
        ({"class_weights": {"bad": 0}}, "class_weights is 0 for bad; give a number above 0"),
        ({"class_weights": {"bad": float("nan")}}, "class_weights is nan for bad"),
        ({"pos_weight": -1.0}, "pos_weight is -1.0 for all labels"),
        ({"pos_weight": {"bad": True}}, "pos_weight is True for bad"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; give a number of 0 or more"),
        ({"focal_gamma": -0.5}, "focal_gamma is -0.5"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_loaded(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassifier("not/there", **options)


def test_options_that_do_not_fit_the_labels_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"class_weights has 'superb', which is not one of the labels: 'bad', 'fair'"):
        single(class_weights={"superb": 2.0})
    with pytest.raises(ValueError, match="pos_weight is given, which the loss of single_label_classification does not"):
        single(pos_weight=2.0)
    with pytest.raises(ValueError, match="class_weights is given, which the loss of multi_label_classification"):
        several(class_weights="balanced")
    with pytest.raises(ValueError, match="label_smoothing is given, which the loss of regression does not support"):
        Regression.from_names(["score"]).with_loss(LossOptions(label_smoothing=0.1))


# --- an optimizer step ---


def expected_gradient(rows: list[int], budget: int | None, padding: str) -> dict[str, torch.Tensor]:
    """Of one big padded batch, by transformers' collator and torch's loss."""
    module = weighted.data(budget, padding)
    module.setup("fit")
    model = weighted.model()
    model.configure_model()
    model.double()
    tokenized = [{"input_ids": module.train_data.table[row]["input_ids"].tolist()} for row in rows]
    batch = DataCollatorWithPadding(module.tokenizer)(tokenized)
    labels = torch.tensor([int(module.train_data.labels[row]) for row in rows])
    weights = torch.tensor([weighted.CLASS_WEIGHTS[name] for name in module.label_names]).double()
    F.cross_entropy(model.model(**batch).logits, labels, weights).backward()
    return {name: value.grad for name, value in model.model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_the_gradient_of_a_step_is_that_of_one_big_batch_of_its_samples(ranks: int, tmp_path: Path) -> None:
    if ranks == 1:
        weighted.main(tmp_path, ranks)
    else:
        finish(Fork(tmp_path, ranks, weighted.main, tmp_path, ranks), tmp_path)
    for number, (accumulated, budget, padding) in enumerate(weighted.SETTINGS):
        kept = [torch.load(tmp_path / f"{number}-{rank}.pt") for rank in range(ranks)]
        for step in range(weighted.STEPS):
            rows = [row for rank in kept for row in rank["rows"][step]]
            expected = expected_gradient(rows, budget, padding)
            scale = max(value.abs().max() for value in expected.values())
            for name, gradient in kept[0]["gradients"][step].items():
                error = (gradient - expected[name]).abs().max() / scale
                assert error < 1e-9, (accumulated, budget, padding, step, name, float(error))


def test_the_sampler_weighs_batches_by_what_their_samples_count_for() -> None:
    sampler = SmartBatchSampler(np.arange(1, 41), BatchSpec(batch_size=6, seed=1), num_replicas=1, rank=0)
    counted = np.random.default_rng(0).uniform(0.1, 5, 40)
    sums = [counted[batch].sum() for batch in sampler]
    weights = list(zip(range(len(sums)), sampler.loss_weights(3, sample_weights=counted), strict=False))
    for first in range(0, len(sums), 3):
        window = sums[first : first + 3]
        for number, weight in weights[first : first + 3]:
            assert weight == pytest.approx(sums[number] * 3 / sum(window))


# --- a run ---


class Imbalanced(SmartBatchDataModule):
    """Nine dull films to a fine one."""

    def load_dataset(self) -> DatasetDict:
        rows = {"text": ["a dull film"] * 36 + ["a fine film"] * 4, "label": ["negative"] * 36 + ["positive"] * 4}
        return DatasetDict({name: Dataset.from_dict(rows) for name in ("train", "test")})


def imbalanced(**options) -> Imbalanced:
    tokenizer = str(demo.model_dir())
    return Imbalanced("films", tokenizer, validation_split="test", batch_size=8, max_length=16, **options)


def test_balanced_weights_are_counted_in_training_and_kept_as_numbers_in_the_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    model = SequenceClassifier(class_weights="balanced")
    run.fit(model, imbalanced())
    run.save_checkpoint(tmp_path / "trained.ckpt")
    loaded = SequenceClassifier.load_from_checkpoint(tmp_path / "trained.ckpt")
    assert loaded.hparams["class_weights"] == pytest.approx({"negative": 40 / (2 * 36), "positive": 40 / (2 * 4)})
    [again] = trainer(tmp_path).validate(loaded, imbalanced(), verbose=False)
    assert again["val_loss"] == pytest.approx(float(run.callback_metrics["val_loss"]), rel=1e-6)
    given = SequenceClassifier(class_weights="balanced")
    [again] = trainer(tmp_path).test(given, imbalanced(), ckpt_path=tmp_path / "trained.ckpt", verbose=False)
    assert again["test_loss"] == pytest.approx(float(run.callback_metrics["val_loss"]), rel=1e-6)


def test_the_loss_of_a_validation_is_the_mean_by_weight_over_all_its_samples(tmp_path: Path) -> None:
    model = SequenceClassifier(class_weights={"positive": 9.0})
    module = imbalanced(batching="random")
    [measured] = trainer(tmp_path).validate(model, module, verbose=False)
    batches = [model(**{k: v for k, v in b.items() if k not in ("index", "labels")}) for b in module.val_dataloader()]
    logits = torch.cat([output.logits for output in batches]).detach()
    labels = torch.cat([batch["labels"] for batch in module.val_dataloader()])
    expected = F.cross_entropy(logits, labels, torch.tensor([1.0, 9.0]))
    assert measured["val_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": {"positives": 9.0}}, "class_weights has 'positives', which is not one of the labels"),
        ({"pos_weight": "balanced"}, "pos_weight is given, which the loss of single_label_classification does not"),
        ({"num_labels": 3}, "num_labels is 3, but the data has 2 classes"),
        ({"pretrained": "three classes"}, "three classes classifies into 'a', 'b', 'c', but the data has"),
        ({"pretrained": "short"}, "max_length is 16, but the model takes 8 tokens at most"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused_before_a_text_is_tokenized(
    options, message: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Counting(Imbalanced):
        tokenized = 0

        def tokenize(self, dataset):
            self.tokenized += 1
            return super().tokenize(dataset)

    names = dict(enumerate("abc"))
    config = AutoConfig.from_pretrained(base, architectures=["BertForSequenceClassification"], id2label=names)
    AutoModelForSequenceClassification.from_config(config).save_pretrained("three classes")
    AutoConfig.from_pretrained(base, max_position_embeddings=8).save_pretrained("short")
    module = Counting("films", str(demo.model_dir()), validation_split="test", max_length=16)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(SequenceClassifier(**options), module)
    assert not module.tokenized


def test_balanced_weights_without_anything_to_count_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class_weights is 'balanced', but there is neither training data"):
        trainer(tmp_path).test(SequenceClassifier(class_weights="balanced"), imbalanced(), verbose=False)
