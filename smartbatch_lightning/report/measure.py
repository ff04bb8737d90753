"""Numbers of a report: samples and classes of each split, and the cost of each batching strategy."""

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, BertConfig

from smartbatch_lightning.batching import STRATEGIES, BatchPlan, BatchSpec, batch_overlap, plan_epoch
from smartbatch_lightning.batching.planner import with_jitter
from smartbatch_lightning.batching.spec import PADDING_WIDTHS
from smartbatch_lightning.data.datamodule import SmartBatchDataModule
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.hub import hub_or_cache
from smartbatch_lightning.models.flops import training_flops


@dataclass(frozen=True)
class Split:
    """A split of the data.

    Attributes:
        name: Its name.
        samples: Number of samples.
        classes: Number of samples of each class; empty without labels.
        tokens: Number of tokens, after truncation.
        mean_length: Mean number of tokens in a sample.
        truncated: Share of the samples that were cut.
        lost_tokens: Share of the tokens that were cut.
    """

    name: str
    samples: int
    classes: dict[str, int]
    tokens: int
    mean_length: float
    truncated: float
    lost_tokens: float


@dataclass(frozen=True)
class StrategyCost:
    """The cost of a combination of batching and padding, for an epoch.

    Attributes:
        batching: Batching strategy.
        padding: How batches become tensors.
        batches: Number of batches.
        tokens: Number of tokens computed, padding included.
        padding_ratio: Padding over real tokens.
        savings_vs_fixed: Fraction of the tokens of fixed padding that are saved.
        batch_overlap: Fraction of the samples batched with a given sample that are batched with it again in the next
            epoch.
        expected_speedup: Operations with fixed padding over operations with this combination, in linear layers and
            attention; an estimate, since not all operations take equally long.
        balance: Operations of the slowest rank over the mean, summed over the steps on several ranks; None if a token
            budget does not allow equally many steps on all ranks.
        largest_batch: Samples and width of the batch with the most tokens; for packed batches, samples and tokens.
            Windows count as samples.
        packed: Whether samples are packed instead of padded.
        is_configured: Whether the data module is set to this combination.
    """

    batching: str
    padding: str
    batches: int
    tokens: int
    padding_ratio: float
    savings_vs_fixed: float
    batch_overlap: float
    expected_speedup: float
    balance: float | None
    largest_batch: tuple[int, int]
    packed: bool
    is_configured: bool

    @property
    def name(self) -> str:
        """Name in tables: batching and padding."""
        return f"{self.batching}, {self.padding}"


def measure_strategy(
    data: SmartBatchDataModule,
    spec: BatchSpec,
    ranks: int,
    operations: tuple[float, float],
    planned: NDArray[np.integer],
) -> tuple[StrategyCost, BatchPlan]:
    """Plans two epochs, and one for several ranks, and computes their cost.

    Args:
        data: A data module set up for `fit`.
        spec: Batching and padding.
        ranks: Number of ranks for which to compute the balance.
        operations: Operations of training per token and per pair of tokens.
        planned: Lengths to plan by: those of the data, or estimates. Shape (num_samples,).

    Returns:
        The cost, and the first epoch's plan.
    """
    lengths = data.train_data.lengths
    per_token, per_pair = operations
    spec = with_jitter(spec, planned)

    def cost(plan: BatchPlan) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Tokens and operations of each batch."""
        tokens, pairs = (of(lengths[plan.order], plan.offsets) for of in (spec.tokens, spec.token_pairs))
        return tokens, per_token * tokens + per_pair * pairs

    plan = plan_epoch(planned, spec)
    tokens, computed_operations = cost(plan)
    balance = None
    with suppress(UsageError):
        costs = cost(plan_epoch(planned, spec, num_replicas=ranks))[1].reshape(-1, ranks)
        balance = float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())
    largest = int(tokens.argmax())
    rows = spec.windows(lengths[plan.order])
    samples = int(np.add.reduceat(rows, plan.offsets[:-1])[largest])
    computed = int(tokens.sum())
    fixed = int(rows.sum()) * data.max_length
    fixed_operations = fixed * (per_token + per_pair * data.max_length)
    strategy = StrategyCost(
        batching=spec.batching,
        padding=spec.padding,
        batches=len(plan),
        tokens=computed,
        padding_ratio=computed / int(lengths.sum()) - 1,
        savings_vs_fixed=1 - computed / fixed,
        batch_overlap=batch_overlap(plan, plan_epoch(planned, spec, epoch=1)),
        expected_speedup=fixed_operations / float(computed_operations.sum()),
        balance=balance,
        largest_batch=(samples, int(tokens[largest]) // (1 if spec.packed else samples)),
        packed=spec.packed,
        is_configured=(data.batching, data.padding) == (spec.batching, spec.padding),
    )
    return strategy, plan


def training_operations(data: SmartBatchDataModule) -> tuple[float, float]:
    """Operations per token and per squared token, for the tokenizer's model, else for BERT-base."""
    name = data.tokenizer.name_or_path
    try:
        with hub_or_cache(name):
            return training_flops(AutoConfig.from_pretrained(name))[1:]
    except Exception:  # it is only used for an estimate, and there are many kinds of models
        return training_flops(BertConfig())[1:]


def measure_splits(data: SmartBatchDataModule) -> list[Split]:
    """Counts samples, classes and tokens of the splits that runs would use."""
    splits = []
    for name in data.used_splits:
        dataset = data.splits[name]
        table = data.token_table(dataset)
        assert table.lost_tokens is not None, "for a report texts are tokenized ahead"
        tokens, lost_tokens = int(table.lengths.sum()), int(table.lost_tokens.sum())
        counts: dict[str, int] = {}
        if data.task is not None and data.label_source.is_in(dataset):
            with suppress(UsageError):  # many test splits have placeholder labels
                counts = data.task.label_counts(data.task.encode(data.label_source.read(dataset, name)))
        splits.append(
            Split(
                name=name,
                samples=len(table),
                classes=counts,
                tokens=tokens,
                mean_length=float(table.lengths.mean()),
                truncated=np.count_nonzero(table.lost_tokens) / len(table),
                lost_tokens=lost_tokens / (tokens + lost_tokens),
            )
        )
    return splits


def combinations(spec: BatchSpec) -> list[BatchSpec]:
    """All combinations of batching and padding; fixed padding first, and once, since batching does not affect it."""
    fixed = replace(spec, batching="random", padding="max_length")
    batchings = dict.fromkeys([*STRATEGIES, spec.batching])
    paddings = [padding for padding in PADDING_WIDTHS if padding != fixed.padding]
    return [fixed, *(replace(spec, batching=name, padding=padding) for padding in paddings for name in batchings)]
