"""The command line: prepare, report, fit, validate, test, predict, export, evaluate and cache, with flags and YAML."""

import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning as L
from jsonargparse import Namespace, auto_cli
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from smartbatch_lightning.cache import list_cache, prune_cache
from smartbatch_lightning.callbacks.best import BestCheckpoint, EarlyStop
from smartbatch_lightning.callbacks.checkpoint_preflight import CheckpointPreflight
from smartbatch_lightning.callbacks.evaluation_report import EvaluationReport
from smartbatch_lightning.callbacks.memory_check import MemoryCheck
from smartbatch_lightning.callbacks.model_export import ModelExport
from smartbatch_lightning.callbacks.prediction_writer import PredictionWriter
from smartbatch_lightning.callbacks.stop_on_signal import StopOnSignal
from smartbatch_lightning.callbacks.training_monitor import TrainingMonitor
from smartbatch_lightning.checkpointing import AtomicCheckpointIO, saved_arguments, verified_checkpoint
from smartbatch_lightning.config_files import ConfigSaver
from smartbatch_lightning.contract import callbacks_of
from smartbatch_lightning.data.datamodule import SmartBatchDataModule
from smartbatch_lightning.errors import UsageError, exception_chain
from smartbatch_lightning.evaluation.command import evaluate
from smartbatch_lightning.models.classifier import SequenceClassifier
from smartbatch_lightning.parser import Parser
from smartbatch_lightning.registry import look_up, takes_argument
from smartbatch_lightning.trainer import SmartBatchTrainer

# The options that most runs need, by command.
_DATA = ("config", "data.dataset", "data.text_columns", "data.label_column", "data.max_length")
_BATCHES = ("data.batch_size", "data.max_tokens_per_batch", "data.padding")
_FIT = (*_DATA, *_BATCHES, "data.validation_split", "model.pretrained", "model.learning_rate")
_TRAINER = ("trainer.devices", "trainer.precision", "trainer.default_root_dir")
_CHECKPOINT_OPTIONS = ("ckpt_path", "config", "data.dataset")
_RUN = ("early_stopping.patience", "checkpoint.monitor", "checkpoint.dirpath", "export_model.folder")
_PREDICTIONS = ("predictions.path", "predictions.columns", "predictions.overwrite", "predictions.thresholds")
_MOST_USED = {
    "fit": (*_FIT, "trainer.max_epochs", *_TRAINER, *_RUN, "ckpt_path"),
    "validate": (*_CHECKPOINT_OPTIONS, *_BATCHES, *_TRAINER, "evaluation.folder"),
    "test": (*_CHECKPOINT_OPTIONS, *_BATCHES, *_TRAINER, "evaluation.folder"),
    "predict": (*_CHECKPOINT_OPTIONS, "data.text_columns", *_BATCHES, *_TRAINER, *_PREDICTIONS),
    "prepare": (*_DATA, "data.cache_dir", "model.pretrained"),
    "report": (*_DATA, *_BATCHES, "model.pretrained", "folder", "ranks"),
    "export": (*_CHECKPOINT_OPTIONS, "folder", "push_to_hub", "private"),
}


