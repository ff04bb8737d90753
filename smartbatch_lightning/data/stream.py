"""A stream of rows -> batches, planned within a buffer of rows."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from lightning.pytorch.trainer.states import TrainerFn

from smartbatch_lightning import progress
from smartbatch_lightning.batching import plan_epoch
from smartbatch_lightning.data.datamodule import SmartBatchDataModule
from smartbatch_lightning.data.lazy import LazyTokenTable
from smartbatch_lightning.data.resume import check_fingerprint, dataset_fingerprint
from smartbatch_lightning.data.tokens import TokenDataset
from smartbatch_lightning.errors import UsageError, check_at_least, join_quoted
from smartbatch_lightning.tasks import Regression


class StreamDataModule(SmartBatchDataModule):
    """Trains on an `IterableDataset`, as from `load_dataset(..., streaming=True)`, for the Trainer's `max_steps`.

    Rows are read into a buffer, which is planned like an epoch; then comes the next buffer. After the last row, the
    stream starts over with its next epoch. By default a rank tokenizes only its own batches, planned by estimated
    lengths. With `tokenization="ahead"` every rank tokenizes whole buffers, so that lengths are exact and
    `max_tokens_per_batch` can be used.

    Every rank reads all rows and trains on its share, so ranks take the same number of steps, and no row is used twice
    before all have been used once. On the same number of ranks, a run resumes exactly, from the stream's own state,
    except that rows in the shuffle buffer of `IterableDataset.shuffle` are lost.

    Only the first buffer is known in advance: it determines class weights and the mean and deviation of targets, while
    classes must be given by `label_names` or a `ClassLabel`. There are no epochs, samples are batched only within their
    buffer, and no validation samples can be set aside: pass `Dataset`s for the other splits.

    Args:
        dataset: An `IterableDataset` to train on; or a mapping from splits to data, whose `train_split` is one.
        tokenizer: A tokenizer, or its name or folder; by default the model's.
        buffer_size: Rows in a buffer. Larger buffers mean less padding but more reading on resume.
        options: Other arguments of `SmartBatchDataModule`.

    Raises:
        ValueError: An argument or the data is not usable; the message says what is wrong and what to do.
    """

    def __init__(self, dataset: Any, tokenizer: Any = None, *, buffer_size: int = 2**14, **options: Any) -> None:
        check_at_least(1, buffer_size=buffer_size)
        super().__init__(dataset, tokenizer, **{"tokenization": "lazy", **options})
        self.buffer_size = buffer_size
        splits = dict(dataset) if isinstance(dataset, Mapping) else {self.train_split: dataset}
        stream = splits.pop(self.train_split, None)
        if not isinstance(stream, IterableDataset):
            raise UsageError(
                f"StreamDataModule needs an IterableDataset, but the split {self.train_split!r} is "
                f"{type(stream).__name__}. Use SmartBatchDataModule for other data."
            )
        self._stream = stream
        self._others = {name: data for name, data in splits.items() if not isinstance(data, IterableDataset)}
        if self.validation_split == "auto":
            self.validation_split = self._names.validated(self._others) or None  # never a share
        if self._names.validation_share(self._others):
            raise UsageError(
                f"validation_split is {self.validation_split}, but no fraction of a stream can be set aside. Add a "
                "Dataset as another split, and give its name."
            )
        self._first: Dataset | None = None
        self._batches: _Batches | None = None

    def load_dataset(self) -> dict[str, Any]:
        """The first buffer as the training split, and the other splits."""
        if self._first is None:
            self._first = self._buffer(islice(self._stream, self.buffer_size))
        return {self.train_split: self._first, **self._others}

    def tokenize(self, dataset: Dataset) -> Any:
        """Tokenizes a buffer or another split, without the cache."""
        table = LazyTokenTable(dataset, self.text_encoder)
        return table if self.tokenization == "lazy" else table.tokenized()

    def setup(self, stage: str) -> None:
        """Creates the data sets of a stage; for the stream, from its first buffer.

        Raises:
            ValueError: The classes of rows beyond the first buffer are unknown, or as for `SmartBatchDataModule`.
        """
        super().setup(stage)
        labels = self._load().train_labels
        known = self._task_options.label_names or labels is None or labels.class_names or len(labels.names) > 1
        if stage == "fit" and not known and not isinstance(self.task, Regression):
            raise UsageError(
                f"label_names is not set, and rows after the first {self.buffer_size:,} of the stream may have other "
                f"labels than {join_quoted(self.label_names or ())}. Set label_names to all classes."
            )

    def train_dataloader(self) -> "_Batches":  # type: ignore[override]
        """The batches of all steps.

        Raises:
            ValueError: The Trainer has no `max_steps`.
        """
        self._batches = _Batches(self, self._num_batches, self._restored)
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """The progress of training and of the stream."""
        if self.trainer is None or self._batches is None:
            return {}
        at = progress.position(self.trainer)
        batches = self._num_batches if at.batches is None else at.batches
        return {
            "fingerprint": self._fingerprint,
            "batches": batches,
            "validation_due": at.validation_due,
            **self._batches.mark(batches),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint, on the same number of ranks.

        Raises:
            ValueError: The checkpoint is from another stream, other settings or another number of ranks.
        """
        if not state or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._adopt_seed(state["fingerprint"]["seed"], "fit")
        if not self.ignore_fingerprint_mismatch:
            check_fingerprint(state["fingerprint"], self._fingerprint)
        self._restored = state
        at = progress.Position(0, min(state["batches"], self._num_batches), state["validation_due"])
        progress.rewrite_checkpoint(self.trainer, at, self._num_batches)

    @property
    def _num_batches(self) -> int:
        assert self.trainer is not None
        if self.trainer.max_steps == -1:
            raise UsageError("a stream has no epochs, so training would never end. Set --trainer.max_steps.")
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    @property
    def _fingerprint(self) -> dict[str, Any]:
        ranks = 1 if self.trainer is None else self.trainer.world_size
        return {
            **dataset_fingerprint(self.train_data, self.spec),
            "buffer_size": self.buffer_size,
            "number of ranks": ranks,
        }

    def _buffer(self, rows: Iterator[dict[str, Any]]) -> Dataset:
        return Dataset.from_list(list(rows), features=self._stream.features)

    def samples(self, rows: Iterator[dict[str, Any]]) -> TokenDataset:
        """Tokenized samples with labels for some rows.

        Raises:
            ValueError: A text or a label is missing, or a label is not one of the classes.
        """
        dataset = self._buffer(rows)
        assert self.task is not None
        labels = self.task.encode(self.label_source.read(dataset, self.train_split))
        return TokenDataset(self.token_table(dataset), labels)


