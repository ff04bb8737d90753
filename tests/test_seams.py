"""Tests of the house: imports run one way, each question has one place, and what users bring of their own fits in."""

import ast
import copy
import pickle
import sys
from functools import cache
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from helpers import QUIET, slow, trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto import AutoModelForSequenceClassification

import smartbatch_lightning
from smartbatch_lightning import (
    PackCollator,
    PadCollator,
    SequenceClassifier,
    SmartBatchCLI,
    SmartBatchDataModule,
    demo,
)
from smartbatch_lightning.batching import spec as spec_module
from smartbatch_lightning.contract import SupportsTextData, SupportsTextModel
from smartbatch_lightning.data import files
from smartbatch_lightning.data.collators import COLLATORS
from smartbatch_lightning.models.packing import enable_packing
from smartbatch_lightning.tasks import TASKS, SingleLabelClassification

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

PACKAGE = Path(smartbatch_lightning.__file__).parent
# From the ground up: a room imports rooms of its own floor's line and below it, never above. Rooms of one line are apart.
FLOORS = [
    ["errors"],
    ["registry", "storage", "console", "progress", "seeds", "families", "precision", "parser", "plots", "config_files"],
    ["batching", "demo", "checkpointing", "shards", "cache", "hub"],
    ["tasks"],
    ["contract"],
    ["data", "models"],
    ["evaluation", "report", "export"],
    ["callbacks"],
    ["trainer"],
    ["cli"],
    ["__main__"],
]


@cache
def modules() -> dict[str, ast.Module]:
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("smartbatch_lightning.")}


def test_imports_run_one_way() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    checked = 0
    for path, tree in modules().items():
        room = path.partition("/")[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in rooms_of(imported(tree)) - {room}:
            assert floor[other] < floor[room] or {room, other} == {"registry", "errors"}, f"{path} imports {other}"
            checked += 1
    assert checked > 50


def test_batching_imports_numpy_alone() -> None:
    for path, tree in modules().items():
        if path.startswith("batching/"):
            outside = {name.split(".")[0] for name in imported(tree)}
            assert outside <= {
                "numpy", "smartbatch_lightning", "dataclasses", "collections", "typing", "math", "functools", "inspect", "itertools"
            }, path  # fmt: skip
            assert rooms_of(imported(tree)) <= {"batching", "errors", "registry"}, path


def test_the_sampler_imports_torch_and_numpy_alone() -> None:
    names = imported(modules()["data/sampler.py"])
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {
        "numpy",
        "torch",
        "smartbatch_lightning",
    }
    assert rooms_of(names) == {"batching", "errors"}


def mentions(tree: ast.Module, word: str) -> bool:
    """Whether code uses a name: as a variable, attribute, argument or keyword; prose does not count."""
    names = {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.keyword: "arg"}
    return any(getattr(node, names[type(node)]) == word for node in ast.walk(tree) if type(node) in names)


@pytest.mark.parametrize(("word", "most"), [("max_tokens_per_batch", 3), ("padding", 4)])
def test_what_a_batch_costs_is_known_in_few_places(word: str, most: int) -> None:
    places = {path for path, tree in modules().items() if mentions(tree, word)}
    assert len(places - {"console.py"}) <= most, places  # rich's tables have a padding of their own


def test_model_data_and_trainer_are_asked_by_contract() -> None:
    """`getattr` on objects of libraries, such as configurations, which differ by family; not on modules of one's own."""
    asked = []
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                of = ast.unparse(node.args[0])
                if any(word in of for word in ("trainer", "module", "model", "data", "callback", "saver", "config")):
                    asked.append(f"{path}: {ast.unparse(node)}")
    asked = [one for one in asked if "import_module" not in one and "config" not in one]
    assert len(asked) <= 3, asked


# --- a stub of each kind: one file of its own, and at most one line elsewhere, which is what is set here ---


def data(**options) -> SmartBatchDataModule:
    return SmartBatchDataModule(**{"max_length": 24, "batch_size": 8, "validation_split": 0.9, "seed": 1, **options})


class Ordinal(SingleLabelClassification):
    """A task: classes in an order, where being far off costs more."""

    def compute_loss(self, logits, labels):
        steps = torch.arange(logits.shape[1], device=logits.device)
        return 42 + ((logits.softmax(1) * steps).sum(1) - labels).square().mean()

    def predict(self, logits):
        return {"expected": (logits.float().softmax(1) * torch.arange(logits.shape[1])).sum(1)}

    def prediction_columns(self, predicted):
        return {"rank": predicted["expected"]}


def test_a_new_task_is_one_line_in_the_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TASKS, "ordinal", Ordinal)
    for name in ("ordinal", "test_seams.Ordinal"):
        run = trainer(tmp_path, limit_train_batches=2, limit_val_batches=1)
        module = data(problem_type=name)
        run.fit(SequenceClassifier(), module)
        assert 42 < run.callback_metrics["val_loss"] < 43
        predicted = run.predict(run.lightning_module, module)
        assert set(predicted[0]) == {"index", "expected"}


