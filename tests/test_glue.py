"""GLUE's ten data sets, small and made up, in the shape in which the Hub has them: columns, label kinds, splits."""

from pathlib import Path

import pandas as pd
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from helpers import FAST, ROOT, cli
from transformers import AutoModel, AutoTokenizer

from smartbatch_lightning import demo

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

PAIRS = ("sentence1", "sentence2")
ENTAILMENT = ["entailment", "not_entailment"]
NLI = ["entailment", "neutral", "contradiction"]
# columns of text, names of the classes (None for numbers), metrics that transformers' run_glue gives, sets to validate on
TASKS = {
    "cola": (("sentence",), ["unacceptable", "acceptable"], {"matthews_correlation"}, ("validation",)),
    "sst2": (("sentence",), ["negative", "positive"], {"accuracy"}, ("validation",)),
    "mrpc": (PAIRS, ["not_equivalent", "equivalent"], {"accuracy", "f1"}, ("validation",)),
    "qqp": (("question1", "question2"), ["not_duplicate", "duplicate"], {"accuracy", "f1"}, ("validation",)),
    "stsb": (PAIRS, None, {"pearson", "spearmanr"}, ("validation",)),
    "mnli": (("premise", "hypothesis"), NLI, {"accuracy"}, ("validation_matched", "validation_mismatched")),
    "qnli": (("question", "sentence"), ENTAILMENT, {"accuracy"}, ("validation",)),
    "rte": (PAIRS, ENTAILMENT, {"accuracy"}, ("validation",)),
    "wnli": (PAIRS, ["not_entailment", "entailment"], {"accuracy"}, ("validation",)),
}


def split(columns: tuple[str, ...], names: list[str] | None, rows: int, *, labelled: bool) -> Dataset:
    texts = [f"film {number} is {['dull', 'fine'][number % 2]}" for number in range(rows)]
    label = Value("float32") if names is None else ClassLabel(names=names)
    features = Features({**dict.fromkeys(columns, Value("string")), "label": label, "idx": Value("int32")})
    labels = [number % 2 + (0.25 * (number % 7) if names is None else 0) for number in range(rows)]
    values = {**dict.fromkeys(columns, texts), "label": labels if labelled else [-1] * rows, "idx": list(range(rows))}
    return Dataset.from_dict(values, features)


def published(task: str, folder: Path) -> None:
    columns, names, _, validated = TASKS[task]
    splits = {"train": split(columns, names, 64, labelled=True)}
    splits |= {name: split(columns, names, 16, labelled=True) for name in validated}
    splits |= {name.replace("validation", "test"): split(columns, names, 8, labelled=False) for name in validated}
    DatasetDict(splits).save_to_disk(folder)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model without a head, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("untrained")
    model = AutoModel.from_pretrained(demo.model_dir())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.model_dir()).save_pretrained(folder)
    return folder


def options(task: str, folder: Path, model: Path) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'glue' / f'{task}.yaml'}",
        f"--data.dataset={folder}",
        "--data.dataset_config=null",
        f"--model.pretrained={model}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_one_command_trains_validates_and_predicts_and_a_test_says_why_not(
    task: str, untrained: Path, tmp_path: Path
) -> None:
    _, names, metrics, validated = TASKS[task]
    published(task, tmp_path / "glue")
    data = options(task, tmp_path / "glue", untrained)
    fitted = cli("fit", *data, *FAST)
    suffixes = [f"/{name}" for name in validated] if len(validated) > 1 else [""]
    logged = {name for name in fitted.trainer.callback_metrics if name.startswith("val_")}
    assert logged == {f"val_{name}{suffix}" for name in {"loss", *metrics} for suffix in suffixes}
    checkpoint = f"--ckpt_path={fitted.trainer.checkpoint_callback.best_model_path}"
    assert cli("validate", *data, *FAST[:2], checkpoint).trainer.callback_metrics.keys() == logged
    tested = validated[0].replace("validation", "test")
    with pytest.raises(ValueError, match=rf"split '{tested}'.*use predict, which needs no labels"):
        cli("test", *data, *FAST[:2], checkpoint, f"--data.test_split={tested}")
    cli("predict", *data, *FAST[:2], checkpoint, f"--predictions.path={tmp_path / 'predicted.csv'}")
    predicted = pd.read_csv(tmp_path / "predicted.csv")
    assert len(predicted) == 8
    if names is not None:
        assert predicted.columns[-len(names) :].tolist() == [f"probability_{name}" for name in names]


@pytest.mark.slow
def test_the_diagnostic_set_is_predicted_by_a_model_of_mnli(untrained: Path, tmp_path: Path) -> None:
    published("mnli", tmp_path / "mnli")
    fitted = cli("fit", *options("mnli", tmp_path / "mnli", untrained), *FAST)
    DatasetDict(test=split(("premise", "hypothesis"), NLI, 8, labelled=False)).save_to_disk(tmp_path / "ax")
    checkpoint = f"--ckpt_path={fitted.trainer.checkpoint_callback.best_model_path}"
    predicted = ["--data.predict_split=test", f"--predictions.path={tmp_path / 'predicted.csv'}"]
    cli("predict", *options("mnli", tmp_path / "ax", untrained), *FAST[:2], *predicted, checkpoint)
    assert len(pd.read_csv(tmp_path / "predicted.csv")) == 8


def test_every_config_names_its_own_data_set() -> None:
    for path in (ROOT / "configs" / "glue").glob("*.yaml"):
        data = yaml.safe_load(path.read_text())["data"]
        assert (data["dataset"], data["dataset_config"]) == ("nyu-mll/glue", path.stem)
        assert path.stem in TASKS
