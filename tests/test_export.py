"""Tests of the exported folder: an ordinary transformers model."""

import resource
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import cli, slow, trainer
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from smartbatch_lightning import (
    PredictionWriter,
    SequenceClassifier,
    SmartBatchCLI,
    SmartBatchDataModule,
    TrainingMonitor,
    demo,
)
from smartbatch_lightning.callbacks.model_export import ModelExport
from smartbatch_lightning.checkpointing import AtomicCheckpointIO
from smartbatch_lightning.export import export_model

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.mark.parametrize("padding", ["longest", slow("packed")])
def test_the_pipeline_of_an_exported_model_says_what_predict_says(padding: str, tmp_path: Path) -> None:
    """On 100 texts, of which many are cut."""
    data = SmartBatchDataModule(max_length=24, seed=1, padding=padding)
    model = SequenceClassifier(learning_rate=1e-3)
    folder = tmp_path / "reviewer"
    run = trainer(
        tmp_path,
        limit_train_batches=80,
        limit_val_batches=2,
        callbacks=[ModelExport(str(folder)), PredictionWriter(str(tmp_path / "predictions.csv")), TrainingMonitor()],
    )
    run.fit(model, data)
    run.predict(model, data)
    predicted = pd.read_csv(tmp_path / "predictions.csv")[:100]
    classify = pipeline("text-classification", str(folder), truncation=True, device="cpu")
    texts = data.splits["test"]["text"][:100]
    answers = classify(texts)
    assert [answer["label"] for answer in answers] == predicted["prediction"].tolist()
    assert len({answer["label"] for answer in answers}) == 2
    scores = predicted[["probability_negative", "probability_positive"]].max(axis=1)
    assert [answer["score"] for answer in answers] == pytest.approx(scores.tolist(), abs=1e-5)
    assert "| max_epochs | 1 |" in ModelCard.load(folder / "README.md").text


def test_a_checkpoint_is_exported_by_command_with_a_card_of_its_run(tmp_path: Path) -> None:
    run = cli(
        "fit",
        "--data.max_length=24",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=5",
        "--trainer.limit_val_batches=2",
        f"--trainer.default_root_dir={tmp_path}",
    )
    checkpoint = run.trainer.checkpoint_callback.best_model_path
    folder = tmp_path / "told"
    with pytest.raises(ValueError, match="was trained with max_length 24, but it is now 25.*Leave --data.max_length"):
        cli("export", "--data.max_length=25", f"--ckpt_path={checkpoint}", f"--folder={folder}")
    cli("export", f"--ckpt_path={checkpoint}", f"--folder={folder}")
    assert {path.name for path in folder.iterdir()} >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    exported = AutoModelForSequenceClassification.from_pretrained(folder)
    assert exported.config.id2label == {0: "negative", 1: "positive"}
    assert exported.config.problem_type == run.model.model.config.problem_type == "single_label_classification"
    trained = run.model.model.state_dict()
    assert all(weight.equal(trained[name]) for name, weight in exported.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 24
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert {result.metric_name for result in card.data.eval_results} == {"val_loss", "val_accuracy", "val_f1"}
    accuracy = float(run.trainer.callback_metrics["val_accuracy"])
    assert f"| val_accuracy | {accuracy:.4f} |" in card.text
    assert "| max_length | 24 |" in card.text
    assert "| learning_rate | 5e-05 |" in card.text
    assert "## Command" in card.text


@pytest.mark.slow
def test_a_runs_own_config_serves_report_export_and_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data.max_length=24", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    options.append("--model.class_weights=balanced")  # which only the checkpoint knows the numbers of
    limits = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    run = SmartBatchCLI(args=["fit", *options, *limits, f"--trainer.default_root_dir={tmp_path}"])
    config, checkpoint = Path(run.trainer.log_dir) / "config.yaml", run.trainer.checkpoint_callback.best_model_path
    cli("prepare", f"--config={config}")
    cli("report", f"--config={config}", f"--folder={tmp_path / 'told'}")
    cli("export", f"--config={config}", f"--ckpt_path={checkpoint}", f"--folder={tmp_path / 'model'}")
    assert (tmp_path / "told" / "report.json").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_run_without_a_data_module_is_refused_for_export_before_training(tmp_path: Path) -> None:
    data = SmartBatchDataModule(max_length=24)
    data.setup("fit")
    run = trainer(tmp_path, callbacks=[ModelExport(str(tmp_path / "model"))])
    with pytest.raises(ValueError, match="but this run has SequenceClassifier and NoneType. Call save_pretrained"):
        run.fit(SequenceClassifier(num_labels=2), data.train_dataloader())


def test_nothing_is_exported_unless_a_folder_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0, callbacks=[ModelExport()])
    run.fit(SequenceClassifier(), SmartBatchDataModule(max_length=24))
    assert not list(tmp_path.iterdir())


