"""The command line, as a user types it."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from helpers import FAST, QUIET, ROOT, Fork, cli, slow
from lightning.pytorch.cli import SaveConfigCallback
from lightning_utilities.core.imports import RequirementCache

from smartbatch_lightning import SequenceClassifier, SmartBatchCLI, SmartBatchDataModule, demo
from smartbatch_lightning.checkpointing import AtomicCheckpointIO
from smartbatch_lightning.cli import _MOST_USED, main
from smartbatch_lightning.console import resume_command

CONFIGS = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml"))

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


class OwnData(SmartBatchDataModule):
    """A subclass with an argument of its own."""

    def __init__(self, copies: int = 1, **options) -> None:
        super().__init__(**options)
        self.copies = copies


def test_fit_with_nothing_else_is_the_demo_with_the_tutorials_settings() -> None:
    run = cli("fit", *FAST)
    config = run.config.fit
    assert config.seed_everything == 321
    assert config.trainer.gradient_clip_val == 1.0
    assert run.datamodule.seed == 321
    assert run.datamodule.dataset == "demo"
    assert (run.model.learning_rate, run.model.adam_epsilon, run.datamodule.jitter) == (5e-5, 1e-8, "auto")
    assert run.trainer.global_step == 2


@pytest.mark.slow
def test_the_model_is_named_once_and_the_tokenizer_follows(minilm: str) -> None:
    run = cli("fit", "--model.pretrained", minilm, *FAST, "--trainer.limit_val_batches=1")
    assert run.datamodule.tokenizer.name_or_path == minilm
    assert run.datamodule.tokenizer.vocab_size == run.model.model.config.vocab_size == 30522


@pytest.mark.slow
def test_a_tokenizer_that_is_given_is_used(minilm: str) -> None:
    with pytest.raises(ValueError, match="has 30522 tokens, but the model has"):
        cli("fit", "--data.tokenizer", minilm, *FAST)


def test_yaml_needs_neither_class_path_nor_init_args(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {batch_size: 8, max_length: 24}\nmodel: {learning_rate: 0.001}\n")
    run = cli("fit", "--config=run.yaml", "--trainer.fast_dev_run=1")
    assert (run.datamodule.batch_size, run.model.learning_rate) == (8, 0.001)


@pytest.mark.parametrize("given", ["0.25", "test", "null"])
def test_the_validation_split_is_a_share_a_name_or_nothing(given: str) -> None:
    run = cli("prepare", f"--data.validation_split={given}", "--data.max_length=24")
    assert run.datamodule.validation_split == {"0.25": 0.25, "test": "test", "null": None}[given]


@pytest.mark.parametrize("flag", [["--model.lr_scheduler=cosine"], ["--model.lr_scheduler", "cosine"]])
def test_a_schedule_and_its_own_options_may_be_flags_in_any_order(flag: list[str], tmp_path: Path) -> None:
    for flags in ([*flag, "--model.lr_scheduler.num_cycles=1.5"], ["--model.lr_scheduler.num_cycles=1.5", *flag]):
        fitted = cli("fit", "--trainer.fast_dev_run=1", "--data.max_length=24", *flags)
        [schedule] = (config.scheduler for config in fitted.trainer.lr_scheduler_configs)
        assert schedule.lr_lambdas[0].keywords["num_cycles"] == 1.5


def test_subclasses_are_named_by_class_path(tmp_path: Path) -> None:
    config = {"data": {"class_path": "test_cli.OwnData", "init_args": {"copies": 3}, "dict_kwargs": {"max_length": 24}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run = cli("fit", "--config=run.yaml", "--trainer.fast_dev_run=1")
    assert type(run.datamodule) is OwnData
    assert run.datamodule.copies == 3


def test_print_config_lists_what_can_be_set(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli("fit", "--print_config")
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["init_args"]["batching"] == "smart"
    assert printed["model"]["init_args"]["warmup_ratio"] == 0.0
    assert printed["trainer"]["gradient_clip_val"] == 1.0


def test_the_saved_config_runs_again(tmp_path: Path) -> None:
    first = SmartBatchCLI(args=["fit", *FAST, "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"])
    saved = Path(first.trainer.log_dir) / "config.yaml"
    again = cli("fit", f"--config={saved}")
    for saver in (first, again):
        assert any(isinstance(callback, SaveConfigCallback) for callback in saver.trainer.callbacks)
    assert again.datamodule.max_length == 24
    assert again.trainer.callback_metrics["val_loss"] == first.trainer.callback_metrics["val_loss"]


@pytest.mark.slow
def test_a_config_of_the_users_is_never_replaced(tmp_path: Path) -> None:
    """Without a logger, and with one that logs to the working directory."""
    written = "# my notes\ndata: {max_length: 24, batch_size: 64}\n"
    (tmp_path / "config.yaml").write_text(written)
    options = ["--config=config.yaml", "--trainer.fast_dev_run=false", "--trainer.limit_val_batches=0", *FAST]
    cli("fit", *options)
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["config.yaml"]
    logger = [
        "--trainer.logger=TensorBoardLogger",
        "--trainer.logger.save_dir=.",
        "--trainer.logger.name=",
        "--trainer.logger.version=",
    ]
    SmartBatchCLI(args=["fit", *options, *logger, "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"])
    assert (tmp_path / "config.yaml").read_text() == written
    assert yaml.safe_load((tmp_path / "config-fit.yaml").read_text())["trainer"]["limit_val_batches"] == 0


@pytest.mark.slow
def test_every_stage_saves_its_config_beside_its_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of a SLURM job, where all of its stages log; one that runs again saves the same config once."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "run")
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--data.max_length=24"]
    run = tmp_path / "lightning_logs" / "version_17"
    fit = ["fit", *quiet, *FAST, "--trainer.limit_val_batches=0"]
    fitted = SmartBatchCLI(args=fit)
    trained = (run / "config.yaml").read_text()
    checkpoint = f"--ckpt_path={fitted.trainer.checkpoint_callback.best_model_path}"
    for rows in (1, 1, 2):
        SmartBatchCLI(args=["test", *quiet, checkpoint, f"--trainer.limit_test_batches={rows}"])
    SmartBatchCLI(args=fit)
    assert (run / "config.yaml").read_text() == trained
    saved = {path.name: yaml.safe_load(path.read_text())["trainer"] for path in run.glob("config*.yaml")}
    assert sorted(saved) == ["config-test-v1.yaml", "config-test.yaml", "config.yaml"]
    assert [saved[name]["limit_test_batches"] for name in ("config-test.yaml", "config-test-v1.yaml")] == [1, 2]


@pytest.mark.slow
def test_a_run_is_logged_to_tensorboard_and_csv_and_what_a_start_logged_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # names the folder, so that a requeued job has the same again
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "run")
    options = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
    for _ in range(2):
        SmartBatchCLI(args=["fit", *FAST, *options])
    run = tmp_path / "lightning_logs" / "version_17"
    assert len(list(run.glob("events.out.tfevents.*"))) == 2
    for start in range(2):
        logged = pd.read_csv(run / "csv" / f"version_{start}" / "metrics.csv")
        assert logged["train_loss_step"].count() == 2
        assert logged["val_accuracy"].count() == 1


def test_a_logger_that_is_given_is_the_only_one() -> None:
    run = SmartBatchCLI(
        args=["fit", *FAST, "--trainer.accelerator=cpu", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    )
    assert [type(logger).__name__ for logger in run.trainer.loggers] == ["CSVLogger"]


@pytest.mark.parametrize("ending", ["parquet", slow("csv")])
def test_fit_validate_test_and_predict_work_from_a_checkpoint(ending: str, tmp_path: Path) -> None:
    short = ["--data.max_length=24", "--data.batch_size=64"]
    fitted = cli("fit", *FAST, "--trainer.default_root_dir=run")
    checkpoint = fitted.trainer.checkpoint_callback.best_model_path
    validated = cli("validate", *short, f"--ckpt_path={checkpoint}").trainer.callback_metrics
    assert validated["val_accuracy"] == fitted.trainer.callback_metrics["val_accuracy"]
    assert "test_f1" in cli("test", *short, f"--ckpt_path={checkpoint}").trainer.callback_metrics
    run = cli("predict", *short, f"--ckpt_path={checkpoint}", f"--predictions.path=out/labels.{ending}")
    table = (pd.read_csv if ending == "csv" else pd.read_parquet)(tmp_path / "out" / f"labels.{ending}")
    assert table.columns.tolist() == ["index", "prediction", "probability_negative", "probability_positive"]
    assert table["index"].tolist() == list(range(600))
    labels = run.datamodule.splits["test"]["label"]
    accuracy = sum(
        name == run.datamodule.label_names[label] for name, label in zip(table["prediction"], labels, strict=True)
    )
    tested = cli("test", *short, f"--ckpt_path={checkpoint}").trainer.callback_metrics["test_accuracy"]
    assert accuracy / 600 == pytest.approx(float(tested))


@pytest.mark.parametrize("written", ["flag", slow("config"), slow("object")])
def test_an_argument_of_the_model_counts_beside_a_checkpoint_whose_own_fill_in_the_rest(
    written, tmp_path: Path
) -> None:
    fitted = cli("fit", *FAST, "--trainer.default_root_dir=run", "--model.learning_rate=1e-4", "--model.warmup_steps=3")
    checkpoint = fitted.trainer.checkpoint_callback.best_model_path
    Path("rate.yaml").write_text("model: {learning_rate: 2e-4, architecture: null}\n")
    given = {"flag": ["--model.learning_rate=2e-4"], "config": ["--config=rate.yaml"]}.get(written, [])
    args = ["validate", *given, "--data.max_length=24", f"--ckpt_path={checkpoint}", *QUIET]
    if written == "object":
        trainer = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        options = {"data": {"max_length": 24}, "ckpt_path": checkpoint, "trainer": trainer}
        args = {"subcommand": "validate", "validate": {"model": {"learning_rate": 2e-4}, **options}}
    run = SmartBatchCLI(args=args)
    assert (run.model.learning_rate, run.model.warmup_steps) == (2e-4, 3)
    assert run.model.architecture == fitted.model.hparams["architecture"]
    assert run.trainer.callback_metrics["val_accuracy"] == fitted.trainer.callback_metrics["val_accuracy"]


def test_new_files_take_tokenizer_and_classes_from_the_checkpoint(tmp_path: Path) -> None:
    """Labels are strings, so that their numbers are known to the checkpoint alone."""

    def write(name: str, rows: list[str]) -> str:
        (tmp_path / name).write_text("\n".join(rows) + "\n")
        return str(tmp_path / name)

    model = ["--model.pretrained", str(demo.model_dir())]
    texts = ["a dull film", '""', "a fine film", "never dull"]
    train = write("train.csv", ["text,label", *(f"{texts[n % 4]},{['no', 'yes'][n % 2]}" for n in range(64))])
    fitted = cli("fit", *model, f"--data.dataset={train}", *FAST, "--trainer.default_root_dir=run")
    checkpoint = f"--ckpt_path={fitted.trainer.checkpoint_callback.best_model_path}"
    test = write("test.csv", ["text,label", "a dull film,yes", "a fine film,yes", "never dull,no"])
    tested = cli("test", *model, f"--data.dataset={{test: {test}}}", checkpoint)
    assert tested.datamodule.label_names == ["no", "yes"]
    assert tested.datamodule.test_data[0].labels.tolist() == [1, 1, 0]
    new = write("new.csv", ["text", *texts])
    cli("predict", *model, f"--data.dataset={new}", checkpoint, "--predictions.path=new.parquet")
    table = pd.read_parquet(tmp_path / "new.parquet")
    assert table.columns.tolist() == ["index", "prediction", "probability_no", "probability_yes"]
    assert len(table) == 4


@pytest.mark.slow
def test_a_mistake_is_told_in_one_line() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "fit", "--data.text_columns=sentence"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: the text column 'sentence' is not in the split 'train'")


@pytest.mark.parametrize(
    ("started", "shown"),
    [
        ("/usr/bin/env", "env"),
        ("train.py", "python train.py"),
        ("/home/us/our project/cli.py", "python '/home/us/our project/cli.py'"),
    ],
)
def test_the_command_that_goes_on_is_one_that_can_be_typed(started: str, shown: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [started, "fit", "--ckpt_path", "old.ckpt", "--ckpt_path=older.ckpt", "--x=a b"])
    assert resume_command("new.ckpt") == f"{shown} fit '--x=a b' --ckpt_path=new.ckpt"


def test_a_predictions_file_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="labels.xlsx ends in '.xlsx'; it has to end in .parquet or .csv"):
        cli("predict", "--predictions.path=labels.xlsx")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_a_run_that_is_requeued_leaves_its_trained_model_and_has_nothing_left_to_do(tmp_path: Path, capsys) -> None:
    config = yaml.safe_load((ROOT / "configs" / "cluster" / "requeue.yaml").read_text())
    config["checkpoint"]["every_n_train_steps"] = 2
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    printed = []
    for _ in range(2):
        run = cli("fit", "--config=run.yaml", *FAST, "--trainer.limit_train_batches=3", "--ckpt_path=last")
        saved = torch.load(tmp_path / "runs" / "imdb" / "last.ckpt", weights_only=True)
        assert saved["global_step"] == run.trainer.global_step == 3
        printed.append(capsys.readouterr().out.rpartition("padding")[2])
    assert "best.ckpt" in printed[0]
    assert printed[1] == printed[0]  # times too


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("command", [slow("validate"), slow("test"), "predict"])
def test_nothing_is_measured_or_predicted_by_a_model_that_was_never_trained(command: str, base: str) -> None:
    with pytest.raises(ValueError, match="'demo' has not been trained to classify.*--ckpt_path"):
        cli(command, "--data.max_length=24")
    with pytest.raises(ValueError, match="has not been trained to classify"):
        cli(command, "--data.max_length=24", f"--model.pretrained={base}", "--ckpt_path=last")


def test_predicting_unlabelled_texts_without_a_checkpoint_is_told_to_give_one(base: str, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("text\na fine film\n")
    with pytest.raises(ValueError, match="has not been trained to classify, no checkpoint.*no labels.*--ckpt_path"):
        cli("predict", "--data.max_length=24", f"--model.pretrained={base}", "--data.dataset=new.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.batch_size=0"], "error: batch_size is 0; give 1 or more."),
        # before the model is built, or its data is looked for
        (
            ["--ckpt_path=nope.ckpt", "--data.dataset=nor.csv"],
            "error: the checkpoint nope.ckpt does not exist. Give another one with --ckpt_path",
        ),
        slow(
            ["--model.pretrained=./nor/folder"],
            "error: the model './nor/folder' was not found locally or on the Hub: FileNotFoundError: there is no such folder.",
        ),
        # jsonargparse takes null for every argument
        (["--model.warmup_steps=null"], "error: --model.warmup_steps is null. Leave it out, or give a value."),
        slow(["--data.label_column=null"], "error: --data.label_column is null. Leave it out, or give a value."),
        # as of a variable of the shell that is not set
        (["--ckpt_path="], "error: ckpt_path is ''; give the path of a checkpoint"),
        slow(["--export_model.folder="], "error: the name of the folder to write to is empty."),
        slow(["--ckpt_path=best"], "error: ckpt_path is 'best'; give the path of a checkpoint"),
        slow(["--seed_everything=-3"], "error: --seed_everything is -3; give a number from 0 to 4294967295."),
        slow(["--model.architecture={a: 1}"], "error: architecture is {'a': 1}, which has no model_type. Leave it out"),
        slow(
            ["--model.metrics=.nan"],
            "error: metrics is '.nan', which cannot be imported: Empty module name. Check the path.",
        ),
        (["--checkpoint.monitor=val_x"], "error: the metric 'val_x' is monitored, but the logged metrics are"),
        (["--ckpt_path=last"], "error: --ckpt_path=last means the last.ckpt in --checkpoint.dirpath, which is not set"),
        (["--trainer.max_epochs=-2"], "error: `max_epochs` must be a non-negative integer or -1"),
    ],
)
def test_a_mistake_ends_with_one_line_wherever_it_is_found(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["smartbatch", "fit", *FAST, *options])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        main()
    assert str(stop.value).startswith(message)
    assert "\n" not in str(stop.value)
    assert list(Path().iterdir()) == []  # no folder of a run that never began


def test_last_without_a_folder_that_stays_is_refused_with_the_latest_checkpoint(tmp_path: Path, monkeypatch) -> None:
    for version, written in ((0, 1000), (1, 3000), (2, 2000)):
        path = tmp_path / "lightning_logs" / f"version_{version}" / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (written, written))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=r"^error: .*the latest is .*version_1/checkpoints/last\.ckpt\.$"):
        smartbatch("fit", *FAST, "--ckpt_path=last")


def test_a_logger_whose_package_is_missing_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", RequirementCache("no-such-package>=2"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=r"^error: .*no-such-package>=2.*pip install[^\n]*$"):
        smartbatch("fit", *FAST, "--trainer.logger=WandbLogger")


def smartbatch(*arguments: str) -> None:
    sys.argv = ["smartbatch", *arguments]
    main()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("logger", "made"),
    [
        # files of the names that a run gives its own, and newer than its start, in the folder where it logs
        ({"class_path": "TensorBoardLogger", "init_args": {"save_dir": ".", "name": "", "version": ""}}, True),
        ({"class_path": "TensorBoardLogger", "init_args": {"save_dir": ".", "name": "", "version": "new"}}, False),
        (True, False),
        (False, False),
    ],
)
def test_a_refused_start_leaves_all_files_and_folders_that_were_there(logger, made: bool, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    (folder / "empty").mkdir(parents=True)
    for name in ("config.yaml", "hparams.yaml", "events.out.tfevents.1"):
        (folder / name).write_text("trainer: {max_epochs: 1}")
        os.utime(folder / name, (2**31, 2**31))
    before = {path: path.is_dir() or path.read_text() for path in folder.rglob("*")}
    options = ["--config=config.yaml", "--checkpoint.monitor=val_x", f"--trainer.logger={json.dumps(logger)}"]
    run = Fork(folder, 1, smartbatch, "fit", *FAST, *options)
    assert run.wait(timeout=120) == 1
    log = folder / "log.txt"
    assert "error: the metric 'val_x' is monitored" in log.read_text()
    log.unlink()
    after = {path: path.is_dir() or path.read_text(errors="replace") for path in folder.rglob("*")}
    assert {path: after.get(path) for path in before} == before
    assert (len(after) > len(before)) == made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--model.learning_rate=abc"], "--model.learning_rate: expected .*float.*, null. Got value: abc"),
        slow(["fit", "--data.max_length=abc"], "--data.max_length: expected one of int, null. Got value: abc"),
        slow(["fit", "--trainer.max_epochs=abc"], "--trainer.max_epochs: expected one of int, null. Got value: abc"),
        (
            ["fit", "--data.truncation=window"],
            "--data.truncation: expected one of 'head', 'tail', 'head_tail', 'windows', null. Got value: window",
        ),
        slow(["fit", "--model=Nope"], "--model: expected a class, or options such as --model.pretrained=..."),
        # not the content of the file
        slow(["fit", "--data=texts.csv"], "--data: expected a class, or options such as --data.dataset=..."),
        (
            ["fit", "--config=twice.yaml"],
            "Problems parsing config: the key 'data' is given twice: line 2, column 1.*",
        ),
        slow(["fit", "--config=latin.yaml"], "--config: 'utf-8' codec can't decode .*. Save the file as UTF-8."),
        slow(["fit", "--config=text.yaml"], "--config: a config holds groups of options.* here is 'hello'."),
        slow(["fit", "--model.class_path=no.Model"], "--model: Problem with .* 'no.Model': No module named 'no'"),
        slow(
            ["fit", "--model=torch.nn.Linear"],
            "--model: .*subclass of SequenceClassifier. .* SmartBatchCLI.MyModel, MyData.*",
        ),
        slow(["fit", "--config=no.yaml"], "--config: File does not exist: '.*no.yaml'"),
        slow(
            ["evaluate", "--predictions=p", "--temperature=warm"], "--temperature: expected .*float.* Got value: warm"
        ),
        (["fit", "--data.max_lenght=9"], r"There is no option --data.max_lenght. Did you mean --data.max_length\?"),
        slow(["fit", "--max_length=9"], r"There is no option --max_length. Did you mean --data.max_length\?"),
        slow(["fit", "--trainer.max_epoch=9"], r"There is no option .*max_epoch. Did you mean --trainer.max_epochs\?"),
        slow(["fit", "--early_stopping.patiense=9"], r"There is no .* Did you mean --early_stopping.patience\?"),
        (["fit", "--model.lr=1"], r"There is no option --model.lr. Did you mean --model.learning_rate\?"),
        slow(["fit", "--epochs=9"], r"There is no .* mean --trainer.max_epochs or --trainer.min_epochs\?"),
        slow(["fit", "--config=misspelt.yaml"], r"There is no option --data.max_lenght. .* --data.max_length\?"),
        slow(["fit", "--config=trainer.yaml"], r"There is no option --trainer.max_epoch. .* --trainer.max_epochs\?"),
        slow(["fit", "--model.nothing_like_it=9"], "There is no option --model.nothing_like_it."),
        slow(["fit", "--data.batch_size"], "an option has no value; write --data.OPTION=VALUE."),
        slow(["fit", "--ckpt_path"], "an option has no value; write --ckpt_path=VALUE."),
        slow(["evaluat"], "There is no command 'evaluat'. Did you mean evaluate. The commands are fit, .*, cache."),
        (["fit", "stray"], "'stray' is not an option. Write --OPTION=stray, and quotes around spaces."),
        slow(["--config=home.yaml", "fit"], "--data.cache_dir is .* or the --config that holds it, after the command."),
        slow(["fit", "run.yaml"], "'run.yaml' is not an option. Write --config=run.yaml, and quotes around spaces."),
        slow(
            ["fit", "-data.seed=1"], "'-data.seed=1' is not an option. Write --data.seed=1, and quotes around spaces."
        ),
        (["export"], "--ckpt_path is required."),
        (
            ["fit", "--data.label_names=[no, yes]"],
            "--data.label_names: .* .False, True.. In YAML, put quotes around .*",
        ),
        slow(["fit", "--data.label_names=[1, 2]"], "--data.label_names: .*. In YAML, put quotes around names .*"),
        slow(["fit", "--config=numbers.yaml"], "--data.label_column: .* Got value: 1. In YAML, put quotes .*"),
    ],
)
def test_an_unknown_option_or_a_value_of_another_type_is_told_in_one_line(
    arguments, message, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "misspelt.yaml").write_text("data: {dataset: demo, max_lenght: 9}")
    (tmp_path / "trainer.yaml").write_text("trainer: {max_epoch: 9}")
    (tmp_path / "twice.yaml").write_text("data: {batch_size: 4}\ndata: {max_length: 9}")
    (tmp_path / "latin.yaml").write_text("data: {text_columns: é}", encoding="latin-1")
    (tmp_path / "texts.csv").write_text("text,label\nfine,pos\n")
    (tmp_path / "home.yaml").write_text("data: {cache_dir: ~/cache}")
    (tmp_path / "text.yaml").write_text("hello")
    (tmp_path / "numbers.yaml").write_text("data: {label_column: 1}")
    monkeypatch.setattr(sys, "argv", ["smartbatch", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    usage, tip, error = capsys.readouterr().err.splitlines()[-3:]
    assert ("usage:" in usage or usage.startswith(" "), tip[:4]) == (True, "tip:")
    assert re.fullmatch("error: " + message, error)


def test_help_shows_what_most_runs_need_and_help_all_everything(monkeypatch, capsys) -> None:
    shown = {}
    for option in ("--help", "--help_all"):
        monkeypatch.setattr(sys, "argv", ["smartbatch", "fit", option])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit):
            main()
        shown[option] = capsys.readouterr().out
    for option in ("--data.dataset", "--data.max_length", "--model.pretrained", "--trainer.max_epochs", "--help_all"):
        assert option in shown["--help"]
    assert "--trainer.num_sanity_val_steps" in shown["--help_all"]
    assert len(shown["--help"].splitlines()) < 90 < len(shown["--help_all"].splitlines())


def test_help_describes_every_command_in_a_whole_sentence(monkeypatch, capsys) -> None:
    def shown(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["smartbatch", *words, "--help"])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit):
            main()
        return " ".join(capsys.readouterr().out.split())

    described = re.findall(r" (fit|validate|test|predict|prepare|report|export) ([A-Z].*?\.)(?= )", shown())
    assert [command for command, _ in described] == [*SmartBatchCLI.subcommands()]
    assert "Trains a model, and saves its best and its last weights." in dict(described).values()
    for command in ("evaluate", "cache"):
        assert "Lightning Trainer" not in shown(command)


@pytest.mark.slow
@pytest.mark.parametrize("command", SmartBatchCLI.subcommands())
def test_every_option_that_the_help_of_a_command_shows_is_one_that_it_takes(command, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["smartbatch", command, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit):
        main()
    options = re.findall(r"^  --([\w.]+)", capsys.readouterr().out, re.MULTILINE)
    assert options == list(_MOST_USED[command])


@pytest.mark.slow
def test_the_package_is_a_command_too_and_tells_its_version() -> None:
    told = subprocess.run([sys.executable, "-m", "smartbatch_lightning", "--version"], capture_output=True, text=True)
    assert told.stdout == f"smartbatch {metadata.version('smartbatch_lightning')}\n"


@pytest.mark.parametrize(
    "config",  # those of GLUE are in test_glue.py
    [
        slow(name) if name.startswith(("cluster", "imdb", "packed")) else name
        for name in CONFIGS
        if not name.startswith("glue")
    ],
)
def test_every_shipped_config_runs_a_step(config: str, minilm: str) -> None:
    options = [
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=1",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
    ]
    if config != "quickstart.yaml":  # real names need a network: the same kinds of things from local files
        options += [f"--model.pretrained={minilm}", f"--data.dataset={demo.data_dir()}", "--data.max_length=32"]
    run = SmartBatchCLI(args=["fit", f"--config={ROOT / 'configs' / config}", *options, "--trainer.logger=false"])
    assert run.trainer.global_step == 1
    assert isinstance(run.model, SequenceClassifier)


def test_configs_and_defaults_that_are_combined_add_up(tmp_path: Path) -> None:
    """A config of the user's, the one for requeueing, plugins and defaults; `prepare` builds the Trainer and no more."""
    (tmp_path / "own.yaml").write_text(
        "data: {max_length: 24}\n"
        "trainer:\n  logger: false\n  accelerator: cpu\n  plugins: [{class_path: lightning.pytorch.plugins.MixedPrecision, init_args: {precision: bf16-mixed, device: cpu}}]\n"
        "  callbacks: [{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}]\n"
    )
    requeue = f"--config={ROOT / 'configs' / 'cluster' / 'requeue.yaml'}"
    run = SmartBatchCLI(trainer_defaults={"max_epochs": 7}, args=["prepare", "--config=own.yaml", requeue])
    kinds = {type(callback).__name__ for callback in run.trainer.callbacks}
    assert {"GradientAccumulationScheduler", "StopOnSignal", "BestCheckpoint", "TrainingMonitor"} <= kinds
    assert type(run.trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    assert run.trainer.precision == "bf16-mixed"
    assert (run.trainer.max_epochs, run.trainer.gradient_clip_val) == (7, 1.0)


def test_a_checkpoint_io_of_the_users_is_the_only_one() -> None:
    plugin = "--trainer.plugins=lightning.pytorch.plugins.io.AsyncCheckpointIO"
    run = cli("prepare", "--data.max_length=24", plugin)
    assert type(run.trainer.strategy.checkpoint_io).__name__ == "AsyncCheckpointIO"


_OURS = """
from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule

class Ours(SequenceClassifier):
    pass

class OurData(SmartBatchDataModule):
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "prepare", "report", "validate", "test", "predict", "export"])
def test_fits_saved_config_replays_every_command_with_classes_of_the_working_directory(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setitem(sys.modules, "ours", None)
    monkeypatch.delitem(sys.modules, "ours")
    (tmp_path / "ours.py").write_text(_OURS)

    def run(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["smartbatch", *args])
        main()

    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.limit_val_batches=1"]
    run("fit", "--model=ours.Ours", "--data=ours.OurData", *FAST, *quiet)
    folder = tmp_path / "lightning_logs" / "version_0"
    del sys.modules["ours"]
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]
    [checkpoint] = folder.rglob("best.ckpt")
    loaded = [] if command in ("fit", "prepare", "report") else [f"--ckpt_path={checkpoint}"]
    run(command, f"--config={folder / 'config.yaml'}", *loaded)
    assert "ours" in sys.modules


@pytest.mark.slow
def test_prepare_tokenizes_once_for_every_later_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMARTBATCH_CACHE", str(tmp_path / "cache"))
    cli("prepare", "--data.max_length=24")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert len(files) == 2
    cli("fit", *FAST)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} == files


@pytest.mark.slow
def test_train_py_and_the_console_script_are_the_same_command(tmp_path: Path) -> None:
    started = [
        subprocess.Popen([*command, "fit", "--print_config"], stdout=subprocess.PIPE, text=True)
        for command in ([sys.executable, str(ROOT / "train.py")], [str(Path(sys.executable).parent / "smartbatch")])
    ]
    printed = [run.communicate()[0] for run in started]
    assert "smartbatch_lightning.SequenceClassifier" in printed[0]
    assert printed[0] == printed[1]


@pytest.mark.slow
def test_the_first_command_of_the_readme_trains_the_demo_in_ninety_seconds(tmp_path: Path) -> None:
    environment = os.environ | {"SMARTBATCH_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    run = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "fit"],
        capture_output=True, text=True, check=True, timeout=90, env=environment,
    )  # fmt: skip
    assert "saved" in run.stdout
    assert "The data is the built-in demo" in run.stderr
    assert "For a real run: smartbatch fit" in run.stderr
    [last] = [line.split() for line in run.stdout.splitlines() if line.startswith("1 ")]
    assert last[1] == "1,800"  # after the epoch's number the samples, the training loss and val_accuracy
    assert float(last[3]) >= 0.90


# What Python lacks on Windows, taken away once the libraries that have a way without it are imported.
_AS_ON_WINDOWS = """
import signal, sys
import datasets, lightning.pytorch.cli, torchmetrics, transformers.masking_utils
for name in ("resource", "fcntl"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
from smartbatch_lightning.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("command", "told"), [("prepare", "The data is prepared"), ("report", "Wrote report")])
def test_data_are_prepared_and_planned_without_what_windows_lacks(command: str, told: str) -> None:
    run = [sys.executable, "-c", _AS_ON_WINDOWS, command, "--data.max_length=24", "--trainer.accelerator=cpu"]
    assert told in subprocess.run(run, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_timer_of_lightning_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    duration = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00"]
    run = cli("fit", *FAST, *duration, f"--trainer.default_root_dir={tmp_path}")
    assert run.trainer.global_step == 2
    assert run.config.fit.trainer.callbacks[0].init_args.interval == "step"


@pytest.mark.slow
def test_paths_may_begin_with_the_home_folder_in_flags_and_configs(tmp_path: Path, monkeypatch) -> None:
    """Which a shell replaces only at the beginning of a word."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "run.yaml").write_text("data: {cache_dir: ~/cache, dataset: demo}\n")
    run = cli("fit", "--config=run.yaml", *FAST, "--export_model.folder=~/reviewer", "--checkpoint.dirpath=~/saved")
    assert run.config.fit.data.init_args.cache_dir == str(home / "cache")
    assert {path.name for path in home.iterdir()} >= {"cache", "reviewer", "saved"}
    cli("predict", "--data.max_length=24", "--ckpt_path=~/saved/last.ckpt", "--predictions.path=~/p.csv")
    assert len(pd.read_csv(home / "p.csv")) == run.trainer.datamodule.splits["test"].num_rows
    assert not Path("~").exists()


def test_a_config_with_null_for_a_callback_of_every_run_is_told_in_one_line(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "run.yaml").write_text("early_stopping: null\n")
    monkeypatch.setattr("sys.argv", ["smartbatch", "fit", f"--config={tmp_path / 'run.yaml'}"])
    with pytest.raises(SystemExit, match="^error: early_stopping is null in the config. Leave it out, or give its"):
        SmartBatchCLI()
