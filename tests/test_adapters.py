"""Adapters of peft, such as LoRA: what is trained, saved, resumed, exported and refused."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import assert_same, begin, cli, finish, kill_after, slow, trainer
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, EMAWeightAveraging, StochasticWeightAveraging
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from test_families import by_pipeline, make_tiny, probabilities
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    pipeline,
)

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule
from smartbatch_lightning.callbacks.best import BestCheckpoint
from smartbatch_lightning.callbacks.model_export import ModelExport
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.export import export_model

pytestmark = [pytest.mark.usefixtures("in_a_folder_of_its_own")]

LORA = {"peft_type": "LORA", "r": 4, "lora_dropout": 0.1}


def data(**options) -> SmartBatchDataModule:
    return SmartBatchDataModule(**{"max_length": 16, "batch_size": 32, "validation_split": 0.9, "seed": 1, **options})


class SavesAfter(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fitted(folder: Path, module: SmartBatchDataModule, ckpt_path=None, callbacks=(), run=None, **options):
    torch.manual_seed(0)
    model = SequenceClassifier(**{"peft_config": LORA, "learning_rate": 1e-2, **options})
    run = trainer(folder, callbacks=[*callbacks], **{"limit_val_batches": 1, "num_sanity_val_steps": 0, **(run or {})})
    run.fit(model, module, ckpt_path=ckpt_path)
    return run, model


def test_adapters_and_head_alone_are_trained_and_saved_and_the_rest_comes_from_the_pretrained_model(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run, model = fitted(tmp_path, data(), pretrained=base, run={"limit_train_batches": 4})
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # of the only layer's queries and values two matrices each, and the head
    assert trained == 2 * 2 * 32 * 4 + 2 * 32 + 2
    assert f"LORA trains {trained:,} of " in caplog.text
    pretrained = AutoModelForSequenceClassification.from_pretrained(base).bert.state_dict()
    kept = {name.replace(".base_layer", ""): weight for name, weight in model.model.bert.state_dict().items()}
    assert pretrained.keys() <= kept.keys()
    assert_same({name: kept[name] for name in pretrained}, pretrained)
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert sum(weight.numel() for weight in checkpoint["state_dict"].values()) == trained + 1  # and the fingerprint
    assert sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]) == 6
    [logged] = run.test(model, data(), verbose=False)
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert run.test(again, data(), verbose=False) == [logged]


def test_weights_that_the_pretrained_model_lacks_are_trained_too(base: str, tmp_path: Path) -> None:
    bare = AutoModelForSequenceClassification.from_pretrained(base)
    bare.bert.pooler = None
    bare.bert.save_pretrained(tmp_path / "bare")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "bare")
    run, model = fitted(tmp_path, data(), pretrained=str(tmp_path / "bare"), run={"limit_train_batches": 1})
    assert sorted(model.adapters.peft_model.peft_config["default"].modules_to_save) == [
        "bert.pooler.dense",
        "classifier",
    ]
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_same(again.state_dict(), model.state_dict())


def test_packed_batches_train_adapters_to_the_weights_of_padded_ones(tmp_path: Path) -> None:
    weights = []
    for padding in ("longest", "packed"):
        config = {**LORA, "lora_dropout": 0.0}
        kwargs = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        module = data(padding=padding)
        _, model = fitted(tmp_path, module, peft_config=config, model_kwargs=kwargs, run={"max_steps": 4})
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback", "ignore:SWA is currently only")
@pytest.mark.parametrize(
    ("averaging", "padding"),
    [
        (None, "longest"),
        slow(None, "packed"),
        slow(lambda: EMAWeightAveraging(decay=0.9), "longest"),
        slow(lambda: StochasticWeightAveraging(1e-3, 1, 2), "longest"),
    ],
)
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(averaging, padding, tmp_path) -> None:
    ended = []
    for ckpt_path in (None, tmp_path / "a.ckpt"):
        callbacks = [*([] if averaging is None else [averaging()]), SavesAfter(9, tmp_path / "a.ckpt")]
        run, model = fitted(tmp_path, data(padding=padding), ckpt_path, callbacks, run={"max_epochs": 2})
        ended.append(model.state_dict())
    assert run.global_step == 14
    assert_same(ended[1], ended[0])


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "padding"), [(1, "packed"), (2, "longest")])
def test_a_killed_run_with_adapters_goes_on_to_the_weights_of_one_that_was_not(devices, padding, tmp_path) -> None:
    options = {"adapters": 1, "devices": devices, "padding": padding}
    finish(begin(tmp_path / "whole", **options), tmp_path / "whole")
    folder = tmp_path / "killed"
    kill_after(begin(folder, **options), folder, lines=7, delay=0.01)
    finish(begin(folder, **options), folder)
    whole, resumed = (torch.load(path / "weights.pt") for path in (tmp_path / "whole", folder))
    assert any(weight.any() for name, weight in whole.items() if "lora_B" in name)
    assert_same(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, slow(True)])
def test_the_command_line_trains_tests_and_exports_adapters(adapter: bool, tmp_path: Path) -> None:
    Path("run.yaml").write_text(
        "model:\n"
        "  learning_rate: 0.01\n"
        "  peft_config: {class_path: peft.LoraConfig, init_args: {r: 2, target_modules: [query, key]}}\n"
        "data: {max_length: 16, batch_size: 32, validation_split: 0.9}\n"
        "trainer: {max_epochs: 1, limit_train_batches: 3, limit_val_batches: 1, limit_test_batches: 2}\n"
    )
    run = cli("fit", "--config=run.yaml", f"--trainer.default_root_dir={tmp_path}", "--export_model.folder=best")
    path = run.trainer.checkpoint_callback.best_model_path
    assert os.path.getsize(path) < 200_000 < os.path.getsize("best/model.safetensors")
    tested = cli("test", "--config=run.yaml", f"--ckpt_path={path}")
    assert {name.split(".")[-4] for name in tested.model.state_dict() if "lora_A" in name} == {"query", "key"}
    for _ in range(2):  # over what is there
        cli("export", "--config=run.yaml", f"--ckpt_path={path}", "--folder=again", f"--adapter={str(adapter).lower()}")
    card = Path("again/README.md").read_text()
    assert "LORA trains " in card
    code = card.partition("```python\n")[2].partition("```")[0].replace("'again'", repr(str(tmp_path / "again")))
    names: dict = {}
    exec(code, names)
    text = "a fine film with a warm heart"
    [said], [expected] = names["classify"](text), pipeline("text-classification", "best", truncation=True)(text)
    assert said["label"] == expected["label"] in ("negative", "positive")
    assert said["score"] == pytest.approx(expected["score"], abs=1e-5)


@pytest.mark.parametrize("adapter", [False, slow(True)])
def test_a_standardised_target_is_exported_in_its_unit(adapter: bool, base: str, tmp_path: Path) -> None:
    class Prices(SmartBatchDataModule):
        def load_dataset(self) -> DatasetDict:
            texts = [f"a {'fine ' * (row % 7)}film" for row in range(28)]
            rows = Dataset.from_dict({"text": texts, "label": [1000.5 + 100 * (row % 7) for row in range(28)]})
            return DatasetDict(train=rows, test=rows)

    module = Prices(max_length=16, batch_size=4, validation_split=0.2, seed=1, standardize_targets=True)
    run, model = fitted(tmp_path, module, pretrained=base, run={"max_epochs": 2})
    batches = run.predict(model, module)
    rows = torch.cat([batch["index"] for batch in batches]).argsort()
    predicted = torch.cat([batch["predictions"] for batch in batches])[rows].flatten()
    assert predicted.std() > 1e-2
    export_model(model, module, tmp_path / "out", adapter=adapter)
    config = AutoConfig.from_pretrained(tmp_path / "out", subfolder="config" if adapter else "")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", config=config).eval()
    classify = pipeline("text-classification", exported, tokenizer=str(tmp_path / "out"), function_to_apply="none")
    said = torch.tensor([one["score"] for one in classify(list(module.splits["test"]["text"]))])
    torch.testing.assert_close(said, predicted.to(said.dtype), rtol=1e-5, atol=0)


KINDS = ["BOFT", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LOHA", "LOKR", "OFT", "RANDLORA"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks")  # which the command leaves out
@pytest.mark.filterwarnings(
    "ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly", "ignore:.*script_method"
)  # peft's
@pytest.mark.parametrize("config", [{"peft_type": kind} for kind in KINDS] + [{**LORA, "use_dora": True}])
@pytest.mark.parametrize("family", ["bert", "roberta"])  # whose heads have one layer and two
def test_every_kind_says_the_same_trained_loaded_merged_and_alone(family: str, config: dict, tmp_path: Path) -> None:
    from test_families import TEXTS, GivenTexts

    make_tiny(family, tmp_path / "base")
    texts = [text for text in TEXTS if text]
    module = GivenTexts(texts, max_length=40, batch_size=4)
    run, model = fitted(tmp_path, module, pretrained=str(tmp_path / "base"), peft_config=config, run={"max_steps": 3})
    expected = probabilities(run, model, module)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    torch.testing.assert_close(probabilities(run, again, module), expected, atol=1e-6, rtol=0)
    dora = "use_dora" in config
    if dora:
        with pytest.raises(ValueError, match="transformers does not load DoRA's magnitudes"):
            export_model(model, module, tmp_path / "adapters", adapter=True)
    for adapter in (False,) if dora else (False, True):
        export_model(model, module, tmp_path / str(adapter), adapter=adapter)
        said = by_pipeline(tmp_path / str(adapter), texts, 8, adapter=adapter)
        torch.testing.assert_close(said, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["esm", slow("xlnet")])
def test_where_peft_names_no_layers_of_a_family_all_linear_ones_but_those_of_the_head_are_adapted(
    family: str, tmp_path: Path
) -> None:
    make_tiny(family, tmp_path / "base")
    options = {"pretrained": str(tmp_path / "base"), "num_labels": 3}
    plain = SequenceClassifier(**options)
    plain.configure_model()
    prefix = f"{plain.model.base_model_prefix}."
    linear = {name for name, module in plain.model.named_modules() if type(module) is torch.nn.Linear}
    for kind in ("IA3", "LOHA"):
        model = SequenceClassifier(**options, peft_config={"peft_type": kind})
        model.configure_model()
        adapted = {name for name, module in model.model.named_modules() if isinstance(module, BaseTunerLayer)}
        assert adapted == {name for name in linear if name.startswith(prefix)}


def test_layers_that_are_excluded_get_no_adapters(tmp_path: Path) -> None:
    make_tiny("olmo2", tmp_path / "base")  # a family for which peft names no layers
    names = []
    for options in ({}, {"exclude_modules": ["k_proj"]}, {"exclude_modules": r".*\.k_proj"}):
        model = SequenceClassifier(str(tmp_path / "base"), num_labels=3, peft_config={**LORA, **options})
        model.configure_model()
        names.append({name for name, one in model.model.named_modules() if isinstance(one, BaseTunerLayer)})
    assert names[1] == names[2] == {name for name in names[0] if not name.endswith(".k_proj")} != names[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_that_are_already_in_the_folder_of_a_model_are_refused(base: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    adapted = get_peft_model(AutoModel.from_pretrained(folder), LoraConfig(task_type="FEATURE_EXTRACTION"))
    adapted.save_pretrained(folder)
    for options in ({}, {"peft_config": LORA}):
        model = SequenceClassifier(str(folder), num_labels=2, **options)
        with pytest.raises(UsageError, match=r"has an adapter_config.json, with adapters .*Merge them .* or remove"):
            model.configure_model()


# --- beside other settings ---


def test_layers_have_rates_of_their_own_and_frozen_ones_keep_their_adapters_as_they_were(tmp_path: Path) -> None:
    run, model = fitted(
        tmp_path, data(), layer_decay=0.5, head_learning_rate=0.1, freeze_layers=1, weight_decay=0.1,
        lr_scheduler="constant", run={"max_steps": 2},
    )  # fmt: skip
    rates = {group["name"]: group["lr"] for group in run.optimizers[0].param_groups}
    assert rates == pytest.approx({"layer_1_decay": 5e-3, "head_decay": 0.1, "head_no_decay": 0.1})
    learnt = {name.split(".")[4] for name, weight in model.state_dict().items() if "lora_B" in name and weight.any()}
    assert learnt == {"1"}


@pytest.mark.filterwarnings("ignore:.*script_method", "ignore:The .grad attribute")  # torch's compiler
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, slow({"compile": True})])
def test_adapters_learn_the_same_computed_twice_or_compiled(options: dict, tmp_path: Path) -> None:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # the compiler draws other numbers
    given = {"model_kwargs": rates, "peft_config": {**LORA, "lora_dropout": 0.0}}
    _, model = fitted(tmp_path, data(), run={"max_steps": 2}, **given)
    _, other = fitted(tmp_path, data(), run={"max_steps": 2}, **given, **options)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_best_adapters_are_kept_and_exported(tmp_path: Path) -> None:
    best = BestCheckpoint("val_loss", dirpath=str(tmp_path / "checkpoints"))
    callbacks = [best, ModelExport(str(tmp_path / "out"))]
    _, model = fitted(tmp_path, data(), callbacks=callbacks, run={"max_epochs": 2, "enable_checkpointing": True})
    loaded = SequenceClassifier.load_from_checkpoint(best.best_model_path)
    expected = loaded.adapters.for_saving().merge_and_unload().state_dict()
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert_same(exported, expected)
    assert model.adapters is not None


# --- what is refused, in one line ---


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("lora", "peft_config is 'lora'; give peft_type, such as {peft_type: LORA, r: 8}, or class_path"),
        ({"r": 8}, "peft_config is {'r': 8}; give peft_type"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_config is 'PREFIX_TUNING'; choose one of 'LORA', "),
        (PrefixTuningConfig(num_virtual_tokens=3), "peft_config is 'PREFIX_TUNING'; choose one of"),
        ({"class_path": "peft.VeraConfig"}, "'peft.VeraConfig', which is not supported. Give one of 'LORA', "),
        ({"class_path": "os.system", "init_args": {"command": "exit"}}, "'os.system', which is not a peft.PeftConfig"),
        ({"class_path": "peft.NoSuch"}, "peft_config is 'peft.NoSuch', which cannot be imported"),
        ({**LORA, "layer_replication": [[0, 1], [0, 1]]}, "'layer_replication', which is not supported. Leave it out"),
        pytest.param(
            {**LORA, "alora_invocation_tokens": [5]},
            "'alora_invocation_tokens', which is not supported. Leave it out",
            marks=pytest.mark.filterwarnings("ignore:aLoRA"),
        ),
        ({"peft_type": "LORA", "rank": 8}, "unexpected keyword argument 'rank'. Correct it"),
    ],
)
def test_what_is_no_configuration_of_an_adapter_that_was_tried_is_refused_at_once(config, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SequenceClassifier(peft_config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"peft_config": {**LORA, "target_modules": ["q_proj"]}},
            "q_proj.* does not fit BertForSequenceClassification: ",
        ),
        (
            {"peft_config": {**LORA, "modules_to_save": ["embedings"]}},
            "modules_to_save has 'embedings', which BertForSequenceClassification does not have. Correct the names",
        ),
        ({"peft_config": {**LORA, "init_lora_weights": "pissa"}}, "which changes the pretrained weights.*to true"),
        ({"model_kwargs": {"quantization_config": {"load_in_4bit": True}}}, "bitsandbytes"),
    ],
)
def test_adapters_that_do_not_fit_the_model_are_refused_before_training(options, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, data(), **options)


def test_a_missing_peft_is_named_and_so_is_a_callback_that_would_train_the_model(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="BackboneFinetuning would undo 'peft_config'"):
        fitted(tmp_path, data(), callbacks=[BackboneFinetuning()])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"peft is not installed. Run pip install 'smartbatch-lightning\[peft\]'"):
        SequenceClassifier(peft_config=LORA)


def test_checkpoints_of_other_adapters_or_another_pretrained_model_are_refused(base: str, tmp_path: Path) -> None:
    run, _ = fitted(tmp_path, data(), pretrained=base, peft_config=LoraConfig(r=4), run={"max_steps": 1})
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="'r': 4.* but this model's is {.*'r': 2.*Set --model.peft_config"):
        fitted(tmp_path, data(), tmp_path / "a.ckpt", pretrained=base, peft_config={"peft_type": "LORA", "r": 2})
    with pytest.raises(ValueError, match="but this model's is None"):
        run.test(SequenceClassifier(base), data(), ckpt_path=str(tmp_path / "a.ckpt"))
    other = AutoModelForSequenceClassification.from_pretrained(base)
    other.bert.encoder.layer[0].output.dense.weight.data += 1e-3
    other.bert.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="adapters that were trained on weights that .*other' does not have"):
        SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt", pretrained=str(tmp_path / "other"))
    DistilBertConfig().save_pretrained(tmp_path / "kind")
    with pytest.raises(ValueError, match="adapters of a bert model, but .*kind' is a distilbert model"):
        SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt", pretrained=str(tmp_path / "kind"))
    plain = SequenceClassifier(base, num_labels=2)
    plain.configure_model()
    with pytest.raises(
        ValueError, match="the model has no adapters. Leave adapter out, or train with --model.peft_config"
    ):
        export_model(plain, data(), tmp_path / "out", adapter=True)