def test_a_readme_of_the_users_is_refused_before_training_and_kept(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("mine")
    run = trainer(tmp_path, callbacks=[ModelExport(str(tmp_path / "model"))])
    with pytest.raises(ValueError, match="README.md was not written by an export and would be replaced. Move it"):
        run.fit(SequenceClassifier(), SmartBatchDataModule(max_length=24))
    assert run.global_step == 0
    assert [path.read_text() for path in (tmp_path / "model").iterdir()] == ["mine"]


def test_outputs_that_cannot_be_written_are_refused_before_anything_has_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = trainer(tmp_path, callbacks=[ModelExport(str(tmp_path / "file" / "model"))])
    with pytest.raises(ValueError, match="file/model cannot be written: .*Give another folder"):
        run.fit(SequenceClassifier(), SmartBatchDataModule(max_length=24))
    assert run.global_step == 0
    with pytest.raises(ValueError, match="file/report cannot be written"):
        cli("report", f"--folder={tmp_path / 'file' / 'report'}")
    with pytest.raises(ValueError, match="file/out cannot be written: .*--predictions.path"):
        cli("predict", f"--predictions.path={tmp_path / 'file' / 'out' / 'labels.csv'}")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("long" * 100, "link"):
        with pytest.raises(ValueError, match=f"{name}/report cannot be written"):
            cli("report", f"--folder={tmp_path / name / 'report'}")
    with pytest.raises(ValueError, match="does not exist"):
        cli("report", f"--folder={tmp_path / 'new' / 'report'}", "--data.dataset=nor.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_a_card_shows_names_as_they_are_and_a_full_disk_leaves_the_files_before(minilm: str, tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "a|b`c", "*bold*\n# heading"]
    rows = [{"text": f"a fine film {number}", "label": name} for number in range(4) for name in names]
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    data = SmartBatchDataModule({"train": str(tmp_path / "train.parquet")}, validation_split=0.25)
    model, folder = SequenceClassifier(minilm), tmp_path / "model"
    trainer(tmp_path, limit_train_batches=1).fit(model, data)
    folder.mkdir()
    (folder / "thresholds.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    export_model(model, data, folder, {"val_loss": 0.5}, "smartbatch fit ```")
    assert not (folder / "thresholds.json").exists(), "they are those of other weights"
    assert (folder / "notes.txt").exists()
    card = (folder / "README.md").read_text()
    body = card.partition("\n---\n")[2]
    assert r"\<script\>alert(1)\</script\>" in body
    assert r"a\|b\`c" in body
    assert "<script" not in body.replace(r"\<", "")
    assert "````bash\nsmartbatch fit ```\n````" in body
    with pytest.raises(
        ValueError, match="the data has the labels .*, but the model was trained on other data.*--config"
    ):
        export_model(model, SmartBatchDataModule(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ValueError, match="model cannot be written: .*Free some space, or give another folder"):
            export_model(model, data, folder)
        with pytest.raises(ValueError, match="a.ckpt cannot be written: .*Free some space"):
            AtomicCheckpointIO().save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "a.ckpt.unfinished").exists()


def test_labels_that_a_spreadsheet_would_run_are_quoted_in_csv_alone(tmp_path: Path) -> None:
    names = ["=cmd|'/C calc'!A0", "plain"]
    files = {"train": str(tmp_path / "train.csv")}
    rows = [{"text": "a fine film", "label": name} for name in names * 4]
    pd.DataFrame(rows).to_csv(files["train"], index=False)
    data = SmartBatchDataModule(files, _demo_tokenizer(), validation_split=0.25, predict_split="train", max_length=24)
    model = SequenceClassifier()
    for ending in ("csv", "parquet"):
        writer = PredictionWriter(str(tmp_path / f"labels.{ending}"))
        run = trainer(tmp_path, callbacks=[writer], limit_train_batches=1, limit_val_batches=0)
        run.fit(model, data)
        torch.nn.init.zeros_(model.model.classifier.weight)
        torch.nn.init.zeros_(model.model.classifier.bias)  # equally likely, so the first class of all
        run.predict(model, data)
    assert model.label_names[0] == names[0]
    assert set(pd.read_parquet(tmp_path / "labels.parquet")["prediction"]) == {names[0]}
    assert set(pd.read_csv(tmp_path / "labels.csv")["prediction"]) == {"'" + names[0]}


def _demo_tokenizer():
    return AutoTokenizer.from_pretrained(demo.model_dir())
