"""SmartBatchDataModule: batches of similar-length samples for the Lightning Trainer."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from smartbatch_lightning import progress
from smartbatch_lightning.batching import BatchSpec
from smartbatch_lightning.batching.strategies import find_strategy
from smartbatch_lightning.checkpointing import drop_unsavable
from smartbatch_lightning.contract import TextData, callbacks_of, check_takes_packed_batches, text_model_of
from smartbatch_lightning.data.collators import COLLATORS, Collator
from smartbatch_lightning.data.loader import SmartBatchLoader, check_loader_kwargs, unpatch_loaders
from smartbatch_lightning.data.resume import (
    check_data_parallel,
    check_fingerprint,
    check_ranks_agree,
    dataset_fingerprint,
    has_trained,
    resume_from_lightning_counters,
    resume_training,
    training_state,
)
from smartbatch_lightning.data.sampler import SmartBatchSampler
from smartbatch_lightning.data.texts import TextDataModule, encoding_of
from smartbatch_lightning.data.tokenizers import check_tokenizer
from smartbatch_lightning.data.tokens import TokenDataset
from smartbatch_lightning.errors import UsageError, check_at_least
from smartbatch_lightning.seeds import seed_is_given

WIDTH_STEP_ON_GPU = 32  # cuDNN takes about 0.1 s to set up attention for a new shape; this adds 5 % padding on IMDB
_PREDICTION_WINDOW = 2**15  # few enough to keep and to repeat after a kill, enough to fill batches by length


class SmartBatchDataModule(TextDataModule):
    """Tokenizes text once and batches samples of similar length, in a new plan every epoch.

    To customize it, override `load_dataset`, `tokenize`, `configure_sampler` or `configure_collator`. Attributes such
    as `batch_size` can be changed until a loader is created.

    Args:
        dataset: `demo`; a name on the Hugging Face Hub; a CSV, TSV, JSON lines or Parquet file, optionally compressed,
            or its URL; a list of these, or a pattern such as `train-*.parquet`; a folder of such files or one written
            by `save_to_disk`; or files by split, `{train: a.csv, test: [b.csv, c.csv]}`. In Python also a `Dataset`,
            `DatasetDict`, pandas or polars DataFrame, Arrow table, list of dicts, or a dict of these by split.
        tokenizer: A tokenizer, or its name or folder; by default the model's.
        batch_size: Maximum number of samples in a batch, per rank; by default 16, or as many as the token budget
            allows. See `BatchSpec` for details of the arguments from here to `seed`.
        max_tokens_per_batch: Token budget of a batch, per rank, padding included: batches then hold few long samples or
            many short ones.
        batching: Batching strategy: `smart`, `tutorial`, `random`, or your own by name or import path.
        padding: How a batch becomes tensors: `longest`, `max_length`, or `packed` (no padding), for models that use
            transformers' `AttentionInterface` (most encoders and decoders) and for DeBERTa.
        jitter: Random noise, in tokens, that `smart` adds to lengths before sorting, to mix batches; `auto` chooses it.
        pad_to_multiple_of: Pads the width of a batch, or the length of a packed row, to a multiple of this; set to the
            token budget, it gives all packed rows one shape, for CUDA graphs. By default 1, or 32 for padded batches on
            a CUDA GPU, which has to set up attention for every new width.
        seed: Seed of the plans and the validation split; by default that of `seed_everything`, else torch's. Saved in
            checkpoints.
        num_workers: Data loader worker processes. Making a batch takes 0.1 ms, so 0 workers are usually enough; with
            `tokenization: lazy` it takes some milliseconds, so use 1 or more.
        pin_memory: Use pinned memory for faster copies to a GPU; by default if there is one.
        loader_kwargs: Extra arguments for `DataLoader`, such as `prefetch_factor`.
        ignore_fingerprint_mismatch: Resume from a checkpoint made with different data, seed or batching, at the same
            step of the new plan; some samples of the epoch may be trained twice or not at all.
        text_options: Other arguments of `TextDataModule`: `reader_kwargs`, columns, labels, splits, `max_length`,
            `truncation`, `cache_dir`.

    Raises:
        ValueError: An argument or the data is not usable; the message says what is wrong and what to do.
    """

    def __init__(
        self,
        dataset: str | list[str] | dict[str, str | list[str]] | Any = "demo",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        batching: str = "smart",
        padding: str = "longest",
        jitter: float | Literal["auto"] = "auto",
        pad_to_multiple_of: int | None = None,
        seed: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        loader_kwargs: dict[str, Any] | None = None,
        ignore_fingerprint_mismatch: bool = False,
        **text_options: Any,
    ) -> None:
        check_at_least(0, num_workers=num_workers)
        super().__init__(dataset, tokenizer, seed=seed, **text_options)
        self.batch_size = batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.batching = batching
        self.padding = padding
        self.jitter = jitter
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_workers = num_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.loader_kwargs = check_loader_kwargs(loader_kwargs or {}, num_workers)
        self.ignore_fingerprint_mismatch = ignore_fingerprint_mismatch
        self._train_sampler: SmartBatchSampler | None = None
        self._restored: dict[str, Any] | None = None
        find_strategy(batching)
        self.batch_size = self.spec.batch_size  # these two lines also validate the settings
        if "batch_size" in self.hparams:
            self.hparams["batch_size"] = self.batch_size  # where Lightning's BatchSizeFinder looks for it

    # --- methods to override ---

    def configure_sampler(self, lengths: ArrayLike, *, shuffle: bool) -> SmartBatchSampler:
        """Returns the batch sampler of a loader, for samples of these lengths."""
        return SmartBatchSampler(
            lengths,
            self.spec,
            shuffle=shuffle,
            num_replicas=self.trainer.world_size if self.trainer else None,
            rank=self.trainer.global_rank if self.trainer else None,
        )

    def configure_collator(self) -> Collator:
        """Returns the collator, which turns rows of `TokenDataset` into a batch."""
        return COLLATORS[self.padding](self.tokenizer, self.spec)

    # --- Lightning's hooks, and the contract with the model ---

    @property
    def spec(self) -> BatchSpec:
        """The `BatchSpec` for the current settings.

        Raises:
            ValueError: A setting is out of range, or a token budget is set with lazy tokenization.
        """
        if self.max_tokens_per_batch and self.tokenization == "lazy":
            raise UsageError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}, but with tokenization 'lazy' token counts are "
                "not known when batches are planned. Set --data.batch_size instead, or --data.tokenization=ahead."
            )
        truncation = self.truncation if self._loaded is None else self.truncation_in_use
        return BatchSpec(
            batching=self.batching,
            batch_size=self.batch_size,
            max_tokens_per_batch=self.max_tokens_per_batch,
            padding=self.padding,
            pad_to_multiple_of=self._width_step if self.pad_to_multiple_of is None else self.pad_to_multiple_of,
            max_length=self.max_length,
            window_pooling=None if truncation is None else truncation.pooling,
            jitter=self.jitter,
            seed=self.seed,
        )

    def text_data(self) -> TextData:
        """What a model needs to know about the data."""
        validation = [self.train_split] if self.validates_share else self._names.validated(self.splits)
        train_data = vars(self).get("train_data")  # created by `setup` if needed
        return TextData(
            task=self.task,
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            evaluation_splits={"val": validation, "test": self._names.tested},
            train_labels=lambda: None if train_data is None else train_data.sample_labels,
            spec=self.spec,
            encoding=self.text_encoder.settings,
        )

    def prepare_data(self) -> None:
        """Rejects unsupported Trainer settings, then prepares the data like `TextDataModule`.

        Raises:
            ValueError: A flag is out of range, a batch size finder is used with a token budget, or data is not usable.
        """
        if self.trainer is not None:
            check_data_parallel(self.trainer)
            if self.trainer.state.fn == TrainerFn.FITTING:
                progress.check_flags(self.trainer)
            if self.max_tokens_per_batch and callbacks_of(self.trainer, BatchSizeFinder):
                raise UsageError(
                    f"a batch size finder was given, but batches are limited by max_tokens_per_batch, "
                    f"{self.max_tokens_per_batch}. Use one of the two."
                )
        super().prepare_data()

    def setup(self, stage: str) -> None:
        """Creates the data sets of a stage.

        Raises:
            ValueError: A sample does not fit into a batch, or data or settings differ between ranks.
        """
        super().setup(stage)
        if stage == "fit":
            drop_unsavable(self, self.hparams)
            self._train_sampler = self._restored = None
            self.spec.check_lengths(self.train_data.lengths, self.train_data.rows)
        check_ranks_agree(self.data_sets(stage), self.label_names, self.spec)
        model = self._load().model
        before = None if model is None or self.trainer is None or self.trainer.ckpt_path else model.trained_on
        if stage == "validate" and before is not None:
            self._set_aside_same_samples(before)

    def train_dataloader(self) -> SmartBatchLoader:
        """Batches in a new plan every epoch; with `overfit_batches`, always the same ones."""
        sampler = self._configure_train_sampler()
        if self._restored is not None:
            sampler.load_state_dict(self._restored)
        self._train_sampler = sampler
        on_epoch = None if self.trainer is None else self._on_epoch
        return self._loader(self.train_data, sampler, on_epoch=on_epoch, loss_weights=self._loss_weights)

    def val_dataloader(self) -> SmartBatchLoader | list[SmartBatchLoader]:
        """Batches in order of length; a list of loaders if there are several validation sets or none."""
        return self._evaluation_loaders(self.validation_data)

    def test_dataloader(self) -> SmartBatchLoader | list[SmartBatchLoader]:
        """Batches in order of length; a list of loaders if there are several test sets."""
        return self._evaluation_loaders(self.test_data)

    def predict_dataloader(self) -> SmartBatchLoader:
        """Batches in order of length within windows of consecutive rows; each sample's `index` is its row."""
        loader = self._evaluation_loader(self.predict_data)
        loader.plan_sampler.window = _PREDICTION_WINDOW
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The training progress, and the fingerprint of data and batching."""
        if self.trainer is None or self._train_sampler is None:
            return {}
        return {
            "fingerprint": dataset_fingerprint(self.train_data, self._train_sampler.spec),
            "encoding": self.text_encoder.settings,
            **training_state(self.trainer, self._train_sampler),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint, on any number of ranks, with its seed if none is given.

        Raises:
            ValueError: The checkpoint was made with different data, seed, truncation or batching.
        """
        if not state or self.trainer is None:
            return
        stage, trained_on, now = self.trainer.state.fn, state["encoding"], self.text_encoder.settings
        check_tokenizer(self.tokenizer, trained_on)
        for name, given in {"max_length": self._max_length, "truncation": self.truncation}.items():
            if given is None and trained_on[name] != now[name]:
                raise UsageError(
                    f"the checkpoint was trained with {name} {trained_on[name]}, but now it is {now[name]}. Set the "
                    "same on the data module, or load the model with SequenceClassifier.load_from_checkpoint, which "
                    "restores it."
                )
        if not encoding_of(self._load().model):  # else `setup` has done so
            self._log_changed_truncation(trained_on)
        if stage == TrainerFn.VALIDATING:
            self._set_aside_same_samples(state["fingerprint"])
        if stage != TrainerFn.FITTING:
            return
        self._adopt_seed(state["fingerprint"]["seed"], "fit")
        sampler = self._configure_train_sampler()
        if has_trained(state) and not self.ignore_fingerprint_mismatch:
            check_fingerprint(state["fingerprint"], dataset_fingerprint(self.train_data, sampler.spec))
        resume_training(self.trainer, sampler, state)
        self._restored = state

    def on_exception(self, exception: BaseException) -> None:
        """Undoes what Lightning leaves behind if an exception was raised while loaders were created."""
        unpatch_loaders()

    # --- the rest ---

    def _configure_train_sampler(self) -> SmartBatchSampler:
        overfit = self.trainer is not None and bool(self.trainer.overfit_batches)  # type: ignore[attr-defined]
        return self.configure_sampler(self.train_data.lengths, shuffle=not overfit)

    @property
    def _width_step(self) -> int:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return WIDTH_STEP_ON_GPU if on_gpu and self.padding == "longest" else 1

    def _adopt_seed(self, seed: int, stage: str) -> None:
        """Uses a checkpoint's seed if none is given."""
        if seed != self.seed and self._given_seed is None and not seed_is_given():
            self._seed = seed
            self.setup(stage)  # since the seed decides which samples are set aside

    def _set_aside_same_samples(self, fingerprint: dict[str, Any]) -> None:
        """Sets aside the same samples as in a checkpoint's training, or refuses: others may have been trained on."""
        if not self.validates_share or self.ignore_fingerprint_mismatch:
            return
        self._adopt_seed(fingerprint["seed"], "validate")
        if dataset_fingerprint(self.train_data, self.spec)["data"] != fingerprint["data"]:
            raise UsageError(
                f"the validation samples set aside from the training split of {self.source} are not those set aside "
                "for this checkpoint, which may have been trained on them. Use the checkpoint's config, data, "
                f"max_length and seed, {fingerprint['seed']}; or name a split with --data.validation_split; or use "
                "test."
            )

    def _on_epoch(self, sampler: SmartBatchSampler) -> None:
        assert self.trainer is not None
        if self._restored is None and progress.resumes_mid_epoch(self.trainer):
            resume_from_lightning_counters(self.trainer, sampler)
        progress.begin_epoch(self.trainer)
        resumes = self._restored is not None and self._restored["epoch"] == sampler.epoch
        if resumes and text_model_of(self.trainer) is None:
            progress.sync_schedules(self.trainer)

    def _loss_weights(self, sampler: SmartBatchSampler) -> Iterator[float]:
        if self.trainer is None:  # the user's own loop
            return sampler.loss_weights()
        progress.count_logged_steps(self.trainer)
        model, weights = text_model_of(self.trainer), None
        if model is not None:
            weights = model.sample_weights(torch.from_numpy(self.train_data.sample_labels))
        return sampler.loss_weights(
            self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches), weights
        )

    def _evaluation_loaders(self, sets: list[TokenDataset]) -> SmartBatchLoader | list[SmartBatchLoader]:
        loaders = [self._evaluation_loader(data) for data in sets]
        return loaders[0] if len(loaders) == 1 else loaders

    def _evaluation_loader(self, data: TokenDataset) -> SmartBatchLoader:
        self.spec.check_lengths(data.lengths, data.rows)
        return self._loader(data, self.configure_sampler(data.lengths, shuffle=False))

    def _loader(self, data: TokenDataset, sampler: SmartBatchSampler, **options: Any) -> SmartBatchLoader:
        module = None if self.trainer is None else self.trainer.lightning_module
        if self.spec.packed and module is not None and text_model_of(self.trainer) is None:
            check_takes_packed_batches(module)
        check_loader_kwargs(self.loader_kwargs, self.num_workers)
        defaults = {
            "collate_fn": self.configure_collator(),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.pin_memory,
        }
        return SmartBatchLoader(data, batch_sampler=sampler, **options, **{**defaults, **self.loader_kwargs})
