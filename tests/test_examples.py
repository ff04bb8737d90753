"""Every file in examples runs, on small data."""

import csv
import importlib.util
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from helpers import ROOT, Fork, cli, finish
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

from smartbatch_lightning import SmartBatchCLI

EXAMPLES = ROOT / "examples"
TRAINER = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_on_ranks(name: str, ranks: int, arguments: list[str]) -> None:
    """What each of several processes runs, and a report of rank 0."""
    run = example(name).main(*arguments, **TRAINER, devices=ranks, strategy="ddp", max_epochs=2)
    if run.is_global_zero:
        metrics = {metric: float(value) for metric, value in run.callback_metrics.items()}
        Path("end.json").write_text(json.dumps({"steps": run.global_step, **metrics}))
        torch.save(run.lightning_module.state_dict(), "weights.pt")


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["packed", "longest"])
def test_a_module_of_ones_own_learns_the_demo(padding: str) -> None:
    run = example("own_module").main(padding, **TRAINER)
    assert run.callback_metrics["val_accuracy"] > 0.6


def test_a_classifier_learns_from_a_data_module_of_ones_own() -> None:
    run = example("own_datamodule").main(**TRAINER)
    assert run.global_step == 16
    assert run.callback_metrics["val_accuracy"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"), [("own_module", ["packed"]), ("own_module", []), ("own_datamodule", [])]
)
def test_two_ranks_run_them_too(name: str, arguments: list[str], tmp_path: Path) -> None:
    finish(Fork(tmp_path / "run", 2, run_on_ranks, name, 2, arguments), tmp_path / "run")
    ended = json.loads((tmp_path / "run" / "end.json").read_text())
    assert ended["val_accuracy"] > 0.6
    assert ended["steps"] == (8 if name == "own_datamodule" else 2 * math.ceil(1800 / 16 / 2))


def test_smart_batches_are_trained_without_lightning() -> None:
    losses = example("plain_dataloader").main()
    assert len(losses) == 2 * 96 / 8
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_decoder_is_trained_with_lora_and_exported_merged() -> None:
    run = example("lora_decoder").main(**TRAINER, limit_train_batches=10, limit_val_batches=2)
    assert run.lightning_module.adapters is not None
    exported = AutoModelForSequenceClassification.from_pretrained("reviewer")
    assert type(exported) is LlamaForSequenceClassification
    assert not any("lora" in name for name in exported.state_dict())


@pytest.fixture
def small(base: str, in_a_folder_of_its_own: None) -> None:
    """Copies the examples to the working directory, with a small model in place of BERT-base."""
    shutil.copytree(EXAMPLES, "examples")
    for config in Path("examples").glob("*.yaml"):
        config.write_text(config.read_text().replace("bert-base-uncased", base))


def run_commands(config: str) -> list[SmartBatchCLI]:
    """What the commands in the first lines of a config leave."""
    lines = Path("examples", config).read_text().splitlines()
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("# smartbatch ")]
    assert all(f"--config examples/{config}" in " ".join(command) for command in commands)
    return [cli(*command) for command in commands]


@pytest.mark.usefixtures("small")
def test_the_config_for_a_csv_of_ones_own_trains_and_keeps_the_best_weights() -> None:
    [fit] = run_commands("own_csv.yaml")
    assert set(fit.datamodule.label_names) == {"recommended", "not recommended"}
    assert Path(fit.trainer.checkpoint_callback.best_model_path).name == "best.ckpt"


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_config_for_several_labels_trains_and_predicts_those_above_a_half_for_each_text() -> None:
    fit, _ = run_commands("multi_label.yaml")
    assert fit.datamodule.label_names == ["access", "billing", "urgent"]
    with open("labels.csv") as predictions, open("examples/multi_label.csv") as texts:
        predicted = list(csv.DictReader(predictions))
        assert len(predicted) == len(list(csv.DictReader(texts))) == 20
    for row in predicted:
        above = [name for name in fit.datamodule.label_names if float(row[f"probability_{name}"]) > 0.5]
        assert row["prediction"] == ";".join(above)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_config_for_text_pairs_learns_a_number() -> None:
    fit, test = run_commands("text_pairs.yaml")
    assert fit.model.model.config.problem_type == "regression"
    assert 0 < test.trainer.callback_metrics["test_mae"] < 5
    first = fit.datamodule.tokenizer.decode(fit.datamodule.train_data[0]["input_ids"])
    assert first.count("[SEP]") == 2