class SmartBatchCLI(LightningCLI):
    """`LightningCLI` with this package's classes, or subclasses of them by `class_path`.

    The tokenizer comes from the model and the class names from the data. By default, gradients are clipped at 1.0 and
    the seed is 321, as in the *Smart Batching Tutorial*.

    Args:
        model_class: Class of the model; a `class_path` must name a subclass of it.
        datamodule_class: Class of the data module, likewise.
        trainer_defaults: As in `LightningCLI`; added to the defaults above.
        args: Arguments to use instead of the command line's; mistakes in them raise exceptions.
        options: All other arguments of `LightningCLI`; here `subclass_mode_model` and `subclass_mode_data` default to
            True.
    """

    def __init__(
        self,
        model_class: type[L.LightningModule] = SequenceClassifier,
        datamodule_class: type[L.LightningDataModule] = SmartBatchDataModule,
        *,
        trainer_defaults: dict[str, Any] | None = None,
        args: ArgsType = None,
        **options: Any,
    ) -> None:
        called = sys.argv[1:2] if args is None else args[:1] if isinstance(args, list) else []
        if called and called[0] in (commands := self.subcommands()):
            # skips collecting the options of other commands, which takes a tenth of a second each
            self.subcommands = {called[0]: commands[called[0]]}.copy  # type: ignore[method-assign]
        classes: dict[str, type] = {"model": model_class, "data": datamodule_class}
        by_path = {name: of for name, of in classes.items() if options.get(f"subclass_mode_{name}", True)}
        options = {
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "seed_everything_default": 321,
            "save_config_callback": ConfigSaver,
            "save_config_kwargs": {"overwrite": True},  # else Lightning would reject its own file
            "parser_class": Parser,
            "auto_configure_optimizers": False,  # configure_optimizer and configure_scheduler do that
            "trainer_class": SmartBatchTrainer,
            "parser_kwargs": {
                "version": version("smartbatch_lightning"),
                "description": "Fine-tune BERT and other transformers on text classification.",
                "more_commands": tuple(_WITHOUT_MODEL),
                "epilog": "Two more commands need no model: smartbatch evaluate --help, for a table of predictions, "
                "and smartbatch cache --help, for tokenized texts.",
                **{
                    command: {
                        "usage": "%(prog)s [options]",
                        "classes": by_path,
                        "most_used": _MOST_USED.get(command, ()),
                    }
                    for command in self.subcommands()
                },
            },
            **options,
        }
        self._classes, self._by_path = classes, by_path
        self._architecture: dict[str, Any] | None = None
        with _as_command(self._remove_rejected_run) if args is None else nullcontext():
            super().__init__(
                model_class,
                datamodule_class,
                trainer_defaults={"max_epochs": 2, "gradient_clip_val": 1.0, **(trainer_defaults or {})},
                args=args,
                **options,
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands plus `prepare`, `report` and `export`."""
        own = ("prepare", "report", "export")
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in own}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks of every run and the default classes."""
        parser.add_lightning_class_args(TrainingMonitor, "monitor")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(CheckpointPreflight, "checkpoint_preflight")
        parser.add_lightning_class_args(MemoryCheck, "memory_check")
        parser.add_lightning_class_args(StopOnSignal, "stop_on_signal")
        parser.add_lightning_class_args(EarlyStop, "early_stopping")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ModelExport, "export_model")
        parser.add_lightning_class_args(EvaluationReport, "evaluation")
        for name, chosen in self._by_path.items():
            module = __package__ if chosen in (SequenceClassifier, SmartBatchDataModule) else chosen.__module__
            parser.set_defaults({name: {"class_path": f"{module}.{chosen.__qualname__}"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Also keeps the arguments, for `_parse_ckpt_path`.

        Raises:
            ValueError: The seed is out of range; or a callback of every run, or another argument, is null.
        """
        self._args = args
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        if not command:
            return
        seed = self.config[command].get("seed_everything")
        if type(seed) is int and not 0 <= seed < 2**32:
            raise UsageError(f"--seed_everything is {seed}; give a number from 0 to {2**32 - 1}.")
        for name in self._parser(command).callback_keys:
            if self.config[command].get(name, {}) is None:
                raise UsageError(f"{name} is null in the config. Leave it out, or give its options.")
        for name, of in self._classes.items():
            for argument, value in self._arguments(self.config[command], name).items():
                if value is None and not _accepts_null(of, argument):
                    raise UsageError(f"--{name}.{argument} is null. Leave it out, or give a value.")

    def _arguments(self, config: Any, name: str) -> Any:
        """The arguments of the model or the data module in a command's config."""
        given = config.get(name) or {}
        return given.get("init_args") or {} if name in self._by_path else given

    def _parse_ckpt_path(self) -> None:
        """Takes the architecture and the model arguments that are not given from a local checkpoint.

        Lightning would take all arguments, silently replacing the given ones, before any checkpoint plugin is involved,
        and fail if the class does not take one.
        """
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path in ("", "best"):  # such as from an unset shell variable; `best` refers to a run in this process
            raise UsageError(f"ckpt_path is {path!r}; give the path of a checkpoint, such as runs/reviews/best.ckpt.")
        if not path or Path(path).is_dir() or _NOT_A_FILE.match(str(path)):
            return
        if command in ("prepare", "report") and not Path(path).exists():
            return
        given = self.config
        model_kwargs = self._arguments(given[command], "model").get("model_kwargs") or {}
        verified_checkpoint(path, trusts_code=model_kwargs.get("trust_remote_code", False))
        saved = saved_arguments(path)
        self._architecture = saved.pop("architecture", None)
        saved.pop("_instantiator", None)
        class_path = saved.pop("_class_path", None)
        chosen = class_path or given[command].model.get("class_path")
        of = self._classes["model"] if chosen is None else look_up(chosen, {}, "class_path")
        taken = {name: value for name, value in saved.items() if takes_argument(of, name)}
        if not taken:
            return
        if class_path:
            taken = {"class_path": class_path, "dict_kwargs": taken}
        config = self.parser.parse_object({command: {"model": taken}}, given)
        parse: Any = self.parser.parse_object if isinstance(self._args, dict | Namespace) else self.parser.parse_args
        # everything else stays as parsed: lists with `+=` would be extended twice
        given[command].model = parse(self._args, config)[command].model

    def instantiate_classes(self) -> None:
        """Also gives the model the architecture of the checkpoint, which a subclass may not take as an argument."""
        super().instantiate_classes()
        if self._architecture is not None and isinstance(self.model, SequenceClassifier):
            self.model.architecture = self.model.architecture or self._architecture

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds `AtomicCheckpointIO` unless a `CheckpointIO` is given; as a default, other plugins would replace it."""
        given = kwargs.pop("plugins", self._get(self.config_init, "trainer", default={}).get("plugins")) or []
        plugins = list(given) if isinstance(given, list | tuple) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        trainer = super().instantiate_trainer(plugins=plugins, **kwargs)
        folder = Path(trainer.log_dir or ".")
        self._new_folders = [one for one in (folder, *folder.parents) if trainer.loggers and not one.exists()]
        return trainer

    def _check_last(self) -> None:
        """Refuses to resume from the last checkpoint of a folder that is new at every start.

        Raises:
            ValueError: `ckpt_path` is `last`, but the checkpoint folder has the number of the run in it.
        """
        settings = self.config[self.config["subcommand"]]
        numbered = settings["trainer"].get("logger") in (None, True) and SLURMEnvironment.job_id() is None
        kept = [one for one in callbacks_of(self.trainer, Checkpoint) if getattr(one, "dirpath", None)]
        if settings.get("ckpt_path") != "last" or not numbered or kept:
            return
        saved = Path(self.trainer.default_root_dir).glob("lightning_logs/version_*/checkpoints/last*.ckpt")
        latest = max(saved, key=lambda path: path.stat().st_mtime, default=None)
        raise UsageError(
            "--ckpt_path=last means the last.ckpt in --checkpoint.dirpath, which is not set, so every start has a "
            "new folder. Set it to the same folder at every start, or give --ckpt_path the path of a checkpoint"
            + (f"; the latest is {latest}." if latest else ".")
        )

    def _remove_rejected_run(self) -> None:
        """Removes the log folders that this run created, if it was rejected before its first step."""
        trainer = getattr(self, "trainer", None)
        if trainer is None or not trainer.is_global_zero or trainer.global_step or not self._new_folders:
            return
        folder, *outer = self._new_folders
        if all(any(map(path.match, _LOGGED_AT_START)) for path in folder.rglob("*") if path.is_file()):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                for one in outer:
                    one.rmdir()  # unless another run is in it

    def _log_demo(self) -> None:
        """Logs that the data is the demo, if it is."""
        if isinstance(self.datamodule, SmartBatchDataModule) and self.datamodule.is_demo:
            rank_zero_info(
                "The data is the built-in demo: made-up reviews, for a small untrained BERT. The results say nothing "
                "about real texts. For other data, set --data.dataset, or give a run's config with --config."
            )

    def before_fit(self) -> None:
        """Also refuses to resume from a folder that is new at every start."""
        self._check_last()
        self._log_demo()

    before_validate = before_test = _log_demo

    def before_predict(self) -> None:
        """Also refuses to overwrite predictions, before the data is tokenized."""
        for writer in callbacks_of(self.trainer, PredictionWriter):
            if isinstance(self.model, SequenceClassifier):
                writer.check_path()
        self._log_demo()

    def after_fit(self) -> None:
        """After the demo, prints the command for a real run."""
        if isinstance(self.datamodule, SmartBatchDataModule) and self.datamodule.is_demo:
            rank_zero_info(
                "That was the built-in demo. For a real run: smartbatch fit --model.pretrained=bert-base-uncased "
                "--data.dataset=stanfordnlp/imdb (or your own CSV, JSON lines or Parquet file)"
            )


def _accepts_null(of: type, argument: str) -> bool:
    """Whether an argument of a class or its base classes may be None; jsonargparse accepts null for all of them."""
    for one in of.__mro__:
        accepted = get_type_hints(vars(one).get("__init__", object)).get(argument)
        if accepted is not None:
            return accepted is Any or not {Any, type(None)}.isdisjoint(get_args(accepted))
    return True


# Checkpoints that Lightning resolves itself: keywords, URLs and its registry.
_NOT_A_FILE = re.compile(r"(last|hpc)$|\w+://|(?i:registry)(:|$)")
_LOGGED_AT_START = ("config*.yaml", "hparams.yaml", "events.out.tfevents.*")
# Warnings that a user cannot act on.
_IGNORED_WARNINGS = (
    "does not have many workers",  # batches are collated in microseconds: workers gain nothing
    "using a custom batch sampler",  # ours returns every sample for prediction
    "Total length of `list` across ranks is zero",  # the user has turned validation off
    "It is recommended to use `self.log",  # with sync_dist; rank 0 logs figures that cover all ranks
    "The dirpath has changed from",  # test and predict have their own folders
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # internal to Lightning
)

# Log lines that a user cannot act on, by logger.
_IGNORED_LINES = {
    "lightning.pytorch.utilities.rank_zero": "Tip: ",
    "lightning.pytorch.trainer.connectors.checkpoint_connector": "`weights_only` was not set",  # at every save
}


def _does_not_contain(message: str, record: logging.LogRecord) -> bool:
    return message not in record.getMessage()


@contextmanager
def _as_command(on_mistake: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Suppresses warnings that a user cannot act on, and reports a user's mistake in one line."""
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    for logger, message in _IGNORED_LINES.items():
        logging.getLogger(logger).addFilter(partial(_does_not_contain, message))
    try:
        yield
    except Exception as error:
        mistake = _user_message(error)
        if mistake is None:
            raise
        on_mistake()
        sys.exit(f"error: {mistake}")


def _user_message(error: Exception) -> str | None:
    """The line to print for an error instead of a traceback; None if it is not the user's mistake.

    Some exceptions with which Lightning rejects arguments can only be recognized by where they were raised.
    """
    for one in exception_chain(error):  # jsonargparse wraps what a constructor raises
        raised_in = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(one.__traceback__)]
        refusal = isinstance(one, ValueError | RuntimeError | ModuleNotFoundError)  # the last: of a logger
        refusal = refusal and "".join(raised_in[-1:]).startswith("lightning.")
        if isinstance(one, UsageError | MisconfigurationException) or refusal:
            return str(one).strip().rpartition("UsageError: ")[2]  # torch prepends the traceback of a loader process
    if rank_zero_only.rank and re.search("closed by peer|remote process exited", str(error)):  # type: ignore[attr-defined]
        return "another rank has failed, and this one with it; see the other rank's error."
    return None


# Commands that take no model and no data, unlike the subcommands of LightningCLI.
_WITHOUT_MODEL: dict[str, Any] = {"evaluate": evaluate, "cache": {"list": list_cache, "prune": prune_cache}}
_DESCRIPTIONS = {
    "evaluate": str(evaluate.__doc__).partition("\n")[0],
    "cache": "Lists and prunes the folders of tokenized text.",
}


def main() -> None:
    """Entry point of `smartbatch` and `train.py`."""
    # so that class_path finds classes in the working directory; "" would mean a config's folder while that is parsed
    sys.path.insert(0, os.getcwd())
    name = "".join(sys.argv[1:2])
    if name in _WITHOUT_MODEL:
        with _as_command():
            auto_cli(
                _WITHOUT_MODEL[name],
                sys.argv[2:],
                as_positional=False,
                prog=f"smartbatch {name}",
                description=_DESCRIPTIONS[name],
                usage="%(prog)s [options]" if name == "evaluate" else None,
                parser_class=Parser,
            )
    else:
        SmartBatchCLI()
