"""What padding costs, before a run: the data looked at, and every way to batch them weighed against fixed padding."""

import json
import textwrap
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, BertConfig

from smartbatch_lightning.batching import STRATEGIES, BatchPlan, BatchSpec, batch_overlap, plan_epoch
from smartbatch_lightning.batching.jitter import JitterPoint, measure_jitter
from smartbatch_lightning.batching.planner import with_jitter
from smartbatch_lightning.batching.spec import PADDING_WIDTHS
from smartbatch_lightning.console import echo, table_of
from smartbatch_lightning.data.datamodule import SmartBatchDataModule
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.models.flops import training_flops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES_OF_A_TEXT = 5
_WIDTH_OF_CLASSES = 60


@dataclass(frozen=True)
class Split:
    """A split of the data.

    Attributes:
        name: Its name.
        samples: Samples in it.
        classes: Samples of each class; none where there are no labels.
        tokens: Their tokens, after truncation.
        mean_length: Tokens of a sample.
        truncated: Share of the samples that were cut at `max_length`.
    """

    name: str
    samples: int
    classes: dict[str, int]
    tokens: int
    mean_length: float
    truncated: float


@dataclass(frozen=True)
class Strategy:
    """A way to batch the training data, over an epoch.

    Attributes:
        batching: How batches are is_configured.
        padding: How they become tensors.
        batches: Batches.
        tokens: Tokens that are computed, with padding.
        padding_ratio: Padding over real tokens.
        savings_vs_fixed: Share of the tokens that fixed padding takes and this does not.
        batch_overlap: Share of a sample's batch-mates that it meets again in the next epoch.
        expected_speedup: Operations of fixed padding over those of this, linear layers and attention counted; an
            estimate, since not every operation takes equally long.
        balance: Operations of the slowest rank over the mean, summed over the steps on several ranks; None where
            a token budget does not let so many ranks take equally many steps.
        largest_batch: Samples and width of the batch with the most tokens; for packed batches samples and tokens.
        packed: Samples are packed instead of padded.
        is_configured: This is what the data module is set to.
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


@dataclass
class PaddingReport:
    """Samples, classes and lengths of a data set, and what each way to batch it costs.

    In a notebook: `report = PaddingReport.from_datamodule(data)`, then `report.show()` and `report.figures()`.

    Attributes:
        splits: The splits.
        strategies: Every batching and padding, fixed padding first.
        examples: A few training samples: label and text.
        lengths: Tokens of the training samples, in the order of arrival. Shape (num_samples,).
        widths: Tokens of the longest sample of each batch of an epoch, as they come, by strategy.
        max_length: Of the data module.
        ranks: Ranks for which the balance is.
        jitter: That `smart` batches of this data have.
        frontier: Padding and batch overlap of `smart` batches by jitter.
    """

    splits: list[Split]
    strategies: list[Strategy]
    examples: list[tuple[str, str]]
    lengths: NDArray[np.int64]
    widths: dict[str, NDArray[np.int64]]
    max_length: int
    ranks: int
    jitter: float
    frontier: list[JitterPoint]

    @classmethod
    def from_datamodule(cls, data: SmartBatchDataModule, ranks: int = 8) -> "PaddingReport":
        """Looks at a data module's data, tokenizing them where that has not been done.

        Args:
            data: Any `SmartBatchDataModule`; its own batch size, token budget and so on are used.
            ranks: Ranks for which to tell how evenly they are loaded.

        Raises:
            ValueError: The data cannot be used; the message says what to do.
        """
        data.prepare_data()
        data.setup("fit")
        lengths = data.train_data.lengths
        ranks = min(ranks, len(lengths))
        operations = _operations(data)
        strategies, widths = [], {}
        for batching, padding in combinations(data.spec):
            with suppress(UsageError):  # a token budget may have no room for the samples of one way or another
                strategy, plan = _evaluate_strategy(data, batching, padding, ranks, operations)
                strategies.append(strategy)
                if (batching, padding) in (("random", "longest"), ("smart", "longest")):
                    widths[f"{batching}, {padding}"] = plan.longest(lengths)
        labelled = data.splits[data.train_split]
        rows = data.train_data.rows[[0, len(lengths) // 2, -1]]
        assert data.task is not None
        assert data.train_data.labels is not None
        labels = data.task.decode(data.train_data.labels[rows]).to_pylist()
        examples = [
            (str(label), " / ".join(labelled[int(row)][column] for column in data.text_columns))
            for label, row in zip(labels, rows, strict=True)
        ]
        spec = with_jitter(replace(data.spec, batching="smart"), lengths)
        jitters = sorted({0.0, 1.0, 2.0, 4.0, 8.0, float(spec.jitter)})
        frontier = [measure_jitter(lengths, spec, jitter) for jitter in jitters]
        return cls(
            _splits(data), strategies, examples, lengths, widths, data.max_length, ranks, float(spec.jitter), frontier
        )

    def show(self) -> None:
        """Prints a few samples and the tables."""
        for label, text in self.examples:
            lines = textwrap.wrap(text, 78)
            more = ["..."] if len(lines) > _LINES_OF_A_TEXT else []
            echo("\n".join([f"[{label}]", *(f"  {line}" for line in lines[:_LINES_OF_A_TEXT] + more), ""]))
        echo(
            table_of(
                [
                    {
                        "split": split.name,
                        "samples": f"{split.samples:,}",
                        "real tokens": f"{split.tokens:,}",
                        "tokens a sample": f"{split.mean_length:,.0f}",
                        f"cut at {self.max_length}": f"{split.truncated:.1%}",
                        "classes": _shortened(split.classes),
                    }
                    for split in self.splits
                ]
            )
        )
        echo("")
        echo(
            table_of(
                [
                    {
                        "batching, padding": f"{one.batching}, {one.padding}" + (" *" if one.is_configured else ""),
                        "batches": f"{one.batches:,}",
                        "tokens": f"{one.tokens:,}",
                        "padding over real": f"{one.padding_ratio:.2%}",
                        "less than fixed": f"{one.savings_vs_fixed:.1%}",
                        "batch overlap": f"{one.batch_overlap:.1%}",
                        "expected speed-up": f"{one.expected_speedup:.2f}",
                        f"balance {self.ranks} ranks": "-" if one.balance is None else f"{one.balance:.3f}",
                        "largest batch": "{:,} x {:,}".format(*one.largest_batch)
                        if not one.packed
                        else "{:,}: {:,}".format(*one.largest_batch),
                    }
                    for one in self.strategies
                ]
            )
        )
        echo(
            f"An epoch of the {len(self.lengths):,} samples that are trained. * as configured.\n"
            "Batch overlap: share of a sample's batch-mates that it meets again in the next epoch.\n"
            "Expected speed-up: an estimate from the operations of linear layers and attention, over fixed padding.\n"
            "Balance: slowest rank over the mean. Largest batch: samples x width; samples: tokens where packed."
        )

        echo("")
        echo(
            table_of(
                [
                    {
                        "smart, jitter": f"{point.jitter:g}" + (" *" if point.jitter == self.jitter else ""),
                        "padding over real": f"{point.padding_ratio:.2%}",
                        "batch overlap": f"{point.batch_overlap:.1%}",
                    }
                    for point in self.frontier
                ]
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Splits, strategies and settings, as JSON can hold them."""
        return {
            "max_length": self.max_length,
            "ranks": self.ranks,
            "jitter": self.jitter,
            "frontier": [asdict(point) for point in self.frontier],
            "splits": [asdict(split) for split in self.splits],
            "strategies": [asdict(strategy) for strategy in self.strategies],
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `report.json` and a PNG for each figure; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "report.json"]
        paths[0].write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        for name, figure in self.figures().items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
        return paths

    def figures(self) -> "dict[str, Figure]":
        """Figures of classes, lengths, tokens and widths."""
        from smartbatch_lightning.report import figures

        computed = {f"{one.batching}, {one.padding}": one.tokens for one in self.strategies}
        return {
            "classes": figures.classes({split.name: split.classes for split in self.splits}),
            "lengths": figures.lengths(self.lengths, self.max_length),
            "tokens": figures.tokens(computed, int(self.lengths.sum())),
            "widths": figures.widths(self.widths, self.max_length),
        }


