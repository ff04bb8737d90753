"""What padding costs, before a run: the data looked at, and every way to batch them weighed against fixed padding."""

import json
import textwrap
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, BertConfig

from smartbatch_lightning.batching.plan import Batching, BatchPlan, mates_kept, plan_epoch
from smartbatch_lightning.console import say, table_of
from smartbatch_lightning.data.collators import PadCollator, Padding
from smartbatch_lightning.data.datamodule import SmartBatchDataModule
from smartbatch_lightning.data.labels import label_values
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.models.flops import training_flops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS: tuple[tuple[Batching, Padding], ...] = (
    ("random", "max_length"),
    ("random", "longest"),
    ("tutorial", "longest"),
    ("smart", "longest"),
    ("random", "packed"),
    ("tutorial", "packed"),
    ("smart", "packed"),
)
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
        batching: How batches are chosen.
        padding: How they become tensors.
        batches: Batches.
        tokens: Tokens that are computed, with padding.
        padding_ratio: Padding over real tokens.
        less_than_fixed: Share of the tokens that fixed padding takes and this does not.
        mates_kept: Share of a sample's batch-mates that it meets again in the next epoch.
        expected_speedup: Operations of fixed padding over those of this, linear layers and attention counted; an
            estimate, since not every operation takes equally long.
        balance: Operations of the slowest rank over the mean, summed over the steps on several ranks; None where
            a token budget does not let so many ranks take equally many steps.
        largest_batch: Samples and width of the batch with the most tokens; for packed batches samples and tokens.
        chosen: This is what the data module is set to.
    """

    batching: str
    padding: str
    batches: int
    tokens: int
    padding_ratio: float
    less_than_fixed: float
    mates_kept: float
    expected_speedup: float
    balance: float | None
    largest_batch: tuple[int, int]
    chosen: bool


@dataclass
class PaddingReport:
    """Samples, classes and lengths of a data set, and what each way to batch it costs.

    In a notebook: `report = PaddingReport.of(data)`, then `report.show()` and `report.figures()`.

    Attributes:
        splits: The splits.
        strategies: Every batching and padding, fixed padding first.
        examples: A few training samples: label and text.
        lengths: Tokens of the training samples, in the order of arrival. Shape (num_samples,).
        widths: Tokens of the longest sample of each batch of an epoch, as they come, by strategy.
        max_length: Of the data module.
        ranks: Ranks for which the balance is.
    """

    splits: list[Split]
    strategies: list[Strategy]
    examples: list[tuple[str, str]]
    lengths: NDArray[np.int64]
    widths: dict[str, NDArray[np.int64]]
    max_length: int
    ranks: int

    @classmethod
    def of(cls, data: SmartBatchDataModule, ranks: int = 8) -> "PaddingReport":
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
        for batching, padding in WAYS:
            with suppress(UsageError):  # a token budget may have no room for the samples of one way or another
                strategy, plan = _weigh(data, batching, padding, ranks, operations)
                strategies.append(strategy)
                if (batching, padding) in (("random", "longest"), ("smart", "longest")):
                    widths[f"{batching}, {padding}"] = plan.longest(lengths)
        labelled = data.splits[data.train_split]
        names, labels = data.label_names, data.train_data.labels
        examples = [
            (
                names[int(labels[row])] if names is not None and labels is not None else "-",
                " / ".join(labelled[int(row)][column] for column in data.text_columns),
            )
            for row in data.train_data.rows[[0, len(lengths) // 2, -1]]
        ]
        return cls(_splits(data), strategies, examples, lengths, widths, data.max_length, ranks)

    def show(self) -> None:
        """Prints a few samples and the tables."""
        for label, text in self.examples:
            lines = textwrap.wrap(text, 78)
            more = ["..."] if len(lines) > _LINES_OF_A_TEXT else []
            say("\n".join([f"[{label}]", *(f"  {line}" for line in lines[:_LINES_OF_A_TEXT] + more), ""]))
        say(
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
        say("")
        say(
            table_of(
                [
                    {
                        "batching, padding": f"{one.batching}, {one.padding}" + (" *" if one.chosen else ""),
                        "batches": f"{one.batches:,}",
                        "tokens": f"{one.tokens:,}",
                        "padding over real": f"{one.padding_ratio:.2%}",
                        "less than fixed": f"{one.less_than_fixed:.1%}",
                        "mates kept": f"{one.mates_kept:.1%}",
                        "expected speed-up": f"{one.expected_speedup:.2f}",
                        f"balance {self.ranks} ranks": "-" if one.balance is None else f"{one.balance:.3f}",
                        "largest batch": "{:,} x {:,}".format(*one.largest_batch)
                        if one.padding != "packed"
                        else "{:,}: {:,}".format(*one.largest_batch),
                    }
                    for one in self.strategies
                ]
            )
        )
        say(
            f"An epoch of the {len(self.lengths):,} samples that are trained. * as configured.\n"
            "Mates kept: share of a sample's batch-mates that it meets again in the next epoch.\n"
            "Expected speed-up: an estimate from the operations of linear layers and attention, over fixed padding.\n"
            "Balance: slowest rank over the mean. Largest batch: samples x width; samples: tokens where packed."
        )

    def to_dict(self) -> dict[str, Any]:
        """Splits, strategies and settings, as JSON can hold them."""
        return {
            "max_length": self.max_length,
            "ranks": self.ranks,
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


def _weigh(
    data: SmartBatchDataModule, batching: Batching, padding: Padding, ranks: int, operations: tuple[float, float]
) -> tuple[Strategy, BatchPlan]:
    """Plans two epochs, and one for several ranks, and counts what they cost."""
    lengths = data.train_data.lengths
    per_token, per_square = operations
    options = data.plan_options(batching, padding)

    def tokens_and_squares(plan: BatchPlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if padding == "packed":
            inside = lengths[plan.order]
            return (
                np.add.reduceat(inside, plan.offsets[:-1]),
                np.add.reduceat(inside**2, plan.offsets[:-1]),
            )
        collator = PadCollator(padding=padding, max_length=data.max_length, pad_to_multiple_of=data.pad_to_multiple_of)
        widths = np.array([collator.width(int(longest)) for longest in plan.longest(lengths)])
        return plan.batch_sizes() * widths, plan.batch_sizes() * widths**2

    plan = plan_epoch(lengths, **options)
    tokens, squares = tokens_and_squares(plan)
    balance = None
    with suppress(UsageError):
        tokens_of_ranks, squares_of_ranks = tokens_and_squares(plan_epoch(lengths, num_replicas=ranks, **options))
        costs = (per_token * tokens_of_ranks + per_square * squares_of_ranks).reshape(-1, ranks)
        balance = float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())
    largest = int(tokens.argmax())
    samples = int(plan.batch_sizes()[largest])
    computed = int(tokens.sum())
    fixed = len(lengths) * data.max_length
    fixed_operations = fixed * (per_token + per_square * data.max_length)
    strategy = Strategy(
        batching=batching,
        padding=padding,
        batches=len(plan),
        tokens=computed,
        padding_ratio=computed / int(lengths.sum()) - 1,
        less_than_fixed=1 - computed / fixed,
        mates_kept=mates_kept(plan, plan_epoch(lengths, epoch=1, **options)),
        expected_speedup=fixed_operations / float(per_token * computed + per_square * squares.sum()),
        balance=balance,
        largest_batch=(samples, int(tokens[largest]) // (1 if padding == "packed" else samples)),
        chosen=(data.batching, data.padding) == (batching, padding),
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
        table = data.tokenize(data.splits[name])
        dataset, names = data.splits[name], data.label_names or []
        labels = None
        if data.classes is not None and data.label_column in dataset.column_names:
            with suppress(UsageError):  # many a test split has labels that are none
                labels = data.classes.numbers(label_values(dataset, data.label_column, name), name)
        splits.append(
            Split(
                name=name,
                samples=len(table),
                classes={}
                if labels is None
                else dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True)),
                tokens=int(table.lengths.sum()),
                mean_length=float(table.lengths.mean()),
                truncated=table.num_truncated / len(table),
            )
        )
    return splits
