"""Which splits a run uses, and setting samples aside for validation without removing a class from training."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import ArrayLike, NDArray

from smartbatch_lightning.batching.arrays import Int64s, argsort
from smartbatch_lightning.data.encoding import check_texts
from smartbatch_lightning.errors import UsageError, did_you_mean_columns, join_quoted
from smartbatch_lightning.tasks import Task

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_DEFAULT_SHARE = 0.1


@dataclass(frozen=True)
class SplitNames:
    """Names of the splits to train on, validate, test and predict, as arguments of a data module.

    Raises:
        ValueError: An argument is not a fraction or distinct split names, or no test split is named.
    """

    train: str
    validation: float | str | list[str] | None
    test: str | list[str]
    predict: str | None

    def __post_init__(self) -> None:
        share = self.validation
        is_share = isinstance(share, Real) and not isinstance(share, bool) and 0 <= share < 1
        if not (share is None or is_share or _are_names(share)):
            raise UsageError(
                f"validation_split is {share}. Give a fraction between 0 and 1, the name of one or more splits, or "
                "null for no validation."
            )
        if not _are_names(self.test) or not self.test:
            raise UsageError(f"test_split is {self.test!r}; give the name of a split, or several.")

    def validated(self, splits: Collection[str]) -> list[str]:
        """Splits to validate on; empty if a share of the training split is set aside or there is no validation."""
        if self.validation == "auto":
            by_lower = {split.lower(): split for split in splits}
            return next(([by_lower[name]] for name in _VALIDATION_NAMES if name in by_lower), [])
        if isinstance(self.validation, str):
            return [self.validation]
        return list(self.validation) if isinstance(self.validation, Sequence) else []

    def validation_share(self, splits: Collection[str]) -> float:
        """Share of the training split to set aside for validation; 0 for none."""
        if self.validation == "auto":
            return 0.0 if self.validated(splits) else _DEFAULT_SHARE
        return float(self.validation) if isinstance(self.validation, Real) else 0.0

    @property
    def tested(self) -> list[str]:
        """Splits to test on."""
        return [self.test] if isinstance(self.test, str) else self.test

    def predicted(self, splits: Collection[str]) -> str:
        """Split to predict: by default the first one to test on, or the only one there is."""
        if self.predict is None and self.tested[0] not in splits and len(splits) == 1:
            return next(iter(splits))
        return self.predict or self.tested[0]

    def used(self, splits: Mapping[str, Dataset]) -> list[str]:
        """Names of the non-empty splits that some stage may use."""
        named = {self.train, *self.validated(splits), *self.tested, self.predicted(splits)}
        return [split for split in splits if split in named and len(splits[split])]

    def argument(self, split: str) -> str:
        """The data module's argument that names a split."""
        if split == self.train:
            return "train_split"
        if self.validation != "auto" and split in self.validated([]):
            return "validation_split"
        return "test_split" if split in self.tested else "predict_split"


def _are_names(value: Any) -> bool:
    """Whether a value is a split name or several distinct ones."""
    names = [value] if isinstance(value, str) else value
    named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return named and len(set(names)) == len(names)


def find_split(
    splits: Mapping[str, Dataset], split: str, text_columns: list[str], source: str, argument: str
) -> Dataset:
    """Returns a split, if it has samples, and texts in all text columns.

    Args:
        splits: All splits.
        split: Name of the split.
        text_columns: Text columns that it must have.
        source: Name of the data set, for messages.
        argument: Data module argument that names the split, for messages.

    Raises:
        ValueError: There is no such split, it is empty, or a column or a text is missing.
    """
    if split not in splits:
        raise UsageError(
            f"the split {split!r} is not in {source}, which has {join_quoted(splits)}. Set --data.{argument} to one of "
            "these."
        )
    dataset = splits[split]
    if not len(dataset):
        raise UsageError(f"the split {split!r} of {source} has no samples. Give data with at least one.")
    for column in text_columns:
        if column not in dataset.column_names:
            hint = did_you_mean_columns(column, dataset.column_names)
            if not hint and dataset.info.builder_name == "csv":
                names = ", ".join(_names_of_a_row(dataset.column_names))
                hint = (
                    f" If the first line is a row, name its columns with --data.reader_kwargs='{{names: [{names}]}}'."
                )
            raise UsageError(
                f"the text column {column!r} is not in the split {split!r} of {source}, which has "
                f"{join_quoted(dataset.column_names)}. Set --data.text_columns.{hint}"
            )
    check_texts(dataset, text_columns)
    return dataset