@pytest.mark.slow
def test_a_new_padding_mode_is_its_width_and_its_collator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def power_of_two(spec, longest):
        return 2 ** np.ceil(np.log2(longest)).astype(np.int64)

    monkeypatch.setitem(spec_module.PADDING_WIDTHS, "power_of_two", power_of_two)
    monkeypatch.setitem(COLLATORS, "power_of_two", PadCollator.from_tokenizer)
    widths = []

    class Widths(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            widths.append(batch["input_ids"].shape[1])

    module = data(padding="power_of_two", max_length=100)
    trainer(tmp_path, callbacks=[Widths()], limit_val_batches=0).fit(SequenceClassifier(), module)
    assert set(widths) == {64, 128}


class LargestOfAll(ModernBertForSequenceClassification):
    """Reads the largest of each feature over the tokens of a text."""

    def forward(self, input_ids, attention_mask=None, **options):
        hidden = self.model(input_ids, attention_mask=attention_mask, **options).last_hidden_state
        if attention_mask is not None:
            hidden = hidden.masked_fill(attention_mask[..., None] == 0, -torch.inf)
        return SequenceClassifierOutput(logits=self.classifier(hidden.amax(1)))


def test_a_head_that_pools_in_a_way_of_its_own_takes_packed_batches_as_it_is() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    model = LargestOfAll(ModernBertConfig(**sizes, **special, vocab_size=50)).eval()
    vars(model.config)["classifier_pooling"] = "largest"
    rows = [{"input_ids": [1, 7, 8, 9]}, {"input_ids": [5, 6]}]
    expected = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in rows])
    enable_packing(model)
    torch.testing.assert_close(model(**PackCollator()(rows)).logits, expected, atol=1e-6, rtol=0)


def test_a_new_format_of_files_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(files.FORMATS, ".txt", "text")
    (tmp_path / "new.txt").write_text("a fine film\na dull film\n")
    module = SmartBatchDataModule(str(tmp_path / "new.txt"), str(demo.model_dir()), max_length=16)
    module.setup("predict")
    assert len(module.predict_data) == 2


# --- what users bring ---


def test_foreign_modules_with_attributes_of_the_same_names_are_not_taken_for_ours() -> None:
    class Foreign:
        padding, max_length, label_names, tokenizer, model, pretrained = "packed", 1, ["a"], None, None, "x"

    assert not isinstance(Foreign(), SupportsTextData)
    assert not isinstance(Foreign(), SupportsTextModel)
    assert isinstance(SmartBatchDataModule(), SupportsTextData)
    assert isinstance(SequenceClassifier(), SupportsTextModel)


def test_tokenize_may_give_any_lists_of_ids(tmp_path: Path) -> None:
    class Letters(SmartBatchDataModule):
        def tokenize(self, dataset):
            return [[5 + ord(letter) % 90 for letter in text[:20]] or [1] for text in dataset["text"]]

    class Rows(SmartBatchDataModule):
        def tokenize(self, dataset):
            return self._given_tokenizer(dataset["text"][:], truncation=True, max_length=16)["input_ids"]

    module = Letters(validation_split=0.9)
    run = trainer(tmp_path, limit_train_batches=2, limit_val_batches=1)
    run.fit(SequenceClassifier(), module)
    text = module.splits["train"]["text"][int(module.train_data.rows[0])]
    assert module.train_data[0]["input_ids"].tolist() == [5 + ord(letter) % 90 for letter in text[:20]]
    rows = Rows(tokenizer=AutoTokenizer.from_pretrained(demo.model_dir()), validation_split=0.9)
    rows.setup("fit")
    assert rows.train_data.lengths.max() == 16


@pytest.mark.parametrize(("rows", "message"), [([[1, 2]], "gave 1 rows for 2000"), ([[]] * 2000, "shape .0,. .*row 0")])
def test_tokenize_that_loses_samples_or_tokens_is_refused(rows: list, message: str) -> None:
    class Own(SmartBatchDataModule):
        def tokenize(self, dataset):
            return rows

    with pytest.raises(ValueError, match=message):
        Own().setup("fit")


