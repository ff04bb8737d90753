"""Every file in examples runs, on small data."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import ROOT, Fork, cli, finish, slow
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

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


@pytest.mark.parametrize("padding", ["packed", slow("longest")])
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


def test_the_config_for_a_csv_of_ones_own_trains_and_keeps_the_best_weights(base: str) -> None:
    Path("examples").symlink_to(EXAMPLES)
    run = cli("fit", "--config=examples/own_csv.yaml", f"--model.pretrained={base}")
    assert set(run.datamodule.label_names) == {"recommended", "not recommended"}
    assert Path(run.trainer.checkpoint_callback.best_model_path).name == "best.ckpt"


def test_every_example_is_short_and_run_here() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if not path.name.startswith("_")}
    text = Path(__file__).read_text()
    assert files == {
        "lora_decoder.py", "own.csv", "own_csv.yaml", "own_datamodule.py", "own_module.py", "plain_dataloader.py"
    }  # fmt: skip
    for path in EXAMPLES.glob("*.*"):
        assert len(path.read_text().splitlines()) < 60, path
        assert path.suffix == ".csv" or path.stem in text
