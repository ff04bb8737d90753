"""SmartBatchDataModule: a data set by name or file -> batches of similar length for the Lightning Trainer."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from smartbatch_lightning.batching import BatchSpec
from smartbatch_lightning.contract import TextData, text_model_of
from smartbatch_lightning.data.collators import COLLATORS, Collator
from smartbatch_lightning.data.labels import find_task
from smartbatch_lightning.data.loader import SmartBatchLoader
from smartbatch_lightning.data.resume import (
    check_fingerprint,
    dataset_fingerprint,
    sync_loop_progress,
    training_progress,
)
from smartbatch_lightning.data.sampler import SmartBatchSampler
from smartbatch_lightning.data.sources import read_dataset
from smartbatch_lightning.data.splits import SplitNames, find_split, train_and_validation_rows
from smartbatch_lightning.data.tokenizers import find_tokenizer
from smartbatch_lightning.data.tokens import TokenDataset, TokenTable, tokenize_to_cache
from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.registry import look_up
from smartbatch_lightning.storage import cache_dir
from smartbatch_lightning.tasks import TASKS, Task

_EVALUATIONS = (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING)


@dataclass(frozen=True)
class _Loaded:
    """What one set-up has loaded; the next one loads again, since model and settings may be others."""

    splits: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    task: Task | None


class SmartBatchDataModule(L.LightningDataModule):
    """Tokenizes text once and batches samples of similar length, in a new plan every epoch.

    Subclass it for other data: `load_dataset`, `tokenize`, `configure_sampler` and `configure_collator` are each a
    method of its own. What is set on it before a loader is made, such as `batch_size`, counts.

    Args:
        dataset: `demo`; a name on the Hugging Face Hub; a CSV, JSON lines or Parquet file; a folder of such files or
            one written by `save_to_disk`; or files by split, as in `{train: a.csv, test: b.csv}`.
        tokenizer: A tokenizer, or the name or folder of one; by default that of the model that the Trainer runs.
        dataset_config: Configuration of a data set on the Hub that has several, such as `sst2` of `nyu-mll/glue`.
        problem_type: What is learnt: a name in `smartbatch_lightning.tasks.TASKS`, or the import path of a class.
        text_columns: Column of text, or two columns for pairs of sentences.
        label_column: Column of labels: a `ClassLabel`, whole numbers, strings or booleans. They are matched by name.
        label_names: Names of the classes in the order of their numbers; by default those of the `ClassLabel`, or what
            the training split holds, sorted. Where none of them is a number, whole numbers in the data count them.
        train_split: Split to train on.
        validation_split: Split to validate on, or several; or the share of the training split to set aside for it,
            drawn from `seed` with the same share of every label; 0 or None for no validation. `auto` takes a split
            named validation, valid, val or dev, else a share of 0.1.
        test_split: Split to test on, or several.
        predict_split: Split to predict, which needs no labels; by default the first `test_split`, or the only split
            there is.
        max_length: Longest sample, in tokens with special tokens; longer text is cut.
        batch_size: As in `BatchSpec`.
        max_tokens_per_batch: As in `BatchSpec`. `smart` batches then hold few long samples or many short ones.
        batching: As in `BatchSpec`.
        padding: As in `BatchSpec`; `packed` is for models of the ALBERT, BERT, CamemBERT, DistilBERT, ELECTRA,
            ModernBERT, RoBERTa and XLM-RoBERTa families.
        jitter: As in `BatchSpec`.
        pad_to_multiple_of: As in `BatchSpec`; 8 suits tensor cores.
        seed: Of plans and the split; by default that of `seed_everything`, else 0.
        num_workers: Processes that load batches. A batch takes a tenth of a millisecond, so 0 is rarely the bottleneck.
        pin_memory: Page-locked batches for faster copies to a GPU; by default where there is one.
        loader_kwargs: What else `DataLoader` takes, such as `prefetch_factor`.
        cache_dir: Where token files are kept; by default `$SMARTBATCH_CACHE` or the user's cache.
        ignore_fingerprint_mismatch: Resume a checkpoint of other data, seed or batching at the same step of the new
            plan, where some samples of the epoch may be trained twice or not at all.

    Raises:
        ValueError: An argument or the data is not usable; the message says what was met and what to do.
    """

    def __init__(
        self,
        dataset: str | dict[str, str] = "demo",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        dataset_config: str | None = None,
        problem_type: str = "single_label_classification",
        text_columns: str | list[str] = "text",
        label_column: str = "label",
        label_names: list[str] | None = None,
        train_split: str = "train",
        validation_split: float | str | list[str] | None = "auto",
        test_split: str | list[str] = "test",
        predict_split: str | None = None,
        max_length: int = 400,
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        batching: str = "smart",
        padding: str = "longest",
        jitter: float | Literal["auto"] = "auto",
        pad_to_multiple_of: int = 1,
        seed: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        loader_kwargs: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        ignore_fingerprint_mismatch: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(tokenizer, str | None) else ["tokenizer"])
        if max_length < 3:
            raise UsageError(
                f"max_length is {max_length}, but two tokens are special ones; set --data.max_length to 3 or more."
            )
        if isinstance(text_columns, list) and len(text_columns) not in (1, 2):
            raise UsageError(f"text_columns is {text_columns}; give one column, or two for pairs of sentences.")
        if fixed := {"batch_sampler", "batch_size", "sampler", "shuffle", "drop_last"} & set(loader_kwargs or {}):
            raise UsageError(
                f"loader_kwargs has {join_quoted(sorted(fixed))}, which the batches decide. Set --data.batch_size and "
                "--data.batching, or override configure_sampler."
            )
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.problem_type = problem_type
        self.text_columns = [text_columns] if isinstance(text_columns, str) else text_columns
        self.label_column = label_column
        self.train_split = train_split
        self.validation_split = validation_split
        self.test_split = test_split
        self.predict_split = predict_split
        self.max_length = max_length
        self.batch_size = batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.batching = batching
        self.padding = padding
        self.jitter = jitter
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.num_workers = num_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.loader_kwargs = loader_kwargs or {}
        self.cache_dir = cache_dir
        self.ignore_fingerprint_mismatch = ignore_fingerprint_mismatch
        self._task_class = look_up(problem_type, TASKS, "problem_type")
        self._given_task = None if label_names is None else self._task_class.from_names(label_names)
        self._given_tokenizer = tokenizer
        self._loaded: _Loaded | None = None
        self._train_sampler: SmartBatchSampler | None = None
        self._restored: dict[str, Any] | None = None
        self.batch_size = self.spec.batch_size  # which refuses arguments that are out of range

    # --- what a subclass may want to do differently ---

    def load_dataset(self) -> DatasetDict:
        """The splits, as `datasets` knows them. Override for data of other kinds."""
        return read_dataset(self.dataset, self.dataset_config, label_column=self.label_column)

    def tokenize(self, dataset: Dataset) -> Any:
        """Token ids of one split.

        Returns:
            For each sample a list of ids, or a mapping with `input_ids` and perhaps `token_type_ids`; or a
            `TokenTable`, as from the cache in which this method keeps them.
        """
        return tokenize_to_cache(
            dataset,
            self.tokenizer,
            text_columns=self.text_columns,
            max_length=self.max_length,
            cache_dir=Path(self.cache_dir) if self.cache_dir else cache_dir(),
        )

    def configure_sampler(self, lengths: ArrayLike, *, shuffle: bool) -> SmartBatchSampler:
        """The batch sampler of a loader, for samples of these lengths."""
        return SmartBatchSampler(
            lengths,
            self.spec,
            shuffle=shuffle,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
        )

    def configure_collator(self) -> Collator:
        """What turns rows of `TokenDataset` into a batch."""
        return COLLATORS[self.padding](self.tokenizer, self.spec)

    # --- what the data turns out to be ---

    @property
    def spec(self) -> BatchSpec:
        """What a batch may hold, by the settings as they are now."""
        return BatchSpec(
            batching=self.batching,
            batch_size=self.batch_size,
            max_tokens_per_batch=self.max_tokens_per_batch,
            padding=self.padding,
            pad_to_multiple_of=self.pad_to_multiple_of,
            max_length=self.max_length,
            jitter=self.jitter,
            seed=self.seed,
        )

    @property
    def is_demo(self) -> bool:
        """The data are the embedded demo's."""
        return self.dataset == "demo" and not self._loads_by_itself

    @property
    def splits(self) -> DatasetDict:
        """All splits of the data set."""
        return self._load().splits

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer: the given one, else the model's."""
        return self._load().tokenizer

    @property
    def task(self) -> Task | None:
        """Labels and what is learnt of them: those of the data, else of a trained model; None where nothing tells."""
        return self._load().task

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes in the order of their numbers; None where nothing tells."""
        return None if self.task is None else self.task.label_names

    @property
    def num_labels(self) -> int | None:
        """Number of classes; None where nothing tells."""
        return None if self.task is None else len(self.task.label_names)

    @property
    def used_splits(self) -> list[str]:
        """Names of the splits that a stage may ask for and that have samples."""
        return self._names.used(self.splits)

    @property
    def source(self) -> str:
        """The data set, as messages name it."""
        if self._loads_by_itself:
            return f"{type(self).__name__}.load_dataset()"
        return self.dataset if isinstance(self.dataset, str) else ", ".join(self.dataset.values())

    def text_data(self) -> TextData:
        """What a model needs to know."""
        validation = self._names.validated(self.splits) or [self.train_split]
        return TextData(
            task=self.task,
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            packed=self.spec.packed,
            evaluation_splits={"val": validation, "test": self._names.tested},
        )

    def token_table(self, dataset: Dataset) -> TokenTable:
        """Token ids of one split, as `tokenize` gives them.

        Raises:
            ValueError: There are not as many as samples, or a sample has none.
        """
        tokenized = self.tokenize(dataset)
        table = tokenized if isinstance(tokenized, TokenTable) else TokenTable.from_rows(tokenized)
        if len(table) != len(dataset):
            raise UsageError(
                f"tokenize gave {len(table)} rows for {len(dataset)} samples; give a list of ids for each sample."
            )
        return table

    # --- Lightning's hooks ---

    def prepare_data(self) -> None:
        """Loads and tokenizes every split that a later stage may ask for; on a cluster one process does it."""
        self._loaded = None
        for split in self.used_splits:
            self.token_table(self._split(split))

    def setup(self, stage: str) -> None:
        """Makes the data sets of a stage out of what `prepare_data` left."""
        self._loaded = None
        if stage == "fit":
            self._restored = None
            self.train_data, self.validation_data = self._train_and_validation()
            self.spec.check_lengths(self.train_data.lengths, self.train_data.rows)
            self._train_sampler = None
        elif stage == "validate":
            self.validation_data = self._train_and_validation()[1]
        elif stage == "test":
            self.test_data = [self._labelled(split) for split in self._names.tested]
        elif stage == "predict":
            self.predict_data = TokenDataset(self.token_table(self._split(self._names.predicted(self.splits))))

    def train_dataloader(self) -> SmartBatchLoader:
        """Batches in a new plan every epoch; the same ones under `overfit_batches`."""
        overfit = self.trainer is not None and bool(self.trainer.overfit_batches)  # type: ignore[attr-defined]
        sampler = self.configure_sampler(self.train_data.lengths, shuffle=not overfit)
        if self._restored is not None:
            sampler.load_state_dict(self._restored)
        self._train_sampler = sampler
        if self.trainer is None:
            return self._loader(self.train_data, sampler)
        return self._loader(self.train_data, sampler, on_epoch=self._on_epoch, loss_weights=self._loss_weights)

    def val_dataloader(self) -> SmartBatchLoader | list[SmartBatchLoader]:
        """Batches in order of length; a list of loaders where there are several validation sets, or none."""
        return self._evaluation_loaders(self.validation_data)

    def test_dataloader(self) -> SmartBatchLoader | list[SmartBatchLoader]:
        """Batches in order of length; a list of loaders where there are several test sets."""
        return self._evaluation_loaders(self.test_data)

    def predict_dataloader(self) -> SmartBatchLoader:
        """Batches in order of length; each sample's `index` is its row."""
        return self._evaluation_loader(self.predict_data)

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, and what its plan is made from."""
        if self.trainer is None or self._train_sampler is None:
            return {}
        return {
            "fingerprint": dataset_fingerprint(self.train_data, self._train_sampler.spec),
            **training_progress(self.trainer, self._train_sampler),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, on any number of ranks.

        Raises:
            ValueError: The checkpoint is of other data, another seed or another batching.
        """
        if not state or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if not self.ignore_fingerprint_mismatch:
            spec = self.configure_sampler(self.train_data.lengths, shuffle=True).spec
            check_fingerprint(state["fingerprint"], dataset_fingerprint(self.train_data, spec))
        self._restored = state

    # --- the rest ---

    def _load(self) -> _Loaded:
        if self._loaded is None:
            splits, model = self.load_dataset(), text_model_of(self.trainer)
            tokenizer = find_tokenizer(self._given_tokenizer, model, self.source, self.is_demo, self.max_length)
            task = find_task(
                self._task_class,
                self._given_task,
                splits,
                self.train_split,
                self.label_column,
                None if model is None else model.trained_config,
                training=self.trainer is None or self.trainer.state.fn not in _EVALUATIONS,
            )
            self._loaded = _Loaded(splits, tokenizer, task)
        return self._loaded

    @property
    def _loads_by_itself(self) -> bool:
        return type(self).load_dataset is not SmartBatchDataModule.load_dataset

    @property
    def _names(self) -> SplitNames:
        return SplitNames(self.train_split, self.validation_split, self.test_split, self.predict_split)

    def _on_epoch(self, sampler: SmartBatchSampler) -> None:
        assert self.trainer is not None
        sync_loop_progress(self.trainer, sampler, resumed=self._restored is not None)

    def _loss_weights(self, sampler: SmartBatchSampler) -> Iterator[float]:
        assert self.trainer is not None
        return sampler.loss_weights(self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches))

    def _evaluation_loaders(self, sets: list[TokenDataset]) -> SmartBatchLoader | list[SmartBatchLoader]:
        loaders = [self._evaluation_loader(data) for data in sets]
        return loaders[0] if len(loaders) == 1 else loaders

    def _evaluation_loader(self, data: TokenDataset) -> SmartBatchLoader:
        self.spec.check_lengths(data.lengths, data.rows)
        return self._loader(data, self.configure_sampler(data.lengths, shuffle=False))

    def _loader(self, data: TokenDataset, sampler: SmartBatchSampler, **options: Any) -> SmartBatchLoader:
        defaults = {
            "collate_fn": self.configure_collator(),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.pin_memory,
        }
        return SmartBatchLoader(data, batch_sampler=sampler, **options, **{**defaults, **self.loader_kwargs})

    def _train_and_validation(self) -> tuple[TokenDataset, list[TokenDataset]]:
        train = self._labelled(self.train_split)
        share = self._names.validation_share(self.splits)
        if not share:
            return train, [self._labelled(split) for split in self._names.validated(self.splits)]
        assert self.task is not None
        assert train.labels is not None
        parts = train_and_validation_rows(self.task, train.labels, share, self.seed)
        train, validation = (TokenDataset(train.table, train.labels, rows) for rows in parts)
        return train, [validation]

    def _labelled(self, split: str) -> TokenDataset:
        dataset = self._split(split)
        if self.task is None and self.train_split in self.splits:
            self._task_class.from_dataset(self._split(self.train_split), self.label_column, self.train_split)
        if self.task is None:
            raise UsageError(
                f"the label classes are unknown: {self.source} has no training split {self.train_split!r} with labels, "
                "and the model is of no checkpoint. Give --ckpt_path, or --data.label_names, in the order of their "
                "numbers."
            )
        labels = self.task.encode(dataset, self.label_column, split)
        return TokenDataset(self.token_table(dataset), labels)

    def _split(self, split: str) -> Dataset:
        return find_split(self.splits, split, self.text_columns, self.source, self._names.argument(split))
