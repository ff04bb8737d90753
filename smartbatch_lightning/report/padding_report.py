"""PaddingReport: the cost of padding before a run, for every batching strategy compared with fixed padding."""

import json
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from smartbatch_lightning.batching.jitter import JitterPoint, measure_jitter
from smartbatch_lightning.batching.planner import with_jitter
from smartbatch_lightning.console import echo
from smartbatch_lightning.data.datamodule import SmartBatchDataModule
from smartbatch_lightning.data.tokens import TokenDataset
from smartbatch_lightning.errors import UsageError, check_at_least
from smartbatch_lightning.plots import as_png
from smartbatch_lightning.report import figures, tables
from smartbatch_lightning.report.measure import (
    Split,
    StrategyCost,
    combinations,
    measure_splits,
    measure_strategy,
    training_operations,
)
from smartbatch_lightning.storage import write_into


@dataclass
class PaddingReport:
    """Samples, classes and lengths of a data set, and the padding cost of each batching strategy.

    In a notebook: `report = PaddingReport.from_datamodule(data)`, then `report.show()` and `report.figures()`.

    Attributes:
        splits: The splits.
        strategies: Each combination of batching and padding, fixed padding first.
        examples: A few training samples: label and text.
        lengths: Tokens of the training samples, in the order of the data. Shape (num_samples,).
        widths: Tokens of the longest sample of each batch of an epoch, in order, by strategy.
        max_length: The data module's.
        ranks: Number of ranks for which the balance is computed.
        jitter: The jitter of `smart` batches for this data.
        frontier: Padding and batch overlap of `smart` batches by jitter.
        tokenized_ahead: If tokenization is lazy, the padding ratio of the configured batching with `tokenization:
            ahead`; else None.
    """

    splits: list[Split]
    strategies: list[StrategyCost]
    examples: list[tuple[str, str]]
    lengths: NDArray[np.integer]
    widths: dict[str, NDArray[np.int64]]
    max_length: int
    ranks: int
    jitter: float
    frontier: list[JitterPoint]
    tokenized_ahead: float | None = None

    @classmethod
    def from_datamodule(cls, data: SmartBatchDataModule, ranks: int = 8) -> "PaddingReport":
        """Computes the report for a data module, first tokenizing its data if needed, even if training does so lazily.

        Args:
            data: Any `SmartBatchDataModule`; its own batch size, token budget and so on are used.
            ranks: Number of ranks for which to compute the balance.

        Raises:
            ValueError: The data cannot be used; the message says what to do.
        """
        check_at_least(1, ranks=ranks)
        data.prepare_data()
        data.setup("fit")
        planned = data.train_data.lengths
        if is_lazy := data.tokenization == "lazy":
            data = copy(data)
            data.tokenization = "ahead"
            table = data.token_table(data.splits[data.train_split])
            data.train_data = TokenDataset(table, data.train_data.labels, data.train_data.rows)
        lengths = data.train_data.lengths
        ranks = min(ranks, len(lengths))
        operations = training_operations(data)
        strategies, widths = [], {}
        for spec in combinations(data.spec):
            with suppress(UsageError):  # a token budget may be too small for some strategies
                strategy, plan = measure_strategy(data, spec, ranks, operations, planned)
                strategies.append(strategy)
                if strategy.name in ("random, longest", "smart, longest"):
                    widths[strategy.name] = plan.longest(lengths)
        ahead = measure_strategy(data, data.spec, ranks, operations, lengths)[0].padding_ratio if is_lazy else None
        spec = with_jitter(replace(data.spec, batching="smart"), planned)
        jitters = sorted({0.0, 1.0, 2.0, 4.0, 8.0, float(spec.jitter)})
        frontier = [measure_jitter(planned, spec, jitter, lengths) for jitter in jitters]
        return cls(
            measure_splits(data),
            strategies,
            _examples(data),
            lengths,
            widths,
            data.max_length,
            ranks,
            float(spec.jitter),
            frontier,
            ahead,
        )

    def show(self) -> None:
        """Prints a few samples and the tables."""
        for label, text in self.examples:
            echo(tables.example(label, text))
        echo(tables.splits(self.splits, self.max_length))
        echo("")
        echo(tables.strategies(self.strategies, self.ranks))
        echo(f"An epoch of the {len(self.lengths):,} samples to train on. {tables.STRATEGIES_LEGEND}")
        if self.tokenized_ahead is not None:
            echo(
                "Texts are tokenized lazily, so batches are planned by estimated lengths. With tokenization ahead, "
                f"the padding of * would be {self.tokenized_ahead:.2%}."
            )
        echo("")
        echo(tables.frontier(self.frontier, self.jitter))

    def to_dict(self) -> dict[str, Any]:
        """Splits, strategies and settings, ready for JSON."""
        return {
            "max_length": self.max_length,
            "ranks": self.ranks,
            "jitter": self.jitter,
            "tokenized_ahead": self.tokenized_ahead,
            "frontier": [asdict(point) for point in self.frontier],
            "splits": [asdict(split) for split in self.splits],
            "strategies": [asdict(strategy) for strategy in self.strategies],
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `report.json` and a PNG for each figure; returns their paths."""

        def write(tmp_folder: Path) -> None:
            tmp_folder.mkdir(parents=True)
            (tmp_folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")
            for name, figure in self.figures().items():
                as_png(figure, tmp_folder / f"{name}.png")

        return write_into(Path(folder), write, ["widths.png"])

    def figures(self) -> dict[str, Figure]:
        """Figures of classes, lengths, tokens and widths."""
        computed = {one.name: one.tokens for one in self.strategies}
        drawn = {
            "classes": figures.classes({split.name: split.classes for split in self.splits}),
            "lengths": figures.lengths(self.lengths, self.max_length),
            "tokens": figures.tokens(computed, int(self.lengths.sum())),
        }
        if self.widths:  # none if the token budget is too small for padded batches
            drawn["widths"] = figures.widths(self.widths, self.max_length)
        return drawn


def _examples(data: SmartBatchDataModule) -> list[tuple[str, str]]:
    """Label and text of the first, the middle and the last training sample."""
    split, samples = data.splits[data.train_split], data.train_data
    assert data.task is not None
    assert samples.labels is not None
    rows = samples.rows[[0, len(samples) // 2, -1]]
    labels = data.task.decode(samples.labels[rows]).to_pylist()
    texts = [" / ".join(split[int(row)][column] for column in data.text_columns) for row in rows]
    return list(zip(map(str, labels), texts, strict=True))