def _names_of_a_row(values: Sequence[str]) -> list[str]:
    """A name for each value of a row: `text` for the longest, `label` for the shorter end other than that."""
    names = [f"column_{number}" for number in range(1, len(values) + 1)]
    longest = max(range(len(values)), key=lambda number: len(values[number]))
    names[longest] = "text"
    if len(values) > 1:
        ends = [number for number in (0, len(values) - 1) if number != longest]
        names[min(ends, key=lambda number: len(values[number]))] = "label"
    return names


def train_and_validation_rows(task: Task, labels: NDArray[Any], share: float, seed: int) -> tuple[Int64s, Int64s]:
    """Rows to train and to validate on; logs which labels are too rare to be validated.

    Raises:
        ValueError: As for `stratified_split`.
    """
    strata = task.strata(labels)
    train, validation = stratified_split(strata, share, seed)
    _, first, counts = np.unique(strata, return_index=True, return_counts=True)
    rare = first[counts == 1]
    if len(rare):
        names = join_quoted(task.decode(labels[rare]).to_pylist())
        rank_zero_info(f"Too few samples to set any aside for validation, so all are trained on: {names}.")
    return train, validation


def stratified_split(strata: ArrayLike, share: float, seed: int = 0) -> tuple[Int64s, Int64s]:
    """Splits samples in two at random, with the same share of every stratum in the second part, to within one sample.

    The second part is a systematic sample of the samples sorted by stratum, with the strata in random order. The first
    part keeps a sample of every stratum, so it has those of strata with a single sample.

    Args:
        strata: Stratum of each sample. Shape (num_samples,), integers.
        share: Share of the samples in the second part, between 0 and 1.
        seed: Seed of the split, which depends only on the arguments.

    Returns:
        The samples of the first and of the second part, each in ascending order.

    Raises:
        ValueError: The share is out of range, or leaves one part without a sample.
    """
    classes = np.asarray(strata)
    num_samples = len(classes)
    if not 0 < share < 1 or not 0 < round(num_samples * share) < num_samples:
        raise UsageError(
            f"setting aside {share} of {num_samples} samples leaves one part of the split empty. Give a fraction "
            "between 0 and 1 that leaves samples in both, name a split, or set --data.validation_split=null."
        )
    stratum, sizes = np.unique(classes, return_inverse=True, return_counts=True)[1:]
    pool = np.flatnonzero(sizes[stratum] > 1)
    if not len(pool):
        raise UsageError(
            f"{share} of {num_samples} samples cannot be set aside, since every label has only one sample. Give more "
            "data, or --data.validation_split=null for no validation."
        )
    taken = max(1, round(len(pool) * share))
    bit_generator = np.random.PCG64(np.random.SeedSequence(seed))
    place = np.argsort(argsort(np.zeros(len(sizes), np.int64), bit_generator))
    order = pool[argsort(place[stratum[pool]], bit_generator)]
    second = np.zeros(num_samples, bool)
    second[order] = np.diff(np.arange(len(pool) + 1) * taken // len(pool)) > 0
    last = np.empty(len(sizes), np.int64)
    last[stratum[order]] = order
    emptied = np.bincount(stratum[second], minlength=len(sizes)) == sizes
    second[last[emptied]] = False
    return np.flatnonzero(~second), np.flatnonzero(second)