@pytest.mark.usefixtures("small")
def test_a_sweep_of_wandb_calls_the_command_line_with_options_that_it_has() -> None:
    sweep = yaml.safe_load(Path("examples/wandb_sweep.yaml").read_text())
    drawn = {name: one["values"][0] if "values" in one else one["max"] for name, one in sweep["parameters"].items()}
    program, *arguments, args = sweep["command"]
    assert (program, sweep["program"], args) == ("${program}", "smartbatch", "${args}")
    run = cli(*arguments, *(f"--{name}={value}" for name, value in drawn.items()))  # but without the logger
    assert run.model.hparams["learning_rate"] == drawn["model.learning_rate"]
    assert run.datamodule.batch_size == drawn["data.batch_size"]
    assert sweep["metric"] == {"name": "val_f1", "goal": "maximize"}
    assert run.model.monitored(None, None) == ("val_f1", "max")


@pytest.mark.slow  # as the next one in an environment that has the extra `examples`
def test_optuna_prunes_the_trials_below_the_median_of_earlier_ones() -> None:
    optuna = pytest.importorskip("optuna")
    study = example("optuna_search").main(6, **TRAINER, limit_train_batches=4, limit_val_batches=2)
    pruned = study.get_trials(states=[optuna.trial.TrialState.PRUNED])
    assert 0 < len(pruned) < len(study.trials) == 6
    for trial in pruned:
        epoch, value = max(trial.intermediate_values.items())
        earlier = [one.intermediate_values for one in study.trials[: trial.number]]
        assert value < statistics.median(one[epoch] for one in earlier if len(one) == 3)


@pytest.fixture
def reviewer(small: None, base: str) -> str:
    """An exported folder, of texts of at most 64 tokens."""
    export = ["--export_model.folder=reviewer", "--trainer.max_epochs=1"]
    cli("fit", "--config=examples/own_csv.yaml", *export)
    return "reviewer"


@pytest.mark.slow
def test_an_exported_folder_gives_the_same_logits_as_onnx_for_batches_of_any_size(reviewer: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    example("export_onnx").main(reviewer)
    session = onnxruntime.InferenceSession(f"{reviewer}/model.onnx")
    model = AutoModelForSequenceClassification.from_pretrained(reviewer)
    tokenizer = AutoTokenizer.from_pretrained(reviewer)
    for texts in (["a fine film"], ["a dull film, and far too long"] * 2 + ["warm"] * 5, ["harbour " * 100] * 3):
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        [logits] = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(logits), model(**inputs).logits, atol=1e-4, rtol=0)


def test_an_exported_folder_has_what_text_embeddings_inference_reads(reviewer: str, monkeypatch) -> None:
    docker = Path("bin/docker")  # which is not here: this one writes down how it is called
    docker.parent.mkdir()
    docker.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > called.txt\n')
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent.resolve()}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["bash", "examples/serve.sh", reviewer], check=True)
    called = Path("called.txt").read_text().splitlines()
    assert called[called.index("-v") + 1] == f"{Path(reviewer).resolve()}:/model:ro"
    assert called[-2:] == ["--model-id", "/model"]

    config = json.loads(Path(reviewer, "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {str(number): name for name, number in config["label2id"].items()}
    assert config["max_position_embeddings"] >= 64
    assert json.loads(Path(reviewer, "sentence_bert_config.json").read_text()) == {"max_seq_length": 64}
    ids = Tokenizer.from_file(f"{reviewer}/tokenizer.json").encode("The harbour at dawn.").ids
    assert ids == AutoTokenizer.from_pretrained(reviewer)("The harbour at dawn.")["input_ids"]
    weights = load_file(f"{reviewer}/model.safetensors")
    assert weights["bert.pooler.dense.weight"].shape == (config["hidden_size"], config["hidden_size"])
    assert weights["classifier.weight"].shape == (2, config["hidden_size"])


def test_every_example_is_short_listed_and_run_here() -> None:
    listed, text = (ROOT / "docs" / "examples.md").read_text(), Path(__file__).read_text()
    examples = [path for path in EXAMPLES.iterdir() if path.is_file()]
    assert len(examples) >= 14
    for path in examples:
        assert len(path.read_text().splitlines()) < 60, path
        if path.suffix != ".csv":
            assert f"`{path.name}`" in listed
            assert path.name in text or f'"{path.stem}"' in text, path