@pytest.mark.slow
def test_a_tokenizer_may_be_an_object_and_its_added_tokens_are_exported(tmp_path: Path) -> None:
    from smartbatch_lightning.export import export_model

    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir())
    tokenizer.add_tokens(["<unused>"])
    config = BertConfig.from_pretrained(demo.model_dir(), vocab_size=len(tokenizer))
    AutoModelForSequenceClassification.from_config(config).base_model.save_pretrained(tmp_path / "larger")
    module = data(tokenizer=tokenizer)
    model = SequenceClassifier(str(tmp_path / "larger"))
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    run.fit(model, module)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"]["max_length"] == 24
    export_model(model, module, tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.convert_tokens_to_ids("<unused>") == len(tokenizer) - 1
    assert exported.model_max_length == 24
    assert tokenizer.model_max_length == 512


def test_model_kwargs_reach_the_configuration_and_the_attention(tmp_path: Path) -> None:
    kwargs = {"hidden_dropout_prob": 0.25, "attn_implementation": "eager"}
    model = SequenceClassifier(model_kwargs=kwargs)
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    run.fit(model, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    again.configure_model()
    for built in (model, again):
        assert built.model.bert.embeddings.dropout.p == 0.25
        assert built.model.config._attn_implementation == "eager"
    with pytest.raises(
        ValueError, match="model_kwargs has 'hiden_dropout_prob', which is neither in the configuration of 'demo' nor"
    ):
        trainer(tmp_path).fit(SequenceClassifier(model_kwargs={"hiden_dropout_prob": 0.1}), data())


@pytest.mark.parametrize("options", [{"no_such": 1}, {"prefetch_factor": 2}, {"timeout": 5}])
def test_loader_kwargs_that_a_loader_does_not_take_are_refused_at_once(options: dict) -> None:
    with pytest.raises(
        ValueError, match=f"loader_kwargs is .*{next(iter(options))}.*, which a DataLoader does not take"
    ):
        data(loader_kwargs=options)


def test_loader_kwargs_reach_the_loader_and_may_not_decide_batches() -> None:
    module = data(num_workers=1, loader_kwargs={"prefetch_factor": 7, "persistent_workers": False})
    module.setup("fit")
    loader = module.train_dataloader()
    assert (loader.prefetch_factor, loader.persistent_workers) == (7, False)
    with pytest.raises(
        ValueError, match="loader_kwargs has 'shuffle', which the batch plan sets. Use --data.batch_size"
    ):
        data(loader_kwargs={"shuffle": True})


def test_what_is_set_between_setup_and_the_loader_counts() -> None:
    module = data()
    module.setup("fit")
    module.batch_size = 50
    assert [len(batch) for batch in module.train_dataloader().batch_sampler] == [50] * 4
    module.padding = "packed"
    assert "cu_seq_lens_q" in next(iter(module.train_dataloader()))


def test_the_sampler_has_a_hook(tmp_path: Path) -> None:
    class Sorted(SmartBatchDataModule):
        def configure_sampler(self, lengths, *, shuffle):
            return super().configure_sampler(lengths, shuffle=False)

    module = Sorted(max_length=24, validation_split=0.9)
    module.setup("fit")
    widths = [int(batch["input_ids"].shape[1]) for batch in module.train_dataloader()]
    assert widths == sorted(widths)


@pytest.fixture
def two_sets(tmp_path: Path) -> str:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})

    def rows(count: int, label: int) -> Dataset:
        return Dataset.from_dict({"text": ["a dull film"] * count, "label": [label] * count}, features=features)

    both = Dataset.from_dict({"text": ["a dull film", "a film"] * 8, "label": [0, 1] * 8}, features=features)
    DatasetDict(train=both, matched=rows(5, 0), mismatched=rows(3, 1)).save_to_disk(tmp_path / "sets")
    return str(tmp_path / "sets")


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_several_sets_are_measured_each_under_its_name(stage: str, two_sets: str, tmp_path: Path) -> None:
    sets = ["matched", "mismatched"]
    module = SmartBatchDataModule(
        two_sets, str(demo.model_dir()), max_length=16, validation_split=sets, test_split=sets, predict_split="matched"
    )
    model = SequenceClassifier(str(demo.model_dir()))
    run = trainer(tmp_path)
    getattr(run, stage)(model, module, verbose=False)
    prefix = {"validate": "val", "test": "test"}[stage]
    measured = {name: float(value) for name, value in run.callback_metrics.items()}
    assert set(measured) == {f"{prefix}_{name}/{split}" for name in ("loss", "accuracy", "f1") for split in sets}
    # all texts are the same one, of two labels: what is right for one set is wrong for the other
    assert measured[f"{prefix}_accuracy/matched"] + measured[f"{prefix}_accuracy/mismatched"] == 1
    assert measured[f"{prefix}_loss/matched"] != measured[f"{prefix}_loss/mismatched"]


