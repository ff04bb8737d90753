"""TextDataModule: a data set by name or file -> token ids with labels, ready to be batched."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
from datasets import Dataset, DatasetDict
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from smartbatch_lightning.contract import TEXT_ENCODING, TextModel, text_data_of, text_model_of
from smartbatch_lightning.data.encoding import TextEncoder, check_not_blank
from smartbatch_lightning.data.lazy import LazyTokenTable
from smartbatch_lightning.data.sources import describe_source, is_named, normalized_source, read_dataset, splits_of
from smartbatch_lightning.data.splits import SplitNames, find_split, train_and_validation_rows
from smartbatch_lightning.data.task_options import TaskOptions
from smartbatch_lightning.data.token_cache import tokenize_to_cache
from smartbatch_lightning.data.tokenizers import check_tokenizer, check_tokens, find_tokenizer
from smartbatch_lightning.data.tokens import TokenDataset, TokenTable
from smartbatch_lightning.data.truncation import Truncation
from smartbatch_lightning.errors import QUOTE_NAMES, UsageError, join_quoted
from smartbatch_lightning.seeds import run_seed, seed_is_given
from smartbatch_lightning.storage import cache_dir
from smartbatch_lightning.tasks import Regression, Task
from smartbatch_lightning.tasks.source import LabelColumns, LabelSource

_MAX_LENGTH = 400  # as in the Smart Batching Tutorial
_EVALUATIONS = (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING)


@dataclass(frozen=True)
class _Loaded:
    """What one `setup` has loaded; the next one loads again, since model and settings may have changed."""

    splits: DatasetDict
    model: TextModel | None
    encoder: TextEncoder
    train_labels: LabelColumns | None
    task: Task | None


class TextDataModule(L.LightningDataModule):
    """Texts and labels of a data set, tokenized: a `TokenDataset` for each split. `SmartBatchDataModule` batches them.

    Args:
        dataset: `demo`; a name on the Hugging Face Hub; a CSV, TSV, JSON lines or Parquet file, optionally compressed,
            or its URL; a list of these, or a pattern such as `train-*.parquet`; a folder of such files or one written
            by `save_to_disk`; or files by split, `{train: a.csv, test: [b.csv, c.csv]}`. In Python also a `Dataset`,
            `DatasetDict`, pandas or polars DataFrame, Arrow table, list of dicts, or a dict of these by split.
        tokenizer: A tokenizer, or its name or folder; by default the model's.
        dataset_config: Configuration name of a data set that has several, such as `sst2` for `nyu-mll/glue`.
        reader_kwargs: Options for reading files, as in `datasets`: for CSV those of pandas, such as `sep`, `names`,
            `header`, `encoding`, `quoting` and `escapechar`; for JSON `encoding` and `field`.
        problem_type: The task: `single_label_classification`, `multi_label_classification`, `regression`, or the import
            path of a class like those in `smartbatch_lightning.tasks`. By default lists of labels mean multi-label,
            floats mean regression, and everything else means single-label.
        text_columns: Text column, or two columns for sentence pairs; or two or more columns joined by `text_separator`.
        text_separator: Joins the texts of several columns into one, such as a space.
        label_column: Label column: a `ClassLabel`, integers, strings or booleans, matched by name; lists of these; or
            numbers. Or several columns: a 0/1 column for each label, or one column for each regression target.
        label_delimiter: Separator for several labels in one string, such as `,` in `joy,anger`.
        label_names: Class names in the order of their ids; by default those of the `ClassLabel`, or the labels in the
            training split, sorted. If none of the names is a number, integers in the data are class ids.
        standardize_targets: For regression: learn `(target - mean) / deviation`, per target, computed on the training
            samples. Predictions and metrics stay in the original units; the loss does not.
        train_split: Split to train on.
        validation_split: Split or splits to validate on; or the fraction of the training split to set aside for
            validation, stratified by label and drawn with `seed`; 0 or None for no validation. `auto` uses a split
            named validation, valid, val or dev, else a fraction of 0.1.
        test_split: Split or splits to test on.
        predict_split: Split to predict, which needs no labels; by default the first `test_split`, or the only split.
        max_length: Tokens that the model takes at once, including special tokens; longer text is truncated. By default
            as the model was trained, else 400.
        truncation: What to keep of longer text: `head`, `tail`, `head_tail`, or everything in overlapping `windows`. By
            default as the model was trained, else the tokenizer's truncation side, usually the head.
        head_tokens: Tokens that `head_tail` keeps from the beginning; by default a quarter of `max_length`.
        stride: Overlap of consecutive windows, in tokens; by default a quarter of `max_length`.
        max_windows: Maximum number of windows per text; the rest is cut.
        window_pooling: How to pool the logits of a text's windows: `mean`, the default, or `max`.
        tokenization: `ahead`: once, before the run, into a cache; or `lazy`: batch by batch in the data loader workers
            (see `num_workers`). Training then starts at once but pads more, since lengths are estimated.
        seed: Seed of the validation split; by default that of `seed_everything`, else torch's. Saved in checkpoints.
        cache_dir: Where tokenized data is cached; by default `$SMARTBATCH_CACHE` or the user's cache.

    Raises:
        ValueError: An argument or the data is not usable; the message says what is wrong and what to do.
    """

    train_data: TokenDataset
    validation_data: list[TokenDataset]
    test_data: list[TokenDataset]
    predict_data: TokenDataset

    def __init__(
        self,
        dataset: str | list[str] | dict[str, str | list[str]] | Any = "demo",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        dataset_config: str | None = None,
        reader_kwargs: dict[str, Any] | None = None,
        problem_type: str | None = None,
        text_columns: str | list[str] | Any = "text",
        text_separator: str | None = None,
        label_column: str | list[str] = "label",
        label_delimiter: str | None = None,
        label_names: list[str] | None = None,
        standardize_targets: bool = False,
        train_split: str = "train",
        validation_split: float | str | list[str] | None = "auto",
        test_split: str | list[str] = "test",
        predict_split: str | None = None,
        max_length: int | None = None,
        truncation: Literal["head", "tail", "head_tail", "windows"] | None = None,
        head_tokens: int | None = None,
        stride: int | None = None,
        max_windows: int | None = None,
        window_pooling: Literal["mean", "max"] | None = None,
        tokenization: Literal["ahead", "lazy"] = "ahead",
        seed: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        dataset = normalized_source(dataset)
        objects = {"tokenizer": not isinstance(tokenizer, str | None), "dataset": not is_named(dataset)}
        self.save_hyperparameters(ignore=[name for name, is_object in objects.items() if is_object])
        if objects["dataset"]:
            self.hparams["dataset"] = None  # so that load_from_checkpoint rejects it instead of using the demo
        if max_length is not None and max_length < 3:
            raise UsageError(
                f"max_length is {max_length}, but two tokens are special tokens; set --data.max_length to 3 or more."
            )
        if tokenization not in ("ahead", "lazy"):
            raise UsageError(f"tokenization is {tokenization!r}; choose 'ahead' or 'lazy'.")
        columns = _checked_columns(text_columns, text_separator)
        SplitNames(train_split, validation_split, test_split, predict_split)  # rejects invalid names
        source = LabelSource.from_arguments(label_column, label_delimiter)
        if both := [column for column in columns if column in source.columns]:
            raise UsageError(
                f"text_columns and label_column both name {join_quoted(both)}, so the text would give the label away. "
                "Set --data.label_column or --data.text_columns."
            )
        if isinstance(label_names, str | Mapping | Set):
            raise UsageError(f"label_names is {label_names!r}; give a list of names in the order of their ids.")
        names = None if label_names is None else tuple(label_names)
        self._task_options = TaskOptions(problem_type, names, source, standardize_targets)
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.reader_kwargs = reader_kwargs
        self.text_columns = columns
        self.text_separator = text_separator
        self.train_split = train_split
        self.validation_split = validation_split
        self.test_split = test_split
        self.predict_split = predict_split
        self.max_length = max_length
        options = (truncation, head_tokens, stride, max_windows, window_pooling)
        self.truncation = None if options == (None,) * len(options) else Truncation(truncation or "head", *options[1:])
        if self.truncation is not None:
            self.truncation.check_columns(columns, text_separator)
        self.tokenization = tokenization
        self.seed = seed
        self.cache_dir = cache_dir
        self._given_tokenizer = tokenizer
        self._loaded: _Loaded | None = None

    # --- methods to override ---

    def load_dataset(self) -> Any:
        """Loads the splits as a `DatasetDict`. Override it to load other data.

        Returns:
            In a subclass also a `Dataset`, a pandas or polars DataFrame, an Arrow table or a list of dicts to train on,
            or a mapping from splits to these.
        """
        options: dict[str, Any] = {"text_columns": self.text_columns, "reader_kwargs": self.reader_kwargs}
        try:
            return read_dataset(self.dataset, self.dataset_config, self.label_source, **options)
        except UsageError:
            if self.trainer is None or self.trainer.state.fn != TrainerFn.PREDICTING:
                raise  # when predicting, it may be about labels, which are not needed
            splits = read_dataset(self.dataset, self.dataset_config, LabelSource(()), **options)
            labels = set(self.label_source.columns)
            return DatasetDict(
                {name: rows.remove_columns(sorted(labels & {*rows.features})) for name, rows in splits.items()}
            )

    def tokenize(self, dataset: Dataset) -> Any:
        """Tokenizes one split; by default with the cache.

        Returns:
            For each sample a list of ids, or a mapping with `input_ids` and optionally `token_type_ids`; or a
            `TokenTable`, as read from the cache.
        """
        if self.tokenization == "lazy":
            return LazyTokenTable(dataset, self.text_encoder)
        folder = Path(self.cache_dir) if self.cache_dir else cache_dir()
        return tokenize_to_cache(dataset, self.text_encoder, folder, self.source)

    # --- what is known about the data ---

    @property
    def is_demo(self) -> bool:
        """Whether the data is the built-in demo."""
        return isinstance(self.dataset, str) and self.dataset == "demo" and not self._overrides_load_dataset

    @property
    def splits(self) -> DatasetDict:
        """All splits of the data set."""
        return self._load().splits

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer: the given one, else the model's."""
        return self.text_encoder.tokenizer

    @property
    def text_encoder(self) -> TextEncoder:
        """The encoder that turns the texts of a split into token ids."""
        return self._load().encoder

    @property
    def max_length(self) -> int:
        """Tokens that the model takes at once: as given, else as the model was trained, else 400.

        How the model was trained is known after `prepare_data` or `setup`.
        """
        return self._max_length or (_MAX_LENGTH if self._loaded is None else self._loaded.encoder.max_length)

    @max_length.setter
    def max_length(self, max_length: int | None) -> None:
        self._max_length = max_length

    @property
    def truncation_in_use(self) -> Truncation:
        """How longer text is truncated: as given, else as the model was trained, else on the tokenizer's side."""
        return self.text_encoder.truncation

    @property
    def seed(self) -> int:
        """Seed of the validation split: the given one, else the run's, which is known after `setup`."""
        return run_seed() if self._seed is None else self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._seed = self._given_seed = seed

    @property
    def task(self) -> Task | None:
        """The task with its labels: from the data, else from a trained model; None if neither is known."""
        return self._load().task

    @property
    def label_source(self) -> LabelSource:
        """Where to find the labels in the data."""
        return self._task_options.source

    @property
    def label_names(self) -> list[str] | None:
        """Class names in the order of their ids; None if unknown."""
        return None if self.task is None else self.task.label_names

    @property
    def num_labels(self) -> int | None:
        """Number of classes; None if unknown."""
        return None if self.task is None else len(self.task.label_names)

    @property
    def predict_rows(self) -> Dataset:
        """The split to predict, with all its columns."""
        return self._split(self._names.predicted(self.splits))

    @property
    def used_splits(self) -> list[str]:
        """Names of the non-empty splits that some stage may use."""
        return self._names.used(self.splits)

    @property
    def validates_share(self) -> bool:
        """Whether validation samples are set aside from the training split."""
        return bool(self._names.validation_share(self.splits))

    @property
    def source(self) -> str:
        """The data set, as messages name it."""
        if self._overrides_load_dataset:
            return f"{type(self).__name__}.load_dataset()"
        return describe_source(self.dataset)

    def token_table(self, dataset: Dataset) -> TokenTable:
        """Token ids of one split, from `tokenize`, checked.

        Raises:
            ValueError: There are not as many rows as samples, a sample has no tokens or too many, or an id is not in
                the tokenizer's vocabulary.
        """
        tokenized = self.tokenize(dataset)
        table = tokenized if isinstance(tokenized, TokenTable) else TokenTable.from_rows(tokenized)
        if self.tokenization == "lazy" and not isinstance(table, LazyTokenTable):
            raise UsageError(
                f"tokenization is 'lazy', but {type(self).__name__}.tokenize gave token ids. Leave the option out, or "
                "have tokenize return what TextDataModule.tokenize does."
            )
        if len(table) != len(dataset):
            raise UsageError(
                f"tokenize gave {len(table)} rows for {len(dataset)} samples; give a list of ids for each sample."
            )
        model = self._load().model
        config = None if model is None else model.config
        table.check(partial(check_tokens, encoder=self.text_encoder, config=config))
        return table

    # --- Lightning's hooks ---

    def prepare_data(self) -> None:
        """Loads and tokenizes every split that a later stage may use; on a cluster, in one process.

        Problems such as a missing column, text or label, or a model that does not fit, are reported before anything
        is tokenized.
        """
        self._loaded = None
        datasets = [self._split(split) for split in self.used_splits]
        for split in self._labelled_splits():
            self._labels(split)
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_not_blank(self._split(self.train_split), self.text_columns, self.train_split)
            if (model := self._load().model) is not None and (data := text_data_of(self.trainer)) is not None:
                model.check(data)
            if self.task is not None:
                rank_zero_info(f"Learning {self.task.description}.")
        for dataset in datasets:
            self.token_table(dataset)

    def setup(self, stage: str) -> None:
        """Creates the data sets of a stage from what `prepare_data` cached, with rank 0's seed if none is given."""
        self._loaded = None
        if self._seed is None:
            self._seed = run_seed(self.trainer)
            if not seed_is_given():
                rank_zero_info(f"No seed was given, so data.seed is {self._seed}. Checkpoints store it.")
        if stage == "fit" or (stage == "validate" and self.validates_share):
            self.train_data, self.validation_data = self._train_and_validation()
        elif stage == "validate":
            self.validation_data = [self._labelled(split) for split in self._names.validated(self.splits)]
        elif stage == "test":
            self.test_data = [self._labelled(split) for split in self._names.tested]
        elif stage == "predict":
            self.predict_data = TokenDataset(self.token_table(self.predict_rows))
        self._log_changed_truncation(encoding_of(self._load().model))

    def data_sets(self, stage: str) -> list[TokenDataset]:
        """The data sets that `setup` created for a stage."""
        if stage == "fit":
            return [self.train_data, *self.validation_data]
        if stage == "validate":
            return self.validation_data
        return self.test_data if stage == "test" else [self.predict_data]

    # --- the rest ---

    def _load(self) -> _Loaded:
        if self._loaded is None:
            wanted = (*self.text_columns, *self.label_source.columns)
            splits, model = splits_of(self.load_dataset(), wanted), text_model_of(self.trainer)
            trained = None if model is None else model.trained_config
            known = encoding_of(model)
            max_length = self._max_length or known.get("max_length", _MAX_LENGTH)
            tokenizer = find_tokenizer(self._given_tokenizer, model, self.source, self.is_demo, max_length)
            check_tokenizer(tokenizer, known)
            train = splits.get(self.train_split)
            labelled = train is not None and len(train) > 0 and self.label_source.is_in(train)
            train_labels = self.label_source.read(train, self.train_split) if labelled else None
            training = self.trainer is None or self.trainer.state.fn not in _EVALUATIONS
            task = self._task_options.find(train_labels, trained, training=training)
            if isinstance(task, Regression) and train_labels is not None and (training or trained is None):
                task = self._standardized(task, splits, train_labels)
            if (truncation := self.truncation) is None:
                truncation = Truncation(**known["truncation"]) if known else Truncation.from_tokenizer(tokenizer)
            encoder = TextEncoder(tokenizer, self.text_columns, self.text_separator, max_length, truncation)
            self._loaded = _Loaded(splits, model, encoder, train_labels, task)
        return self._loaded

    def _log_changed_truncation(self, known: dict[str, Any]) -> None:
        """Logs that texts are truncated differently than when the model was trained, which may be intended.

        Args:
            known: The settings of its training, as in `TextEncoder.settings`; empty if unknown.
        """
        if known:
            before = Truncation(**known["truncation"]).settings(known["max_length"])
            now = self.truncation_in_use.settings(self.max_length)
            if before != now:
                rank_zero_info(f"The model was trained with {before}; this run uses {now}.")

    @property
    def _overrides_load_dataset(self) -> bool:
        return type(self).load_dataset is not TextDataModule.load_dataset

    @property
    def _names(self) -> SplitNames:
        return SplitNames(self.train_split, self.validation_split, self.test_split, self.predict_split)

    def _standardized(self, task: Regression, splits: DatasetDict, labels: LabelColumns) -> Regression:
        """The task with the mean and deviation of the training targets, if requested and not a trained model's."""
        if not self._task_options.standardize_targets or task.standardization is not None:
            return task
        share, rows = self._names.validation_share(splits), None
        if share:
            rows, _ = train_and_validation_rows(task, task.encode(labels), share, self.seed)
        return task.standardized(labels, rows)

    def _train_and_validation(self) -> tuple[TokenDataset, list[TokenDataset]]:
        train, share = self._labelled(self.train_split), self._names.validation_share(self.splits)
        if not share:
            validated = self._names.validated(self.splits)
            if validated[:1] == [self.train_split]:  # the set that decides which weights are best
                rank_zero_warn(
                    f"The split {self.train_split!r} is trained on and validated on, so the validation says nothing "
                    "about other samples. Unless this is intended, set --data.validation_split."
                )
            return train, [self._labelled(split) for split in validated]
        task, labels, columns = self.task, train.labels, self._load().train_labels
        assert task is not None  # otherwise `_labelled` would have raised an error
        assert labels is not None
        assert columns is not None
        if isinstance(task, Regression) and task.standardization is not None:
            task = replace(task, standardization=None)  # so that it does not affect the split
            labels = task.encode(columns)
        parts = train_and_validation_rows(task, labels, share, self.seed)
        unused = [split for split in self.splits if split not in self._names.used(self.splits)]
        if self.validation_split == "auto" and unused:
            rank_zero_info(
                f"A tenth of the split {self.train_split!r} is set aside for validation; unused splits: "
                f"{join_quoted(unused)}. To validate on another split, name it with --data.validation_split."
            )
        train, validation = (TokenDataset(train.table, train.labels, rows) for rows in parts)
        return train, [validation]

    def _labelled_splits(self) -> list[str]:
        """Splits whose labels the Trainer's current stage needs."""
        stage = None if self.trainer is None else self.trainer.state.fn
        if stage == TrainerFn.TESTING:
            return self._names.tested
        validated = self._names.validated(self.splits)
        if stage == TrainerFn.FITTING:
            return [self.train_split, *validated]
        return validated if stage == TrainerFn.VALIDATING else []

    def _labelled(self, split: str) -> TokenDataset:
        return TokenDataset(self.token_table(self._split(split)), self._labels(split))

    def _labels(self, split: str) -> NDArray[Any]:
        """The encoded labels of a split."""
        dataset = self._split(split)
        if self.task is None:
            if self.train_split in self.splits:  # says what is wrong with its labels
                self.label_source.read(self._split(self.train_split), self.train_split)
            raise UsageError(
                f"the label classes are unknown: {self.source} has no training split {self.train_split!r} with labels, "
                "and the model is not from a checkpoint. Set --ckpt_path, or --data.label_names in the order of the "
                "class ids."
            )
        train_labels = self._load().train_labels if split == self.train_split else None
        return self.task.encode(train_labels or self.label_source.read(dataset, split))

    def _split(self, split: str) -> Dataset:
        return find_split(self.splits, split, self.text_columns, self.source, self._names.argument(split))


def encoding_of(model: TextModel | None) -> dict[str, Any]:
    """How texts were tokenized in a model's training, as in `TextEncoder.settings`; empty if unknown."""
    return {} if model is None or model.trained_config is None else getattr(model.trained_config, TEXT_ENCODING, {})


def _checked_columns(text_columns: Any, text_separator: str | None) -> list[str]:
    columns = [text_columns] if isinstance(text_columns, str) else text_columns
    named = isinstance(columns, list | tuple) and all(isinstance(column, str) and column for column in columns)
    if not named or not columns or len(set(columns)) < len(columns) or columns[0].startswith("["):
        raise UsageError(
            f"text_columns is {text_columns!r}; give one column, or a list of several, each once, as in '[title, "
            f"text]'. {QUOTE_NAMES}"
        )
    if len(columns) > 2 and text_separator is None:
        raise UsageError(
            f"text_columns is {text_columns!r}; give one column, or two for pairs of sentences, or set "
            "--data.text_separator, such as ' ', to join them all into one text."
        )
    if len(columns) == 1 and text_separator is not None:
        raise UsageError(
            f"text_separator is {text_separator!r}, but text_columns is {text_columns!r}; give two or more columns."
        )
    return list(columns)