class _Batches:
    """One rank's batches of all steps, as a loader for Lightning."""

    def __init__(self, data: StreamDataModule, length: int, restored: dict[str, Any] | None) -> None:
        self._data = data
        self._length = length
        self._start = restored or {"batches": 0, "first": 0, "buffer": 0, "stream": None}
        self._marks: list[dict[str, Any]] = []  # for each buffer, its number, first batch and stream state

    def __len__(self) -> int:
        return self._length

    def mark(self, batches: int) -> dict[str, Any]:
        """Start of the buffer in use after a number of batches, which must not decrease from call to call."""
        while len(self._marks) > 1 and self._marks[1]["first"] <= batches:
            self._marks.pop(0)
        return self._marks[0] if self._marks else {name: self._start[name] for name in ("first", "buffer", "stream")}

    def state_dict(self) -> dict[str, Any]:
        """Empty, since the data module stores the state; without this method, Lightning would warn."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing."""

    def __iter__(self) -> Iterator[Any]:
        data, trainer = self._data, self._data.trainer
        assert trainer is not None
        stream, collate = deepcopy(data._stream), data.configure_collator()
        first, buffer = self._start["first"], self._start["buffer"]
        if self._start["stream"] is not None:
            stream.set_epoch(self._start["stream"]["epoch"])
            stream.load_state_dict(self._start["stream"])
        self._marks = []
        rows = _endless(stream)
        while first < self._length:
            self._marks.append({"first": first, "buffer": buffer, "stream": deepcopy(stream.state_dict())})
            try:
                samples = data.samples(islice(rows, data.buffer_size))
            except (ValueError, TypeError) as error:  # pyarrow's, or our own
                raise UsageError(f"after {buffer * data.buffer_size:,} rows of the stream: {error}") from error
            plan = plan_epoch(samples.lengths, data.spec, epoch=buffer, num_replicas=trainer.world_size)
            for step, batch in enumerate(plan.rank_batches(trainer.global_rank), first):
                if self._start["batches"] <= step < self._length:
                    yield collate(samples.__getitems__(batch.tolist()))
            first += len(plan) // trainer.world_size
            buffer += 1


def _endless(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows of a stream, epoch after epoch."""
    rows, before = 1, 1
    while rows or before:  # an epoch resumed at its end has none
        rows, before = 0, rows
        for row in stream:
            rows += 1
            yield row
        stream.set_epoch(stream.epoch + 1)
    raise UsageError("the stream has no rows. Give one with rows.")