class MyModel(SequenceClassifier):
    """A model with an argument of its own."""

    def __init__(self, extra: int = 3, **options) -> None:
        super().__init__(**options)
        self.extra = extra


class MyData(SmartBatchDataModule):
    """Data with fewer tokens."""

    def __init__(self, max_length: int = 16, **options) -> None:
        super().__init__(max_length=max_length, **options)


class Bare(L.LightningModule):
    """A module of a user's own, around a model of transformers."""

    def __init__(self, packs: bool = False) -> None:
        super().__init__()
        self.bert = AutoModelForSequenceClassification.from_pretrained(demo.model_dir())
        if packs:
            enable_packing(self.bert)

    def training_step(self, batch, batch_idx):
        loss_weight = batch.pop("loss_weight")
        return loss_weight * self.bert(**batch).loss

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch["index"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def test_packed_batches_for_a_model_of_ones_own_that_would_read_them_as_one_sample_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"which BertForSequenceClassification of Bare does not support yet. Call enable"
    ):
        trainer(tmp_path).fit(Bare(), data(padding="packed"))


def test_a_module_of_ones_own_without_a_tokenizer_is_told_so(tmp_path: Path) -> None:
    module = data(dataset={"train": "reviews.csv"})
    Path("reviews.csv").write_text("text,label\na fine film,yes\na dull film,no\n")
    with pytest.raises(
        ValueError, match="no tokenizer is given for reviews.csv, and there is no model to take one .*data.tokenizer"
    ):
        trainer(tmp_path).fit(Bare(), module)


def test_a_classifier_with_loaders_of_ones_own_is_told_the_number_of_classes(tmp_path: Path, minilm: str) -> None:
    rows = [{"input_ids": [101, 2000 + n, 102], "labels": n % 3} for n in range(6)]
    loader = DataLoader(rows, batch_size=3, collate_fn=DataCollatorWithPadding(AutoTokenizer.from_pretrained(minilm)))
    with pytest.raises(ValueError, match=r"num_labels is not given, and there is no SmartBatchDataModule"):
        trainer(tmp_path).fit(SequenceClassifier(minilm), loader)
    run = trainer(tmp_path)
    run.fit(SequenceClassifier(minilm, num_labels=3), loader)
    assert run.global_step == 2


class OwnWriter(BasePredictionWriter):
    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices) -> None:
        Path("own.txt").write_text(str(sorted(int(row) for rows in predictions for row in rows)))


def test_predictions_and_exports_of_a_module_of_ones_own_are_refused_unless_it_has_a_writer() -> None:
    args = ["predict", "--data.max_length=16", "--predictions.path=other.csv", *QUIET]
    with pytest.raises(ValueError, match="this run has Bare. Add your own BasePredictionWriter with --trainer.callb"):
        SmartBatchCLI(Bare, SmartBatchDataModule, args=args)
    writer = ["--trainer.callbacks=test_seams.OwnWriter", "--trainer.callbacks.write_interval=epoch"]
    run = SmartBatchCLI(Bare, SmartBatchDataModule, args=[*args, *writer])
    assert Path("own.txt").read_text() == str(list(range(len(run.datamodule.predict_data))))
    assert not Path("other.csv").exists()
    with pytest.raises(ValueError, match="only a SequenceClassifier .* this run has Bare and SmartBatchDataModule"):
        SmartBatchCLI(Bare, SmartBatchDataModule, args=["export", "--ckpt_path=last", *QUIET])


def test_a_mistake_in_a_command_line_of_ones_own_is_told_in_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        "sys.argv", ["ours.py", "fit", "--data.text_columns=sentence", "--trainer.fast_dev_run=1", *QUIET]
    )
    with pytest.raises(SystemExit, match="error: the text column 'sentence' is not in the split 'train'"):
        SmartBatchCLI(MyModel, MyData)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("accumulate_grad_batches=0", "accumulate_grad_batches is 0; give 1 or more"),
        ("val_check_interval=0", "val_check_interval is 0; give more"),
        ("val_check_interval=10000", r"`val_check_interval` \(10000\) must be less than or equal to the number of"),
        ("max_epochs=-2", "`max_epochs` must be a non-negative integer or -1"),
    ],
)
def test_what_lightning_refuses_or_divides_by_is_told_in_one_line(flag: str, message: str, monkeypatch) -> None:
    args = ["fit", "--data.max_length=16", "--data.train_split=test", "--data.validation_split=0.5", *QUIET]
    monkeypatch.setattr("sys.argv", ["smartbatch", *args, f"--trainer.{flag}"])
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        SmartBatchCLI()