def _evaluate_strategy(
    data: SmartBatchDataModule, batching: str, padding: str, ranks: int, operations: tuple[float, float]
) -> tuple[Strategy, BatchPlan]:
    """Plans two epochs, and one for several ranks, and counts what they cost."""
    lengths = data.train_data.lengths
    per_token, per_pair = operations
    spec = with_jitter(replace(data.spec, batching=batching, padding=padding), lengths)
    plan = plan_epoch(lengths, spec)
    tokens, pairs = (of(lengths[plan.order], plan.offsets) for of in (spec.tokens, spec.token_pairs))
    balance = None
    with suppress(UsageError):
        shared = plan_epoch(lengths, spec, num_replicas=ranks)
        tokens_of_ranks, pairs_of_ranks = (
            of(lengths[shared.order], shared.offsets) for of in (spec.tokens, spec.token_pairs)
        )
        costs = (per_token * tokens_of_ranks + per_pair * pairs_of_ranks).reshape(-1, ranks)
        balance = float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())
    largest = int(tokens.argmax())
    samples = int(plan.batch_sizes()[largest])
    computed = int(tokens.sum())
    fixed = len(lengths) * data.max_length
    fixed_operations = fixed * (per_token + per_pair * data.max_length)
    strategy = Strategy(
        batching=batching,
        padding=padding,
        batches=len(plan),
        tokens=computed,
        padding_ratio=computed / int(lengths.sum()) - 1,
        savings_vs_fixed=1 - computed / fixed,
        batch_overlap=batch_overlap(plan, plan_epoch(lengths, spec, epoch=1)),
        expected_speedup=fixed_operations / float(per_token * computed + per_pair * pairs.sum()),
        balance=balance,
        largest_batch=(samples, int(tokens[largest]) // (1 if spec.packed else samples)),
        packed=spec.packed,
        is_configured=(data.batching, data.padding) == (batching, padding),
    )
    return strategy, plan


def _shortened(classes: dict[str, int]) -> str:
    """The classes that fit into a cell."""
    shown: list[str] = []
    for name, count in classes.items():
        one = f"{name if len(name) <= 30 else name[:27] + '...'} {count:,}"
        if len(", ".join([*shown, one])) > _WIDTH_OF_CLASSES:
            return ", ".join([*shown, f"{len(classes) - len(shown)} more"])
        shown.append(one)
    return ", ".join(shown) or "-"


def _operations(data: SmartBatchDataModule) -> tuple[float, float]:
    """Operations by token and by squared token, of the model that the tokenizer is of, else of BERT-base."""
    try:
        return training_flops(AutoConfig.from_pretrained(data.tokenizer.name_or_path))
    except Exception:  # it is only an estimate, and there are many kinds of models
        return training_flops(BertConfig())


def _splits(data: SmartBatchDataModule) -> list[Split]:
    """The splits that runs would use."""
    splits = []
    for name in data.used_splits:
        dataset = data.splits[name]
        table = data.token_table(dataset)
        counts: dict[str, int] = {}
        if data.task is not None and data.label_column in dataset.column_names:
            with suppress(UsageError):  # many a test split has labels that are none
                counts = data.task.label_counts(data.task.encode(dataset, data.label_column, name))
        splits.append(
            Split(
                name=name,
                samples=len(table),
                classes=counts,
                tokens=int(table.lengths.sum()),
                mean_length=float(table.lengths.mean()),
                truncated=table.num_truncated / len(table),
            )
        )
    return splits


def combinations(spec: BatchSpec) -> list[tuple[str, str]]:
    """Every batching and padding; fixed padding, for which batching makes no difference, first and once."""
    fixed = ("random", "max_length")
    batchings = list(dict.fromkeys([*STRATEGIES, spec.batching]))
    return [
        fixed,
        *((batching, padding) for padding in PADDING_WIDTHS if padding != fixed[1] for batching in batchings),
    ]
