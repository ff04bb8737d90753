"""SmartBatchDataModule: a data set by name or file -> batches of similar length for the Lightning Trainer."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch.trainer.states import TrainerFn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from smartbatch_lightning import demo
from smartbatch_lightning.batching.plan import Batching
from smartbatch_lightning.data.collators import PackCollator, PadCollator, Padding
from smartbatch_lightning.data.labels import Classes, label_values, stratified_split
from smartbatch_lightning.data.loader import SmartBatchLoader
from smartbatch_lightning.data.resume import align_progress, position, recipe
from smartbatch_lightning.data.sampler import SmartBatchSampler
from smartbatch_lightning.data.sources import read_dataset
from smartbatch_lightning.data.tokens import TokenDataset, TokenTable, tokenize_to_cache
from smartbatch_lightning.errors import UsageError, cause, listed
from smartbatch_lightning.storage import cache_dir

_PARTS = {"data": "data (texts, labels, tokenizer, max_length or split)"}  # of a recipe, as a message names them


class SmartBatchDataModule(L.LightningDataModule):
    """Tokenizes text once and batches samples of similar length, planned anew every epoch.

    Subclass it for other data: `load_dataset`, `tokenize` and `make_collator` are each a method of its own.

    Args:
        dataset: `demo`; a name on the Hugging Face Hub; a CSV, JSON lines or Parquet file; a folder of such files or
            one written by `save_to_disk`; or files by split, as in `{train: a.csv, test: b.csv}`.
        tokenizer: Name or folder of a pretrained fast tokenizer; by default the one of the model that the Trainer
            runs, a `SequenceClassifier`.
        dataset_config: Configuration of a data set on the Hub that has several, such as `sst2` of `nyu-mll/glue`.
        text_columns: Column of text, or two columns for pairs of sentences.
        label_column: Column of labels: a `ClassLabel`, whole numbers, strings or booleans.
        label_names: Names of the classes in the order of their numbers; by default those of the `ClassLabel`, or what
            the training split holds, sorted.
        train_split: Split to train on.
        validation_split: Split to validate on, or the share of the training split to set aside for it, drawn from
            `seed` with the same share of every label; None for no validation.
        test_split: Split to test on.
        predict_split: Split to predict, which needs no labels; by default `test_split`, or the only split there is.
        max_length: Longest sample, in tokens with special tokens; longer text is cut.
        batch_size: Samples in a batch at most, on one rank; by default 16, or as many as the token budget allows.
        max_tokens_per_batch: Token budget: samples times the tokens of the longest, after rounding up, at most; the sum
            of their tokens where batches are packed. `smart` batches then hold few long samples or many short ones.
        batching: How batches are chosen. `smart`: runs of the samples sorted by length, in random order; `tutorial`:
            Chris McCormick's algorithm; `random`: an ordinary shuffle.
        padding: `longest` pads a batch to its longest sample, `max_length` to `max_length`; `packed` pads nothing and
            puts the samples one after another, for models of the ALBERT, BERT, CamemBERT, DistilBERT, ELECTRA,
            ModernBERT, RoBERTa and XLM-RoBERTa families.
        jitter: Tokens by which lengths are randomly moved before sorting (`smart` only): more mixes better, pads more.
        pad_to_multiple_of: Rounds the width of a batch up, never beyond `max_length`; 8 suits tensor cores.
        seed: Of plans and the split; by default that of `seed_everything`, else 0.
        num_workers: Processes that load batches. A batch takes a tenth of a millisecond, so 0 is rarely the bottleneck.
        pin_memory: Page-locked batches for faster copies to a GPU; by default where there is one.
        cache_dir: Where token files are kept; by default `$SMARTBATCH_CACHE` or the user's cache.
        resume_regardless: Resume a checkpoint of other data, seed or batching at the same step of the new plan, where
            some samples of the epoch may be trained twice or not at all.

    Raises:
        ValueError: An argument or the data is not usable; the message says what was met and what to do.
    """

    def __init__(
        self,
        dataset: str | dict[str, str] = "demo",
        tokenizer: str | None = None,
        *,
        dataset_config: str | None = None,
        text_columns: str | list[str] = "text",
        label_column: str = "label",
        label_names: list[str] | None = None,
        train_split: str = "train",
        validation_split: float | str | None = 0.1,
        test_split: str = "test",
        predict_split: str | None = None,
        max_length: int = 400,
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        batching: Batching = "smart",
        padding: Padding = "longest",
        jitter: float = 1.0,
        pad_to_multiple_of: int = 1,
        seed: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        cache_dir: str | None = None,
        resume_regardless: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(tokenizer, str | None):
            raise UsageError(
                f"tokenizer is a {type(tokenizer).__name__}; give its name or folder, such as tokenizer.name_or_path."
            )
        self.save_hyperparameters()
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; set --data.batch_size to 1 or more.")
        if max_length < 3:
            raise UsageError(
                f"max_length is {max_length}, but two tokens are special ones; set --data.max_length to 3 or more."
            )
        if isinstance(text_columns, list) and len(text_columns) not in (1, 2):
            raise UsageError(f"text_columns is {text_columns}; give one column, or two for pairs of sentences.")
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.tokenizer_name = tokenizer
        self.text_columns = [text_columns] if isinstance(text_columns, str) else text_columns
        self.label_column = label_column
        self.train_split = train_split
        self.validation_split = validation_split
        self.test_split = test_split
        self.predict_split = predict_split
        self.max_length = max_length
        self.batch_size = 16 if batch_size is None and max_tokens_per_batch is None else batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.batching = batching
        self.padding = padding
        self.jitter = jitter
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.num_workers = num_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.cache_dir = cache_dir
        self.resume_regardless = resume_regardless
        self._label_names = label_names
        self._restored: dict[str, Any] | None = None

    # --- what a subclass may want to do differently ---

    def load_dataset(self) -> DatasetDict:
        """The splits, as `datasets` knows them. Override for data of other kinds."""
        return read_dataset(self.dataset, self.dataset_config, label_column=self.label_column)

    def tokenize(self, dataset: Dataset) -> TokenTable:
        """Token ids of one split, out of the cache where they have been made before."""
        return tokenize_to_cache(
            dataset,
            self.tokenizer,
            text_columns=self.text_columns,
            max_length=self.max_length,
            cache_dir=Path(self.cache_dir) if self.cache_dir else cache_dir(),
        )

    def make_collator(self) -> Callable[[Sequence[dict[str, Any]]], Any]:
        """What turns rows of `TokenDataset` into a batch."""
        if self.padding == "packed":
            return PackCollator()
        return PadCollator(
            self.tokenizer.pad_token_id or 0,
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    # --- what the data turns out to be ---

    @property
    def is_demo(self) -> bool:
        """The data are the embedded demo's."""
        return self.dataset == "demo" and not self._loads_by_itself

    @cached_property
    def splits(self) -> DatasetDict:
        """All splits of the data set."""
        return self.load_dataset()

    @property
    def used_splits(self) -> list[str]:
        """Names of the splits that a stage may ask for and that have samples."""
        named = {self.train_split, self.validation_split, self.test_split, self._split_to_predict}
        return [split for split in self.splits if split in named and len(self.splits[split])]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded: the one that is named, else the model's."""
        name = self.tokenizer_name or getattr(self._model, "pretrained", "demo")
        if name == "demo":
            if not self.is_demo:
                raise UsageError(
                    f"the demo's model and tokenizer know few words but the demo's. For {self.source} set "
                    "--model.pretrained, or tokenizer= in Python, for example to bert-base-uncased."
                )
            name = str(demo.model_dir())
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{name!r} is neither a folder here nor to be had from the Hub, so it has no tokenizer: {cause(error)} "
                "Give the path of a folder written by save_pretrained, or a name on the Hub and a network."
            ) from error
        if self.max_length > tokenizer.model_max_length:
            raise UsageError(
                f"max_length is {self.max_length}, but {name} takes {tokenizer.model_max_length} tokens at most. "
                f"Set --data.max_length to {tokenizer.model_max_length} or less."
            )
        return tokenizer

    @cached_property
    def classes(self) -> Classes | None:
        """The classes: those of the data, else of a model from a checkpoint; None where nothing tells."""
        if self._label_names is not None:
            return Classes(self._label_names)
        if self.train_split not in self.splits or self.label_column not in self.splits[self.train_split].column_names:
            known = getattr(self._model, "label_names", None)
            return Classes(known) if known else None
        return Classes.of(self._split(self.train_split), self.label_column, self.train_split)

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes in the order of their numbers; None where nothing tells."""
        return None if self.classes is None else self.classes.names

    @property
    def num_labels(self) -> int | None:
        """Number of classes; None where nothing tells."""
        return None if self.classes is None else len(self.classes.names)

    def plan_options(self, batching: Batching, padding: Padding) -> dict[str, Any]:
        """What `plan_epoch` and `SmartBatchSampler` take for such batches in the sizes and the seed of this module."""
        return {
            "batch_size": self.batch_size,
            "batching": batching,
            "max_tokens_per_batch": self.max_tokens_per_batch,
            "pad_to_multiple_of": self.max_length if padding == "max_length" else self.pad_to_multiple_of,
            "packed": padding == "packed",
            "jitter": self.jitter,
            "seed": self.seed,
        }

    # --- Lightning's hooks ---

    def prepare_data(self) -> None:
        """Loads and tokenizes every split that a later stage may ask for; on a cluster one process does it."""
        for split in self.used_splits:
            self.tokenize(self._split(split))

    def setup(self, stage: str) -> None:
        """Makes the data sets of a stage out of what `prepare_data` left."""
        if stage == "fit":
            self._restored = None
            self.train_data, self.validation_data = self._train_and_validation()
            overfit = getattr(self.trainer, "overfit_batches", 0)
            self._train_sampler = self._sampler(self.train_data, shuffle=not overfit)
        elif stage == "validate":
            self.validation_data = self._train_and_validation()[1]
        elif stage == "test":
            self.test_data = self._token_dataset(self.test_split)
        elif stage == "predict":
            self.predict_data = self._token_dataset(self._split_to_predict, with_labels=False)

    def train_dataloader(self) -> SmartBatchLoader:
        """Batches planned anew every epoch; the same ones under `overfit_batches`."""
        if self.trainer is None:
            return self._loader(self.train_data, self._train_sampler)
        return self._loader(
            self.train_data, self._train_sampler, on_epoch=self._on_epoch, loss_weights=self._loss_weights
        )

    def val_dataloader(self) -> SmartBatchLoader | list[SmartBatchLoader]:
        """Batches in order of length; nothing where there is no validation."""
        return [] if self.validation_data is None else self._evaluation_loader(self.validation_data)

    def test_dataloader(self) -> SmartBatchLoader:
        """Batches in order of length."""
        return self._evaluation_loader(self.test_data)

    def predict_dataloader(self) -> SmartBatchLoader:
        """Batches in order of length; each sample's `index` is its row."""
        return self._evaluation_loader(self.predict_data)

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, and what its plan is made from."""
        if self.trainer is None or not hasattr(self, "train_data"):
            return {}
        return {
            "recipe": recipe(self.train_data, self._train_sampler),
            **position(self.trainer, self._train_sampler),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, on any number of ranks.

        Raises:
            ValueError: The checkpoint is of other data, another seed or another batching.
        """
        if not state or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        now = recipe(self.train_data, self._train_sampler)
        differing = [
            f"{_PARTS.get(name, name)} was {state['recipe'].get(name)}, now {now[name]}"
            for name in now
            if state["recipe"].get(name) != now[name]
        ]
        if differing and not self.resume_regardless:
            raise UsageError(
                f"the checkpoint cannot be resumed exactly: {'; '.join(differing)}. Set these as they were; or set "
                "--data.resume_regardless=true to go on at the same step of the new plan; or start anew from its "
                "weights with SequenceClassifier.load_from_checkpoint."
            )
        self._restored = state
        self._train_sampler.resume(state["epoch"], [(ranks, steps) for ranks, steps in state["trained"]])

    # --- the rest ---

    @property
    def _model(self) -> L.LightningModule | None:
        return None if self.trainer is None else self.trainer.lightning_module

    @property
    def source(self) -> str:
        """The data set, as messages name it."""
        if self._loads_by_itself:
            return f"{type(self).__name__}.load_dataset()"
        return self.dataset if isinstance(self.dataset, str) else ", ".join(self.dataset.values())

    @property
    def _loads_by_itself(self) -> bool:
        return type(self).load_dataset is not SmartBatchDataModule.load_dataset

    @property
    def _split_to_predict(self) -> str:
        if self.predict_split is None and self.test_split not in self.splits and len(self.splits) == 1:
            return str(next(iter(self.splits)))
        return self.predict_split or self.test_split

    def _on_epoch(self, sampler: SmartBatchSampler) -> None:
        assert self.trainer is not None
        align_progress(self.trainer, sampler, resumed=self._restored is not None)

    def _loss_weights(self, sampler: SmartBatchSampler) -> Iterator[float]:
        assert self.trainer is not None
        return sampler.loss_weights(self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches))

    def _sampler(self, data: TokenDataset, *, shuffle: bool) -> SmartBatchSampler:
        self._check_budget(data)
        return SmartBatchSampler(
            data.lengths,
            **self.plan_options(self.batching, self.padding),
            shuffle=shuffle,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
        )

    def _check_budget(self, data: TokenDataset) -> None:
        longest = int(data.lengths.argmax())
        width = self.max_length if self.padding == "max_length" else int(data.lengths[longest])
        if self.max_tokens_per_batch is not None and width > self.max_tokens_per_batch:
            raise UsageError(
                f"row {data.rows[longest]} takes {width} tokens, but max_tokens_per_batch is "
                f"{self.max_tokens_per_batch}. Set --data.max_tokens_per_batch to {width} or more, or "
                "--data.max_length to less."
            )

    def _evaluation_loader(self, data: TokenDataset) -> SmartBatchLoader:
        return self._loader(data, self._sampler(data, shuffle=False))

    def _loader(self, data: TokenDataset, sampler: SmartBatchSampler, **options: Any) -> SmartBatchLoader:
        return SmartBatchLoader(
            data,
            batch_sampler=sampler,
            **options,
            collate_fn=self.make_collator(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
        )

    def _train_and_validation(self) -> tuple[TokenDataset, TokenDataset | None]:
        train = self._token_dataset(self.train_split)
        if isinstance(self.validation_split, str):
            return train, self._token_dataset(self.validation_split)
        if self.validation_split is None:
            return train, None
        assert train.labels is not None
        parts = stratified_split(train.labels, self.validation_split, self.seed)
        train, validation = (TokenDataset(train.table, train.labels, rows) for rows in parts)
        return train, validation

    def _token_dataset(self, split: str, *, with_labels: bool = True) -> TokenDataset:
        dataset = self._split(split)
        labels = None
        if with_labels:
            values = label_values(dataset, self.label_column, split)
            if self.classes is None:
                raise UsageError(
                    f"nothing tells which classes there are: {self.source} has no training split "
                    f"{self.train_split!r} with labels, and the model is of no checkpoint. Give --ckpt_path, or "
                    "--data.label_names, in the order of their numbers."
                )
            labels = self.classes.numbers(values, split)
        return TokenDataset(self.tokenize(dataset), labels)

    def _role(self, split: str) -> str:
        """The argument that names a split."""
        roles = ("train_split", "validation_split", "test_split")
        return next((role for role in roles if getattr(self, role) == split), "predict_split")

    def _split(self, split: str) -> Dataset:
        """A split that has samples and the text columns."""
        if split not in self.splits:
            raise UsageError(
                f"the split {split!r} is not in {self.source}, which has {listed(self.splits)}. "
                f"Set --data.{self._role(split)} to one of these."
            )
        dataset = self.splits[split]
        if not len(dataset):
            raise UsageError(f"the split {split!r} of {self.source} has no samples. Give data with at least one.")
        for column in self.text_columns:
            if column not in dataset.column_names:
                raise UsageError(
                    f"the text column {column!r} is not in the split {split!r} of {self.source}, which has "
                    f"{listed(dataset.column_names)}. Set --data.text_columns."
                )
        return dataset