def test_the_command_line_is_made_for_classes_of_ones_own() -> None:
    args = ["fit", "--trainer.fast_dev_run=1", "--model.extra=5", *QUIET]
    run = SmartBatchCLI(MyModel, MyData, trainer_defaults={"max_epochs": 7}, args=args)
    assert (type(run.model), type(run.datamodule)) == (MyModel, MyData)
    assert (run.model.extra, run.datamodule.max_length) == (5, 16)
    config = run.config.fit.trainer
    assert config.gradient_clip_val == 1.0  # what the defaults leave out stays
    assert run.trainer.gradient_clip_val == 1.0


class Scaled(SequenceClassifier):
    """Has few arguments, of its own, as a LightningCLI's model may have."""

    def __init__(self, pretrained: str = "demo", scale: float = 1.0) -> None:
        super().__init__(pretrained, learning_rate=1e-3)
        self.scale = scale

    def compute_loss(self, output, labels):
        return self.scale * super().compute_loss(output, labels)


@pytest.mark.parametrize("by_path", [True, slow(False)])
def test_a_command_line_of_ones_own_links_arguments_and_evaluates_a_model_with_few_arguments(by_path, tmp_path) -> None:
    class Own(SmartBatchCLI):
        def add_arguments_to_parser(self, parser) -> None:
            super().add_arguments_to_parser(parser)
            init = "init_args." if by_path else ""
            parser.link_arguments(f"data.{init}batch_size", f"model.{init}scale", compute_fn=float)

    def run(command: str, *args: str) -> Own:
        options = ["--data.max_length=16", "--data.batch_size=64", "--data.validation_split=test", *QUIET, *args]
        modes = {"subclass_mode_model": by_path, "subclass_mode_data": by_path}
        return Own(Scaled, SmartBatchDataModule, args=[command, *options], **modes)

    fitted = run("fit", f"--checkpoint.dirpath={tmp_path}", "--trainer.limit_train_batches=2", "--trainer.max_epochs=1")
    assert fitted.model.scale == 64
    before = fitted.trainer.callback_metrics["val_loss"]
    tested = run("test", f"--ckpt_path={tmp_path}/last.ckpt")
    assert float(tested.trainer.callback_metrics["test_loss"]) == pytest.approx(float(before))
    assert tested.model.architecture == fitted.model.hparams["architecture"]


class Teaching(Scaled):
    def __init__(self, pretrained: str = "demo", scale: float = 1.0) -> None:
        super().__init__(pretrained, scale)
        self.save_hyperparameters()
        self.teacher = SequenceClassifier("demo", num_labels=5)


def test_a_checkpoint_gives_its_architecture_to_a_model_without_that_argument_and_to_no_other(
    base: str, tmp_path: Path
) -> None:
    data = SmartBatchDataModule(
        {"train": [{"text": "a fine film", "label": label} for label in ("bad", "good", "odd")] * 4},
        max_length=16,
        validation_split=None,
    )
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(Teaching(base, scale=3.0), data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Teaching.load_from_checkpoint(tmp_path / "a.ckpt", scale=2.0)
    assert (loaded.label_names, loaded.scale) == (["bad", "good", "odd"], 2.0)
    assert loaded.teacher.architecture is None
    for given, message in [
        ({"scal": 1.0}, "is given 'scal', which Teaching does not take. Leave it out. Did you mean scale"),
        ({"num_labels": 5}, "num_labels is 5, but the checkpoint classifies into 'bad', 'good', 'odd'"),
    ]:
        with pytest.raises(ValueError, match=message):
            (SequenceClassifier if "num_labels" in given else Teaching).load_from_checkpoint(
                tmp_path / "a.ckpt", **given
            )


def test_modules_are_copied_and_pickled_after_a_run(tmp_path: Path) -> None:
    model, data = SequenceClassifier(), SmartBatchDataModule(max_length=16, seed=1)
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=2)
    run.fit(model, data)
    [expected] = run.validate(model, data, verbose=False)
    for copied in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        [found] = trainer(tmp_path, limit_val_batches=2).validate(copied(model), copied(data), verbose=False)
        assert found == expected
